"""LoRA matmuls over dense or NF4 base weights: several projections of one input.

    y = x W^T + scaling * (d(x) A^T) B^T                      d: dropout on the input, a mask of its own per projection

    dx = dy W + d'(dxa A),   dxa = scaling * dy B
    dA = dxa^T d(x),  dB = scaling * dy^T (d(x) A^T),  dW = dy^T x   (only where asked for)

The big products are cuBLAS's; what is written here is what surrounds them: NF4 weights are dequantised into one
short-lived buffer, for all projections of an input together where their outputs lie side by side; so are the products
with their A's; LoRA's B part is accumulated into the base product's output, dx over projections; x A^T (rank columns)
and d(x) are recomputed rather than kept. Saved for the backward: x, and the masks that dropout drew (a byte each).

Adapters may have another dtype than x (float32 adapters on a bfloat16 model); their products then run in the
adapters' dtype, as PEFT's do. Under autocast everything runs in autocast's.

Source: Hu et al., "LoRA" (2021); Dettmers et al., "QLoRA" (2023); `peft.tuners.lora.layer.Linear`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastgemma.kernels._autograd import (
    backward_without_autocast,
    join_trained,
    keep,
    kept,
    masks_of,
    numbers_of,
    parts_of,
    projections_of,
    split_trained,
    trained_only,
    wanted_of,
    wants_of,
)
from fastgemma.kernels._lora_parts import Adapter, Grads, Projection, check_projections, rows_of, without_autocast
from fastgemma.kernels._lora_products import Projections
from fastgemma.kernels._once_differentiable import once_differentiable
from fastgemma.kernels.nf4 import NF4Weight, dequantize_nf4_reference

__all__ = [
    "Adapter",
    "Projection",
    "lora_linear",
    "lora_linear_reference",
    "lora_projections",
    "lora_qkv",
]


class _LoraProjections(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, static, numbers, autocast, *trained):
        ctx.set_materialize_grads(False)
        ctx.static, ctx.numbers, ctx.autocast = static, numbers, autocast
        rows = rows_of(x)
        projections = projections_of(join_trained(static, trained), numbers)
        with without_autocast(x):
            bundle = Projections(projections, autocast)
            _, outs = bundle.forward(rows)
        keep(ctx, trained, (x, *bundle.drawn()))
        return tuple(out.view(*x.shape[:-1], out.shape[1]) for out in outs)

    @staticmethod
    @once_differentiable
    @backward_without_autocast
    def backward(ctx, *dys):
        trained, (x, *drawn) = kept(ctx)
        projections = projections_of(join_trained(ctx.static, trained), ctx.numbers)
        masks = masks_of(projections, drawn)
        wanted = wants_of(wanted_of(ctx.static, ctx.needs_input_grad[4:]))
        used = [index for index, dy in enumerate(dys) if dy is not None]
        if not used:
            return (None,) * (4 + len(trained))
        bundle = Projections([projections[i] for i in used], ctx.autocast, [masks[i] for i in used])
        used_dys, rows = [rows_of(dys[i]) for i in used], rows_of(x)
        dx, dxas = None, []
        if ctx.needs_input_grad[0]:
            dx, dxas = bundle.input_gradient(used_dys)
            dx = dx.view(x.shape).to(x.dtype)
        grads = [Grads()] * len(projections)
        for index, grad in zip(used, bundle.factor_gradients(used_dys, rows, [wanted[i] for i in used], dxas)):
            grads[index] = grad
        flat = [gradient for grad in grads for gradient in grad]
        return dx, None, None, None, *trained_only(ctx.static, flat)


def lora_projections(
    x: torch.Tensor, projections: Sequence[Projection], autocast: torch.dtype | None = None
) -> tuple[torch.Tensor, ...]:
    """Several projections of one input, with one accumulated input gradient.

    Args:
        x: [..., in_features], float32, bfloat16 or float16.
        projections: dense weights in x's dtype, or NF4 ones; adapters of any rank, in x's dtype or another.
        autocast: run every product in this dtype, whatever the tensors have, as torch.autocast would; None: as above.

    Returns:
        One [..., out_features] per projection, in x's dtype, or in autocast's.

    Raises:
        TypeError: dtypes that do not fit. ValueError: shapes that do not fit, different devices, or a dropout of 1.
    """
    check_projections(x, projections, autocast)
    static, trained = split_trained(parts_of(projections))
    return _LoraProjections.apply(x, static, numbers_of(projections), autocast, *trained)


def lora_linear(x: torch.Tensor, projection: Projection, autocast: torch.dtype | None = None) -> torch.Tensor:
    """One projection: [..., in_features] -> [..., out_features]. See `lora_projections`."""
    return lora_projections(x, (projection,), autocast)[0]


def lora_qkv(
    x: torch.Tensor,
    q: Projection,
    k: Projection | None = None,
    v: Projection | None = None,
    autocast: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The attention projections of one layer: q alone (shared keys and values), q and k (values from keys), or all.

    Returns:
        q, k, v as [..., out_features]; None where no projection was given. See `lora_projections` for the rest.
    """
    outs = iter(lora_projections(x, [p for p in (q, k, v) if p is not None], autocast))
    return next(outs), None if k is None else next(outs), None if v is None else next(outs)


def lora_linear_reference(x: torch.Tensor, projection: Projection) -> torch.Tensor:
    """`lora_linear` in plain torch; float64 inputs stay float64."""
    weight, adapter, dropout = projection
    dense = dequantize_nf4_reference(weight) if isinstance(weight, NF4Weight) else weight
    y = torch.nn.functional.linear(x, dense.to(x.dtype))
    if adapter is not None:
        dropped = torch.nn.functional.dropout(x.to(adapter.A.dtype), dropout)
        delta = torch.nn.functional.linear(torch.nn.functional.linear(dropped, adapter.A), adapter.B)
        y = y + (delta * adapter.scaling).to(y.dtype)
    return y
