"""The B's of several adapters as one block diagonal."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import fresh, record_launches, same_bits

import fastgemma.kernels.adapter_columns as module
from fastgemma.kernels import backend
from fastgemma.kernels.adapter_columns import Block, block_diagonal


def make(
    heights: tuple[int, ...], ranks: tuple[int, ...], order: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> tuple[list[Block], torch.Tensor]:
    """Blocks whose columns come in the given order, rank 0 for no adapter, and the matrix they form, in float64."""
    columns = {index: sum(ranks[i] for i in order[:place]) for place, index in enumerate(order)}
    matrix = torch.zeros(sum(heights), sum(ranks), dtype=torch.float64, device=device)
    blocks = []
    for index, (height, rank) in enumerate(zip(heights, ranks)):
        first = sum(heights[:index])
        factor = fresh(height, rank, device=device, dtype=dtype, grad=False) if rank else None
        if factor is not None:
            matrix[first : first + height, columns[index] : columns[index] + rank] = factor.double()
        blocks.append(Block(factor, first, height, columns[index]))
    return blocks, matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "heights, ranks, order",
    [
        ((7,), (16,), (0,)),
        ((64, 64), (16, 16), (0, 1)),
        ((101, 1, 33), (8, 1, 3), (0, 1, 2)),
        ((101, 1, 33), (8, 1, 3), (2, 0, 1)),
        ((40, 40), (0, 5), (0, 1)),
        ((40, 3, 9), (4, 0, 4), (2, 1, 0)),
        ((5, 6, 7, 8), (1, 2, 3, 4), (3, 0, 2, 1)),
    ],
    ids=str,
)
def test_blocks_and_zeros(heights, ranks, order, dtype, device, monkeypatch):
    blocks, matrix = make(heights, ranks, order, device, dtype)
    whole = torch.full((sum(heights) + 1, sum(ranks) + 5), torch.nan, device=device)
    log = record_launches(monkeypatch, module)
    block_diagonal(blocks, whole[:-1, 2 : sum(ranks) + 2])
    assert same_bits(whole[:-1, 2 : sum(ranks) + 2].contiguous(), matrix.float())
    outside = whole.clone()
    outside[:-1, 2 : sum(ranks) + 2] = torch.nan
    assert outside.isnan().all()
    assert len(log) == (1 if 1 < len(heights) <= 3 else 0)


def test_a_factor_that_is_not_finite_stays_in_its_block(device):
    blocks, matrix = make((9, 9), (4, 4), (0, 1), device, torch.float32)
    assert blocks[0].factor is not None
    blocks[0].factor.fill_(torch.inf)
    out = torch.empty(18, 8, device=device)
    block_diagonal(blocks, out)
    assert out[:9, :4].isinf().all() and same_bits(out[9:], matrix[9:].float()) and (out[:9, 4:] == 0).all()


def test_factors_of_any_layout_and_without_triton(device, monkeypatch):
    blocks, matrix = make((9, 5), (4, 2), (1, 0), device, torch.float32)
    transposed = [block._replace(factor=block.factor.t().contiguous().t()) for block in blocks]
    out = torch.empty(14, 6, device=device)
    block_diagonal(transposed, out)
    assert same_bits(out, matrix.float())
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    again = torch.empty_like(out)
    block_diagonal(blocks, again)
    assert same_bits(again, out)
