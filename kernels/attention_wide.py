"""Forward pass of `attention` for heads too wide for one program's registers: scores first, then their sums of values.

An accumulator of 64 rows by 512 dimensions fills the registers of a program and leaves the tensor cores idle. Instead

    scores: of every tile  m = ceil(max s)   p = exp2(s - m)   l = sum p        p, in q's dtype, into a workspace
    output: over the tiles of a row          out = sum exp2(m - M) p v / L      M = max m,  L = sum exp2(m - M) l

both plain products of matrices. The maxima are whole numbers, so that rescaling p multiplies by a power of two, and
rounds nothing. Positions go in chunks, as the workspace allows; tiles that no row attends to are neither written nor
read. FLOPs as in `attention`; traffic 4 bytes a pair of a row and a key, in L2 for the most part.

Source: measured for this package; a kernel that holds whole heads of 512 runs at half the speed (`docs/kernels.md` has
this one's).
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
    chunk_tile,
    finite_rows,
    in_bands,
    key_bounds,
    products,
    tiles,
    wide,
)
from fastgemma.kernels.backend import Prepared, cdiv, jit, kernel_of_any_numbers, tl
from fastgemma.kernels.key_intervals import KeyIntervals, Reach
from fastgemma.kernels.launch import Launch
from fastgemma.kernels.workspace import workspace_bytes

# Positions of a chunk are a multiple of this, so that chunks are whole tiles of rows for any even group.
_ALIGN = 64
# More does not make the products faster.
_ENOUGH = 256 << 20


def chunk_of_positions(seq_len: int, bytes_per_position: int, budget: int) -> int:
    """How many positions at once: half of the budget, no more than is useful, at least 64."""
    affordable = min(budget // 2, _ENOUGH) // bytes_per_position
    return min(seq_len, max(affordable // _ALIGN, 1) * _ALIGN)


@kernel_of_any_numbers
def _attention_scores_kernel(
    q_ptr,
    k_ptr,
    lo_ptr,
    hi_ptr,
    workspace_ptr,
    peaks_ptr,
    totals_ptr,
    seq_len,
    start,
    stop,
    n_rows,
    first_tile,
    n_tiles,
    scale_log2,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NO_KEY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile, key_tile = in_bands(tl.program_id(0), n_rows // BLOCK_M, n_tiles, 8)
    batch, head, positions, heads, exists, lo, hi = chunk_tile(
        lo_ptr, hi_ptr, tl.program_id(1), tile, seq_len, start, stop, KV_HEADS, GROUP, BLOCK_M
    )
    first, end = key_bounds(lo, hi, NO_KEY)
    first_key = (first_tile + key_tile) * BLOCK_N
    if (first_key < end) & (first_key + BLOCK_N > first):
        keys = first_key + tl.arange(0, BLOCK_N)
        q_rows = (batch * seq_len + positions) * (KV_HEADS * GROUP) + heads
        k_rows = (batch * seq_len + tl.minimum(keys, seq_len - 1)) * KV_HEADS + head
        s = products(q_ptr + q_rows * HEAD_DIM, k_ptr + k_rows * HEAD_DIM, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D)
        keep = (keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None])
        s = tl.where(keep, s * scale_log2, -1e30)
        peak = tl.ceil(tl.max(s, axis=1))
        p = tl.where(keep, tl.exp2(s - peak[:, None]), 0.0)
        rows = tl.program_id(1).to(tl.int64) * n_rows + tile * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = key_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        workspace = workspace_ptr + rows[:, None] * (n_tiles * BLOCK_N) + columns[None, :]
        tl.store(workspace, p.to(workspace_ptr.dtype.element_ty))
        stats = key_tile.to(tl.int64) * n_rows * tl.num_programs(1) + rows
        tl.store(peaks_ptr + stats, peak)
        tl.store(totals_ptr + stats, tl.sum(p, axis=1))


@jit
def _sum_values(
    start,
    end,
    first_key,
    highest,
    p_rows,
    peak_rows,
    tile_stride,
    v_base,
    lo,
    hi,
    seq_len,
    FINITE: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_K)
    p_ptrs = p_rows[:, None] + columns[None, :]
    v_ptrs = v_base + columns[:, None] * KEY_STRIDE + tl.arange(0, DIMS)[None, :]
    acc = tl.zeros([BLOCK_M, DIMS], tl.float32)
    for key in range(start, end, BLOCK_K):
        column = tl.multiple_of(key - first_key, BLOCK_K)
        peak = tl.load(peak_rows + column // BLOCK_N * tile_stride)
        p = tl.load(p_ptrs + column)
        v = tl.load(v_ptrs + wide(key) * KEY_STRIDE, mask=columns[:, None] < seq_len - key, other=0.0)
        weights = p.to(tl.float32) * tl.exp2(peak - highest)[:, None]
        if FINITE:
            v, bad = finite_rows(v)
            keep = (key + columns[None, :] >= lo[:, None]) & (key + columns[None, :] < hi[:, None])
            weights = tl.where(keep & bad[None, :], float("nan"), weights)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return acc


@kernel_of_any_numbers
def _attention_output_kernel(
    v_ptr,
    lo_ptr,
    hi_ptr,
    workspace_ptr,
    peaks_ptr,
    totals_ptr,
    out_ptr,
    lse_ptr,
    seq_len,
    start,
    stop,
    n_rows,
    first_tile,
    n_tiles,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NO_KEY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DIMS: tl.constexpr,
):
    PIECES: tl.constexpr = HEAD_DIM // DIMS
    tile = n_rows // BLOCK_M - 1 - tl.program_id(0) // PIECES
    first_dim = tl.program_id(0) % PIECES * DIMS
    batch, head, positions, heads, exists, lo, hi = chunk_tile(
        lo_ptr, hi_ptr, tl.program_id(1), tile, seq_len, start, stop, KV_HEADS, GROUP, BLOCK_M
    )
    first, end = key_bounds(lo, hi, NO_KEY)
    first_key = first_tile * BLOCK_N
    rows = tl.program_id(1).to(tl.int64) * n_rows + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    tile_stride = tl.num_programs(1).to(tl.int64) * n_rows

    highest = tl.full([BLOCK_M], -1e30, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for key_tile in range(first // BLOCK_N, (end + BLOCK_N - 1) // BLOCK_N):
        stats = (key_tile - first_tile) * tile_stride + rows
        peak = tl.load(peaks_ptr + stats)
        higher = tl.maximum(highest, peak)
        total = total * tl.exp2(highest - higher) + tl.load(totals_ptr + stats) * tl.exp2(peak - higher)
        highest = higher

    p_rows = workspace_ptr + rows * (n_tiles * BLOCK_N)
    v_base = v_ptr + (batch * seq_len * KV_HEADS + head) * HEAD_DIM + first_dim
    first = first // BLOCK_K * BLOCK_K
    acc = _sum_values(
        first, end, first_key, highest, p_rows, peaks_ptr + rows, tile_stride, v_base, lo, hi,
        seq_len, False, KV_HEADS * HEAD_DIM, DIMS, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if not all_finite(acc):
        acc = _sum_values(
            first, end, first_key, highest, p_rows, peaks_ptr + rows, tile_stride, v_base, lo, hi,
            seq_len, True, KV_HEADS * HEAD_DIM, DIMS, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    some = lo < hi
    total = tl.where(some, total, 1.0)
    out = tl.where(some[:, None], acc / total[:, None], 0.0)
    q_rows = (batch * seq_len + positions) * (KV_HEADS * GROUP) + heads
    out_ptrs = out_ptr + q_rows[:, None] * HEAD_DIM + (first_dim + tl.arange(0, DIMS))[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=exists[:, None])
    if first_dim == 0:
        tl.store(lse_ptr + q_rows, tl.where(some, highest + tl.log2(total), 0.0), mask=exists)


class _Plan(NamedTuple):
    """What `wide_attention_fwd` needs for tensors of one shape: launches by chunk of positions; numbers in buffers."""

    chunks: list[tuple[Prepared, Prepared]]  # to scores, to the output
    workspace_size: int
    stats_size: int


@functools.lru_cache(MAX_PLANS)
def _plan(
    shape: torch.Size,
    num_key_value_heads: int,
    itemsize: int,
    scores: Launch,
    output: Launch,
    reach: Reach,
    scale: float,
    budget: int,
) -> _Plan:
    batch, seq_len, num_heads, head_dim = shape
    group, slots = num_heads // num_key_value_heads, batch * num_key_value_heads
    rows_of_tile = max(scores.blocks["BLOCK_M"], output.blocks["BLOCK_M"])
    block_n = scores.blocks["BLOCK_N"]
    chunk = chunk_of_positions(seq_len, slots * group * cdiv(seq_len, block_n) * block_n * itemsize, budget)
    n_rows = cdiv(chunk * group, rows_of_tile) * rows_of_tile
    pieces = head_dim // output.blocks["DIMS"]
    chunks = []
    most_tiles = 0
    for start in range(0, seq_len, chunk):
        stop = min(start + chunk, seq_len)
        first_tile, end_tile = reach.tiles_of_rows(start, stop, block_n)
        n_tiles = end_tile - first_tile
        most_tiles = max(most_tiles, n_tiles)
        shared = {
            "seq_len": seq_len,
            "start": start,
            "stop": stop,
            "n_rows": n_rows,
            "first_tile": first_tile,
            "n_tiles": n_tiles,
            "KV_HEADS": num_key_value_heads,
            "GROUP": group,
            "HEAD_DIM": head_dim,
            "NO_KEY": NO_KEY,
        }
        chunks.append(
            (
                Prepared(
                    (n_rows // scores.blocks["BLOCK_M"] * n_tiles, slots),
                    scale_log2=scale * LOG2E,
                    **shared,
                    **scores.kwargs(),
                ),
                Prepared(
                    (n_rows // output.blocks["BLOCK_M"] * pieces, slots), BLOCK_N=block_n, **shared, **output.kwargs()
                ),
            )
        )
    return _Plan(chunks, slots * n_rows * most_tiles * block_n, slots * n_rows * most_tiles)


def wide_attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    intervals: KeyIntervals,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    """Writes `out` and `lse`, which are as `attention_fwd` returns them."""
    rows = (tiles(f"attention_{name}", q.shape[3], q.dtype, q.device) for name in ("scores", "output"))
    plan = _plan(q.shape, k.shape[2], q.dtype.itemsize, *rows, intervals.reach, scale, workspace_bytes(q.device))
    workspace = q.new_empty(plan.workspace_size)
    peaks, totals = (q.new_empty(plan.stats_size, dtype=torch.float32) for _ in range(2))
    lo, hi = intervals.lo, intervals.hi
    for to_scores, to_output in plan.chunks:
        _attention_scores_kernel[to_scores](
            q_ptr=q, k_ptr=k, lo_ptr=lo, hi_ptr=hi, workspace_ptr=workspace, peaks_ptr=peaks, totals_ptr=totals
        )
        _attention_output_kernel[to_output](
            v_ptr=v,
            lo_ptr=lo,
            hi_ptr=hi,
            workspace_ptr=workspace,
            peaks_ptr=peaks,
            totals_ptr=totals,
            out_ptr=out,
            lse_ptr=lse,
        )
