"""What a QLoRA layer computes before its attention, beside transformers and PEFT on bitsandbytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_inputs import BEFORE_ATTENTION, activation, decoder_layer, projection
from kernel_timing import Subject
from transformers.models.gemma4.modeling_gemma4 import apply_rotary_pos_emb

from fastgemma.kernels.pre_attention import pre_attention, pre_attention_reference
from fastgemma.kernels.qk_norm_rope_launch import Heads

SHAPES = [(rows, size) for size in ("e2b", "e4b") for rows in (2048, 32768)]


def arguments(x: torch.Tensor, layer: Any, angles: torch.Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    attention = layer.self_attn
    projections = [projection(layer.get_submodule(name), dtype=dtype) for name in BEFORE_ATTENTION]
    head_dim = attention.head_dim
    weights = [norm.weight for norm in (layer.input_layernorm, attention.q_norm, attention.k_norm)]
    cos, sin = angles.to(dtype).unbind()
    return x, weights[0], projections, cos, sin, *weights[1:], Heads(head_dim, head_dim)


def fused(x: torch.Tensor, layer: Any, angles: torch.Tensor) -> Any:
    return pre_attention(*arguments(x, layer, angles, x.dtype))


def reference(x: torch.Tensor, layer: Any, angles: torch.Tensor) -> Any:
    x = x.float()
    return x, *pre_attention_reference(*arguments(x, layer, angles, torch.float32))


def stock(x: torch.Tensor, layer: Any, angles: torch.Tensor) -> Any:
    attention, normed = layer.self_attn, layer.input_layernorm(x)
    q, k, v = (layer.get_submodule(name)(normed).unflatten(-1, (-1, attention.head_dim)) for name in BEFORE_ATTENTION)
    q = apply_rotary_pos_emb(attention.q_norm(q), *angles.unbind(), unsqueeze_dim=2)
    k = apply_rotary_pos_emb(attention.k_norm(k), *angles.unbind(), unsqueeze_dim=2)
    return x, q, k, attention.v_norm(v)


@pytest.mark.shapes(SHAPES, tiny=(7, "e2b"))
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("impl", ["fastgemma", "hf"])
def test_pre_attention(measure, shape, impl, direction):
    rows, size = shape
    layer = decoder_layer(size, measure.device, adapted=BEFORE_ATTENTION, tiny=measure.tiny)
    hidden = layer.hidden_size
    widths = [layer.get_submodule(name).out_features for name in BEFORE_ATTENTION]

    def make() -> tuple[Any, ...]:
        angles = torch.rand(2, 1, rows, layer.self_attn.head_dim, device=measure.device).to(torch.bfloat16)
        return activation(1, rows, hidden, device=measure.device), layer, angles

    measure(
        Subject(make, fused if impl == "fastgemma" else stock),
        op="pre_attention",
        impl=impl,
        shape=[rows, hidden, sum(widths)],
        direction=direction,
        reference=reference,
        flops=2 * rows * hidden * sum(widths),
    )
