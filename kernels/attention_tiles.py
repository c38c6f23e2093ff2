"""What the kernels of `attention` share: tiles of rows, their keys, and products of tiles.

A row is a (position, head of the group) pair of one key/value head, positions first: a group of 8 heads over one
key/value head reads a tile of keys once for all of them, and a window of keys is cut at positions 8 times closer
together than with a tile a head.

0 * NaN is NaN: what a row does not attend to could reach it through a product with a probability of 0, where a tile of
keys or rows is attended to in part. Kernels multiply plain tiles first, and only where a result is not finite do they
go through the same tiles again with `finite_rows`.
"""

from __future__ import annotations

import torch

from fastgemma.kernels.backend import jit, tl
from fastgemma.kernels.launch import Launch, launch

LOG2E = 1.4426950408889634
# Beyond any sequence, and no overflow when a tile is added to it.
NO_KEY = 1 << 30
# Of launches prepared for a shape; those of a very long one take megabytes.
MAX_PLANS = 32


def tiles(kernel: str, head_dim: int, dtype: torch.dtype, device: torch.device) -> Launch:
    """How to launch a kernel of attention. Tiles of numbers of 4 bytes are smaller."""
    return launch(kernel, str(head_dim) if dtype.itemsize == 2 else "any", device, head_dim)


@jit
def row_tile(lo_ptr, hi_ptr, first_row, start, stop, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """Rows from `first_row` on, counted from position `start`, of positions before `stop`.

    Returns positions (of missing rows: the last one), heads in the group, which rows exist, lo and hi (0 and 0 where
    missing).
    """
    rows = first_row + tl.arange(0, BLOCK_M)
    positions = start + rows // GROUP
    exists = positions < stop
    lo = tl.load(lo_ptr + positions, mask=exists, other=0)
    hi = tl.load(hi_ptr + positions, mask=exists, other=0)
    return tl.minimum(positions, stop - 1), rows % GROUP, exists, lo, hi


@jit
def chunk_tile(
    lo_ptr,
    hi_ptr,
    slot,
    tile,
    seq_len,
    start,
    stop,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """A tile of rows of a chunk of positions, of the batch entry and key/value head that `slot` numbers.

    Returns batch, key/value head, positions, heads, which rows exist, lo and hi. What is computed from them early would
    stay in registers through the loops of a kernel.
    """
    batch = (slot // KV_HEADS).to(tl.int64)
    head = slot % KV_HEADS
    positions, members, exists, lo, hi = row_tile(
        lo_ptr + batch * seq_len, hi_ptr + batch * seq_len, tile * BLOCK_M, start, stop, GROUP, BLOCK_M
    )
    return batch, head, positions, head * GROUP + members, exists, lo, hi


@jit
def key_bounds(lo, hi, NO_KEY: tl.constexpr):
    """The least lo and the greatest hi of the rows that have keys; NO_KEY and 0 where none has."""
    some = lo < hi
    return tl.min(tl.where(some, lo, NO_KEY), axis=0), tl.max(tl.where(some, hi, 0), axis=0)


@jit
def full_bounds(lo, hi, exists, first, end, NO_KEY: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of the tiles of BLOCK_N keys from `first` to `end`: from where to where all rows attend."""
    last_lo = tl.max(tl.where(exists, lo, 0), axis=0)
    # A row without keys has a hi no higher than its lo, above which unmasked tiles begin.
    first_hi = tl.min(tl.where(exists, hi, NO_KEY), axis=0)
    full = first + (tl.maximum(last_lo - first, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    partial = first + tl.maximum(first_hi - first, 0) // BLOCK_N * BLOCK_N
    full = tl.minimum(full, tl.maximum(end, first))
    return full, tl.minimum(tl.maximum(partial, full), tl.maximum(end, full))


@jit
def wide(number):
    """A number of 64 bits; the interpreter's loops count in plain integers, which have no `to`."""
    return tl.full([], number, tl.int64)


@jit
def row_offsets(rows, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Where rows lie in [positions, KV_HEADS * GROUP, HEAD_DIM], from the first head of their group on.

    Of constant strides, the compiler puts the distances within a tile into the instructions that load it: run-time
    strides take a register pair for each 16 bytes that a thread holds, and spill.
    """
    if KV_HEADS == 1:
        return rows * HEAD_DIM
    return rows // GROUP * (KV_HEADS * GROUP * HEAD_DIM) + rows % GROUP * HEAD_DIM


@jit
def products(a_rows, b_rows, HEAD_DIM: tl.constexpr, A: tl.constexpr, B: tl.constexpr, BLOCK_D: tl.constexpr):
    """a b^T in float32, [A, B], of rows of HEAD_DIM numbers at these addresses, BLOCK_D of them at a time."""
    dims = tl.arange(0, BLOCK_D)
    sums = tl.zeros([A, B], tl.float32)
    for d in range(0, HEAD_DIM, BLOCK_D):
        a = tl.load(a_rows[:, None] + (d + dims)[None, :])
        b = tl.load(b_rows[:, None] + (d + dims)[None, :])
        sums = tl.dot(a, tl.trans(b), sums, input_precision="ieee")
    return sums


@jit
def in_bands(program, n_rows, n_columns, BAND: tl.constexpr):
    """(row, column) of a program's tile: down a band of rows before going right, so that the band's rows stay in L2."""
    band = program // (BAND * n_columns)
    height = tl.minimum(n_rows - band * BAND, BAND)
    return band * BAND + program % (BAND * n_columns) % height, program % (BAND * n_columns) // height


@jit
def all_finite(x):
    """Whether a tile of float32 holds neither NaN nor infinity, as one number; False also where its sum overflows."""
    return tl.abs(tl.sum(tl.sum(x, axis=1), axis=0)) < float("inf")


@jit
def finite_rows(x):
    """`x` with 0 in the rows that hold a NaN or an infinity, and which rows those are."""
    bad = tl.min((tl.abs(x.to(tl.float32)) < float("inf")).to(tl.int32), axis=1) == 0
    return tl.where(bad[:, None], 0.0, x).to(x.dtype), bad
