"""Runs out of memory where it is told to: at one of the moments at which an operation could."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode

from fastgemma.kernels import backend

_KERNELS = os.path.dirname(backend.__file__)


class Place(NamedTuple):
    phase: str  # "forward", "backward" or "recompute": a checkpointed forward inside a backward
    operation: str  # the file of `kernels/` that was entered first, but for a layer's own


def _place() -> Place | None:
    """Where in the package the caller is, or None."""
    operation, phase, runs = "", "forward", False
    frame: Any = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        folder, name = os.path.split(code.co_filename)
        if folder == _KERNELS and name == "checkpointed_layer.py":
            runs = runs or code.co_name == "run"
            if code.co_name == "backward":
                return Place("recompute" if runs else phase, operation) if operation else None
        elif folder == _KERNELS and not name.startswith("_"):
            operation = name.removesuffix(".py")
            phase = "backward" if code.co_name == "backward" else phase
        elif code.co_name == "unpack_hook" and code.co_filename == checkpoint.__file__:
            # What lies outside it is the backward that asked for the recomputation.
            return Place("recompute", operation) if operation else None
        frame = frame.f_back
    return Place(phase, operation) if operation else None


class _Shortage(TorchDispatchMode):
    def __init__(self, at: int | None) -> None:
        super().__init__()
        self.places: list[Place] = []
        self._at, self._launching = at, False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._launching:  # Triton's interpreter moves tensors about
            self._pass(_place())
        return function(*args, **(kwargs or {}))

    def launch(self, start: Callable[..., None]) -> Callable[..., None]:
        place = _place()

        def run(**kwargs: Any) -> None:
            self._pass(place)
            self._launching = True
            try:
                start(**kwargs)
            finally:
                self._launching = False

        return run

    def _pass(self, place: Place | None) -> None:
        if place is None:
            return
        if len(self.places) == self._at:
            raise torch.OutOfMemoryError(f"out of memory at {self._at}, in {place}")
        self.places.append(place)


@contextmanager
def shortage(at: int | None = None) -> Iterator[list[Place]]:
    """Raises torch.OutOfMemoryError before the launch or torch operation of this number inside `kernels/`.

    Gives the places of those that came before, in a list that grows.
    """
    mode, get = _Shortage(at), backend.Kernel.__getitem__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend.Kernel, "__getitem__", lambda kernel, grid: mode.launch(get(kernel, grid)))
        with mode:
            yield mode.places
