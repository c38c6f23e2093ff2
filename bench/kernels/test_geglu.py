"""GeGLU at the MLP widths of E2B (6144; 12288 in later layers) and E4B (10240), and at the per-layer gate's 256."""

from __future__ import annotations

import pytest
from kernel_inputs import activation
from kernel_timing import Subject
from transformers.activations import ACT2FN

from fastgemma.kernels.geglu import geglu, geglu_reference

SHAPES = [(rows, width) for width in (6144, 12288, 10240, 256) for rows in (2048, 32768)]
COMPILED = (32768, 6144)


@pytest.mark.shapes(SHAPES, tiny=(7, 96))
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("impl", ["fastgemma", "hf", "compile", "liger"])
def test_geglu(measure, shape, impl, direction):
    rows, width = shape
    activate = ACT2FN["gelu_pytorch_tanh"]

    def liger():
        from liger_kernel.ops import LigerGELUMulFunction

        return LigerGELUMulFunction.apply

    run = measure.choose(
        impl,
        fastgemma=geglu,
        hf=lambda gate, up: activate(gate) * up,
        compiled=shape == COMPILED,
        liger=liger,
    )
    measure(
        Subject(lambda: [activation(rows, width, device=measure.device) for _ in range(2)], run),
        op="geglu",
        impl=impl,
        shape=[rows, width],
        direction=direction,
        reference=geglu_reference,
        num_bytes=(6 if direction == "forward" else 10) * rows * width,
    )
