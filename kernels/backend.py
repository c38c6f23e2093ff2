"""Where a kernel can run.

`triton` and `tl` are imported here once, so that the package still imports on a machine without Triton (Windows,
macOS): there every operation runs its plain-torch reference.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import operator
import os
from collections.abc import Callable
from typing import Any

import torch

try:
    triton: Any = importlib.import_module("triton")
    tl: Any = importlib.import_module("triton.language")
except ImportError:  # Triton is published for Linux only
    triton = tl = None

HAS_TRITON: bool = triton is not None
_INT32_MAX = 2**31 - 1


def jit(fn: Any) -> Any:
    """`triton.jit`, or the plain function where Triton is missing (it is then never called)."""
    return triton.jit(fn) if HAS_TRITON else fn


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own is made for kernels too, and costs a launch's worth of host time outside them."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


class Kernel:
    """A Triton kernel, launched as `kernel[grid](name=value, ...)`.

    Triton binds and classifies every argument again at each launch, which costs more host time than a small kernel
    takes on the GPU. Here a launch whose values and pointer alignments were seen before finds its compiled variant in
    one look-up, and hands addresses to Triton's launcher, which would ask the driver about each tensor otherwise. Name
    every parameter in a launch, compiler options last; pointers come first in the kernel's signature, as `..._ptr`.
    """

    def __init__(self, fn: Any) -> None:
        self.function = jit(fn)
        self.__name__: str = fn.__name__
        # By exact values, to spare the classification; by what Triton compiles values into.
        self._launchers: dict[Any, Callable[..., None]] = {}
        self._compiled: dict[Any, Any] = {}
        self._orders: dict[tuple[str, ...], Callable[[Any], tuple[Any, ...]]] = {}
        if HAS_TRITON:
            parameters = inspect.signature(fn).parameters.values()
            self._names = [parameter.name for parameter in parameters]
            self._is_constexpr = ["constexpr" in str(parameter.annotation) for parameter in parameters]
            self._n_pointers = sum(name.endswith("_ptr") for name in self._names)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return functools.partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], **kwargs: Any) -> None:
        names = tuple(kwargs)
        order = self._orders.get(names)
        if order is None:
            # The kernel's own order, then options.
            ordered = (*self._names, *names[len(self._names) :])
            order = self._orders[names] = operator.itemgetter(*map(names.index, ordered))
        values = order(tuple(kwargs.values()))
        n_pointers = self._n_pointers
        pointers = values[:n_pointers]
        first = pointers[0]
        if not first.is_cuda or torch.compiler.is_compiling():
            self.function[grid](**kwargs)
            return
        device = first.get_device()
        if _several_devices() and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                self._launch(grid, **kwargs)
            return
        addresses = []
        dtypes = []
        unaligned = 0
        for pointer in pointers:
            if not pointer.is_cuda:
                raise ValueError(f"fastgemma: {self.__name__} got a tensor on {pointer.device}; move it to the GPU.")
            address = pointer.data_ptr()
            unaligned |= address
            addresses.append(address)
            dtypes.append(pointer.dtype)
        aligned = True if unaligned & 15 == 0 else tuple(address & 15 == 0 for address in addresses)
        rest = values[n_pointers:]
        key = (device, grid, aligned, *dtypes, *rest)
        launcher = self._launchers.get(key)
        if launcher is None:
            launcher = self._find(grid, kwargs, rest, key[:1] + key[2 : 3 + n_pointers])
            if launcher is None:
                return
            if len(self._launchers) >= _MAX_LAUNCHERS:  # sequence lengths that never come back
                self._launchers.clear()
            self._launchers[key] = launcher
        launcher(device, *addresses, *rest[: len(self._names) - n_pointers])

    def _find(
        self, grid: tuple[int, ...], kwargs: dict[str, Any], rest: tuple[Any, ...], pointers: tuple[Any, ...]
    ) -> Callable[..., None] | None:
        """What launches these values on this grid, or None where the first launch compiled, and so launched already."""
        constants = self._is_constexpr[self._n_pointers :]
        variant = (
            pointers,
            *(value if constant else _specialisation(value) for value, constant in zip(rest, constants)),
            *rest[len(constants) :],
        )
        compiled = self._compiled.get(variant)
        if compiled is None:
            # What it returns launches itself from then on.
            self._compiled[variant] = self.function[grid](**kwargs)
            return None
        return _launcher(compiled, grid if len(grid) == 3 else (*grid, 1, 1)[:3])


def _launcher(compiled: Any, grid: tuple[int, ...]) -> Callable[..., None]:
    """`compiled[grid]` without what it prepares for hooks, unless a profiler has set some."""
    official = compiled[grid]  # also loads the kernel
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    runtime = triton.knobs.runtime
    current_stream = torch._C._cuda_getCurrentRawStream

    def start(device: int, *args: Any) -> None:
        hooks = runtime.launch_enter_hook
        if getattr(hooks, "calls", hooks):
            official(*args)
        else:
            run(*grid, current_stream(device), function, metadata, None, None, None, *args)

    return start


# Launches remembered by exact value, for each kernel.
_MAX_LAUNCHERS = 4096


def _specialisation(value: Any) -> Any:
    """What Triton compiles a run-time number into: an integer 1, divisibility by 16, its width; floats are alike."""
    if value.__class__ is not int:
        return None
    if -_INT32_MAX <= value <= _INT32_MAX:
        return 1 if value == 1 else 2 if value & 15 else 3
    return 4 if value & 15 else 5


@functools.cache
def _several_devices() -> bool:
    return torch.cuda.device_count() > 1


def kernel(fn: Any) -> Kernel:
    """Decorator of a kernel's entry point; its first argument must be a tensor. Helpers it calls take `jit`."""
    return Kernel(fn)


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
    rows = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.numel() == 0 else rows.contiguous()
