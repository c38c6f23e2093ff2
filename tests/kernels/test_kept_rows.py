"""KeptRows finds the rows that have a loss, without waiting for later work."""

from __future__ import annotations

import pytest
import torch
from kernel_checks import gpu

from fastgemma.kernels.kept_rows import KeptRows


def test_kept_rows(device):
    labels = torch.tensor([[-100, 4, -100], [-100, 0, 9]], device=device)
    kept = KeptRows(labels)
    assert kept.count == 3 and kept.total == 6
    assert kept.index().dtype == torch.int64 and kept.index().tolist() == [1, 4, 5]
    assert KeptRows(labels, ignore_index=0).index().tolist() == [0, 1, 2, 3, 5]
    assert KeptRows(labels[:0]).index().tolist() == [] and KeptRows(labels[:0]).count == 0
    many = torch.where(torch.rand(5000, device=device) < 0.4, -100, 1)
    assert torch.equal(KeptRows(many).index(), (many != -100).nonzero().squeeze(1))
    with pytest.raises(TypeError):
        KeptRows(labels.int())


class TestOnTheGPU:
    pytestmark = gpu

    def test_kept_rows_do_not_wait(self, device):
        labels = torch.where(torch.rand(4096, device=device) < 0.4, -100, 1)
        KeptRows(labels).count  # noqa: B018  warm up
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            kept = KeptRows(labels)
            torch.cuda._sleep(int(2e9))  # about a second of later work
            index = kept.index()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not torch.cuda.current_stream().query(), "waited for work enqueued after it"
        assert torch.equal(index, (labels != -100).nonzero().squeeze(1))

    def test_with_another_default_device(self, device):
        labels = torch.tensor([4, -100, 0], device=device)
        with torch.device(device):
            kept = KeptRows(labels)
            assert kept.index().tolist() == [0, 2]
