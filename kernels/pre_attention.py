"""What a decoder layer computes before its attention, as one operation.

    x = rms_norm(hidden_states)
    q, k, v = x W_q^T, x W_k^T, x W_v^T (with LoRA)           some layers have q alone, or take v from k
    q, k, v = norm and rotate q and k, norm v                 the formulas are in `rms_norm`, `lora`, `qk_norm_rope`

q, k and v lie side by side in one buffer: one dequantised weight and one product make them, forward and backward. The
residual passes through, so that its gradient and the norm's meet in float32 and are rounded once. Saved: hidden_states,
the buffer of q, k and v before their norms, and 4 bytes a token; x is normed again in the backward.

Bytes that must move per token beside the products (bf16, hidden size H, C columns of q, k and v): forward 4 H + 4 C,
backward 8 H + 6 C.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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
from fastgemma.kernels._lora_parts import Projection, check_projections, with_room, without_autocast
from fastgemma.kernels._lora_products import Projections
from fastgemma.kernels._once_differentiable import once_differentiable
from fastgemma.kernels.backend import as_rows, runs_kernel
from fastgemma.kernels.lora import lora_linear_reference
from fastgemma.kernels.qk_norm_rope import qk_norm_rope_reference
from fastgemma.kernels.qk_norm_rope_launch import Angles, Heads, qk_norm_rope_bwd, qk_norm_rope_fwd
from fastgemma.kernels.rms_norm import rms_norm_bwd, rms_norm_fwd, rms_norm_reference

Outputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]


def _qkv(columns: torch.Tensor, projections: Sequence[Projection]) -> list[torch.Tensor | None]:
    """The parts of a buffer that belong to q, k and v; None where there is no such projection."""
    parts: list[torch.Tensor | None] = list(columns.split_with_sizes([p.weight.shape[0] for p in projections], 1))
    return parts + [None] * (3 - len(parts))


class _PreAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, cos, sin, static, numbers, heads, eps, autocast, *trained):
        norm, q_norm, k_norm, *parts = join_trained(static, trained)
        projections = projections_of(parts, numbers)
        rows, angles = as_rows(hidden_states), Angles.of(cos, sin)
        rstd = torch.empty(rows.shape[0], dtype=torch.float32, device=rows.device)
        with without_autocast(rows):
            bundle = Projections(projections, autocast)
            x, room = with_room(rows.shape, bundle.room(rows.dtype), rows.dtype, rows.device)
            rms_norm_fwd(rows, norm, eps, rstd=rstd, out=x)
            columns, parts = bundle.forward(x, joint=True, room=room)
        padded: list[Any] = [*parts, None, None]
        q, k, v = padded[:3]
        outs = qk_norm_rope_fwd(q, k, v, angles, q_norm, k_norm, heads, hidden_states.shape[:2])
        ctx.static, ctx.numbers, ctx.heads, ctx.eps, ctx.autocast = static, numbers, heads, eps, autocast
        ctx.set_materialize_grads(False)
        keep(ctx, trained, (hidden_states, rstd, columns, angles.cos, angles.sin, *bundle.drawn()))
        return hidden_states, *outs

    @staticmethod
    @once_differentiable
    @backward_without_autocast
    def backward(ctx, d_residual, *d_outs):
        trained, (hidden_states, rstd, columns, cos, sin, *drawn) = kept(ctx)
        nothing = (None,) * 7
        if all(grad is None for grad in d_outs):
            return d_residual, *nothing, *(None,) * len(trained)
        norm, q_norm, k_norm, *parts = join_trained(ctx.static, trained)
        projections = projections_of(parts, ctx.numbers)
        wants_norm, wants_q_norm, wants_k_norm, *flags = wanted_of(ctx.static, ctx.needs_input_grad[8:])
        bundle = Projections(projections, ctx.autocast, masks_of(projections, drawn))
        rows = as_rows(hidden_states)

        needs_hidden = ctx.needs_input_grad[0]
        behind = bundle.room(columns.dtype, gradient=True) if needs_hidden or wants_norm else 0
        d_columns, room = with_room(columns.shape, behind, columns.dtype, columns.device)
        d_ins = _qkv(d_columns, projections)
        d_q_norm, d_k_norm = qk_norm_rope_bwd(
            d_outs,
            *_qkv(columns, projections),
            Angles(cos, sin),
            q_norm,
            k_norm,
            ctx.heads,
            d_ins,
            wants_q_norm or wants_k_norm,
        )
        dys = [grad for grad in d_ins if grad is not None]
        d_hidden, d_norm, dxas = None, None, []
        if needs_hidden or wants_norm:
            dx, dxas = bundle.input_gradient(dys, d_columns, room=room)
            grads = rms_norm_bwd(
                dx,
                rows,
                norm,
                rstd,
                addend=None if d_residual is None else as_rows(d_residual),
                needs_dx=needs_hidden,
                needs_dweight=wants_norm,
            )
            d_hidden = None if grads.x is None else grads.x.view(hidden_states.shape)
            d_norm = grads.weight
        x = rms_norm_fwd(rows, norm, ctx.eps) if any(flags) else rows
        factors = bundle.factor_gradients(dys, x, wants_of(flags), dxas)
        flat = [d_norm, d_q_norm, d_k_norm, *(gradient for grad in factors for gradient in grad)]
        return d_hidden, *nothing, *trained_only(ctx.static, flat)


def _check(
    hidden_states: torch.Tensor,
    norm_weight: torch.Tensor,
    projections: Sequence[Projection],
    cos: torch.Tensor,
    sin: torch.Tensor,
    head_norms: Sequence[torch.Tensor | None],
    heads: Heads,
    autocast: torch.dtype | None,
) -> None:
    check_projections(hidden_states, projections, autocast)
    if hidden_states.dim() != 3 or norm_weight.shape != hidden_states.shape[-1:]:
        raise ValueError(
            f"fastgemma: pre_attention got hidden states {tuple(hidden_states.shape)} and a norm weight "
            f"{tuple(norm_weight.shape)}; give [batch, seq_len, hidden_size] and [hidden_size]."
        )
    if autocast not in (None, hidden_states.dtype):
        raise TypeError(f"fastgemma: hidden states are {hidden_states.dtype} under autocast to {autocast}; cast them.")
    if len(projections) not in ((2,) if heads.values_from_keys else (1, 3)):
        raise ValueError("fastgemma: pre_attention takes q alone, q and k with values_from_keys, or q, k and v.")
    if any(p.weight.shape[0] % heads.head_dim for p in projections):
        raise ValueError(f"fastgemma: a projection's output does not divide into heads of {heads.head_dim}.")
    if (head_norms[1] is None) != (len(projections) == 1):
        raise ValueError("fastgemma: the keys' norm weight goes with their projection.")
    if any(norm is not None and norm.shape != (heads.head_dim,) for norm in head_norms):
        raise ValueError(f"fastgemma: the norm weights of heads must have shape [{heads.head_dim}].")
    batch, seq_len = hidden_states.shape[:2]
    for angle in (cos, sin):
        if angle.dim() != 3 or angle.shape[0] not in (1, batch) or angle.shape[1:] != (seq_len, heads.head_dim):
            raise ValueError(
                f"fastgemma: an angle has shape {tuple(angle.shape)}, not [{batch} or 1, {seq_len}, {heads.head_dim}]."
            )


def pre_attention(
    hidden_states: torch.Tensor,
    norm_weight: torch.Tensor,
    projections: Sequence[Projection],
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm_weight: torch.Tensor,
    k_norm_weight: torch.Tensor | None,
    heads: Heads,
    eps: float = 1e-6,
    autocast: torch.dtype | None = None,
) -> Outputs:
    """The residual, and the queries, keys and values of a layer's attention.

    Args:
        hidden_states: [batch, seq_len, hidden_size], float32, bfloat16 or float16.
        norm_weight: [hidden_size].
        projections: of q; of q and k with `heads.values_from_keys`; or of q, k and v. See `lora.Projection`.
        cos, sin: [batch or 1, seq_len, head_dim], any floating dtype, constants.
        q_norm_weight, k_norm_weight: [head_dim]; the latter None where q is alone.
        heads: how projections divide into heads; its eps is that of their norms.
        eps: of the norm of hidden_states.
        autocast: the dtype of an enclosing autocast region, which must be that of hidden_states; else None.

    Returns:
        hidden_states again, to be used as the residual, so that all of its gradient comes through here; then q, k and v
        as [batch, seq_len, heads, head_dim], contiguous, k and v None where q is alone.

    Raises:
        TypeError: dtypes that do not fit. ValueError: shapes that do not fit, or tensors on different devices.
    """
    head_norms = (q_norm_weight, k_norm_weight)
    _check(hidden_states, norm_weight, projections, cos, sin, head_norms, heads, autocast)
    if not runs_kernel(hidden_states, norm_weight, cos, sin, *head_norms):
        return hidden_states, *pre_attention_reference(
            hidden_states, norm_weight, projections, cos, sin, q_norm_weight, k_norm_weight, heads, eps
        )
    return pre_attention_unchecked(hidden_states, norm_weight, projections, cos, sin, *head_norms, heads, eps, autocast)


def pre_attention_unchecked(
    hidden_states: torch.Tensor,
    norm_weight: torch.Tensor,
    projections: Sequence[Projection],
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm_weight: torch.Tensor,
    k_norm_weight: torch.Tensor | None,
    heads: Heads,
    eps: float,
    autocast: torch.dtype | None,
) -> Outputs:
    """`pre_attention` where its kernels run, of arguments known to fit: checks cost as much host time as launches."""
    static, trained = split_trained([norm_weight, q_norm_weight, k_norm_weight, *parts_of(projections)])
    return _PreAttention.apply(hidden_states, cos, sin, static, numbers_of(projections), heads, eps, autocast, *trained)


def pre_attention_reference(
    hidden_states: torch.Tensor,
    norm_weight: torch.Tensor,
    projections: Sequence[Projection],
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_norm_weight: torch.Tensor,
    k_norm_weight: torch.Tensor | None,
    heads: Heads,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """q, k and v of `pre_attention` in plain torch; float64 inputs stay float64."""
    x = rms_norm_reference(hidden_states, norm_weight, eps)
    q, k, v, *_ = [*(lora_linear_reference(x, p) for p in projections), None, None]
    assert q is not None
    return qk_norm_rope_reference(
        q,
        k,
        v,
        cos,
        sin,
        q_norm_weight,
        k_norm_weight,
        heads.head_dim,
        heads.rotary_dim,
        heads.values_from_keys,
        heads.eps,
    )
