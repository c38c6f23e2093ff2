"""Batches are on the host before they are on the GPU: what is asked of them there costs no wait for the GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastgemma.patches.engine import Op

_HOST_COPY = "_fastgemma_host_copy"
# Entries of a batch that fast paths ask for.
_NAMES = ("input_ids", "attention_mask", "position_ids")


def remember(moved: torch.Tensor, original: torch.Tensor) -> None:
    """Notes that `original`, on the host, is what `moved` was copied from."""
    if moved.is_inference() or original.is_inference():
        return  # they do not count what is written to them
    setattr(moved, _HOST_COPY, (original, original._version, moved._version))


def host_copy(tensor: torch.Tensor) -> torch.Tensor | None:
    """What a tensor was copied from, unless either was written to since; CPU tensors themselves."""
    if tensor.device.type == "cpu":
        return tensor
    original, *versions = getattr(tensor, _HOST_COPY, (None,))
    return original if original is not None and versions == [original._version, tensor._version] else None


def make_send_to_device(original: Callable[..., Any], ops: dict[str, Op]) -> Callable[..., Any]:
    """accelerate's move of a batch to the device."""

    def send_to_device(tensor: Any, *args: Any, **kwargs: Any) -> Any:
        sent = original(tensor, *args, **kwargs)
        if any(op.active for op in ops.values()) and hasattr(tensor, "keys"):
            for name in (name for name in _NAMES if name in tensor):
                host, moved = tensor[name], sent[name]
                if isinstance(host, torch.Tensor) and host.is_cpu and not moved.is_cpu:
                    remember(moved, host)
        return sent

    return send_to_device
