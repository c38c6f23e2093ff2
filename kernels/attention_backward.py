"""Backward pass of `attention`: two Triton kernels, one over rows for dq, one over keys for dk and dv; no atomics.

    delta = sum(dout * out)          p = exp2(s - lse)          ds = p * (dout v^T - delta)
    dq = scale * ds k                dk = scale * ds^T q        dv = p^T dout

Rows, tiles and SPLITS are those of the forward. Over keys, a program goes through the rows that may attend to its tile
(`KeyIntervals.rows_of_keys`); with PARTS, several programs share them and their sums meet in float32 afterwards, in a
fixed order: one key/value head alone gives too few programs at short sequences.

Source: Dao, "FlashAttention-2" (2023).
"""

from __future__ import annotations

import torch

from fastgemma.kernels.attention_forward import LOG2E, finite_rows, products, row_tile
from fastgemma.kernels.backend import cdiv, jit, kernel, tl
from fastgemma.kernels.key_intervals import KeyIntervals
from fastgemma.kernels.launch import launch


@kernel
def _attention_delta_kernel(
    dout_ptr,
    out_ptr,
    delta_ptr,
    dout_batch_stride,
    dout_position_stride,
    seq_len,
    num_heads,
    n_rows,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (rows < n_rows)[:, None]
    dims = tl.arange(0, HEAD_DIM)[None, :]
    tokens = rows // num_heads
    dout_rows = tokens // seq_len * dout_batch_stride + tokens % seq_len * dout_position_stride
    dout_rows += rows % num_heads * HEAD_DIM
    dout = tl.load(dout_ptr + dout_rows[:, None] + dims, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + rows[:, None] * HEAD_DIM + dims, mask=mask, other=0.0).to(tl.float32)
    tl.store(delta_ptr + rows, tl.sum(dout * out, axis=1), mask=rows < n_rows)


@jit
def _dq_of_keys(
    acc,
    start,
    end,
    q,
    dout,
    q_ptrs,
    dout_ptrs,
    k_base,
    v_base,
    k_slice,
    k_position_stride,
    v_position_stride,
    row_mask,
    lo,
    hi,
    lse,
    delta,
    seq_len,
    scale_log2,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    dims = tl.arange(0, BLOCK_D)
    for first in range(start, end, BLOCK_N):
        keys = first + tl.arange(0, BLOCK_N)
        key_mask = keys < seq_len
        offsets = keys[:, None].to(tl.int64)
        k_ptrs = k_base + offsets * k_position_stride + dims[None, :]
        v_ptrs = v_base + offsets * v_position_stride + dims[None, :]
        s = products(q, q_ptrs, k_ptrs, row_mask, key_mask, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D) * scale_log2
        dp = products(dout, dout_ptrs, v_ptrs, row_mask, key_mask, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D)
        ds = tl.exp2(s - lse[:, None]) * (dp - delta[:, None])
        k = tl.load(k_slice + offsets * k_position_stride, mask=key_mask[:, None], other=0.0)
        if MASKED:
            keep = (keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None])
            k, bad = finite_rows(k, key_mask)
            ds = tl.where(keep, tl.where(bad[None, :], float("nan"), ds), 0.0)
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision="ieee")
    return acc


