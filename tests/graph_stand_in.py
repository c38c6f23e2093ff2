"""Stands in for a CUDA graph on a machine without one: a replay runs the recorded work again, on the same buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastgemma.kernels import graph_replay

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


class Rerun:
    """As `graph_replay.Graph`."""

    def __init__(self, work: Callable[[], None], pool: Any) -> None:
        self._work = work
        state = torch.get_rng_state()
        work()
        torch.set_rng_state(state)

    def replay(self) -> None:
        self._work()

    @staticmethod
    def new_pool() -> Any:
        return None


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings work here: as CUDA graphs where there is a GPU."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(graph_replay, "Graph", Rerun)
