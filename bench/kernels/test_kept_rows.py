"""The rows that take part in a loss: found on an idle GPU, and asked for behind work that is still running.

The second is what `KeptRows` is for, and its host time is the figure to read: who asks the GPU only then waits for it.
"""

from __future__ import annotations

import pytest
import torch
from kernel_timing import Subject

from fastgemma.kernels.kept_rows import KeptRows


@pytest.mark.shapes([(2048,), (32768,)], tiny=(7,))
@pytest.mark.parametrize("backbone", [False, True], ids=["idle", "behind work"])
@pytest.mark.parametrize("impl", ["fastgemma", "nonzero"])
def test_kept_rows(measure, shape, impl, backbone):
    (rows,) = shape
    # One product of this size takes over a millisecond.
    size = 8192 if backbone and not measure.tiny else 8
    matrix = torch.randn(size, size, dtype=torch.bfloat16, device=measure.device)

    def work() -> None:
        if backbone:
            torch.mm(matrix, matrix)

    def labels() -> tuple[torch.Tensor]:
        drawn = torch.randint(0, 1000, (rows,), device=measure.device)
        drawn[::3] = -100
        return (drawn,)

    def ahead(drawn: torch.Tensor) -> torch.Tensor:
        kept = KeptRows(drawn)
        work()
        return kept.index()

    def afterwards(drawn: torch.Tensor) -> torch.Tensor:
        work()
        return (drawn != -100).nonzero().squeeze(1)

    measure(
        Subject(labels, ahead if impl == "fastgemma" else afterwards, captured=False),
        op="kept_rows_behind_work" if backbone else "kept_rows",
        impl=impl,
        shape=list(shape),
        direction="forward",
        dtype="int64",
        reference=lambda drawn: (drawn != -100).nonzero().squeeze(1),
        host=True,
    )
