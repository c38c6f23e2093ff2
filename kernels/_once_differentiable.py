"""Gradients that cannot be differentiated again, and say so.

torch's own decorator says so only where the gradient that reaches the operation requires one itself. The gradient of a
loss with respect to itself does not, so that in `autograd.grad(loss, ..., create_graph=True)` everything before an
operation would come out as a constant: a penalty on gradients would not train anything, in silence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_MESSAGE = (
    b"fastgemma: the gradient of a fused operation was to be differentiated again, but it is only once_differentiable. "
    b"No second derivative was computed. Compute it with stock code, after fastgemma.unpatch()."
)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """The `backward` of an autograd Function, whose results raise where they are differentiated."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: torch.Tensor | None) -> Any:
        if not torch.is_grad_enabled():  # it is with create_graph=True
            return backward(ctx, *grads)
        with torch.no_grad():
            results = backward(ctx, *grads)
        several = results if isinstance(results, tuple) else (results,)
        # Whatever requires a gradient makes a node of the error.
        marked: list[Any] = [None if result is None else result.detach().requires_grad_() for result in several]
        return torch._C._functions.DelayedError(_MESSAGE, len(marked))(*marked)

    return run
