"""Backward pass of `attention`: scores again, then three products of matrices; no atomics.

    delta = sum(dout * out)          p = exp2(s - lse)          ds = p * (dout v^T - delta)
    dq = scale * ds k                dk = scale * ds^T q        dv = p^T dout

One kernel writes tiles of p and ds into a workspace, in q's dtype; two more multiply them, each with accumulators small
enough to keep the tensor cores busy, where kernels that recompute the scores for dq and for dk hold whole heads. A
chunk of positions at a time, as the workspace allows; dk and dv meet in float32, in a fixed order. Of a sliding window
the workspace holds the tiles of keys that a row can reach, at their number modulo as many.

Source: Dao, "FlashAttention-2" (2023), for the formulas; the split into products was measured for this package against
his two kernels, and is several times as fast with heads of 512 (`docs/kernels.md` has its speed).
"""

from __future__ import annotations

import torch

from fastgemma.kernels.attention_products import _attention_dkdv_kernel, _attention_dq_kernel, ds_offset
from fastgemma.kernels.attention_tiles import (
    LOG2E,
    NO_KEY,
    chunk_tile,
    in_bands,
    key_bounds,
    tiles,
)
from fastgemma.kernels.attention_wide import chunk_of_positions
from fastgemma.kernels.backend import cdiv, kernel, kernel_of_any_numbers, tl
from fastgemma.kernels.key_intervals import ROWS_TOGETHER, KeyIntervals
from fastgemma.kernels.launch import launch, multiprocessors

# Programs that share the rows of a tile of keys, at most: each part costs a float32 copy of dk and dv.
_MOST_PARTS = 4


