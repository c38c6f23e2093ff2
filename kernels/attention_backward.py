"""Backward pass of `attention`: scores again, then three products of matrices; no atomics.

    delta = sum(dout * out)          p = exp2(s - lse)          ds = p * (dout v^T - delta)
    dq = scale * ds k                dk = scale * ds^T q        dv = p^T dout

One kernel writes tiles of p and ds into a workspace, in q's dtype; another multiplies them, with accumulators small
enough to keep the tensor cores busy, where kernels that recompute the scores for dq and for dk hold whole heads. A
chunk of positions at a time, as the workspace allows; dk and dv meet in float32, in a fixed order. Of a sliding window
the workspace holds the tiles of keys that a row can reach, at their number modulo as many.

Source: Dao, "FlashAttention-2" (2023), for the formulas; the split into products was measured for this package against
his two kernels, and is several times as fast with heads of 512 (`docs/kernels.md` has its speed).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from fastgemma.kernels.attention_products import _attention_products_kernel, ds_offset
from fastgemma.kernels.attention_tiles import (
    LOG2E,
    MAX_PLANS,
    NO_KEY,
    chunk_tile,
    in_bands,
    key_bounds,
    tiles,
)
from fastgemma.kernels.attention_wide import chunk_of_positions
from fastgemma.kernels.backend import Prepared, cdiv, kernel, kernel_of_any_numbers, tl
from fastgemma.kernels.key_intervals import ROWS_TOGETHER, KeyIntervals, Reach
from fastgemma.kernels.launch import Launch, launch, multiprocessors
from fastgemma.kernels.workspace import workspace_bytes

# Programs that share the rows of a tile of keys, at most: each part costs a float32 copy of dk and dv, and several of
# them a launch that adds them up.
_MOST_PARTS = 4


@kernel_of_any_numbers
def _attention_delta_kernel(
    dout_ptr,
    out_ptr,
    delta_ptr,
    n_rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (rows < n_rows)[:, None]
    dims = tl.arange(0, HEAD_DIM)[None, :]
    dout = tl.load(dout_ptr + rows[:, None] * HEAD_DIM + dims, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + rows[:, None] * HEAD_DIM + dims, mask=mask, other=0.0).to(tl.float32)
    tl.store(delta_ptr + rows, tl.sum(dout * out, axis=1), mask=rows < n_rows)


@kernel
def _attention_sum_kernel(parts_ptr, out_ptr, n_elements, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """[2, PARTS, n_elements] float32 summed over PARTS, in their order."""
    side = tl.program_id(1).to(tl.int64)
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n_elements
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(parts_ptr + (side * PARTS + part) * n_elements + offsets, mask=mask, other=0.0)
    tl.store(out_ptr + side * n_elements + offsets, total.to(out_ptr.dtype.element_ty), mask=mask)


@kernel_of_any_numbers
def _attention_ds_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lo_ptr,
    hi_ptr,
    first_ptr,
    end_ptr,
    lse_ptr,
    delta_ptr,
    workspace_ptr,
    seq_len,
    start,
    stop,
    n_rows,
    n_tiles,
    n_slots,
    reach,
    scale_log2,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NO_KEY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    tile, key_tile = in_bands(tl.program_id(0), n_rows // BLOCK_M, n_slots, 8)
    batch, head, positions, heads, exists, lo, hi = chunk_tile(
        lo_ptr, hi_ptr, tl.program_id(1), tile, seq_len, start, stop, KV_HEADS, GROUP, BLOCK_M
    )
    q_rows = (batch * seq_len + positions) * (KV_HEADS * GROUP) + heads
    # Read only at the end, but there every program would wait for them.
    lse = tl.load(lse_ptr + q_rows)
    delta = tl.load(delta_ptr + q_rows)
    first, end = key_bounds(lo, hi, NO_KEY)
    position = start + tile * BLOCK_M // GROUP
    key_tile += tl.maximum(position - reach, 0) // BLOCK_N
    first_key = key_tile * BLOCK_N
    touched = (first_key < end) & (first_key + BLOCK_N > first)
    # The sums over rows go from the first row of a tile of keys to its last, through all between.
    known = key_tile < n_tiles
    first_position = tl.load(first_ptr + batch * n_tiles + key_tile, mask=known, other=NO_KEY)
    end_position = tl.load(end_ptr + batch * n_tiles + key_tile, mask=known, other=0)
    wanted = (position < end_position) & (tl.max(positions, axis=0) >= first_position)

    rows = tl.program_id(1).to(tl.int64) * n_rows + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = key_tile % n_slots * BLOCK_N + tl.arange(0, BLOCK_N)
    p_ptrs = workspace_ptr + rows[:, None] * (n_slots * BLOCK_N) + columns[None, :]
    ds_ptrs = p_ptrs + ds_offset(tl.num_programs(1), n_rows, n_slots, BLOCK_N)
    dtype = workspace_ptr.dtype.element_ty
    if touched:
        keys = first_key + tl.arange(0, BLOCK_N)
        k_rows = (batch * seq_len + tl.minimum(keys, seq_len - 1)) * KV_HEADS + head
        dims = tl.arange(0, BLOCK_D)
        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        dp = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for d in range(0, HEAD_DIM, BLOCK_D):
            q_offsets = (q_rows * HEAD_DIM)[:, None] + (d + dims)[None, :]
            k_offsets = (k_rows * HEAD_DIM)[:, None] + (d + dims)[None, :]
            s = tl.dot(tl.load(q_ptr + q_offsets), tl.trans(tl.load(k_ptr + k_offsets)), s, input_precision="ieee")
            dp = tl.dot(tl.load(dout_ptr + q_offsets), tl.trans(tl.load(v_ptr + k_offsets)), dp, input_precision="ieee")
        keep = (keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None])
        p = tl.where(keep, tl.exp2(s * scale_log2 - lse[:, None]), 0.0)
        # Over a single key the softmax is constant; the difference of dp and delta would be a rounding error.
        ds = tl.where(keep & (lo + 1 < hi)[:, None], p * (dp - delta[:, None]), 0.0)
        tl.store(p_ptrs, p.to(dtype))
        tl.store(ds_ptrs, ds.to(dtype))
    elif wanted:
        zeros = tl.zeros([BLOCK_M, BLOCK_N], dtype)
        tl.store(p_ptrs, zeros)
        tl.store(ds_ptrs, zeros)


def key_blocks(head_dim: int, dtype: torch.dtype, device: torch.device) -> tuple[int, int]:
    """The sizes of tiles of keys whose `KeyIntervals.rows_of_keys` the backward reads."""
    to_ds, products = (tiles(f"attention_{name}", head_dim, dtype, device) for name in ("ds", "products"))
    return to_ds.blocks["BLOCK_N"], products.blocks["KEY_BLOCK_N"]


class _Chunk(NamedTuple):
    """The launches of a chunk of positions."""

    to_ds: Prepared
    products: Prepared


class Sums(NamedTuple):
    """How dk and dv come together: from so many parts, in q's dtype where they are whole at once, else in float32."""

    parts: int
    dtype: torch.dtype


