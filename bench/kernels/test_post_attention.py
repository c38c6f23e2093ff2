"""What a QLoRA layer computes after its attention, beside transformers and PEFT on bitsandbytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_inputs import AFTER_ATTENTION, PER_LAYER, activation, decoder_layer, projection
from kernel_timing import Subject

from fastgemma.kernels.post_attention import Matrices, Norms, post_attention, post_attention_reference

SHAPES = [(rows, size) for size in ("e2b", "e4b") for rows in (2048, 32768)]


def arguments(layer: Any, dtype: torch.dtype) -> tuple[Norms, Matrices]:
    norms = [
        layer.post_attention_layernorm,
        layer.pre_feedforward_layernorm,
        layer.post_feedforward_layernorm,
        layer.post_per_layer_input_norm,
    ]
    linears = [projection(layer.get_submodule(name), dtype=dtype) for name in (*AFTER_ATTENTION, *PER_LAYER)]
    return Norms(*(norm.weight for norm in norms)), Matrices(*linears)


def fused(attended: torch.Tensor, residual: torch.Tensor, layer: Any, per_layer_input: torch.Tensor) -> torch.Tensor:
    return post_attention(attended, residual, *arguments(layer, attended.dtype), layer.layer_scalar, per_layer_input)


def reference(attended: torch.Tensor, residual: torch.Tensor, layer: Any, per_layer_input: torch.Tensor) -> Any:
    tensors = attended.float(), residual.float()
    return post_attention_reference(
        *tensors, *arguments(layer, torch.float32), layer.layer_scalar, per_layer_input.float()
    )


def stock(attended: torch.Tensor, residual: torch.Tensor, layer: Any, per_layer_input: torch.Tensor) -> torch.Tensor:
    h = residual + layer.post_attention_layernorm(layer.self_attn.o_proj(attended))
    h = h + layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(h)))
    product = layer.act_fn(layer.per_layer_input_gate(h)) * per_layer_input
    return (h + layer.post_per_layer_input_norm(layer.per_layer_projection(product))) * layer.layer_scalar


@pytest.mark.shapes(SHAPES, tiny=(7, "e2b"))
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("impl", ["fastgemma", "hf"])
def test_post_attention(measure, shape, impl, direction):
    rows, size = shape
    layer = decoder_layer(size, measure.device, adapted=AFTER_ATTENTION, bare=PER_LAYER, tiny=measure.tiny)
    linears = [layer.get_submodule(name) for name in (*AFTER_ATTENTION, *PER_LAYER)]
    columns, device = linears[4].out_features, measure.device

    def make() -> tuple[Any, ...]:
        attended = activation(1, rows, linears[0].in_features, device=device)
        residual = activation(1, rows, layer.hidden_size, device=device)
        return attended, residual, layer, activation(1, rows, columns, device=device)

    measure(
        Subject(make, fused if impl == "fastgemma" else stock),
        op="post_attention",
        impl=impl,
        shape=[rows, layer.hidden_size, linears[1].out_features],
        direction=direction,
        reference=reference,
        flops=2 * rows * sum(linear.in_features * linear.out_features for linear in linears),
    )
