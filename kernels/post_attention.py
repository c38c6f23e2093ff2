"""What a decoder layer computes after its attention, as one operation.

    h1  = residual + rms_norm(attended W_o^T)
    h2  = h1 + rms_norm(mlp(rms_norm(h1)))
    out = (h2 + rms_norm((gelu_tanh(h2 W_g^T) * per_layer_input) W_p^T)) * layer_scalar

where a layer has no per-layer input, the last line is h2 * layer_scalar. Every matrix may be dense or NF4, with or
without LoRA; the formulas are in `rms_norm`, `lora`, `lora_mlp` and `geglu`. One launch norms, adds and scales.

Saved: attended, the three (two) outputs that are normed before they are added, h1, gate and up, the per-layer gate,
the columns that `lora_mlp` keeps, and 4 bytes a token for each norm; the MLP's input is normed again in the backward.
Gradients of h1 from its two uses meet in float32 and are rounded once. `post_attention_tiles` saves the inputs alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastgemma.kernels._autograd import (
    backward_without_autocast,
    keep,
    kept,
    numbers_of,
    parts_of,
    split_trained,
    trained_only,
    wanted_of,
)
from fastgemma.kernels._lora_parts import Projection, check_projections, without_autocast
from fastgemma.kernels._once_differentiable import once_differentiable
from fastgemma.kernels._post_attention_rows import Kept, Tail, keeps_gate_input, rows_bwd, rows_fwd
from fastgemma.kernels.backend import as_rows, runs_kernel
from fastgemma.kernels.geglu import geglu_reference
from fastgemma.kernels.lora import lora_linear_reference
from fastgemma.kernels.lora_mlp import check_mlp, lora_mlp_reference
from fastgemma.kernels.rms_norm import rms_norm_reference, rms_norm_residual_reference


class Norms(NamedTuple):
    """Weights [hidden_size] of the layer's norms from the attention on; the last one with a per-layer input only."""

    post_attention: torch.Tensor
    pre_feedforward: torch.Tensor
    post_feedforward: torch.Tensor
    post_per_layer_input: torch.Tensor | None = None


class Matrices(NamedTuple):
    """The layer's projections from the attention on; the last two with a per-layer input only."""

    o: Projection
    gate: Projection
    up: Projection
    down: Projection
    per_layer_gate: Projection | None = None
    per_layer_projection: Projection | None = None


class _PostAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attended, residual, per_layer_input, layer_scalar, static, numbers, eps, autocast, *trained):
        ctx.static, ctx.rest = static, (numbers, layer_scalar, eps, autocast)
        keeps_h2 = keeps_gate_input(wanted_of(static, (True,) * len(trained)))
        inputs = None if per_layer_input is None else as_rows(per_layer_input)
        with without_autocast(attended):
            out, made = rows_fwd(
                Tail.of(static, trained, *ctx.rest),
                as_rows(attended),
                as_rows(residual),
                inputs,
                keeps_h2,
                residual.shape,
            )
        *tensors, masks, gate_ups = made
        ctx.n_masks = len(masks)
        keep(ctx, trained, (attended, per_layer_input, *tensors, *masks, *gate_ups))
        return out

    @staticmethod
    @once_differentiable
    @backward_without_autocast
    def backward(ctx, d_out):
        trained, (attended, per_layer_input, *saved) = kept(ctx)
        tensors, rest = saved[: len(Kept._fields) - 2], saved[len(Kept._fields) - 2 :]
        needs = ctx.needs_input_grad
        grads = rows_bwd(
            Tail.of(ctx.static, trained, *ctx.rest),
            as_rows(d_out),
            as_rows(attended),
            None if per_layer_input is None else as_rows(per_layer_input),
            Kept(*tensors, rest[: ctx.n_masks], rest[ctx.n_masks :]),
            needs[0],
            needs[2],
            wanted_of(ctx.static, needs[8:]),
        )
        return (
            None if grads.attended is None else grads.attended.view(attended.shape),
            grads.residual.view(d_out.shape) if needs[1] else None,
            None if grads.per_layer_input is None else grads.per_layer_input.view(per_layer_input.shape),
            *(None,) * 5,
            *trained_only(ctx.static, grads.trained),
        )


