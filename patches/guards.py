"""Cheap per-call questions: may the fast path run here, exactly?"""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
from torch import nn

from fastgemma.kernels.backend import HAS_TRITON, interpreting

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


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward: hooks, or a forward set on the instance."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


@functools.cache
def is_stock(kind: Any) -> bool:
    """Whether a class is transformers' own: a subclass, or another library's wrapper, may compute something else."""
    return kind.__module__.startswith("transformers.models.gemma4")


def is_transformers(function: Any) -> bool:
    """Whether a function is transformers' own, or one of ours or of another library that wraps it."""
    return str(getattr(inspect.unwrap(function), "__module__", "")).startswith("transformers.")


def plain(weight: Any) -> bool:
    """Whether a weight is an ordinary tensor: not a DTensor or another sharded or quantised subclass."""
    return type(weight) in (nn.Parameter, torch.Tensor)


def is_gelu_tanh(activation: Any) -> bool:
    """Whether an activation from transformers' ACT2FN is the tanh-approximated GELU."""
    if type(activation) is nn.GELU:
        return activation.approximate == "tanh"
    return type(activation).__name__ in ("GELUTanh", "PytorchGELUTanh")
