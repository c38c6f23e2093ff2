"""Rows of E2B's per-layer-embedding table (35 layers of 256 channels), kept in host memory; the ceiling is the bus."""

from __future__ import annotations

import pytest
import torch
from kernel_timing import Subject

from fastgemma.kernels.host_rows import gather_rows, gather_rows_reference

# The published table has 262144 rows; these exceed every cache as well.
TABLE_ROWS = 32768


@pytest.mark.shapes([(2048, 8960), (32768, 8960)], tiny=(7, 48))
@pytest.mark.parametrize("impl", ["fastgemma", "pageable", "gpu_table", "pinned_copy"])
def test_host_rows(measure, shape, impl):
    rows, columns = shape
    device, on_gpu = measure.device, measure.device.type == "cuda"
    table = torch.randn(64 if measure.tiny else TABLE_ROWS, columns, dtype=torch.bfloat16, device=device)
    on_host = table.cpu()

    def indices() -> tuple[torch.Tensor]:
        return (torch.randint(0, table.shape[0], (rows,)),)

    run = {
        "fastgemma": lambda index: gather_rows(on_host, index, device),
        "pageable": lambda index: gather_rows_reference(on_host, index, device),
        "gpu_table": lambda index: torch.nn.functional.embedding(index.to(device), table),
    }
    staged = torch.empty(rows, columns, dtype=torch.bfloat16, pin_memory=on_gpu)
    bus = Subject(lambda: (staged,), lambda source: source.to(device, non_blocking=True, copy=True), captured=False)
    measure(
        bus if impl == "pinned_copy" else Subject(indices, run[impl], captured=False),
        op="host_rows",
        impl=impl,
        shape=list(shape),
        direction="forward",
        reference=None if impl == "pinned_copy" else lambda index: gather_rows_reference(on_host, index, device),
        num_bytes=2 * rows * columns,
        ceiling=bus,
    )
