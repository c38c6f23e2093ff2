"""Forward pass of `attention`: one Triton kernel, online softmax, keys and values read in place.

A program holds BLOCK_M rows of the queries of one key/value head: rows are (position, head of the group) pairs, so that
a group of 8 heads over one key/value head reads a tile of keys once for 8 heads, and a window of keys is cut at
positions 8 times closer together. It visits the tiles between the least lo and the greatest hi of its rows; only tiles
that some row attends to in part are masked.

Where a head is too wide to be held at once, SPLITS programs share a row tile: each computes the scores in pieces of
BLOCK_D dimensions, and 1 / SPLITS of the output.

Source: Dao, "FlashAttention-2" (2023), for the order of the loops.
"""

from __future__ import annotations

import torch

from fastgemma.kernels.backend import cdiv, jit, kernel, tl
from fastgemma.kernels.key_intervals import KeyIntervals
from fastgemma.kernels.launch import launch

LOG2E = 1.4426950408889634


@jit
def products(
    a,
    a_ptrs,
    b_ptrs,
    a_mask,
    b_mask,
    HEAD_DIM: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """a b^T of two tiles of rows, float32, [BLOCK_A, BLOCK_B]; `a` is unread where BLOCK_D is less than a row."""
    if BLOCK_D == HEAD_DIM:
        b = tl.load(b_ptrs, mask=b_mask[:, None], other=0.0)
        return tl.dot(a, tl.trans(b), input_precision="ieee")
    sums = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
    for d in range(0, HEAD_DIM, BLOCK_D):
        piece = tl.load(a_ptrs + d, mask=a_mask[:, None], other=0.0)
        b = tl.load(b_ptrs + d, mask=b_mask[:, None], other=0.0)
        sums = tl.dot(piece, tl.trans(b), sums, input_precision="ieee")
    return sums


@jit
def row_tile(lo_ptr, hi_ptr, tile, seq_len, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a tile of rows: positions, heads in the group, which exist, lo, hi, and the bounds of the keys to visit.

    From `first` to `end` by BLOCK_N, of which those from `full` to `partial` need no mask.
    """
    rows = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    positions = rows // GROUP
    row_mask = positions < seq_len
    lo = tl.load(lo_ptr + positions, mask=row_mask, other=0)
    hi = tl.load(hi_ptr + positions, mask=row_mask, other=0)
    some = lo < hi
    first = tl.min(tl.where(some, lo, seq_len), axis=0) // BLOCK_N * BLOCK_N
    end = tl.max(tl.where(some, hi, 0), axis=0)
    full = (tl.max(tl.where(row_mask, lo, 0), axis=0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    # A row without keys must not take part in any unmasked tile.
    partial = tl.min(tl.where(row_mask, tl.where(some, hi, 0), seq_len), axis=0) // BLOCK_N * BLOCK_N
    full = tl.minimum(tl.maximum(full, first), tl.maximum(end, first))
    partial = tl.maximum(partial, full)
    return positions, rows % GROUP, row_mask, lo, hi, first, full, partial, end


@jit
def finite_rows(x, mask):
    """`x` with 0 in the rows that hold a NaN or an infinity, and which rows those are.

    0 * NaN is NaN: what a row does not attend to must not reach it through a product with a probability of 0.
    """
    bad = tl.sum((tl.abs(x.to(tl.float32)) < float("inf")).to(tl.int32), axis=1) < x.shape[1]
    return tl.where(bad[:, None], 0.0, x).to(x.dtype), bad & mask


@jit
def _attend(
    acc,
    peak,
    total,
    start,
    end,
    q,
    q_ptrs,
    k_base,
    v_base,
    k_position_stride,
    v_position_stride,
    row_mask,
    lo,
    hi,
    seq_len,
    scale_log2,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Takes the keys from `start` to `end` into account."""
    dims = tl.arange(0, BLOCK_D)
    for first in range(start, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        key_mask = keys < seq_len
        offsets = keys[:, None].to(tl.int64)
        k_ptrs = k_base + offsets * k_position_stride + dims[None, :]
        s = products(q, q_ptrs, k_ptrs, row_mask, key_mask, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D) * scale_log2
        v = tl.load(v_base + offsets * v_position_stride, mask=key_mask[:, None], other=0.0)
        if MASKED:
            keep = (keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None])
            v, bad = finite_rows(v, key_mask)
            # Not -inf: the difference of two infinities is NaN.
            s = tl.where(keep, s, -1e30)
        new_peak = tl.maximum(peak, tl.max(s, axis=1))
        p = tl.exp2(s - new_peak[:, None])
        if MASKED:
            # Of a row without keys so far the peak is -1e30, and its exponentials are 1.
            p = tl.where(keep, tl.where(bad[None, :], float("nan"), p), 0.0)
        correction = tl.exp2(peak - new_peak)
        total = total * correction + tl.sum(p, axis=1)
        peak = new_peak
        acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision="ieee")
    return acc, peak, total


@kernel
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lo_ptr,
    hi_ptr,
    out_ptr,
    lse_ptr,
    q_batch_stride,
    q_position_stride,
    k_batch_stride,
    k_position_stride,
    v_batch_stride,
    v_position_stride,
    seq_len,
    scale_log2,
    num_key_value_heads,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    DIMS: tl.constexpr = HEAD_DIM // SPLITS
    head = tl.program_id(0) // SPLITS
    split = tl.program_id(0) % SPLITS
    # Causal rows have more keys the later they come: the long programs start first.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    positions, members, row_mask, lo, hi, first, full, partial, end = row_tile(
        lo_ptr + batch * seq_len, hi_ptr + batch * seq_len, tile, seq_len, GROUP, BLOCK_M, BLOCK_N
    )
    heads = head * GROUP + members

    dims = tl.arange(0, BLOCK_D)
    out_dims = split * DIMS + tl.arange(0, DIMS)
    q_ptrs = q_ptr + batch * q_batch_stride + positions[:, None].to(tl.int64) * q_position_stride
    q_ptrs += heads[:, None] * HEAD_DIM + dims[None, :]
    q = tl.load(q_ptrs, mask=row_mask[:, None], other=0.0)
    k_base = k_ptr + batch * k_batch_stride + head * HEAD_DIM
    v_base = v_ptr + batch * v_batch_stride + head * HEAD_DIM + out_dims[None, :]

    peak = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DIMS], tl.float32)
    acc, peak, total = _attend(
        acc, peak, total, first, full, q, q_ptrs, k_base, v_base, k_position_stride, v_position_stride,
        row_mask, lo, hi, seq_len, scale_log2, True, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, peak, total = _attend(
        acc, peak, total, full, partial, q, q_ptrs, k_base, v_base, k_position_stride, v_position_stride,
        row_mask, lo, hi, seq_len, scale_log2, False, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, peak, total = _attend(
        acc, peak, total, partial, end, q, q_ptrs, k_base, v_base, k_position_stride, v_position_stride,
        row_mask, lo, hi, seq_len, scale_log2, True, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    some = lo < hi
    total = tl.where(some, total, 1.0)
    out = tl.where(some[:, None], acc / total[:, None], 0.0)
    # [batch, seq_len, heads, head_dim], contiguous.
    row_offsets = (batch * seq_len + positions) * (num_key_value_heads * GROUP) + heads
    out_ptrs = out_ptr + row_offsets[:, None] * HEAD_DIM + out_dims[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=row_mask[:, None])
    if split == 0:
        tl.store(lse_ptr + row_offsets, tl.where(some, peak + tl.log2(total), 0.0), mask=row_mask)


def attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, intervals: KeyIntervals, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out like q, contiguous; lse [batch, seq_len, num_heads] float32, to base 2), without autograd.

    q [batch, seq_len, num_heads, head_dim]; k, v [batch, seq_len, num_key_value_heads, head_dim]; heads and dimensions
    lie one behind the other, whatever the strides of positions and of the batch. Rows without keys give zeros.
    """
    batch, seq_len, num_heads, head_dim = q.shape
    num_key_value_heads = k.shape[2]
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, seq_len, num_heads), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    group = num_heads // num_key_value_heads
    config = launch("attention_fwd", str(head_dim), q.device)
    blocks = config.blocks
    grid = (num_key_value_heads * blocks["SPLITS"], cdiv(seq_len * group, blocks["BLOCK_M"]), batch)
    _attention_fwd_kernel[grid](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        lo_ptr=intervals.lo,
        hi_ptr=intervals.hi,
        out_ptr=out,
        lse_ptr=lse,
        q_batch_stride=q.stride(0),
        q_position_stride=q.stride(1),
        k_batch_stride=k.stride(0),
        k_position_stride=k.stride(1),
        v_batch_stride=v.stride(0),
        v_position_stride=v.stride(1),
        seq_len=seq_len,
        scale_log2=scale * LOG2E,
        num_key_value_heads=num_key_value_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        **config.kwargs(),
    )
    return out, lse
