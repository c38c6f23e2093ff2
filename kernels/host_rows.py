"""Rows of a host-resident table, copied to the GPU without stopping it.

The rows are gathered on the CPU into pinned memory, and copied from there in stream order: the CPU goes on at once,
and the pinned block returns to torch's host allocator when the copy has run. Bytes that must move: one row read from
the table and one written to the device per index; no copy of the table exists on the device.
"""

from __future__ import annotations

import torch


def gather_rows(table: torch.Tensor, indices: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`table[indices]` on `device`.

    Args:
        table: [rows, columns] on the CPU, contiguous rows; it may be a memory-mapped file.
        indices: any shape, int64 or int32. On the CPU nothing waits; indices on another device are fetched first,
            which waits for the work that is queued there.
        device: where the rows are wanted.

    Returns:
        [*indices.shape, columns] in the table's dtype, on `device`.

    Raises:
        ValueError: a table that is not a CPU matrix. IndexError: an index outside the table.
    """
    if table.device.type != "cpu" or table.dim() != 2:
        raise ValueError(f"fastgemma: gather_rows reads a CPU matrix, got {tuple(table.shape)} on {table.device}.")
    host = indices.to("cpu").reshape(-1)
    columns = table.shape[1]
    if device.type != "cuda":
        return torch.index_select(table, 0, host).view(*indices.shape, columns).to(device)
    staging = torch.empty((host.numel(), columns), dtype=table.dtype, device="cpu", pin_memory=True)
    torch.index_select(table, 0, host, out=staging)
    return staging.to(device, non_blocking=True).view(*indices.shape, columns)


def gather_rows_reference(table: torch.Tensor, indices: torch.Tensor, device: torch.device) -> torch.Tensor:
    """`gather_rows` as one indexing expression."""
    return table[indices.to("cpu")].to(device)
