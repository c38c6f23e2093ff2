"""The kernels of `qk_norm_rope`, launched on row matrices without autograd, for all operations that contain it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastgemma.kernels.backend import cdiv, jit, kernel, next_power_of_2, tl
from fastgemma.kernels.launch import launch


@jit
def _load_pair(ptr, offsets, mask, HALF: tl.constexpr):
    """The two halves of a tile of heads, in float32."""
    first = tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
    return first, second


@jit
def _store_pair(ptr, offsets, first, second, mask, HALF: tl.constexpr):
    tl.store(ptr + offsets, first.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptr + offsets + HALF, second.to(ptr.dtype.element_ty), mask=mask)


@jit
def _rows_of(seq_len, BLOCK_M: tl.constexpr):
    """This program's rows [BLOCK_M], and as columns their batch entries and their positions in the sequence."""
    # Divided in 32 bits: in 64 it is a call of a hundred instructions, which loads would wait for.
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    batch = (rows // seq_len)[:, None].to(tl.int64)
    position = (rows % seq_len)[:, None].to(tl.int64)
    return rows.to(tl.int64), batch, position


@jit
def _load_angles(cos_ptr, sin_ptr, offsets, turning, HALF: tl.constexpr):
    """cos and sin of both halves of a tile of heads, in float32: 1 and 0 where nothing turns."""
    c1 = tl.load(cos_ptr + offsets, mask=turning, other=1.0).to(tl.float32)
    s1 = tl.load(sin_ptr + offsets, mask=turning, other=0.0).to(tl.float32)
    c2 = tl.load(cos_ptr + offsets + HALF, mask=turning, other=1.0).to(tl.float32)
    s2 = tl.load(sin_ptr + offsets + HALF, mask=turning, other=0.0).to(tl.float32)
    return c1, s1, c2, s2


@jit
def _rstd(first, second, eps, HALF: tl.constexpr):
    mean_square = (tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * HALF)
    return (1.0 / tl.sqrt(mean_square + tl.cast(eps, tl.float32)))[:, None]


@jit
def _norm_bwd(g1, g2, x1, x2, rstd, HALF: tl.constexpr):
    """RMSNorm's input gradient from g = dn * w, for one head in halves."""
    h1 = x1 * rstd
    h2 = x2 * rstd
    projection = ((tl.sum(g1 * h1, axis=1) + tl.sum(g2 * h2, axis=1)) / (2 * HALF))[:, None]
    return (g1 - h1 * projection) * rstd, (g2 - h2 * projection) * rstd


@kernel
def _qk_norm_rope_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    q_out_ptr,
    k_out_ptr,
    v_out_ptr,
    q_row_stride,
    k_row_stride,
    v_row_stride,
    cos_batch_stride,
    cos_row_stride,
    n_rows,
    seq_len,
    num_heads,
    num_kv_heads,
    eps,
    ROTARY_HALF: tl.constexpr,
    V_FROM_K: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    rows, batch, position = _rows_of(seq_len, BLOCK_M)
    head = tl.program_id(1)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < n_rows)[:, None] & (cols < HALF)[None, :]
    turning = (rows < n_rows)[:, None] & (cols < ROTARY_HALF)[None, :]
    if head < num_heads + num_kv_heads:
        is_query = head < num_heads
        local = tl.where(is_query, head, head - num_heads)
        heads = tl.where(is_query, num_heads, num_kv_heads)
        # One body for queries and keys: which of the two only chooses pointers.
        x_ptr = q_ptr if is_query else k_ptr
        weight_ptr = q_weight_ptr if is_query else k_weight_ptr
        out_ptr = q_out_ptr if is_query else k_out_ptr
        row_stride = tl.where(is_query, q_row_stride, k_row_stride)
        x1, x2 = _load_pair(x_ptr, rows[:, None] * row_stride + local * 2 * HALF + cols[None, :], mask, HALF)
        # Everything is on its way before the sums of squares, which nothing overtakes.
        angle = batch * cos_batch_stride + position * cos_row_stride + cols[None, :]
        c1, s1, c2, s2 = _load_angles(cos_ptr, sin_ptr, angle, turning, HALF)
        rstd = _rstd(x1, x2, eps, HALF)
        if V_FROM_K:  # noqa: SIM102 - a compile-time branch around a run-time one
            if head >= num_heads:
                v_out = (rows[:, None] * num_kv_heads + local) * (2 * HALF) + cols[None, :]
                _store_pair(v_out_ptr, v_out, x1 * rstd, x2 * rstd, mask, HALF)
        # Not as a tile, which here would push loads of angles behind the sums of squares.
        w1 = tl.load(weight_ptr + cols, mask=cols < HALF, other=0.0).to(tl.float32)[None, :]
        w2 = tl.load(weight_ptr + HALF + cols, mask=cols < HALF, other=0.0).to(tl.float32)[None, :]
        n1 = x1 * rstd * w1
        n2 = x2 * rstd * w2
        out = (rows[:, None] * heads + local) * (2 * HALF) + cols[None, :]
        _store_pair(out_ptr, out, n1 * c1 - n2 * s1, n2 * c2 + n1 * s2, mask, HALF)
    else:
        local = head - num_heads - num_kv_heads
        x1, x2 = _load_pair(v_ptr, rows[:, None] * v_row_stride + local * 2 * HALF + cols[None, :], mask, HALF)
        rstd = _rstd(x1, x2, eps, HALF)
        out = (rows[:, None] * num_kv_heads + local) * (2 * HALF) + cols[None, :]
        _store_pair(v_out_ptr, out, x1 * rstd, x2 * rstd, mask, HALF)