def _check(
    attended: torch.Tensor,
    residual: torch.Tensor,
    norms: Norms,
    matrices: Matrices,
    layer_scalar: torch.Tensor,
    per_layer_input: torch.Tensor | None,
    autocast: torch.dtype | None,
) -> None:
    check_projections(attended, (matrices.o,), autocast)
    check_mlp(residual, matrices[1:4], autocast)
    hidden_size = residual.shape[-1]
    if attended.shape[:-1] != residual.shape[:-1] or matrices.o.weight.shape[0] != hidden_size:
        raise ValueError(
            f"fastgemma: post_attention got attended {tuple(attended.shape)}, a residual {tuple(residual.shape)} and "
            f"an output projection {tuple(matrices.o.weight.shape)}, which do not fit."
        )
    if attended.dtype != residual.dtype or autocast not in (None, residual.dtype):
        raise TypeError(f"fastgemma: attended is {attended.dtype}, the residual {residual.dtype}; cast one.")
    if any(norm is not None and norm.shape != (hidden_size,) for norm in norms):
        raise ValueError(f"fastgemma: norm weights must have shape [{hidden_size}].")
    if layer_scalar.numel() != 1 or layer_scalar.requires_grad:
        raise ValueError("fastgemma: layer_scalar must be one element that requires no gradient.")
    given = (per_layer_input, norms.post_per_layer_input, matrices.per_layer_gate, matrices.per_layer_projection)
    if any(item is None for item in given) and any(item is not None for item in given):
        raise ValueError("fastgemma: a per-layer input comes with a gate, a projection and a norm.")
    if per_layer_input is None or matrices.per_layer_gate is None or matrices.per_layer_projection is None:
        return
    if per_layer_input.shape[:-1] != residual.shape[:-1] or per_layer_input.dtype != residual.dtype:
        raise ValueError(
            f"fastgemma: the per-layer input is {tuple(per_layer_input.shape)} {per_layer_input.dtype} beside a "
            f"residual {tuple(residual.shape)} {residual.dtype}."
        )
    check_projections(residual, (matrices.per_layer_gate,), autocast)
    check_projections(per_layer_input, (matrices.per_layer_projection,), autocast)
    columns, rows = matrices.per_layer_gate.weight.shape[0], matrices.per_layer_projection.weight.shape[0]
    if columns != per_layer_input.shape[-1] or rows != hidden_size:
        raise ValueError("fastgemma: the per-layer gate and projection do not fit the per-layer input.")


def post_attention(
    attended: torch.Tensor,
    residual: torch.Tensor,
    norms: Norms,
    matrices: Matrices,
    layer_scalar: torch.Tensor,
    per_layer_input: torch.Tensor | None = None,
    eps: float = 1e-6,
    autocast: torch.dtype | None = None,
) -> torch.Tensor:
    """A layer's output from what its attention gathered.

    Args:
        attended: [batch, seq_len, num_heads * head_dim], float32, bfloat16 or float16.
        residual: [batch, seq_len, hidden_size] in the same dtype.
        norms, matrices: the layer's weights; with a per-layer input all of them.
        layer_scalar: one element, a constant.
        per_layer_input: [batch, seq_len, columns] in the same dtype, or None.
        eps: of every norm.
        autocast: the dtype of an enclosing autocast region, which must be the residual's; else None.

    Returns:
        [batch, seq_len, hidden_size], contiguous, in the residual's dtype.

    Raises:
        TypeError: dtypes that do not fit. ValueError: shapes that do not fit, tensors on different devices, or a
            `layer_scalar` that requires a gradient.
    """
    _check(attended, residual, norms, matrices, layer_scalar, per_layer_input, autocast)
    if not runs_kernel(attended, residual, layer_scalar, per_layer_input, *norms):
        return post_attention_reference(attended, residual, norms, matrices, layer_scalar, per_layer_input, eps)
    return post_attention_unchecked(attended, residual, norms, matrices, layer_scalar, per_layer_input, eps, autocast)


def post_attention_unchecked(
    attended: torch.Tensor,
    residual: torch.Tensor,
    norms: Norms,
    matrices: Matrices,
    layer_scalar: torch.Tensor,
    per_layer_input: torch.Tensor | None,
    eps: float,
    autocast: torch.dtype | None,
) -> torch.Tensor:
    """`post_attention` where its kernels run, of arguments known to fit: checks cost as much host time as launches."""
    projections = [p for p in matrices if p is not None]
    static, trained = split_trained([*norms, *parts_of(projections)])
    return _PostAttention.apply(
        attended, residual, per_layer_input, layer_scalar, static, numbers_of(projections), eps, autocast, *trained
    )


def post_attention_reference(
    attended: torch.Tensor,
    residual: torch.Tensor,
    norms: Norms,
    matrices: Matrices,
    layer_scalar: torch.Tensor,
    per_layer_input: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """`post_attention` in plain torch; float64 inputs stay float64."""
    h1 = rms_norm_residual_reference(
        lora_linear_reference(attended, matrices.o), norms.post_attention, residual, None, eps
    )
    x = rms_norm_reference(h1, norms.pre_feedforward, eps)
    mlp_out = lora_mlp_reference(x, matrices.gate, matrices.up, matrices.down)
    if per_layer_input is None or matrices.per_layer_gate is None or matrices.per_layer_projection is None:
        return rms_norm_residual_reference(mlp_out, norms.post_feedforward, h1, layer_scalar, eps)
    h2 = rms_norm_residual_reference(mlp_out, norms.post_feedforward, h1, None, eps)
    product = geglu_reference(lora_linear_reference(h2, matrices.per_layer_gate), per_layer_input)
    projected = lora_linear_reference(product, matrices.per_layer_projection)
    return rms_norm_residual_reference(projected, norms.post_per_layer_input, h2, layer_scalar, eps)
