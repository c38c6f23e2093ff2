"""The B's of a layer's adapters beside their base weights: q, k and v, and gate and up, at rank 16 as in training."""

from __future__ import annotations

import pytest
import torch
from kernel_inputs import activation
from kernel_timing import Subject

from fastgemma.kernels.adapter_columns import Block, block_diagonal

RANK = 16
# Base columns, and the rows of the projections.
SHAPES = [(1536, 2048, 256, 256), (1536, 6144, 6144), (2560, 10240, 10240)]


@pytest.mark.shapes(SHAPES, tiny=(32, 24, 8, 8))
@pytest.mark.parametrize("impl", ["fastgemma", "hf"])
def test_adapter_columns(measure, shape, impl):
    base, *heights = shape
    device, columns = measure.device, RANK * len(heights)
    starts = [sum(heights[:number]) for number in range(len(heights))]

    def make() -> tuple[list[torch.Tensor], torch.Tensor]:
        factors = [activation(rows, RANK, device=device, grad=False) for rows in heights]
        return factors, activation(sum(heights), base + columns, device=device, grad=False)

    def fastgemma(factors: list[torch.Tensor], widened: torch.Tensor) -> torch.Tensor:
        out = widened[:, base:]
        places = enumerate(zip(factors, starts, heights))
        block_diagonal([Block(b, start, rows, RANK * number) for number, (b, start, rows) in places], out)
        return out

    def plain(factors: list[torch.Tensor], widened: torch.Tensor) -> torch.Tensor:
        return widened[:, base:].copy_(torch.block_diag(*factors))

    measure(
        Subject(make, fastgemma if impl == "fastgemma" else plain),
        op="adapter_columns",
        impl=impl,
        shape=list(shape),
        direction="forward",
        reference=plain,
        num_bytes=2 * (RANK * sum(heights) + sum(heights) * columns),
        host=True,
    )
