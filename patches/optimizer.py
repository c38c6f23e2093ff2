"""bitsandbytes' optimizers wait for the GPU after every parameter: a tenth of a millisecond each, hundreds of times.

The kernels of a step run on the stream that the gradients were computed on, one after another, so nothing needs the
wait: while the GPU is still in the backward, the host can enqueue the whole step behind it. Two cases do need it: paged
states, which the host may move, and another stream than the default one, which bitsandbytes does not use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastgemma.patches.engine import Op


def _must_wait(tensor: torch.Tensor) -> str | None:
    if tensor.device.type != "cuda":
        return "no gpu"
    if torch.cuda.current_stream(tensor.device) != torch.cuda.default_stream(tensor.device):
        return "a stream of its own"
    from bitsandbytes.functional import GlobalPageManager

    return "paged states" if GlobalPageManager.get_instance().paged_tensors else None


def make_sync(original: Callable[..., Any], ops: dict[str, Op]) -> Callable[..., Any]:
    """`sync_gpu` as `bitsandbytes.optim.optimizer` calls it."""
    op = ops["optimizer"]

    def sync_gpu(t: torch.Tensor) -> None:
        if not op.active:
            return original(t)
        reason = _must_wait(t)
        if reason is not None:
            op.fallback(reason)
            return original(t)
        op.fast()
        return None

    return sync_gpu
