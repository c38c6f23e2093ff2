"""What LoRA projections are made of, and whether they fit together."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastgemma.kernels.backend import cdiv, check_dtype
from fastgemma.kernels.nf4 import NF4Weight

Masks = list[torch.Tensor | None]


class Adapter(NamedTuple):
    """LoRA factors: A [rank, in_features], B [out_features, rank], same dtype, and alpha / rank or the like."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


class Projection(NamedTuple):
    """One linear layer: base weight [out_features, in_features], dense or NF4, and its adapter, if any.

    `dropout` is the probability, below 1, with which the adapter's input elements are dropped in this call. The mask is
    drawn from torch's generator as `torch.nn.functional.dropout` draws it.
    """

    weight: torch.Tensor | NF4Weight
    adapter: Adapter | None = None
    dropout: float = 0.0


class Wanted(NamedTuple):
    """Which of a projection's gradients are asked for."""

    weight: bool = False
    A: bool = False
    B: bool = False


class Grads(NamedTuple):
    """A projection's gradients; None where not asked for."""

    weight: torch.Tensor | None = None
    A: torch.Tensor | None = None
    B: torch.Tensor | None = None


def with_room(
    shape: Sequence[int], room: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """An empty row matrix of this shape, and the buffer that it begins where `room` columns are wanted behind it."""
    n_rows, n_cols = shape
    if room == 0:
        return torch.empty((n_rows, n_cols), dtype=dtype, device=device), None
    # Rows begin at multiples of 64 elements, as they do in Gemma 4's matrices: in bf16 that is a line of the cache.
    whole = torch.empty((n_rows, n_cols + 64 * cdiv(room, 64)), dtype=dtype, device=device)
    return whole[:, :n_cols], whole


def check_projections(x: torch.Tensor, projections: Sequence[Projection], autocast: torch.dtype | None) -> None:
    """Raises TypeError or ValueError where the projections do not fit x [..., in_features]."""
    check_dtype("x", x)
    device, features = x.device, x.shape[-1]
    for weight, adapter, dropout in projections:
        if weight.shape[1] != features:
            raise ValueError(
                f"fastgemma: a weight of shape {tuple(weight.shape)} does not fit an input of {features} features."
            )
        if autocast is None and not isinstance(weight, NF4Weight) and weight.dtype != x.dtype:
            raise TypeError(f"fastgemma: x is {x.dtype}, a base weight {weight.dtype}; cast one.")
        if weight.device != device:
            raise ValueError(f"fastgemma: x is on {device}, a base weight on {weight.device}; move one.")
        if not 0 <= dropout < 1:
            raise ValueError(f"fastgemma: dropout is {dropout}; give a probability below 1.")
        if adapter is None:
            continue
        A, B, _ = adapter
        if A.shape != (B.shape[1], features) or B.shape[0] != weight.shape[0]:
            raise ValueError(
                f"fastgemma: LoRA factors {tuple(A.shape)} and {tuple(B.shape)} do not fit a weight of shape "
                f"{tuple(weight.shape)}."
            )
        if A.device != device or B.device != device:
            raise ValueError(f"fastgemma: x is on {device}, LoRA factors on {A.device} and {B.device}; move one.")
        if A.dtype != B.dtype:
            raise TypeError(f"fastgemma: LoRA factors are {A.dtype} and {B.dtype}; cast one.")


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x as [rows, columns], for a matrix product."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Products here run in the dtypes they were given; entering torch.autocast costs as much as a launch."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()
