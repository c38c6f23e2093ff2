"""Forward pass of `attention` for heads that a program can hold: one kernel, online softmax, keys read in place.

A program visits the tiles between the least lo and the greatest hi of its rows; only tiles that some row attends to in
part are masked. Wider heads: `attention_wide`.

Source: Dao, "FlashAttention-2" (2023), for the order of the loops.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from fastgemma.kernels.attention_tiles import (
    LOG2E,
    MAX_PLANS,
    NO_KEY,
    all_finite,
    finite_rows,
    full_bounds,
    key_bounds,
    row_offsets,
    row_tile,
    tiles,
    wide,
)
from fastgemma.kernels.attention_wide import wide_attention_fwd
from fastgemma.kernels.backend import Prepared, cdiv, jit, kernel_of_any_numbers, tile_descriptor, tl
from fastgemma.kernels.key_intervals import KeyIntervals
from fastgemma.kernels.launch import Launch

# Wider heads, and numbers of 4 bytes, leave too few registers and too little shared memory for whole heads.
_WIDEST = 256


@jit
def _tile(ptrs, desc, first, batch_row, column, mask, KEY_STRIDE: tl.constexpr):
    """Keys from `first` on: through the copy engine where there is a descriptor, else as addresses in registers.

    Past the end of a sequence the copy engine reads the next one; of what is masked nothing but its finiteness counts.
    """
    if desc is None:
        tile = tl.load(ptrs + wide(first) * KEY_STRIDE, mask=mask, other=0.0)
    else:
        tile = desc.load([batch_row + first, column])
    return tile


@jit
def _attend(
    acc,
    peak,
    total,
    start,
    end,
    q,
    k_ptrs,
    v_ptrs,
    k_desc,
    v_desc,
    batch_row,
    column,
    lo,
    hi,
    seq_len,
    scale_log2,
    MASKED: tl.constexpr,
    FINITE: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Takes the keys from `start` to `end` into account."""
    keys = tl.arange(0, BLOCK_N)
    for first in range(start, end, BLOCK_N):
        mask = keys[:, None] < (seq_len - first if MASKED else BLOCK_N)
        k = _tile(k_ptrs, k_desc, first, batch_row, column, mask, KEY_STRIDE)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        v = _tile(v_ptrs, v_desc, first, batch_row, column, mask, KEY_STRIDE)
        if MASKED:
            keep = (first + keys[None, :] >= lo[:, None]) & (first + keys[None, :] < hi[:, None])
            # Not -inf: the difference of two infinities is NaN.
            s = tl.where(keep, s, -1e30)
        new_peak = tl.maximum(peak, tl.max(s, axis=1) * scale_log2)
        p = tl.exp2(s * scale_log2 - new_peak[:, None])
        if FINITE:
            v, bad = finite_rows(v)
            p = tl.where(bad[None, :], float("nan"), p)
        if MASKED:
            # Of a row without keys so far the peak is -1e30, and its exponentials are 1.
            p = tl.where(keep, p, 0.0)
        correction = tl.exp2(peak - new_peak)
        total = total * correction + tl.sum(p, axis=1)
        peak = new_peak
        acc = tl.dot(p.to(v.dtype), v, acc * correction[:, None], input_precision="ieee")
    return acc, peak, total


@jit
def _store(acc, peak, total, some, exists, out_ptrs, lse_ptrs):
    """`some`: which rows have keys, and others an `acc` of zeros; `exists`: which rows there are."""
    total = tl.where(some, total, 1.0)
    out = acc * (1.0 / total)[:, None]
    tl.store(out_ptrs, out.to(out_ptrs.dtype.element_ty), mask=exists[:, None])
    tl.store(lse_ptrs, tl.where(some, peak + tl.log2(total), 0.0), mask=exists)