@kernel
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
        lo_ptr, hi_ptr, tile, seq_len, start, stop, KV_HEADS, GROUP, BLOCK_M
    )
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
        q_rows = (batch * seq_len + positions) * (KV_HEADS * GROUP) + heads
        k_rows = (batch * seq_len + tl.minimum(keys, seq_len - 1)) * KV_HEADS + head
        dims = tl.arange(0, BLOCK_D)
        s = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        dp = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for d in range(0, HEAD_DIM, BLOCK_D):
            q_offsets = (q_rows * HEAD_DIM)[:, None] + (d + dims)[None, :]
            k_offsets = (k_rows * HEAD_DIM)[:, None] + (d + dims)[None, :]
            s = tl.dot(tl.load(q_ptr + q_offsets), tl.trans(tl.load(k_ptr + k_offsets)), s, input_precision="ieee")
            dp = tl.dot(tl.load(dout_ptr + q_offsets), tl.trans(tl.load(v_ptr + k_offsets)), dp, input_precision="ieee")
        lse = tl.load(lse_ptr + q_rows)
        delta = tl.load(delta_ptr + q_rows)
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
    to_ds, to_dkdv = (tiles(f"attention_{name}", head_dim, dtype, device) for name in ("ds", "dkdv"))
    return to_ds.blocks["BLOCK_N"], to_dkdv.blocks["BLOCK_N"]


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
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dq, dk and dv, contiguous, of what `attention_fwd` took and gave; dout as q. `needs`: dq; dk and dv."""
    batch, seq_len, num_heads, head_dim = q.shape
    num_key_value_heads = k.shape[2]
    group, slots = num_heads // num_key_value_heads, batch * num_key_value_heads
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if needs[0] else None
    if out.numel() == 0:
        return dq, torch.zeros_like(k) if needs[1] else None, torch.zeros_like(v) if needs[1] else None
    delta = torch.empty_like(lse)
    config = launch("attention_delta", "any", q.device)
    n_rows = batch * seq_len * num_heads
    _attention_delta_kernel[(cdiv(n_rows, config.blocks["BLOCK_M"]),)](
        dout_ptr=dout,
        out_ptr=out,
        delta_ptr=delta,
        n_rows=n_rows,
        HEAD_DIM=head_dim,
        **config.kwargs(),
    )

    to_ds, to_dq, to_dkdv = (tiles(f"attention_{name}", head_dim, q.dtype, q.device) for name in ("ds", "dq", "dkdv"))
    block_m, (block_n, block_keys) = to_ds.blocks["BLOCK_M"], key_blocks(head_dim, q.dtype, q.device)
    n_tiles = cdiv(seq_len, block_n)
    reach, most_slots = seq_len, n_tiles
    if intervals.causal and intervals.window is not None:
        # Rows are known by ROWS_TOGETHER positions, so as many more may want a tile.
        reach = intervals.window + ROWS_TOGETHER
        most_slots = min(n_tiles, (reach + cdiv(block_m, group) + ROWS_TOGETHER) // block_n + 2)
    windowed = most_slots < n_tiles
    chunk = chunk_of_positions(seq_len, 2 * slots * group * most_slots * block_n * q.element_size(), q.device)
    n_rows = cdiv(chunk * group, block_m) * block_m
    workspace = torch.empty(2 * slots * n_rows * most_slots * block_n, dtype=q.dtype, device=q.device)
    shared = {
        "lo_ptr": intervals.lo,
        "hi_ptr": intervals.hi,
        "workspace_ptr": workspace,
        "seq_len": seq_len,
        "n_rows": n_rows,
        "KV_HEADS": num_key_value_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
    }
    first, end = intervals.rows_of_keys(block_n)
    first_of_keys, end_of_keys = intervals.rows_of_keys(block_keys)
    pieces = head_dim // to_dkdv.blocks["DIMS"]
    dk = dv = None
    if needs[1]:
        # Short sequences give too few programs: several share the rows of a tile of keys.
        first_tile, end_tile = intervals.tiles_of_rows(max(seq_len - chunk, 0), seq_len, block_keys)
        programs = (end_tile - first_tile) * pieces * 2 * slots
        parts = min(max(2 * multiprocessors(q.device) // programs, 1), _MOST_PARTS)
        rows_of_part = cdiv(cdiv(n_rows, parts), block_m) * block_m
        parts = cdiv(n_rows, rows_of_part)
        # A single part and chunk is the result itself.
        dtype = q.dtype if parts == 1 and chunk == seq_len else torch.float32
        dk, dv = (torch.empty((parts, *k.shape), dtype=dtype, device=q.device) for _ in range(2))
    started_tiles = 0
    for start in range(0, seq_len, chunk):
        stop = min(start + chunk, seq_len)
        first_tile, end_tile = intervals.tiles_of_rows(start, stop, block_keys)
        n_slots = most_slots if windowed else intervals.tiles_of_rows(start, stop, block_n)[1]
        of_chunk = {**shared, "start": start, "stop": stop, "n_slots": n_slots}
        _attention_ds_kernel[(n_rows // block_m * n_slots, slots)](
            q_ptr=q,
            k_ptr=k,
            v_ptr=v,
            dout_ptr=dout,
            first_ptr=first,
            end_ptr=end,
            lse_ptr=lse,
            delta_ptr=delta,
            n_tiles=n_tiles,
            reach=reach,
            scale_log2=scale * LOG2E,
            NO_KEY=NO_KEY,
            **of_chunk,
            **to_ds.kwargs(),
        )
        if dq is not None:
            programs = n_rows // to_dq.blocks["BLOCK_M"] * (head_dim // to_dq.blocks["DIMS"])
            _attention_dq_kernel[(programs, slots)](
                k_ptr=k,
                dq_ptr=dq,
                scale=scale,
                NO_KEY=NO_KEY,
                BLOCK_N=block_n,
                **of_chunk,
                **to_dq.kwargs(),
            )
        if not needs[1]:
            continue
        _attention_dkdv_kernel[((end_tile - first_tile) * pieces * 2, parts, slots)](
            q_ptr=q,
            dout_ptr=dout,
            first_ptr=first_of_keys,
            end_ptr=end_of_keys,
            dk_ptr=dk,
            dv_ptr=dv,
            rows_of_part=rows_of_part,
            first_tile=first_tile,
            started_tiles=started_tiles,
            n_tiles=first_of_keys.shape[1],
            scale=scale,
            SLOT_N=block_n,
            **of_chunk,
            **to_dkdv.kwargs(),
        )
        started_tiles = end_tile
    if dk is None or dv is None:
        return dq, None, None
    dk, dv = ((x[0] if len(x) == 1 else x.sum(0)).to(k.dtype) for x in (dk, dv))
    return dq, dk, dv
