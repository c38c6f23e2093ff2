"""Where a kernel can run.

`triton` and `tl` are imported here once, so that the package still imports on a machine without Triton (Windows,
macOS): there every operation runs its plain-torch reference.
"""

from __future__ import annotations

import os
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton is published for Linux only
    triton: Any = None
    tl: Any = None

HAS_TRITON: bool = triton is not None


def jit(fn: Any) -> Any:
    """`triton.jit`, or the plain function where Triton is missing (it is then never called)."""
    return triton.jit(fn) if HAS_TRITON else fn


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"


def runs_kernel(*tensors: torch.Tensor | None) -> bool:
    """Whether an operation on these tensors launches its kernel (True) or runs its plain-torch reference (False).

    Raises:
        ValueError: the tensors are on different devices.
    """
    first = None
    for tensor in tensors:
        if tensor is None:
            continue
        if first is None:
            first = tensor.device
        elif tensor.device != first:
            raise ValueError(
                f"fastgemma: an operation got tensors on {first} and on {tensor.device}. "
                "Nothing was computed. Move them to one device first."
            )
    if first is None or not HAS_TRITON:
        return False
    return first.type == "cuda" or (first.type == "cpu" and interpreting())


def check_dtype(name: str, tensor: torch.Tensor) -> None:
    """Raises TypeError unless `tensor` is float32, bfloat16 or float16."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"fastgemma: {name} is {tensor.dtype}; kernels take float32, bfloat16 and float16. Cast it first."
        )


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` as [rows, columns] with unit column stride; a view wherever its strides allow one, else a copy."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.numel() == 0 else rows.contiguous()
