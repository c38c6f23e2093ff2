"""Cheap per-call questions: may the fast path run here, exactly?"""

from __future__ import annotations

import contextlib
import functools
import inspect
import threading
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from fastgemma.kernels.backend import HAS_TRITON, interpreting
from fastgemma.patches.engine import directory_of, replacements, written_in

_TORCH, _TRANSFORMERS = directory_of(torch), directory_of(transformers)
_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def unusable(tensor: torch.Tensor) -> str | None:
    """Why kernels cannot take this tensor, or None."""
    if not tensor.is_cuda and not (tensor.device.type == "cpu" and interpreting()):
        return "no gpu"
    if not HAS_TRITON:
        return "no triton"
    if torch.compiler.is_compiling():
        return "compiling"  # stock code is what torch.compile knows how to fuse
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func"
    if tensor.dtype not in _KERNEL_DTYPES:
        return f"dtype {tensor.dtype}"
    return None


class _ThisThread(threading.local):
    recomputes = False


_this_thread = _ThisThread()


@contextlib.contextmanager
def recomputing(whether: bool) -> Iterator[None]:
    """The recomputation of a checkpointed layer takes the path of its forward: hooks on all modules that came in
    between are not asked for."""
    before, _this_thread.recomputes = _this_thread.recomputes, whether
    try:
        yield
    finally:
        _this_thread.recomputes = before


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward: hooks, of its own or of all modules, or a forward
    set on the instance."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
        or (not _this_thread.recomputes and _has_any_global_hook())
    )


def for_hooks(module: nn.Module, output: torch.Tensor) -> torch.Tensor:
    """A module's output, in memory that its hooks may write to: autograd refuses to let them write to a view that a
    fused operation returned, such as one part of several."""
    if torch.compiler.is_compiling():  # stock code, whose outputs are its own
        return output
    return output.clone() if output._is_view() and hooked(module) else output


@functools.cache
def is_stock(kind: Any) -> bool:
    """Whether a class is transformers' own: a subclass, or another library's wrapper, may compute something else."""
    return kind.__module__.startswith("transformers.models.gemma4")


def _beneath(function: Any) -> Any:
    """What transformers' own wrappers and torch's, such as no_grad, lead to: ours, stock's, or somebody's code.

    transformers also wraps the method of a subclass when that is defined, as FSDP2 defines one for a layer.
    """
    while (
        function not in replacements
        and hasattr(function, "__wrapped__")
        and (written_in(function, _TRANSFORMERS) or written_in(function, _TORCH))
    ):
        function = function.__wrapped__
    return function


def is_ours(kind: Any) -> bool:
    """Whether the forward of a class is what a row put there: not refused, and neither replaced nor wrapped since."""
    return _beneath(kind.forward) in replacements


def is_known(kind: Any) -> bool:
    """Whether the forward of a class is transformers' own code, or ours in its place."""
    return is_ours(kind) or is_transformers_own(kind.forward)


def is_transformers_own(function: Any) -> bool:
    """Whether a function is written in transformers, and not only a wrapper of one that is."""
    return written_in(_beneath(function), _TRANSFORMERS)


def is_transformers(function: Any) -> bool:
    """Whether a function is transformers' own, or one of ours or of another library that wraps it."""
    return str(getattr(inspect.unwrap(function), "__module__", "")).startswith("transformers.")


def plain(weight: Any) -> bool:
    """Whether a weight is an ordinary tensor: not a DTensor or another sharded or quantised subclass."""
    return type(weight) in (nn.Parameter, torch.Tensor)


def activation_unusable(activation: Any) -> str | None:
    """Why `geglu` cannot stand in for an activation from transformers' ACT2FN, or None."""
    kind = type(activation)
    tanh = activation.approximate == "tanh" if kind is nn.GELU else kind.__name__ in ("GELUTanh", "PytorchGELUTanh")
    if not tanh:
        return f"activation {kind.__name__}"
    if not written_in(kind.forward, _TORCH if kind is nn.GELU else _TRANSFORMERS):
        return "another forward of the activation"
    return "hooks on an activation" if hooked(activation) else None
