"""Which call of a checkpointed decoder layer a forward belongs to, and whether it is that call's recomputation.

Checkpointing hands a layer's keyword arguments to the recomputation as it handed them to the first forward, on whatever
thread that runs. So a call leaves a note among them, which says when it is over: whoever runs the layer with that note
from then on recomputes it. A checkpoint of the user's own around several layers calls them again, with new notes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.checkpoint import checkpoint

from fastgemma.patches.engine import directory_of, written_in
from fastgemma.patches.guards import hooked, is_ours, is_stock

_NAME = "_fastgemma_call"


class LayerCall:
    """A call of a layer that transformers checkpoints, and whose output nothing reads within the checkpoint."""

    __slots__ = ("over",)

    def __init__(self) -> None:
        self.over = False

    def recomputes_for_gradients(self, layer: Any) -> bool:
        """Whether a forward of this call is its recomputation, and nobody reads its output now."""
        return self.over and _unread(layer)


def note_of(kwargs: dict[str, Any]) -> LayerCall | None:
    """The note among a forward's arguments, which it is taken out of."""
    return kwargs.pop(_NAME, None)


def _checkpointing(layer: Any) -> Callable[..., Any] | None:
    """The function that checkpoints the layer, not reentrant and with nothing else asked; or None."""
    function = getattr(layer, "_gradient_checkpointing_func", None)
    if not isinstance(function, functools.partial) or function.args:
        return None
    keywords = {"preserve_rng_state": True, **function.keywords}
    return function.func if keywords == {"use_reentrant": False, "preserve_rng_state": True} else None


# Somebody may have put another in its place before this was imported.
_IS_TORCHS = written_in(checkpoint, directory_of(torch))


def plainly_checkpointed(layer: Any) -> bool:
    """Whether transformers checkpoints this layer by torch's own function, not reentrant, with nothing else asked."""
    return _IS_TORCHS and _checkpointing(layer) is checkpoint


def _offloads(layer: Any) -> bool:
    """Whether it does so by its own function around torch's, which keeps checkpoints on the host."""
    function: Any = _checkpointing(layer)
    names = getattr(function, "__module__", None), getattr(function, "__name__", None)
    return names == ("transformers.modeling_utils", "checkpoint_func")


def _unread(layer: Any) -> bool:
    """Whether what lies between the checkpoint and our forward hands its output on, and does nothing else with it."""
    kind: Any = type(layer)
    return (
        is_stock(kind)
        and is_ours(kind)
        and layer._compiled_call_impl is None
        and not hooked(layer)
        and not _has_any_global_hook()
    )


def call_noted(original: Callable[..., Any], layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`original(layer, *args, **kwargs)`, with a note where the layer's forward may find one."""
    if not ((plainly_checkpointed(layer) or _offloads(layer)) and _unread(layer)):
        return original(layer, *args, **kwargs)
    call = LayerCall()
    try:
        return original(layer, *args, **{**kwargs, _NAME: call})
    finally:
        call.over = True
