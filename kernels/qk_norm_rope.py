"""Query norm + RoPE, key norm + RoPE and value norm of Gemma 4's attention, in one launch.

Per token and head, with rstd = (mean(x^2) + eps)^-1/2 over the head dimension D:

    n = x * rstd * w
    y_i       = n_i * cos_i - n_{i+D/2} * sin_i                  for i < D/2
    y_{i+D/2} = n_{i+D/2} * cos_{i+D/2} + n_i * sin_{i+D/2}

for queries and keys (rotate-half RoPE on the two halves of the head), and v = x * rstd for values, which have neither
weight nor rotation. On layers that use keys as values, v comes from the raw, un-normed key projection. On global
layers only the first `rotary_dim / 2` pairs turn: for the others cos is 1 and sin is 0, and neither is loaded.
Everything inside is float32, rounded once.

The backward rotates the gradient back, then applies RMSNorm's: dx = rstd * (g - x * rstd * mean(g * x * rstd)) with
g = dn * w. It reads the pre-norm projections and recomputes rstd. Bytes per element (bf16): forward 4, backward 6.

Source: Su et al., "RoFormer" (2021); Zhang and Sennrich (2019); `Gemma4TextAttention` in transformers.
"""

from __future__ import annotations

import torch

from fastgemma.kernels._once_differentiable import once_differentiable
from fastgemma.kernels.backend import as_rows, check_dtype, runs_kernel
from fastgemma.kernels.qk_norm_rope_launch import Angles, Heads, qk_norm_rope_bwd, qk_norm_rope_fwd


def _rows(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else as_rows(x)


class _QKNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cos, sin, q_weight, k_weight, heads):
        angles = Angles.of(cos, sin)
        q_weight = q_weight.contiguous()
        k_weight = None if k_weight is None else k_weight.contiguous()
        # Frozen weights are persistent module state, not activations: no hook needs to see them.
        ctx.trains = any(ctx.needs_input_grad[5:7])
        ctx.frozen = () if ctx.trains else (q_weight, k_weight)
        ctx.save_for_backward(q, k, v, angles.cos, angles.sin, *((q_weight, k_weight) if ctx.trains else ()))
        ctx.heads = heads
        ctx.set_materialize_grads(False)
        return qk_norm_rope_fwd(_rows(q), _rows(k), _rows(v), angles, q_weight, k_weight, heads, q.shape[:2])

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outs):
        q, k, v, cos, sin, q_weight, k_weight = ctx.saved_tensors + ctx.frozen
        d_ins = [None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        d_weights = qk_norm_rope_bwd(
            d_outs,
            _rows(q),
            _rows(k),
            _rows(v),
            Angles(cos, sin),
            q_weight,
            k_weight,
            ctx.heads,
            [_rows(grad) for grad in d_ins],
            ctx.trains,
        )
        return *d_ins, None, None, *d_weights, None


def qk_norm_rope(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor | None,
    head_dim: int,
    rotary_dim: int | None = None,
    values_from_keys: bool = False,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Norms and rotates the projections of one attention layer.

    Args:
        q: [batch, seq_len, num_heads * head_dim], the raw query projection; float32, bfloat16 or float16.
        k: [batch, seq_len, num_kv_heads * head_dim], or None on layers that reuse another layer's keys and values.
        v: like `k`; None where `k` is None or `values_from_keys` is set.
        cos, sin: [batch or 1, seq_len, head_dim], any floating dtype, constants.
        q_weight, k_weight: [head_dim], the norms' weights; `k_weight` None where `k` is None.
        head_dim: even.
        rotary_dim: how many of the dimensions turn (the first half of them in each half of the head); None: all.
        values_from_keys: take the values from the raw key projection (Gemma 4's K=V layers).
        eps: added to the mean squares.

    Returns:
        q, k, v as [batch, seq_len, heads, head_dim], contiguous; k and v are None where `k` is None.

    Raises:
        TypeError: unsupported or unequal dtypes. ValueError: shapes that do not fit, or different devices.
    """
    check_dtype("q", q)
    rotary_dim = head_dim if rotary_dim is None else rotary_dim
    if head_dim % 2 or rotary_dim % 2 or not 0 <= rotary_dim <= head_dim:
        raise ValueError(f"fastgemma: head_dim {head_dim} and rotary_dim {rotary_dim} must be even and in order.")
    if (k is None) != (k_weight is None) or (v is None) != (k is None or values_from_keys):
        raise ValueError("fastgemma: qk_norm_rope takes q alone, q and k with values_from_keys, or q, k and v.")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is None:
            continue
        if x.dtype != q.dtype:
            raise TypeError(f"fastgemma: {name} is {x.dtype}, q {q.dtype}; cast one.")
        if x.dim() != 3 or x.shape[:2] != q.shape[:2] or x.shape[2] % head_dim:
            raise ValueError(
                f"fastgemma: {name} has shape {tuple(x.shape)}, not [batch, seq_len, heads * {head_dim}] beside q "
                f"{tuple(q.shape)}."
            )
    for name, angle in (("cos", cos), ("sin", sin)):
        if angle.dim() != 3 or angle.shape[0] not in (1, q.shape[0]) or angle.shape[1:] != (q.shape[1], head_dim):
            raise ValueError(
                f"fastgemma: {name} has shape {tuple(angle.shape)}, not [{q.shape[0]} or 1, {q.shape[1]}, {head_dim}]."
            )
    if q_weight.shape != (head_dim,) or (k_weight is not None and k_weight.shape != (head_dim,)):
        raise ValueError(f"fastgemma: norm weights must have shape [{head_dim}].")
    if not runs_kernel(q, k, v, cos, sin, q_weight, k_weight):
        return qk_norm_rope_reference(
            q, k, v, cos, sin, q_weight, k_weight, head_dim, rotary_dim, values_from_keys, eps
        )
    heads = Heads(head_dim, rotary_dim, values_from_keys, eps)
    return _QKNormRope.apply(q, k, v, cos, sin, q_weight, k_weight, heads)


def qk_norm_rope_reference(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor | None,
    head_dim: int,
    rotary_dim: int | None = None,
    values_from_keys: bool = False,
    eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`qk_norm_rope` in plain torch; float64 inputs stay float64, everything else is computed in float32."""
    high = torch.promote_types(q.dtype, torch.float32)
    half, turning = head_dim // 2, (head_dim if rotary_dim is None else rotary_dim) // 2
    turns = (torch.arange(head_dim, device=q.device) % half) < turning
    cos = torch.where(turns, cos.to(high), 1.0).unsqueeze(2)
    sin = torch.where(turns, sin.to(high), 0.0).unsqueeze(2)

    def norm(x: torch.Tensor) -> torch.Tensor:
        x = x.to(high).unflatten(-1, (-1, head_dim))
        return x * torch.pow(x.square().mean(-1, keepdim=True) + eps, -0.5)

    def rotate(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        n = norm(x) * weight.to(high)
        return (n * cos + torch.cat((-n[..., half:], n[..., :half]), dim=-1) * sin).to(q.dtype)

    if k is None or k_weight is None:
        return rotate(q, q_weight), None, None
    values = k if values_from_keys or v is None else v
    return rotate(q, q_weight), rotate(k, k_weight), norm(values).to(q.dtype)
