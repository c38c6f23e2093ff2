"""The check that all tests of kernels run under, in the interpreter."""

from __future__ import annotations

import pytest
import torch

from fastgemma.kernels.backend import interpreting, kernel, tl

pytestmark = pytest.mark.skipif(not interpreting(), reason="only the interpreter checks addresses")


@kernel
def _copy_kernel(x_ptr, y_ptr, n_read, n_written, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n_read, other=0.0)
    tl.store(y_ptr + offsets, x, mask=offsets < n_written)


@pytest.mark.parametrize("n_read, n_written", [(5, 5), (6, 5), (5, 6), (0, 0), (0, 6)])
def test_nothing_outside_of_a_tensor(n_read, n_written):
    """The tensors are the first five elements of eight: what lies behind them is someone else's."""
    x, y = torch.arange(8.0), torch.zeros(8)

    def copy():
        _copy_kernel[(1,)](x_ptr=x[:5], y_ptr=y[:5], n_read=n_read, n_written=n_written, BLOCK=8)

    if max(n_read, n_written) <= 5:
        copy()
        assert torch.equal(y[:5], torch.where(torch.arange(5) < n_read, x[:5], 0.0))
    else:
        with pytest.raises(Exception, match="outside of every tensor"):
            copy()
        assert not y[5:].any()