@kernel
def _qk_norm_rope_bwd_kernel(
    dq_out_ptr,
    dk_out_ptr,
    dv_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    q_weight_ptr,
    k_weight_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dweight_ptr,
    dq_out_batch_stride,
    dq_out_row_stride,
    dq_out_head_stride,
    dk_out_batch_stride,
    dk_out_row_stride,
    dk_out_head_stride,
    dv_out_batch_stride,
    dv_out_row_stride,
    dv_out_head_stride,
    q_row_stride,
    k_row_stride,
    v_row_stride,
    dq_row_stride,
    dk_row_stride,
    dv_row_stride,
    cos_batch_stride,
    cos_row_stride,
    n_rows,
    seq_len,
    num_heads,
    num_kv_heads,
    eps,
    ROTARY_HALF: tl.constexpr,
    V_FROM_K: tl.constexpr,
    NEEDS_DWEIGHT: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    rows, batch, position = _rows_of(seq_len, BLOCK_M)
    head = tl.program_id(1)
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < n_rows)[:, None] & (cols < HALF)[None, :]
    turning = (rows < n_rows)[:, None] & (cols < ROTARY_HALF)[None, :]
    if head < num_heads + num_kv_heads:
        is_query = head < num_heads
        local = tl.where(is_query, head, head - num_heads)
        x_ptr = q_ptr if is_query else k_ptr
        weight_ptr = q_weight_ptr if is_query else k_weight_ptr
        dy_ptr = dq_out_ptr if is_query else dk_out_ptr
        dx_ptr = dq_ptr if is_query else dk_ptr
        row_stride = tl.where(is_query, q_row_stride, k_row_stride)
        dx_row_stride = tl.where(is_query, dq_row_stride, dk_row_stride)
        dy_batch_stride = tl.where(is_query, dq_out_batch_stride, dk_out_batch_stride)
        dy_row_stride = tl.where(is_query, dq_out_row_stride, dk_out_row_stride)
        dy_head_stride = tl.where(is_query, dq_out_head_stride, dk_out_head_stride)

        x1, x2 = _load_pair(x_ptr, rows[:, None] * row_stride + local * 2 * HALF + cols[None, :], mask, HALF)
        dy = batch * dy_batch_stride + position * dy_row_stride + local * dy_head_stride + cols[None, :]
        g1, g2 = _load_pair(dy_ptr, dy, mask, HALF)
        angle = batch * cos_batch_stride + position * cos_row_stride + cols[None, :]
        c1, s1, c2, s2 = _load_angles(cos_ptr, sin_ptr, angle, turning, HALF)
        rstd = _rstd(x1, x2, eps, HALF)
        dn1 = g1 * c1 + g2 * s2
        dn2 = g2 * c2 - g1 * s1
        if NEEDS_DWEIGHT:
            partial = (tl.program_id(0) * (num_heads + num_kv_heads) + head).to(tl.int64) * (2 * HALF) + cols
            tl.store(dweight_ptr + partial, tl.sum(dn1 * x1 * rstd, axis=0), mask=cols < HALF)
            tl.store(dweight_ptr + partial + HALF, tl.sum(dn2 * x2 * rstd, axis=0), mask=cols < HALF)
        # As a tile: a row of weights would pass through shared memory to reach the tile's threads.
        w1, w2 = _load_pair(weight_ptr, tl.zeros_like(rows)[:, None] + cols[None, :], mask, HALF)
        dx1, dx2 = _norm_bwd(dn1 * w1, dn2 * w2, x1, x2, rstd, HALF)
        if V_FROM_K:  # noqa: SIM102 - a compile-time branch around a run-time one
            if head >= num_heads:
                # Keys and values share one projection here; their gradients meet in float32.
                dv = batch * dv_out_batch_stride + position * dv_out_row_stride + local * dv_out_head_stride
                g1, g2 = _load_pair(dv_out_ptr, dv + cols[None, :], mask, HALF)
                e1, e2 = _norm_bwd(g1, g2, x1, x2, rstd, HALF)
                dx1 += e1
                dx2 += e2
        out = rows[:, None] * dx_row_stride + local * 2 * HALF + cols[None, :]
        _store_pair(dx_ptr, out, dx1, dx2, mask, HALF)
    else:
        local = head - num_heads - num_kv_heads
        x1, x2 = _load_pair(v_ptr, rows[:, None] * v_row_stride + local * 2 * HALF + cols[None, :], mask, HALF)
        dv = batch * dv_out_batch_stride + position * dv_out_row_stride + local * dv_out_head_stride + cols[None, :]
        g1, g2 = _load_pair(dv_out_ptr, dv, mask, HALF)
        dx1, dx2 = _norm_bwd(g1, g2, x1, x2, _rstd(x1, x2, eps, HALF), HALF)
        out = rows[:, None] * dv_row_stride + local * 2 * HALF + cols[None, :]
        _store_pair(dv_ptr, out, dx1, dx2, mask, HALF)


