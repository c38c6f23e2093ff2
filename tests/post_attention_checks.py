"""Inputs of `post_attention`, and calls of it by name, for the tests of every form that it has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import Inputs, fresh, nf4
from quick import slow_after

from fastgemma.kernels.lora import Adapter, Projection
from fastgemma.kernels.post_attention import Matrices, Norms

HIDDEN, ATTENDED, INNER, INPUT = 32, 48, 64, 16
# out_features, in_features of the projections, in the order of `Matrices`.
SIZES = ((HIDDEN, ATTENDED), (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER), (INPUT, HIDDEN), (HIDDEN, INPUT))
both = pytest.mark.parametrize("per_layer", slow_after(1, [True, False]), ids=["per-layer input", "plain"])


def make(
    device: torch.device,
    per_layer: bool = True,
    dtype: torch.dtype = torch.float32,
    base: str = "nf4",
    norms: bool = False,
    adapted: tuple[int, ...] = (0, 1, 2, 3, 4, 5),
    shape: tuple[int, int] = (2, 13),
    adapter_dtype: torch.dtype | None = None,
    rank: int = 2,
    **options: Any,
) -> Inputs:
    """attended, residual, per_layer_input, norm weights, and W{i}, A{i}, B{i} of each projection."""
    inputs: Inputs = {
        "attended": fresh(*shape, ATTENDED, device=device, dtype=dtype, **options),
        "residual": fresh(*shape, HIDDEN, device=device, dtype=dtype, **options),
        "layer_scalar": torch.tensor([0.7], device=device, dtype=dtype),
    }
    if per_layer:
        inputs["per_layer_input"] = fresh(*shape, INPUT, device=device, dtype=dtype, **options)
    for i in range(4 if per_layer else 3):
        inputs[f"norm{i}"] = (1 + 0.3 * torch.randn(HIDDEN, device=device)).to(dtype).requires_grad_(norms)
    for i, (n_out, n_in) in enumerate(SIZES if per_layer else SIZES[:4]):
        if base == "nf4":
            inputs[f"W{i}"] = nf4(n_out, n_in, device, dtype)
        else:
            weight = fresh(n_out, n_in, device=device, dtype=dtype, grad=False) / n_in**0.5
            inputs[f"W{i}"] = weight.requires_grad_(base == "trained")
        if i in adapted:
            kind = adapter_dtype or dtype
            inputs[f"A{i}"] = (fresh(rank, n_in, device=device, dtype=kind, grad=False) / n_in**0.5).requires_grad_()
            inputs[f"B{i}"] = fresh(n_out, rank, device=device, dtype=kind)
    return inputs


def call(fn: Any, dropout: float = 0.0, **options: Any) -> Any:
    """`fn` over the inputs that `make` gives, as a function of them."""

    def run(attended: Any, residual: Any, layer_scalar: Any, per_layer_input: Any = None, **tensors: Any) -> Any:
        projections = []
        for i in range(sum(name.startswith("W") for name in tensors)):
            adapter = Adapter(tensors[f"A{i}"], tensors[f"B{i}"], 0.5) if f"A{i}" in tensors else None
            projections.append(Projection(tensors[f"W{i}"], adapter, dropout if adapter else 0.0))
        norms = Norms(*(tensors[f"norm{i}"] for i in range(4) if f"norm{i}" in tensors))
        return fn(attended, residual, norms, Matrices(*projections), layer_scalar, per_layer_input, **options)

    return run


def make_grads(inputs: Inputs, layout: str = "contiguous") -> list[torch.Tensor]:
    residual = inputs["residual"]
    return [fresh(*residual.shape, device=residual.device, dtype=residual.dtype, layout=layout, grad=False)]
