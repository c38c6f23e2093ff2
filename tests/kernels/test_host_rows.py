"""gather_rows against plain indexing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_checks import gpu, same_bits

from fastgemma.kernels.host_rows import gather_rows, gather_rows_reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 13), (3, 1, 5), (0,), (2, 0)], ids=str)
def test_equal_to_indexing(dtype, shape, device):
    table = (100 * torch.rand(101, 33)).to(dtype)
    indices = torch.randint(0, 101, shape)
    rows = gather_rows(table, indices, device)
    assert rows.device.type == device.type and rows.shape == (*shape, 33)
    assert same_bits(rows.cpu(), table[indices])
    assert same_bits(rows, gather_rows_reference(table, indices, device))


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize(
    "pick", [lambda i: i, lambda i: i.t(), lambda i: i[:, ::3], lambda i: i[:1].expand(6, -1)], ids=range(4)
)
def test_indices_of_any_layout_and_device(index_dtype, pick, device):
    table = torch.randn(23, 8)
    indices = pick(torch.randint(0, 23, (4, 9), dtype=index_dtype, device=device))
    assert same_bits(gather_rows(table, indices, device).cpu(), table[indices.cpu()])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_with_another_default_device(device):
    """`torch.set_default_device("cuda")` is some scripts' first line; only memory of the CPU can be pinned."""
    table, indices = torch.randn(11, 4), torch.tensor([3, 10])
    with torch.device(device):
        rows = gather_rows(table, indices, device)
    assert same_bits(rows.cpu(), table[indices])


def test_first_last_and_repeated_rows(device):
    table = torch.randn(11, 4)
    indices = torch.tensor([10, 0, 0, 10, 5, 5, 5])
    assert same_bits(gather_rows(table, indices, device).cpu(), table[indices])


def test_table_of_a_memory_mapped_file(tmp_path, device):
    values = np.random.default_rng(0).standard_normal((57, 12), dtype=np.float32)
    values.tofile(tmp_path / "table")
    table = torch.from_file(str(tmp_path / "table"), shared=False, size=57 * 12).view(57, 12)
    rows = gather_rows(table, torch.tensor([[56, 3], [0, 56]]), device)
    np.testing.assert_array_equal(rows.cpu().numpy(), values[[[56, 3], [0, 56]]])


def test_result_is_a_copy(device):
    table = torch.randn(5, 4)
    before = table.clone()
    gather_rows(table, torch.tensor([1, 2]), device).fill_(7.0)
    assert same_bits(table, before)


def test_rows_of_a_wider_table(device):
    table = torch.randn(9, 20)[:, 4:11]
    indices = torch.tensor([8, 0, 3])
    assert same_bits(gather_rows(table, indices, device).cpu(), table[indices])


@pytest.mark.parametrize("table", [torch.zeros(4), torch.zeros(2, 2, 2), torch.zeros(3, 2, device="meta")])
def test_tables_that_are_no_host_matrix(table, device):
    with pytest.raises(ValueError, match="CPU matrix"):
        gather_rows(table, torch.tensor([0]), device)


@pytest.mark.parametrize("index", [3, 100, -4])
def test_index_outside_the_table(index, device):
    with pytest.raises(IndexError):
        gather_rows(torch.zeros(3, 2), torch.tensor([0, index]), device)


@pytest.mark.parametrize("rows", [pytest.param(4096, marks=gpu)])
def test_pinned_memory_is_not_reused_too_early(rows):
    """Many gathers in flight behind a busy GPU: each result is that of its own indices."""
    device = torch.device("cuda")
    table = torch.randn(3 * rows, 256)
    picks = [torch.randint(0, 3 * rows, (rows,)) for _ in range(16)]
    busy = torch.randn(4096, 4096, device=device)
    for _ in range(20):
        busy = busy @ busy * 1e-3
    results = [gather_rows(table, pick, device) for pick in picks]
    for pick, result in zip(picks, results):
        assert same_bits(result.cpu(), table[pick])
