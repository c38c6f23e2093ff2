"""The one budget for chunks and scratch memory.

It follows from the card's total memory times the process's memory fraction, never from momentarily free memory: that
would change chunk shapes, and with them the last bits of a result, from step to step and between a forward and its
recomputation.
"""

from __future__ import annotations

import torch

_MIB = 1 << 20
_GIB = 1 << 30
# Bytes of budget from this many bytes of card memory upwards. The steps sit a little under the marketed sizes
# because drivers report less than that.
_STEPS = ((22 * _GIB, 1024 * _MIB), (11 * _GIB, 512 * _MIB), (0, 256 * _MIB))

_override: int | None = None


def set_workspace_bytes(num_bytes: int | None) -> None:
    """Overrides the budget for the whole process; None returns to the default.

    Raises:
        ValueError: fewer than one mebibyte.
    """
    global _override
    if num_bytes is not None and num_bytes < _MIB:
        raise ValueError(f"fastgemma: a workspace of {num_bytes} bytes is too small; give at least {_MIB} (1 MiB).")
    _override = num_bytes


def workspace_bytes(device: torch.device | None = None) -> int:
    """Bytes that one operation may use for chunks and scratch on `device` (default: the current device).

    256 MiB on an 8 GB card, 512 MiB on 12 to 16 GB, 1 GiB from 24 GB; 256 MiB where there is no CUDA device to ask. A
    memory fraction set through `torch.cuda.set_per_process_memory_fraction` counts as a smaller card.
    """
    if _override is not None:
        return _override
    if (device is not None and device.type != "cuda") or not has_cuda():
        return _STEPS[-1][1]
    index = torch.cuda.current_device() if device is None or device.index is None else device.index
    return _from_memory(card_bytes(torch.device("cuda", index)))


def has_cuda() -> bool:
    """Whether a CUDA device can be asked anything: not in a forked child of a process that uses it, such as a loader's
    worker, where every question raises."""
    # The first answer is cheap, and that of training; the second asks the driver each time.
    return torch.cuda.is_initialized() or (torch.cuda.is_available() and not torch.cuda._is_in_bad_fork())


def card_bytes(device: torch.device) -> float:
    """Bytes of a CUDA device that this process may use: a memory fraction counts as a smaller card."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return torch.cuda.get_device_properties(index).total_memory * _memory_fraction(index)


def _memory_fraction(index: int) -> float:
    return torch.cuda.get_per_process_memory_fraction(index)


def _from_memory(total: float) -> int:
    return next(budget for least, budget in _STEPS if total >= least)