@kernel
def _attention_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    dout_ptr,
    lo_ptr,
    hi_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    q_batch_stride,
    q_position_stride,
    k_batch_stride,
    k_position_stride,
    v_batch_stride,
    v_position_stride,
    dout_batch_stride,
    dout_position_stride,
    seq_len,
    scale,
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
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    positions, members, row_mask, lo, hi, first, full, partial, end = row_tile(
        lo_ptr + batch * seq_len, hi_ptr + batch * seq_len, tile, seq_len, GROUP, BLOCK_M, BLOCK_N
    )
    heads = head * GROUP + members
    dims = tl.arange(0, BLOCK_D)
    out_dims = split * DIMS + tl.arange(0, DIMS)
    wide = positions[:, None].to(tl.int64)
    columns = heads[:, None] * HEAD_DIM + dims[None, :]
    q_ptrs = q_ptr + batch * q_batch_stride + wide * q_position_stride + columns
    dout_ptrs = dout_ptr + batch * dout_batch_stride + wide * dout_position_stride + columns
    q = tl.load(q_ptrs, mask=row_mask[:, None], other=0.0)
    dout = tl.load(dout_ptrs, mask=row_mask[:, None], other=0.0)
    row_offsets = (batch * seq_len + positions) * (num_key_value_heads * GROUP) + heads
    lse = tl.load(lse_ptr + row_offsets, mask=row_mask, other=0.0)
    delta = tl.load(delta_ptr + row_offsets, mask=row_mask, other=0.0)
    k_base = k_ptr + batch * k_batch_stride + head * HEAD_DIM
    v_base = v_ptr + batch * v_batch_stride + head * HEAD_DIM
    k_slice = k_base + out_dims[None, :]

    acc = tl.zeros([BLOCK_M, DIMS], tl.float32)
    acc = _dq_of_keys(
        acc, first, full, q, dout, q_ptrs, dout_ptrs, k_base, v_base, k_slice, k_position_stride, v_position_stride,
        row_mask, lo, hi, lse, delta, seq_len, scale_log2, True, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc = _dq_of_keys(
        acc, full, partial, q, dout, q_ptrs, dout_ptrs, k_base, v_base, k_slice, k_position_stride, v_position_stride,
        row_mask, lo, hi, lse, delta, seq_len, scale_log2, False, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc = _dq_of_keys(
        acc, partial, end, q, dout, q_ptrs, dout_ptrs, k_base, v_base, k_slice, k_position_stride, v_position_stride,
        row_mask, lo, hi, lse, delta, seq_len, scale_log2, True, HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    # Over a single key the softmax is constant; the difference of dp and delta would be a rounding error.
    dq = tl.where((lo + 1 < hi)[:, None], acc * scale, 0.0)
    dq_ptrs = dq_ptr + row_offsets[:, None] * HEAD_DIM + out_dims[None, :]
    tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=row_mask[:, None])


@kernel
def _attention_dkdv_kernel(
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
    dk_ptr,
    dv_ptr,
    q_batch_stride,
    q_position_stride,
    k_batch_stride,
    k_position_stride,
    v_batch_stride,
    v_position_stride,
    dout_batch_stride,
    dout_position_stride,
    seq_len,
    scale,
    scale_log2,
    num_key_value_heads,
    n_batch,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    DIMS: tl.constexpr = HEAD_DIM // SPLITS
    split = tl.program_id(0) % SPLITS
    part = tl.program_id(0) // SPLITS % PARTS
    head = tl.program_id(0) // (SPLITS * PARTS)
    tile = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    key_mask = keys < seq_len
    dims = tl.arange(0, BLOCK_D)
    out_dims = split * DIMS + tl.arange(0, DIMS)
    wide_keys = keys[:, None].to(tl.int64)
    k_ptrs = k_ptr + batch * k_batch_stride + wide_keys * k_position_stride + head * HEAD_DIM + dims[None, :]
    v_ptrs = v_ptr + batch * v_batch_stride + wide_keys * v_position_stride + head * HEAD_DIM + dims[None, :]
    k = tl.load(k_ptrs, mask=key_mask[:, None], other=0.0)
    v = tl.load(v_ptrs, mask=key_mask[:, None], other=0.0)

    first = tl.load(first_ptr + batch * tl.num_programs(1) + tile) * GROUP
    end = tl.load(end_ptr + batch * tl.num_programs(1) + tile) * GROUP
    dk = tl.zeros([BLOCK_N, DIMS], tl.float32)
    dv = tl.zeros([BLOCK_N, DIMS], tl.float32)
    for start in range(first + part * BLOCK_M, end, PARTS * BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        row_mask = rows < end
        positions = rows // GROUP
        heads = head * GROUP + rows % GROUP
        lo = tl.load(lo_ptr + batch * seq_len + positions, mask=row_mask, other=0)
        hi = tl.load(hi_ptr + batch * seq_len + positions, mask=row_mask, other=0)
        row_offsets = (batch * seq_len + positions) * (num_key_value_heads * GROUP) + heads
        lse = tl.load(lse_ptr + row_offsets, mask=row_mask, other=0.0)
        delta = tl.load(delta_ptr + row_offsets, mask=row_mask, other=0.0)
        wide = positions[:, None].to(tl.int64)
        q_rows = q_ptr + batch * q_batch_stride + wide * q_position_stride + heads[:, None] * HEAD_DIM
        dout_rows = dout_ptr + batch * dout_batch_stride + wide * dout_position_stride + heads[:, None] * HEAD_DIM
        q_ptrs, dout_ptrs = q_rows + dims[None, :], dout_rows + dims[None, :]
        s = products(k, k_ptrs, q_ptrs, key_mask, row_mask, HEAD_DIM, BLOCK_N, BLOCK_M, BLOCK_D) * scale_log2
        dp = products(v, v_ptrs, dout_ptrs, key_mask, row_mask, HEAD_DIM, BLOCK_N, BLOCK_M, BLOCK_D)
        keep = (keys[:, None] >= lo[None, :]) & (keys[:, None] < hi[None, :])
        p = tl.exp2(s - lse[None, :])
        ds = p * (dp - delta[None, :])
        q, bad_q = finite_rows(tl.load(q_rows + out_dims[None, :], mask=row_mask[:, None], other=0.0), row_mask)
        dout, bad_dout = finite_rows(
            tl.load(dout_rows + out_dims[None, :], mask=row_mask[:, None], other=0.0), row_mask
        )
        p = tl.where(keep, tl.where(bad_dout[None, :], float("nan"), p), 0.0)
        several = keep & (lo + 1 < hi)[None, :]
        ds = tl.where(several, tl.where(bad_q[None, :], float("nan"), ds), 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision="ieee")
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    # [parts, batch, seq_len, num_key_value_heads, head_dim], contiguous.
    offsets = (((part * n_batch + batch) * seq_len + wide_keys) * num_key_value_heads + head) * HEAD_DIM
    offsets += out_dims[None, :]
    tl.store(dk_ptr + offsets, (dk * scale).to(dk_ptr.dtype.element_ty), mask=key_mask[:, None])
    tl.store(dv_ptr + offsets, dv.to(dv_ptr.dtype.element_ty), mask=key_mask[:, None])


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
    group = num_heads // num_key_value_heads
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device) if needs[0] else None
    if out.numel() == 0:
        return dq, torch.zeros_like(k) if needs[1] else None, torch.zeros_like(v) if needs[1] else None
    delta = torch.empty_like(lse)
    config = launch("attention_delta", str(head_dim), q.device)
    n_rows = batch * seq_len * num_heads
    _attention_delta_kernel[(cdiv(n_rows, config.blocks["BLOCK_M"]),)](
        dout_ptr=dout,
        out_ptr=out,
        delta_ptr=delta,
        dout_batch_stride=dout.stride(0),
        dout_position_stride=dout.stride(1),
        seq_len=seq_len,
        num_heads=num_heads,
        n_rows=n_rows,
        HEAD_DIM=head_dim,
        **config.kwargs(),
    )
    shared = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "dout_ptr": dout,
        "lo_ptr": intervals.lo,
        "hi_ptr": intervals.hi,
        "lse_ptr": lse,
        "delta_ptr": delta,
        "q_batch_stride": q.stride(0),
        "q_position_stride": q.stride(1),
        "k_batch_stride": k.stride(0),
        "k_position_stride": k.stride(1),
        "v_batch_stride": v.stride(0),
        "v_position_stride": v.stride(1),
        "dout_batch_stride": dout.stride(0),
        "dout_position_stride": dout.stride(1),
        "seq_len": seq_len,
        "scale": scale,
        "scale_log2": scale * LOG2E,
        "num_key_value_heads": num_key_value_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
    }
    if dq is not None:
        config = launch("attention_dq", str(head_dim), q.device)
        blocks = config.blocks
        grid = (num_key_value_heads * blocks["SPLITS"], cdiv(seq_len * group, blocks["BLOCK_M"]), batch)
        _attention_dq_kernel[grid](dq_ptr=dq, **shared, **config.kwargs())
    if not needs[1]:
        return dq, None, None
    config = launch("attention_dkdv", str(head_dim), q.device)
    blocks = config.blocks
    parts = blocks["PARTS"]
    first, end = intervals.rows_of_keys(blocks["BLOCK_N"])
    # One part is the result itself.
    dtype = q.dtype if parts == 1 else torch.float32
    dk, dv = (torch.empty((parts, *k.shape), dtype=dtype, device=q.device) for _ in range(2))
    grid = (num_key_value_heads * parts * blocks["SPLITS"], cdiv(seq_len, blocks["BLOCK_N"]), batch)
    _attention_dkdv_kernel[grid](
        first_ptr=first, end_ptr=end, dk_ptr=dk, dv_ptr=dv, n_batch=batch, **shared, **config.kwargs()
    )
    if parts == 1:
        return dq, dk[0], dv[0]
    return dq, dk.sum(0).to(k.dtype), dv.sum(0).to(v.dtype)
