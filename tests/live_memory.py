"""How much memory an operation takes at the most, where no GPU's allocator says it."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fastgemma.kernels.backend import Kernel


class _Live(TorchDispatchMode):
    """The most bytes that are alive at once of what torch operations make outside of launches."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self.launching = 0, False
        self._storages: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.launching:  # Triton's interpreter moves tensors about
            for tensor in result if isinstance(result, tuple | list) else (result,):
                if isinstance(tensor, torch.Tensor) and not func.is_view:
                    storage = tensor.untyped_storage()
                    self._storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            self._storages = {k: v for k, v in self._storages.items() if not v[0].expired()}
            self.peak = max(self.peak, sum(size for _, size in self._storages.values()))
        return result

    def launch(self, start: Callable[..., None]) -> Callable[..., None]:
        def run(**kwargs: Any) -> None:
            self.launching = True
            try:
                start(**kwargs)
            finally:
                self.launching = False
                gc.collect(0)  # the interpreter leaves cycles that hold a launch's tensors

        return run


@contextlib.contextmanager
def live_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Live]:
    """What is made inside, and its `peak` in bytes."""
    get, seen = Kernel.__getitem__, _Live()
    with monkeypatch.context() as patch, seen:
        patch.setattr(Kernel, "__getitem__", lambda kernel, grid: seen.launch(get(kernel, grid)))
        yield seen
