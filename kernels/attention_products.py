"""The products of the backward pass of `attention`: dq, dk and dv, in one launch, from the scores that
`attention_backward` wrote.

    dq = scale * ds k                dk = scale * ds^T q        dv = p^T dout

The workspace holds p and, `ds_offset` further on, ds: [batch * key/value heads, rows of a chunk, slots of tiles of
keys], where a tile of keys lies at its number modulo the number of slots.
"""

from __future__ import annotations

from fastgemma.kernels.attention_tiles import all_finite, chunk_tile, finite_rows, key_bounds, row_offsets, wide
from fastgemma.kernels.backend import jit, kernel_of_any_numbers, tl


@jit
def ds_offset(slots, n_rows, n_slots, BLOCK: tl.constexpr):
    """Where ds begins in the workspace: behind the p of all slots."""
    return slots.to(tl.int64) * n_rows * n_slots * BLOCK


@jit
def _sum_keys(
    start,
    end,
    ds_rows,
    k_base,
    lo,
    hi,
    seq_len,
    n_slots,
    FINITE: tl.constexpr,
    KEY_STRIDE: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SLOT_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_K)
    ds_ptrs = ds_rows[:, None] + columns[None, :]
    k_ptrs = k_base + columns[:, None] * KEY_STRIDE + tl.arange(0, DIMS)[None, :]
    acc = tl.zeros([BLOCK_M, DIMS], tl.float32)
    for key in tl.range(start, end, BLOCK_K, num_stages=STAGES):
        column = tl.multiple_of(key // SLOT_N % n_slots * SLOT_N + key % SLOT_N, BLOCK_K)
        ds = tl.load(ds_ptrs + column)
        k = tl.load(k_ptrs + wide(key) * KEY_STRIDE, mask=columns[:, None] < seq_len - key, other=0.0)
        if FINITE:
            k, bad = finite_rows(k)
            keep = (key + columns[None, :] >= lo[:, None]) & (key + columns[None, :] < hi[:, None])
            ds = tl.where(keep & bad[None, :], float("nan"), ds)
        acc = tl.dot(ds, k, acc, input_precision="ieee")
    return acc


@jit
def _gradient_of_queries(
    slot,
    index,
    slots,
    k_ptr,
    lo_ptr,
    hi_ptr,
    workspace_ptr,
    dq_ptr,
    seq_len,
    start,
    stop,
    n_rows,
    n_slots,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NO_KEY: tl.constexpr,
    SLOT_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DIMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Stores the part of dq that `index` counts: a tile of rows, by a piece of a head."""
    PIECES: tl.constexpr = HEAD_DIM // DIMS
    # Causal rows have more keys the later they come: the long programs start first.
    tile = n_rows // BLOCK_M - 1 - index // PIECES
    first_dim = index % PIECES * DIMS
    batch, head, positions, heads, exists, lo, hi = chunk_tile(
        lo_ptr, hi_ptr, slot, tile, seq_len, start, stop, KV_HEADS, GROUP, BLOCK_M
    )
    first, end = key_bounds(lo, hi, NO_KEY)
    first = first // BLOCK_K * BLOCK_K
    rows = slot.to(tl.int64) * n_rows + tile * BLOCK_M + tl.arange(0, BLOCK_M)
    ds_rows = workspace_ptr + ds_offset(slots, n_rows, n_slots, SLOT_N) + rows * (n_slots * SLOT_N)
    k_base = k_ptr + (batch * seq_len * KV_HEADS + head) * HEAD_DIM + first_dim
    acc = _sum_keys(
        first, end, ds_rows, k_base, lo, hi, seq_len, n_slots, False, KV_HEADS * HEAD_DIM, DIMS, BLOCK_M, SLOT_N,
        BLOCK_K, STAGES,
    )  # fmt: skip
    if not all_finite(acc):
        acc = _sum_keys(
            first, end, ds_rows, k_base, lo, hi, seq_len, n_slots, True, KV_HEADS * HEAD_DIM, DIMS, BLOCK_M,
            SLOT_N, BLOCK_K, STAGES,
        )  # fmt: skip
    q_rows = (batch * seq_len + positions) * (KV_HEADS * GROUP) + heads
    dq_ptrs = dq_ptr + q_rows[:, None] * HEAD_DIM + (first_dim + tl.arange(0, DIMS))[None, :]
    tl.store(dq_ptrs, (acc * scale).to(dq_ptr.dtype.element_ty), mask=exists[:, None])


@jit
def _sum_rows(
    first_row,
    end_row,
    columns_base,
    n_columns,
    x_base,
    lo_ptr,
    hi_ptr,
    keys,
    start,
    stop,
    FINITE: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    rows = tl.arange(0, BLOCK_K)
    weight_ptrs = columns_base + rows[:, None].to(tl.int64) * n_columns + tl.arange(0, BLOCK_N)[None, :]
    dims = tl.arange(0, DIMS)[None, :]
    n_rows = (stop - start) * GROUP
    acc = tl.zeros([BLOCK_N, DIMS], tl.float32)
    for row in tl.range(first_row, end_row, BLOCK_K, num_stages=STAGES):
        weights = tl.load(weight_ptrs + wide(row) * n_columns)
        mask = rows < n_rows - row
        if BLOCK_K % GROUP == 0:
            first = wide(row // GROUP) * (KV_HEADS * GROUP * HEAD_DIM)
            x_ptrs = x_base + row_offsets(rows, KV_HEADS, GROUP, HEAD_DIM)[:, None] + dims + first
        else:
            x_ptrs = x_base + row_offsets((row + rows).to(tl.int64), KV_HEADS, GROUP, HEAD_DIM)[:, None] + dims
        x = tl.load(x_ptrs, mask=mask[:, None], other=0.0)
        if FINITE:
            positions = start + (row + rows) // GROUP
            lo = tl.load(lo_ptr + positions, mask=mask, other=0)
            hi = tl.load(hi_ptr + positions, mask=mask, other=0)
            x, bad = finite_rows(x)
            keep = (keys[None, :] >= lo[:, None]) & (keys[None, :] < hi[:, None])
            weights = tl.where(keep & bad[:, None], float("nan"), weights)
        acc = tl.dot(tl.trans(weights), x, acc, input_precision="ieee")
    return acc


@jit
def _gradient_of_keys(
    grad_ptr,
    first_row,
    end_row,
    columns_base,
    n_columns,
    x_base,
    lo_ptr,
    hi_ptr,
    keys,
    grad_row,
    start,
    stop,
    seq_len,
    scale,
    accumulate,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    acc = _sum_rows(
        first_row, end_row, columns_base, n_columns, x_base, lo_ptr, hi_ptr, keys, start, stop,
        False, KV_HEADS, GROUP, HEAD_DIM, DIMS, BLOCK_N, BLOCK_K, STAGES,
    )  # fmt: skip
    if not all_finite(acc):
        acc = _sum_rows(
            first_row, end_row, columns_base, n_columns, x_base, lo_ptr, hi_ptr, keys, start, stop,
            True, KV_HEADS, GROUP, HEAD_DIM, DIMS, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
    acc *= scale
    ptrs = grad_ptr + (grad_row + keys.to(tl.int64) * (KV_HEADS * HEAD_DIM))[:, None]
    ptrs += tl.arange(0, DIMS)[None, :]
    mask = (keys < seq_len)[:, None]
    if accumulate:
        acc += tl.load(ptrs, mask=mask, other=0.0)
    tl.store(ptrs, acc.to(grad_ptr.dtype.element_ty), mask=mask)


@jit
def _gradients_of_keys_and_values(
    slot,
    index,
    slots,
    q_ptr,
    dout_ptr,
    lo_ptr,
    hi_ptr,
    first_ptr,
    end_ptr,
    workspace_ptr,
    dk_ptr,
    dv_ptr,
    seq_len,
    start,
    stop,
    n_rows,
    rows_of_part,
    first_tile,
    tiles_of_part,
    started_tiles,
    n_tiles,
    n_slots,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    SLOT_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DIMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Stores, or adds, the part of dk or dv that `index` counts: a piece of a head, which of the two, a tile of keys,
    and a part of the chunk's rows."""
    PIECES: tl.constexpr = HEAD_DIM // DIMS
    batch = (slot // KV_HEADS).to(tl.int64)
    head = slot % KV_HEADS
    first_dim = index % PIECES * DIMS
    for_k = index // PIECES % 2
    part = index // (2 * PIECES) // tiles_of_part
    tile = first_tile + index // (2 * PIECES) % tiles_of_part
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.load(first_ptr + batch * n_tiles + tile)
    end = tl.load(end_ptr + batch * n_tiles + tile)
    first_row = tl.maximum(tl.maximum(first - start, 0) * GROUP // BLOCK_K * BLOCK_K, part * rows_of_part)
    end_row = tl.minimum(tl.minimum(end, stop) * GROUP - start * GROUP, (part + 1) * rows_of_part)

    n_columns = n_slots * SLOT_N
    # The column of the first key.
    column = tile * BLOCK_N // SLOT_N % n_slots * SLOT_N + tile * BLOCK_N % SLOT_N
    columns_base = workspace_ptr + slot.to(tl.int64) * n_rows * n_columns + tl.multiple_of(column, BLOCK_N)
    n_batch = slots // KV_HEADS
    grad_row = ((part * n_batch + batch) * seq_len * KV_HEADS + head) * HEAD_DIM + first_dim
    x_dim = head * GROUP * HEAD_DIM + first_dim
    x_offset = (batch * seq_len + start) * (KV_HEADS * GROUP * HEAD_DIM) + x_dim
    lo_ptr += batch * seq_len
    hi_ptr += batch * seq_len
    accumulate = tile < started_tiles
    if for_k == 1:
        columns_base += ds_offset(slots, n_rows, n_slots, SLOT_N)
        _gradient_of_keys(
            dk_ptr, first_row, end_row, columns_base, n_columns, q_ptr + x_offset, lo_ptr, hi_ptr, keys, grad_row,
            start, stop, seq_len, scale, accumulate, KV_HEADS, GROUP, HEAD_DIM, DIMS, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip
    else:
        _gradient_of_keys(
            dv_ptr, first_row, end_row, columns_base, n_columns, dout_ptr + x_offset, lo_ptr, hi_ptr, keys, grad_row,
            start, stop, seq_len, 1.0, accumulate, KV_HEADS, GROUP, HEAD_DIM, DIMS, BLOCK_N, BLOCK_K, STAGES,
        )  # fmt: skip


@kernel_of_any_numbers
def _attention_products_kernel(
    q_ptr,
    k_ptr,
    dout_ptr,
    lo_ptr,
    hi_ptr,
    first_ptr,
    end_ptr,
    workspace_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    seq_len,
    start,
    stop,
    n_rows,
    rows_of_part,
    slots,
    q_programs,
    key_programs,
    q_first,
    first_tile,
    tiles_of_part,
    started_tiles,
    n_tiles,
    n_slots,
    scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NO_KEY: tl.constexpr,
    SLOT_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DIMS: tl.constexpr,
    STAGES: tl.constexpr,
    KEY_BLOCK_N: tl.constexpr,
    KEY_BLOCK_K: tl.constexpr,
    KEY_DIMS: tl.constexpr,
    KEY_STAGES: tl.constexpr,
):
    # Of the two kinds of programs the longer come first, and the others fill the places that they leave: with a launch
    # each, multiprocessors would wait at the end of either for its last programs.
    program = tl.program_id(0)
    # Selected, not branched over: the compiler loses sight of what divides an index that comes out of branches.
    first_programs = slots * tl.where(q_first == 1, q_programs, key_programs)
    is_first = program < first_programs
    index = program - tl.where(is_first, 0, first_programs)
    if is_first == (q_first == 1):
        _gradient_of_queries(
            index // q_programs, index % q_programs, slots, k_ptr, lo_ptr, hi_ptr, workspace_ptr, dq_ptr, seq_len,
            start, stop, n_rows, n_slots, scale, KV_HEADS, GROUP, HEAD_DIM, NO_KEY, SLOT_N, BLOCK_M, BLOCK_K, DIMS,
            STAGES,
        )  # fmt: skip
    else:
        _gradients_of_keys_and_values(
            index // key_programs, index % key_programs, slots, q_ptr, dout_ptr, lo_ptr, hi_ptr, first_ptr, end_ptr,
            workspace_ptr, dk_ptr, dv_ptr, seq_len, start, stop, n_rows, rows_of_part, first_tile, tiles_of_part,
            started_tiles, n_tiles, n_slots, scale, KV_HEADS, GROUP, HEAD_DIM, SLOT_N, KEY_BLOCK_N, KEY_BLOCK_K,
            KEY_DIMS, KEY_STAGES,
        )  # fmt: skip
