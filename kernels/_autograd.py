"""What an operation over projections shows to autograd: trained tensors and activations; the rest rides along.

An autograd Function over many projections takes their trained tensors as flat arguments and everything else in one
`static` object. Here both are taken apart and put together again, and kept for the backward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastgemma.kernels._lora_parts import Adapter, Masks, Projection, Wanted
from fastgemma.kernels.nf4 import NF4Weight

# What autograd need not see of tensors and projections: frozen tensors and NF4 weights; a mark where it must.
Static = tuple[Any, ...]
_TRAINED = object()


def split_trained(tensors: Sequence[torch.Tensor | NF4Weight | None]) -> tuple[Static, list[torch.Tensor]]:
    """(frozen ones in their places, trained ones): what is frozen is persistent module state, not an activation, and
    rides along outside `save_for_backward`."""
    static, trained = [], []
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            trained.append(tensor)
            static.append(_TRAINED)
        else:
            static.append(tensor)
    return tuple(static), trained


def join_trained(static: Static, trained: Sequence[Any]) -> list[Any]:
    """The sequence that `split_trained` took apart; `trained` may hold anything in place of the trained tensors."""
    rest = iter(trained)
    return [next(rest) if item is _TRAINED else item for item in static]


def wanted_of(static: Static, needed: Sequence[bool]) -> list[bool]:
    """For each place whether its gradient is asked for, from `needed` of the trained ones."""
    rest = iter(needed)
    return [item is _TRAINED and next(rest) for item in static]


def trained_only(static: Static, items: Sequence[Any]) -> list[Any]:
    """Of one item for each place, those of the trained ones."""
    return [item for place, item in zip(static, items) if place is _TRAINED]


def keep(ctx: Any, trained: Sequence[torch.Tensor], activations: Sequence[torch.Tensor | None]) -> None:
    """Keeps what a backward needs.

    Activations go through `save_for_backward`, where checkpointing and offloading see them. Trained parameters live in
    their modules anyway and would be no gain to drop or to offload: they are only watched for being written to.
    """
    if all(tensor.is_leaf for tensor in trained):
        ctx.trained = [(tensor, tensor._version) for tensor in trained]
        ctx.save_for_backward(*activations)
    else:
        ctx.trained = len(trained)
        ctx.save_for_backward(*trained, *activations)


def kept(ctx: Any) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """(trained, activations) as `keep` was given them.

    Raises:
        RuntimeError: a trained parameter was written to since, as torch raises it for saved tensors.
    """
    saved = ctx.saved_tensors
    if isinstance(ctx.trained, int):
        return saved[: ctx.trained], saved[ctx.trained :]
    if any(tensor._version != version for tensor, version in ctx.trained):
        raise RuntimeError(
            "fastgemma: a trained parameter was modified in place between a forward and its backward, so that its "
            "gradient would be that of other weights. No gradient was produced. Step the optimizer after backward()."
        )
    return [tensor for tensor, _ in ctx.trained], saved


class Context:
    """Stands for autograd's where an operation calls another's forward and backward itself."""

    def __init__(self, saves: bool) -> None:
        """`saves`: whether a backward follows."""
        self._saves = saves
        self.saved_tensors: tuple[Any, ...] = ()
        self.needs_input_grad: tuple[bool, ...] = ()

    def save_for_backward(self, *tensors: torch.Tensor | None) -> None:
        if self._saves:
            self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """The caller gives the gradients there are."""


def parts_of(projections: Sequence[Projection]) -> list[torch.Tensor | NF4Weight | None]:
    """weight, A and B of each projection."""
    parts: list[torch.Tensor | NF4Weight | None] = []
    for weight, adapter, _ in projections:
        parts += (weight, None, None) if adapter is None else (weight, adapter.A, adapter.B)
    return parts


def numbers_of(projections: Sequence[Projection]) -> tuple[tuple[float, float], ...]:
    """scaling and dropout of each projection."""
    return tuple((0.0 if adapter is None else adapter.scaling, dropout) for _, adapter, dropout in projections)


def projections_of(parts: Sequence[Any], numbers: Sequence[tuple[float, float]]) -> list[Projection]:
    """The projections that `parts_of` and `numbers_of` took apart."""
    projections = []
    for index, (scaling, dropout) in enumerate(numbers):
        weight, A, B = parts[3 * index : 3 * index + 3]
        projections.append(Projection(weight, None if A is None else Adapter(A, B, scaling), dropout))
    return projections


def masks_of(projections: Sequence[Projection], drawn: Sequence[torch.Tensor]) -> Masks:
    """The masks that a forward drew, in the places of the projections that they belong to."""
    rest = iter(drawn)
    return [next(rest) if adapter is not None and dropout else None for _, adapter, dropout in projections]


def wants_of(flags: Sequence[bool]) -> list[Wanted]:
    """`flags` for weight, A and B of each projection, projection by projection."""
    return [Wanted(*flags[i : i + 3]) for i in range(0, len(flags), 3)]


def backward_without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward in its tensors' own dtypes, as its forward, also where the caller runs it inside autocast."""

    @functools.wraps(backward)
    def run(ctx: Any, *dys: torch.Tensor | None) -> Any:
        first = next((dy for dy in dys if dy is not None), None)
        if first is None or not torch.is_autocast_enabled(first.device.type):
            return backward(ctx, *dys)
        with torch.autocast(first.device.type, enabled=False):
            return backward(ctx, *dys)

    return run