class _Plan(NamedTuple):
    """What `attention_bwd` needs for tensors of one shape: its launches, and what their buffers hold."""

    to_delta: Prepared
    chunks: list[_Chunk]
    workspace_size: int
    sums: Sums
    key_blocks: tuple[int, int]


def _parts(rows: int, work: int, products: Launch, device: torch.device) -> int:
    """How many programs share the `rows` of a tile of keys, of a launch with `work` multiplications in all.

    Below twice its share of the work, a program that has them alone is done before adding up parts would be worth it.
    """
    longest = rows * products.blocks["KEY_BLOCK_N"] * products.blocks["KEY_DIMS"] * multiprocessors(device)
    return 1 if longest <= 2 * work else min(cdiv(longest, work), _MOST_PARTS)


def _q_first(keys: int, rows: int, products: Launch) -> bool:
    """Whether a program of dq, over so many keys, takes longer than one of dk or dv over so many rows."""
    blocks = products.blocks
    of_keys = rows * blocks["KEY_BLOCK_N"] * blocks["KEY_DIMS"]
    return keys * blocks["BLOCK_M"] * blocks["DIMS"] > of_keys


@functools.lru_cache(MAX_PLANS)
def _plan(
    shape: torch.Size,
    num_key_value_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    to_delta: Launch,
    to_ds: Launch,
    products: Launch,
    reach: Reach,
    scale: float,
    budget: int,
    needs: tuple[bool, bool],
) -> _Plan:
    batch, seq_len, num_heads, head_dim = shape
    group, slots = num_heads // num_key_value_heads, batch * num_key_value_heads
    block_m, block_n, block_keys = to_ds.blocks["BLOCK_M"], to_ds.blocks["BLOCK_N"], products.blocks["KEY_BLOCK_N"]
    n_tiles = cdiv(seq_len, block_n)
    positions, most_slots = seq_len, n_tiles
    if reach.causal and reach.window is not None:
        # Rows are known by ROWS_TOGETHER positions, so as many more may want a tile.
        positions = reach.window + ROWS_TOGETHER
        most_slots = min(n_tiles, (positions + cdiv(block_m, group) + ROWS_TOGETHER) // block_n + 2)
    windowed = most_slots < n_tiles
    chunk = chunk_of_positions(seq_len, 2 * slots * group * most_slots * block_n * dtype.itemsize, budget)
    n_rows = cdiv(chunk * group, block_m) * block_m

    pieces = head_dim // products.blocks["KEY_DIMS"]
    # Of the last chunk, whose rows have the most keys: three products of every pair of a row and a key.
    most_rows = min(n_rows, ((reach.window or seq_len) + block_keys) * group)
    pairs = n_rows * slots * min(seq_len - chunk // 2 if reach.causal else seq_len, reach.window or seq_len)
    parts = _parts(most_rows, 3 * pairs * head_dim, products, device)
    rows_of_part = cdiv(cdiv(n_rows, parts), block_m) * block_m
    parts = cdiv(n_rows, rows_of_part)

    heads = {"KV_HEADS": num_key_value_heads, "GROUP": group, "HEAD_DIM": head_dim}
    chunks = []
    started_tiles = 0
    for start in range(0, seq_len, chunk):
        stop = min(start + chunk, seq_len)
        first_tile, end_tile = reach.tiles_of_rows(start, stop, block_keys)
        n_slots = most_slots if windowed else reach.tiles_of_rows(start, stop, block_n)[1]
        shared = {"seq_len": seq_len, "start": start, "stop": stop, "n_rows": n_rows, "n_slots": n_slots, **heads}
        ds = {"n_tiles": n_tiles, "reach": positions, "scale_log2": scale * LOG2E, "NO_KEY": NO_KEY}
        key_programs = (end_tile - first_tile) * pieces * 2 * parts if needs[1] else 0
        q_programs = n_rows // products.blocks["BLOCK_M"] * (head_dim // products.blocks["DIMS"]) if needs[0] else 0
        gradients = {
            "rows_of_part": rows_of_part,
            "slots": slots,
            "q_programs": q_programs,
            "key_programs": key_programs,
            "q_first": int(_q_first(n_slots * block_n, min(rows_of_part, most_rows), products)),
            "first_tile": first_tile,
            "tiles_of_part": end_tile - first_tile,
            "started_tiles": started_tiles,
            "n_tiles": cdiv(seq_len, block_keys),
            "scale": scale,
            "NO_KEY": NO_KEY,
            "SLOT_N": block_n,
        }
        chunks.append(
            _Chunk(
                Prepared((n_rows // block_m * n_slots, slots), **ds, **shared, **to_ds.kwargs()),
                Prepared(((q_programs + key_programs) * slots,), **gradients, **shared, **products.kwargs()),
            )
        )
        started_tiles = end_tile

    rows = batch * seq_len * num_heads
    delta = Prepared((cdiv(rows, to_delta.blocks["BLOCK_M"]),), n_rows=rows, HEAD_DIM=head_dim, **to_delta.kwargs())
    # A single part and chunk is the result itself.
    sums = Sums(parts, dtype if parts == 1 and chunk == seq_len else torch.float32)
    workspace_size = 2 * slots * n_rows * most_slots * block_n
    return _Plan(delta, chunks, workspace_size, sums, (block_n, block_keys))


def _plan_for(
    shape: torch.Size,
    num_key_value_heads: int,
    dtype: torch.dtype,
    device: torch.device,
    reach: Reach,
    scale: float,
    needs: tuple[bool, bool],
) -> _Plan:
    to_delta = launch("attention_delta", "any", device)
    to_ds = tiles("attention_ds", shape[3], dtype, device)
    products = tiles("attention_products", shape[3], dtype, device)
    budget = workspace_bytes(device)
    return _plan(shape, num_key_value_heads, dtype, device, to_delta, to_ds, products, reach, scale, budget, needs)


def sums_of(
    shape: torch.Size, num_key_value_heads: int, dtype: torch.dtype, device: torch.device, reach: Reach
) -> Sums:
    """How dk and dv come together, of queries of this shape."""
    return _plan_for(shape, num_key_value_heads, dtype, device, reach, 1.0, (True, True)).sums


def attention_bwd(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    intervals: KeyIntervals,
    scale: float,
    needs: tuple[bool, bool],
    sums: Sums | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dq, dk and dv, contiguous, of what `attention_fwd` took and gave; dout as q. `needs`: dq; dk and dv.

    `sums`: what is compiled for, of another length, where nothing is launched.
    """
    dtype, device = q.dtype, q.device
    dq = torch.empty_like(q) if needs[0] else None
    if out.numel() == 0:
        return dq, torch.zeros_like(k) if needs[1] else None, torch.zeros_like(v) if needs[1] else None
    plan = _plan_for(q.shape, k.shape[2], dtype, device, intervals.reach, scale, needs)
    sums = plan.sums if sums is None else sums
    of_slots, of_keys = map(intervals.rows_of_keys, plan.key_blocks)
    delta = torch.empty_like(lse)
    _attention_delta_kernel[plan.to_delta](dout_ptr=dout, out_ptr=out, delta_ptr=delta)
    workspace = q.new_empty(plan.workspace_size)
    dk = dv = dkdv = None
    if needs[1]:
        if sums == (1, dtype):
            dk, dv = torch.empty_like(k), torch.empty_like(v)
        else:
            # One buffer for both, so that their parts meet in one launch.
            dkdv = torch.empty((2, sums.parts, *k.shape), dtype=sums.dtype, device=device)
            dk, dv = dkdv.unbind()
    # What stands in for them where they are not wanted is of their dtype, so that nothing else is compiled.
    unwanted = workspace if sums.dtype == dtype else delta
    lo, hi = intervals.lo, intervals.hi
    for scores, gradients in plan.chunks:
        _attention_ds_kernel[scores](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            dout_ptr=dout,
            lo_ptr=lo,
            hi_ptr=hi,
            first_ptr=of_slots[0],
            end_ptr=of_slots[1],
            lse_ptr=lse,
            delta_ptr=delta,
            workspace_ptr=workspace,
        )
        _attention_products_kernel[gradients](
            q_ptr=q,
            k_ptr=k,
            dout_ptr=dout,
            lo_ptr=lo,
            hi_ptr=hi,
            first_ptr=of_keys[0],
            end_ptr=of_keys[1],
            workspace_ptr=workspace,
            dq_ptr=q if dq is None else dq,
            dk_ptr=unwanted if dk is None else dk,
            dv_ptr=unwanted if dv is None else dv,
        )
    if dkdv is None:
        return dq, dk, dv
    whole = torch.empty((2, *k.shape), dtype=dtype, device=device)
    config = launch("attention_sum", "any", device)
    _attention_sum_kernel[(cdiv(k.numel(), config.blocks["BLOCK"]), 2)](
        parts_ptr=dkdv, out_ptr=whole, n_elements=k.numel(), PARTS=sums.parts, **config.kwargs()
    )
    dk, dv = whole.unbind()
    return dq, dk, dv
