"""The random numbers of a call, for a backward that computes the call again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def generator_of(device: torch.device) -> torch.Generator:
    """What operations on `device` draw from where they are given nothing else."""
    return torch.cuda.default_generators[device.index] if device.type == "cuda" else torch.default_generator


@contextlib.contextmanager
def drawing_from(generator: torch.Generator | None, state: torch.Tensor | None) -> Iterator[None]:
    """`generator` draws what it drew from `state` on, and afterwards goes on from where it is now; None: nothing
    draws."""
    if generator is None or state is None:
        yield
        return
    now = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(now)