@dataclass(frozen=True)
class Heads:
    """How columns of projections divide into heads of `head_dim`, and what happens to each of them."""

    head_dim: int
    rotary_dim: int  # how many dimensions turn
    values_from_keys: bool = False
    eps: float = 1e-6


@dataclass(frozen=True)
class Angles:
    """cos and sin [batch or 1, seq_len, head_dim] with equal strides, unit in the last dimension."""

    cos: torch.Tensor
    sin: torch.Tensor

    @staticmethod
    def of(cos: torch.Tensor, sin: torch.Tensor) -> Angles:
        if cos.stride(-1) != 1 or sin.stride() != cos.stride():
            cos, sin = cos.contiguous(), sin.contiguous()
        return Angles(cos, sin)

    def arguments(self) -> dict[str, Any]:
        return {
            "cos_ptr": self.cos,
            "sin_ptr": self.sin,
            "cos_batch_stride": self.cos.stride(0) if self.cos.shape[0] > 1 else 0,
            "cos_row_stride": self.cos.stride(1),
        }


def qk_norm_rope_fwd(
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    angles: Angles,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor | None,
    heads: Heads,
    shape: tuple[int, int],
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """`qk_norm_rope` of row matrices [batch * seq_len, heads * head_dim] with unit column stride, without autograd.

    `shape` is (batch, seq_len).
    """
    n_rows, head_dim = q.shape[0], heads.head_dim
    num_heads, num_kv_heads = q.shape[1] // head_dim, 0 if k is None else k.shape[1] // head_dim
    batch, seq_len = shape
    q_out = q.new_empty((batch, seq_len, num_heads, head_dim))
    k_out = v_out = None
    if k is not None:
        k_out = q.new_empty((batch, seq_len, num_kv_heads, head_dim))
        v_out = q.new_empty(k_out.shape)
    if n_rows == 0:
        return q_out, k_out, v_out
    config = launch("qk_norm_rope", str(head_dim), q.device)
    programs = num_heads + num_kv_heads * (1 if heads.values_from_keys else 2)
    k_rows = q if k is None else k
    v_rows = k_rows if v is None else v
    _qk_norm_rope_fwd_kernel[(cdiv(n_rows, config.blocks["BLOCK_M"]), programs)](
        q_ptr=q,
        k_ptr=k_rows,
        v_ptr=v_rows,
        q_weight_ptr=q_weight,
        k_weight_ptr=q_weight if k_weight is None else k_weight,
        q_out_ptr=q_out,
        k_out_ptr=q_out if k_out is None else k_out,
        v_out_ptr=q_out if v_out is None else v_out,
        q_row_stride=q.stride(0),
        k_row_stride=k_rows.stride(0),
        v_row_stride=v_rows.stride(0),
        **angles.arguments(),
        n_rows=n_rows,
        seq_len=seq_len,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        eps=heads.eps,
        ROTARY_HALF=heads.rotary_dim // 2,
        V_FROM_K=heads.values_from_keys,
        HALF=head_dim // 2,
        BLOCK_D=next_power_of_2(head_dim // 2),
        **config.kwargs(),
    )
    return q_out, k_out, v_out


def _output_gradient(grad: torch.Tensor | None, like: torch.Tensor, batch: int, head_dim: int) -> torch.Tensor:
    # An output nobody used has no gradient: rare enough to feed the same launch zeros.
    if grad is None:
        return like.new_zeros((batch, like.shape[0] // max(batch, 1), like.shape[1] // head_dim, head_dim))
    return grad if grad.stride(-1) == 1 else grad.contiguous()


def qk_norm_rope_bwd(
    d_outs: Sequence[torch.Tensor | None],
    q: torch.Tensor,
    k: torch.Tensor | None,
    v: torch.Tensor | None,
    angles: Angles,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor | None,
    heads: Heads,
    d_ins: Sequence[torch.Tensor | None],
    needs_dweight: bool,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Fills `d_ins`, the gradients of row matrices q, k and v, from `d_outs`, those of the outputs, without autograd.

    `d_ins` are the caller's own, [batch * seq_len, heads * head_dim] with unit column stride (None where q, k, v are);
    `d_outs` are [batch, seq_len, heads, head_dim] of any strides. Returns the gradients of the two weights, or None.
    """
    n_rows, head_dim = q.shape[0], heads.head_dim
    num_heads, num_kv_heads = q.shape[1] // head_dim, 0 if k is None else k.shape[1] // head_dim
    batch = next(grad.shape[0] for grad in d_outs if grad is not None)
    if n_rows == 0:
        zeros = (torch.zeros_like(q_weight), None if k_weight is None else torch.zeros_like(k_weight))
        return zeros if needs_dweight else (None, None)
    k_rows = q if k is None else k
    v_rows = k_rows if v is None else v
    dq_out = _output_gradient(d_outs[0], q, batch, head_dim)
    dk_out = dq_out if k is None else _output_gradient(d_outs[1], k_rows, batch, head_dim)
    dv_out = dq_out if k is None else _output_gradient(d_outs[2], v_rows, batch, head_dim)
    dq, dk, dv = d_ins
    assert dq is not None
    config = launch("qk_norm_rope", str(head_dim), q.device)
    blocks = cdiv(n_rows, config.blocks["BLOCK_M"])
    partial = None
    if needs_dweight:
        partial = torch.zeros((blocks, num_heads + num_kv_heads, head_dim), dtype=torch.float32, device=q.device)
    strides = {
        f"{name}_{axis}_stride": stride
        for name, grad in (("dq_out", dq_out), ("dk_out", dk_out), ("dv_out", dv_out))
        for axis, stride in zip(("batch", "row", "head"), grad.stride())
    }
    _qk_norm_rope_bwd_kernel[(blocks, num_heads + num_kv_heads * (1 if dv is None else 2))](
        dq_out_ptr=dq_out,
        dk_out_ptr=dk_out,
        dv_out_ptr=dv_out,
        q_ptr=q,
        k_ptr=k_rows,
        v_ptr=v_rows,
        q_weight_ptr=q_weight,
        k_weight_ptr=q_weight if k_weight is None else k_weight,
        dq_ptr=dq,
        dk_ptr=dq if dk is None else dk,
        dv_ptr=dq if dv is None else dv,
        dweight_ptr=angles.cos if partial is None else partial,
        **strides,
        q_row_stride=q.stride(0),
        k_row_stride=k_rows.stride(0),
        v_row_stride=v_rows.stride(0),
        dq_row_stride=dq.stride(0),
        dk_row_stride=0 if dk is None else dk.stride(0),
        dv_row_stride=0 if dv is None else dv.stride(0),
        **angles.arguments(),
        n_rows=n_rows,
        seq_len=n_rows // batch,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        eps=heads.eps,
        ROTARY_HALF=heads.rotary_dim // 2,
        V_FROM_K=heads.values_from_keys,
        NEEDS_DWEIGHT=needs_dweight,
        HALF=head_dim // 2,
        BLOCK_D=next_power_of_2(head_dim // 2),
        **config.kwargs(),
    )
    if partial is None:
        return None, None
    sums = partial.sum(dim=0)
    dk_weight = None if k_weight is None else sums[num_heads:].sum(dim=0).to(k_weight.dtype)
    return sums[:num_heads].sum(dim=0).to(q_weight.dtype), dk_weight
