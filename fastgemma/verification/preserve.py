"""Leaves a model, and the process around it, as they were found, whatever happens in between."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastgemma.patches.engine import Op


@contextlib.contextmanager
def preserved(model: nn.Module, ops: list[Op]) -> Iterator[None]:
    """Puts back gradients (the same tensors), training modes, random states, matmul precision and `ops`' counters.

    Inside, no parameter has a gradient, and float32 products are computed in float32.
    """
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    counts = [(op, op.fast_calls, Counter(op.fallbacks)) for op in ops]
    precision = torch.get_float32_matmul_precision()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    try:
        with torch.random.fork_rng(devices):
            torch.set_float32_matmul_precision("highest")
            for parameter, _ in grads:
                parameter.grad = None
            yield
    finally:
        for parameter, grad in grads:
            parameter.grad = grad
        for module, training in modes:
            module.training = training
        for op, fast_calls, fallbacks in counts:
            op.fast_calls, op.fallbacks = fast_calls, fallbacks
        torch.set_float32_matmul_precision(precision)


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[bool]:
    """Switches off every dropout that is on; yields whether there was one."""
    modules: Any = list(model.modules())
    drops = [m for m in modules if isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0]
    # Attention drops weights at a rate of its own, without a module for it.
    rates = [(m, m.attention_dropout) for m in modules if m.training and getattr(m, "attention_dropout", 0)]
    try:
        for module in drops:
            module.training = False
        for module, _ in rates:
            module.attention_dropout = 0.0
        yield bool(drops or rates)
    finally:
        for module in drops:
            module.training = True
        for module, rate in rates:
            module.attention_dropout = rate


@contextlib.contextmanager
def attention_implementation(model: Any, name: str) -> Iterator[None]:
    """Another of transformers' attention implementations ("sdpa", "eager") for the language model."""
    config = model.config.get_text_config()
    previous = config._attn_implementation
    try:
        config._attn_implementation = name
        yield
    finally:
        config._attn_implementation = previous
