"""The B's of LoRA adapters as columns beside their base weights, so that one product computes both.

    y = x W^T + xa B^T = [x | xa] [W | B]^T          xa = scaling * (x A^T)

For several projections of one input, whose weights lie one below the other, the B's form a block diagonal: zeros where
a projection's rows meet another one's xa. Against a product of its own that is accumulated into y, which reads and
writes all of y again, this costs rank / in_features more of the base product.

Bytes that must move per weight row (bf16): 2 per column read (its own), 2 per column written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastgemma.kernels.backend import cdiv, kernel, next_power_of_2, runs_kernel, tl
from fastgemma.kernels.launch import launch

# Projections of one input: queries, keys and values.
_MAX_FACTORS = 3


class Block(NamedTuple):
    """The B [out_features, rank] of a projection, None without an adapter, and where it lies in the matrix of all."""

    factor: torch.Tensor | None
    first_row: int
    n_rows: int
    first_column: int


@kernel
def _block_diagonal_kernel(
    factor0_ptr,
    factor1_ptr,
    factor2_ptr,
    out_ptr,
    first_row1,
    first_row2,
    n_rows,
    out_row_stride,
    first_column0,
    first_column1,
    first_column2,
    rank0,
    rank1,
    rank2,
    n_cols,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    cols = tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < n_rows) & (cols < n_cols)
    # Each element belongs to one factor at most: what the others load is zero.
    own = cols - first_column0
    inside = mask & (rows < first_row1) & (own >= 0) & (own < rank0)
    b = tl.load(factor0_ptr + rows * rank0 + own, mask=inside, other=0.0).to(out_ptr.dtype.element_ty)
    own = cols - first_column1
    inside = mask & (rows >= first_row1) & (rows < first_row2) & (own >= 0) & (own < rank1)
    b += tl.load(factor1_ptr + (rows - first_row1) * rank1 + own, mask=inside, other=0.0).to(b.dtype)
    own = cols - first_column2
    inside = mask & (rows >= first_row2) & (own >= 0) & (own < rank2)
    b += tl.load(factor2_ptr + (rows - first_row2) * rank2 + own, mask=inside, other=0.0).to(b.dtype)
    tl.store(out_ptr + rows.to(tl.int64) * out_row_stride + cols, b, mask=mask)


def block_diagonal(blocks: Sequence[Block], out: torch.Tensor) -> None:
    """Fills `out` [sum of out_features, sum of ranks], a row matrix of unit column stride; casts to its dtype.

    The blocks' rows follow one another; their columns may come in any order.
    """
    present = [block.factor for block in blocks if block.factor is not None]
    if len(blocks) == 1 and present:
        out.copy_(present[0])
        return
    if not 1 <= len(blocks) <= _MAX_FACTORS or not runs_kernel(out, *present):
        out.zero_()
        for factor, first_row, n_rows, first_column in blocks:
            if factor is not None:
                out[first_row : first_row + n_rows, first_column : first_column + factor.shape[1]] = factor
        return
    if out.numel() == 0:
        return
    n_rows, n_cols = out.shape
    # What is not there has no columns, and begins behind the last row.
    padded = [*blocks, *[Block(None, n_rows, 0, 0)] * (_MAX_FACTORS - len(blocks))]
    factors = [out if block.factor is None else block.factor.contiguous() for block in padded]
    config, block_n = launch("block_diagonal", "any", out.device), next_power_of_2(n_cols)
    _block_diagonal_kernel[(cdiv(n_rows, config.blocks["BLOCK_M"]),)](
        factor0_ptr=factors[0],
        factor1_ptr=factors[1],
        factor2_ptr=factors[2],
        out_ptr=out,
        first_row1=padded[1].first_row,
        first_row2=padded[2].first_row,
        n_rows=n_rows,
        out_row_stride=out.stride(0),
        first_column0=padded[0].first_column,
        first_column1=padded[1].first_column,
        first_column2=padded[2].first_column,
        **{
            f"rank{number}": 0 if block.factor is None else block.factor.shape[1] for number, block in enumerate(padded)
        },
        n_cols=n_cols,
        BLOCK_N=block_n,
        **config.kwargs(),
    )
