"""RMSNorm, alone and fused with the residual add, at the hidden sizes of E2B and E4B; weights frozen, as in LoRA."""

from __future__ import annotations

import pytest
import torch
from kernel_inputs import activation
from kernel_timing import Subject
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

from fastgemma.kernels.rms_norm import rms_norm, rms_norm_reference, rms_norm_residual, rms_norm_residual_reference

SHAPES = [(2048, 1536), (32768, 1536), (2048, 2560), (32768, 2560)]
TINY = (7, 48)
COMPILED = (32768, 1536)


def frozen_norm(width: int, device: torch.device) -> Gemma4RMSNorm:
    norm = Gemma4RMSNorm(width).to(device, torch.bfloat16).requires_grad_(False)
    norm.weight.normal_(1.0, 0.2)
    return norm


@pytest.mark.shapes(SHAPES, tiny=TINY)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("impl", ["fastgemma", "hf", "compile", "liger"])
def test_rms_norm(measure, shape, impl, direction):
    rows, width = shape
    norm = frozen_norm(width, measure.device)

    def liger():
        from liger_kernel.transformers.rms_norm import LigerRMSNormForGemma4

        theirs = LigerRMSNormForGemma4(width).to(measure.device, torch.bfloat16).requires_grad_(False)
        theirs.weight.copy_(norm.weight)
        return theirs

    run = measure.choose(
        impl,
        fastgemma=lambda x: rms_norm(x, norm.weight, norm.eps),
        hf=norm,
        compiled=shape == COMPILED,
        liger=liger,
    )
    measure(
        Subject(lambda: [activation(rows, width, device=measure.device)], run),
        op="rms_norm",
        impl=impl,
        shape=[rows, width],
        direction=direction,
        reference=lambda x: rms_norm_reference(x, norm.weight, norm.eps),
        num_bytes=(4 if direction == "forward" else 6) * rows * width,
    )


@pytest.mark.shapes(SHAPES, tiny=TINY)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("impl", ["fastgemma", "hf", "compile"])
def test_rms_norm_residual(measure, shape, impl, direction):
    rows, width = shape
    norm = frozen_norm(width, measure.device)
    run = measure.choose(
        impl,
        fastgemma=lambda x, residual: rms_norm_residual(x, norm.weight, residual, eps=norm.eps),
        hf=lambda x, residual: residual + norm(x),
        compiled=shape == COMPILED,
    )
    measure(
        Subject(lambda: [activation(rows, width, device=measure.device) for _ in range(2)], run),
        op="rms_norm_residual",
        impl=impl,
        shape=[rows, width],
        direction=direction,
        reference=lambda x, residual: rms_norm_residual_reference(x, norm.weight, residual, eps=norm.eps),
        # Backward: the residual's gradient is the upstream one, at no cost.
        num_bytes=6 * rows * width,
    )