@kernel_of_any_numbers
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    lo_ptr,
    hi_ptr,
    out_ptr,
    lse_ptr,
    k_desc,
    v_desc,
    seq_len,
    scale_log2,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NO_KEY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    KEY_STRIDE: tl.constexpr = KV_HEADS * HEAD_DIM
    head = tl.program_id(0)
    # Causal rows have more keys the later they come: the long programs start first.
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    positions, members, exists, lo, hi = row_tile(
        lo_ptr + batch * seq_len, hi_ptr + batch * seq_len, tile * BLOCK_M, 0, seq_len, GROUP, BLOCK_M
    )
    # The tile's rows in [batch, seq_len, heads], from a first one on.
    if BLOCK_M % GROUP == 0:
        # Constant distances take no registers through the loops: see `row_offsets`.
        start = ((batch * seq_len + tile * (BLOCK_M // GROUP)) * KV_HEADS + head) * GROUP
        rows = row_offsets(tl.arange(0, BLOCK_M), KV_HEADS, GROUP, 1)
    else:
        start = batch * seq_len * (KV_HEADS * GROUP)
        rows = positions * (KV_HEADS * GROUP) + head * GROUP + members
    dims = tl.arange(0, HEAD_DIM)[None, :]
    places = rows[:, None] * HEAD_DIM + dims
    q = tl.load(q_ptr + start * HEAD_DIM + places, mask=exists[:, None], other=0.0)
    # From the first key on, at no multiple of BLOCK_N: a window takes a tile more where its first one starts early.
    first, end = key_bounds(lo, hi, NO_KEY)
    full, partial = full_bounds(lo, hi, exists, first, end, NO_KEY, BLOCK_N)
    keys = batch * seq_len * KEY_STRIDE + head * HEAD_DIM + (tl.arange(0, BLOCK_N) * KEY_STRIDE)[:, None] + dims
    k_ptrs, v_ptrs = k_ptr + keys, v_ptr + keys
    batch_row = tl.program_id(2) * seq_len
    column = head * HEAD_DIM

    peak = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    acc, peak, total = _attend(
        acc, peak, total, first, full, q, k_ptrs, v_ptrs, k_desc, v_desc, batch_row, column,
        lo, hi, seq_len, scale_log2, True, False, KEY_STRIDE, BLOCK_N,
    )  # fmt: skip
    acc, peak, total = _attend(
        acc, peak, total, full, partial, q, k_ptrs, v_ptrs, k_desc, v_desc, batch_row, column,
        lo, hi, seq_len, scale_log2, False, False, KEY_STRIDE, BLOCK_N,
    )  # fmt: skip
    acc, peak, total = _attend(
        acc, peak, total, partial, end, q, k_ptrs, v_ptrs, k_desc, v_desc, batch_row, column,
        lo, hi, seq_len, scale_log2, True, False, KEY_STRIDE, BLOCK_N,
    )  # fmt: skip
    out_ptrs = out_ptr + start * HEAD_DIM + places
    lse_ptrs = lse_ptr + start + rows
    some = lo < hi
    finite = all_finite(acc)
    # What has to be done again is written all the same: waiting for the answer would keep registers.
    _store(acc, peak, total, some, exists, out_ptrs, lse_ptrs)
    if not finite:
        peak = tl.full([BLOCK_M], -1e30, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
        acc, peak, total = _attend(
            acc, peak, total, first, end, q, k_ptrs, v_ptrs, k_desc, v_desc, batch_row, column,
            lo, hi, seq_len, scale_log2, True, True, KEY_STRIDE, BLOCK_N,
        )  # fmt: skip
        _store(acc, peak, total, some, exists, out_ptrs, lse_ptrs)


class _Plan(NamedTuple):
    """What `attention_fwd` needs for tensors of one shape."""

    whole: Prepared
    tiles: tuple[list[int], list[int]] | None  # of k and v as rows, where the copy engine loads them: shape and block


@functools.lru_cache(MAX_PLANS)
def _plan(shape: torch.Size, num_key_value_heads: int, config: Launch, scale: float) -> _Plan:
    batch, seq_len, num_heads, head_dim = shape
    group = num_heads // num_key_value_heads
    whole = Prepared(
        (num_key_value_heads, cdiv(seq_len * group, config.blocks["BLOCK_M"]), batch),
        seq_len=seq_len,
        scale_log2=scale * LOG2E,
        KV_HEADS=num_key_value_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        NO_KEY=NO_KEY,
        **config.kwargs(),
    )
    rows = [batch * seq_len, num_key_value_heads * head_dim]
    return _Plan(whole, (rows, [config.blocks["BLOCK_N"], head_dim]) if config.descriptors else None)


def attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, intervals: KeyIntervals, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out like q, contiguous; lse [batch, seq_len, num_heads] float32, to base 2), without autograd.

    q [batch, seq_len, num_heads, head_dim]; k, v [batch, seq_len, num_key_value_heads, head_dim]; all contiguous. Rows
    without keys give zeros.
    """
    shape, dtype, device = q.shape, q.dtype, q.device
    out = torch.empty_like(q)
    lse = q.new_empty(shape[:3], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    head_dim = shape[3]
    if head_dim > _WIDEST or dtype == torch.float32:
        wide_attention_fwd(q, k, v, intervals, scale, out, lse)
        return out, lse
    plan = _plan(shape, k.shape[2], tiles("attention_fwd", head_dim, dtype, device), scale)
    k_desc = v_desc = None
    if plan.tiles is not None:
        k_desc, v_desc = tile_descriptor(k, *plan.tiles), tile_descriptor(v, *plan.tiles)
    _attention_fwd_kernel[plan.whole](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        lo_ptr=intervals.lo,
        hi_ptr=intervals.hi,
        out_ptr=out,
        lse_ptr=lse,
        k_desc=k_desc,
        v_desc=v_desc,
    )
    return out, lse
