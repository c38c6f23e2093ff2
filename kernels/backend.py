"""Where a kernel can run.

`triton` and `tl` are imported here once, so that the package still imports on a machine without Triton (Windows,
macOS): there every operation runs its plain-torch reference.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import operator
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
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


class Prepared:
    """A launch but for its pointers and descriptors: what comes again with every layer and step costs host time to work
    out, and to recognise.

    `kernel[prepared](name=pointer, ...)` launches it, with all of the kernel's pointers and then descriptors, in the
    order of its signature: all on one device, the descriptors of one tile.
    """

    def __init__(self, grid: tuple[int, ...], **numbers: Any) -> None:
        """`numbers`: what else the kernel takes, constants and the compiler's options last."""
        self.grid = grid
        self.numbers = numbers
        # By kernel, device and dtypes of pointers, all at multiples of 16 bytes: what launches it, and the numbers in
        # its order.
        self.launchers: dict[Any, tuple[Callable[..., None], tuple[Any, ...]]] = {}


class Kernel:
    """A Triton kernel, launched as `kernel[grid](name=value, ...)`.

    Triton binds and classifies every argument again at each launch, which costs more host time than a small kernel
    takes on the GPU. Here a launch whose values and pointer alignments were seen before finds its compiled variant in
    one look-up, and hands addresses to Triton's launcher, which would ask the driver about each tensor otherwise. Name
    every parameter in a launch, compiler options last; pointers come first in the kernel's signature, as `..._ptr`,
    then what `tile_descriptor` returned or None, as `..._desc`.
    """

    def __init__(self, fn: Any, specialise: bool = True) -> None:
        self.__name__: str = fn.__name__
        # By exact values, to spare the classification; by what Triton compiles values into.
        self._launchers: dict[Any, Callable[..., None]] = {}
        self._compiled: dict[Any, Any] = {}
        self._orders: dict[tuple[str, ...], Callable[[Any], tuple[Any, ...]]] = {}
        parameters = inspect.signature(fn).parameters.values()
        self._names = [parameter.name for parameter in parameters]
        self._is_constexpr = ["constexpr" in str(parameter.annotation) for parameter in parameters]
        self._n_pointers = sum(name.endswith("_ptr") for name in self._names)
        self._n_descriptors = sum(name.endswith("_desc") for name in self._names)
        start = self._n_pointers + self._n_descriptors
        self._given = tuple(self._names[:start])
        numbers = [name for name, constant in zip(self._names, self._is_constexpr) if not constant][start:]
        self._specialisation = _specialisation if specialise else _width
        self.function = triton.jit(fn, do_not_specialize=[] if specialise else numbers) if HAS_TRITON else fn

    def __getitem__(self, grid: tuple[int, ...] | Prepared) -> Any:
        if isinstance(grid, Prepared):
            return functools.partial(self._launch_prepared, grid)
        return functools.partial(self._compile_ahead if _this_thread.compiles_ahead else self._launch, grid)

    def _in_order(self, kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments of a launch in the kernel's own order, then options."""
        names = tuple(kwargs)
        order = self._orders.get(names)
        if order is None:
            ordered = (*self._names, *names[len(self._names) :])
            order = self._orders[names] = operator.itemgetter(*map(names.index, ordered))
        return order(tuple(kwargs.values()))

    def _launch_prepared(self, prepared: Prepared, **given: Any) -> None:
        """Asks what a launch before this one did not answer, and no more: every layer of every step comes here."""
        if _this_thread.compiles_ahead or torch.compiler.is_compiling():
            self._launch_whole(prepared, given)
            return
        values = tuple(given.values())
        pointers = values[: self._n_pointers]
        device = pointers[0].get_device()
        addresses = tuple(map(_data_ptr, pointers))
        key = None
        if functools.reduce(operator.or_, addresses) & 15 == 0:
            key = (self, device, *map(_dtype, pointers))
        found = prepared.launchers.get(key)
        if found is None or _several_devices() and device != torch.cuda.current_device():
            self._launch_whole(prepared, given, key)
            return
        launcher, numbers = found
        launcher(device, *addresses, *values[len(pointers) :], *numbers)

    def _launch_whole(self, prepared: Prepared, given: dict[str, Any], key: Any = None) -> None:
        """Launches as if nothing were prepared, and keeps under `key`, if any, what can launch the next of its kind."""
        if tuple(given) != self._given:
            raise TypeError(f"{self.__name__} takes {', '.join(self._given)} in this order; got {', '.join(given)}.")
        whole = self._compile_ahead if _this_thread.compiles_ahead else self._launch
        launcher = whole(prepared.grid, **given, **prepared.numbers)
        if launcher is not None and key is not None:
            prepared.launchers[key] = launcher, tuple(prepared.numbers[name] for name in self._names[len(given) :])

    def _launch(self, grid: tuple[int, ...], **kwargs: Any) -> Callable[..., None] | None:
        """Launches; returns what did, where it can do so again."""
        values = self._in_order(kwargs)
        n_pointers = self._n_pointers
        pointers = values[:n_pointers]
        first = pointers[0]
        if not first.is_cuda or torch.compiler.is_compiling():
            self.function[grid](**kwargs)
            return None
        device = first.get_device()
        if _several_devices() and device != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._launch(grid, **kwargs)
        for pointer in pointers:
            if not pointer.is_cuda:
                raise ValueError(f"fastgemma: {self.__name__} got a tensor on {pointer.device}; move it to the GPU.")
        addresses = tuple(map(_data_ptr, pointers))
        rest = values[n_pointers:]
        n_descriptors = self._n_descriptors
        # A descriptor's address and lengths are given to the launcher; what it was compiled for is its tile.
        known = (*map(_tile, rest[:n_descriptors]), *rest[n_descriptors:]) if n_descriptors else rest
        key = (device, grid, _aligned(addresses), *map(_dtype, pointers), *known)
        launcher = self._launchers.get(key)
        if launcher is None:
            launcher = self._find(grid, kwargs, rest, key[:1] + key[2 : 3 + n_pointers])
            if launcher is None:
                return None
            if len(self._launchers) >= _MAX_LAUNCHERS:  # sequence lengths that never come back
                self._launchers.clear()
            self._launchers[key] = launcher
        launcher(device, *addresses, *rest[: len(self._names) - n_pointers])
        return launcher

    def _find(
        self, grid: tuple[int, ...], kwargs: dict[str, Any], rest: tuple[Any, ...], pointers: tuple[Any, ...]
    ) -> Callable[..., None] | None:
        """What launches these values on this grid, or None where the first launch compiled, and so launched already."""
        variant = self._variant(rest, pointers)
        compiled = self._compiled.get(variant)
        if compiled is None:
            ahead = _ahead.pop((self, variant), None)
            if ahead is not None and ahead.exception() is None:
                compiled = self._compiled[variant] = ahead.result()
        if compiled is None:
            # What it returns launches itself from then on.
            self._compiled[variant] = self.function[grid](**kwargs)
            return None
        return _launcher(compiled, grid if len(grid) == 3 else (*grid, 1, 1)[:3])

    def _variant(self, rest: tuple[Any, ...], pointers: tuple[Any, ...]) -> tuple[Any, ...]:
        """What Triton compiles a kernel for: `pointers` are device, alignments and dtypes, `rest` what follows them."""
        constants = self._is_constexpr[self._n_pointers :]
        known = (value if constant else self._specialisation(value) for value, constant in zip(rest, constants))
        return (pointers, *known, *rest[len(constants) :])

    def _compile_ahead(self, grid: tuple[int, ...], **kwargs: Any) -> None:
        """Has another thread compile and load what a launch would need; launches nothing."""
        values = self._in_order(kwargs)
        tensors, rest = values[: self._n_pointers], values[self._n_pointers :]
        device = tensors[0].get_device()
        variant = self._variant(rest, (device, True, *(tensor.dtype for tensor in tensors)))
        if variant in self._compiled or (self, variant) in _ahead:
            return

        def work() -> Any:
            torch.cuda.set_device(device)
            compiled = self.function.warmup(grid=grid, **kwargs)
            compiled[grid]  # loads it
            return compiled

        _ahead[self, variant] = _compilers().submit(work)


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


class _ThisThread(threading.local):
    compiles_ahead = False


_this_thread = _ThisThread()


@contextlib.contextmanager
def compiling_ahead() -> Iterator[None]:
    """Has other threads compile what is launched inside, instead of launching it: outputs are left as they were.

    A launch of the same kind waits for them later, or compiles by itself where they failed. Tensors inside must begin
    at multiples of 16 bytes.
    """
    _this_thread.compiles_ahead = True
    try:
        yield
    finally:
        _this_thread.compiles_ahead = False


@functools.cache
def _compilers() -> ThreadPoolExecutor:
    # The compiler gives Python's lock away for most of its time. More than 8 would want a laptop's memory.
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1), "fastgemma-compile")


# What they compile, or have compiled, by kernel and variant.
_ahead: dict[tuple[Kernel, Any], Future[Any]] = {}


def _after_fork() -> None:
    """A forked child has none of these threads, and would wait for them: it compiles by itself."""
    _ahead.clear()
    _compilers.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


_dtype = operator.attrgetter("dtype")
_data_ptr = torch.Tensor.data_ptr


def _aligned(addresses: tuple[int, ...]) -> bool | tuple[bool, ...]:
    """Which of them are multiples of 16; True for all."""
    return functools.reduce(operator.or_, addresses) & 15 == 0 or tuple(address & 15 == 0 for address in addresses)


def _specialisation(value: Any) -> Any:
    """What Triton compiles a run-time value into: an integer 1, divisibility by 16, its width; floats are alike."""
    if value.__class__ is not int:
        return _tile(value)
    if -_INT32_MAX <= value <= _INT32_MAX:
        return 1 if value == 1 else 2 if value & 15 else 3
    return 4 if value & 15 else 5


def _width(value: Any) -> Any:
    """The same where integers are not looked at."""
    return -_INT32_MAX <= value <= _INT32_MAX if value.__class__ is int else _tile(value)


def _tile(value: Any) -> Any:
    """What a kernel was compiled for of a descriptor; None of anything else."""
    return (value.base.dtype, *value.block_shape) if hasattr(value, "block_shape") else None


@functools.cache
def _several_devices() -> bool:
    return torch.cuda.device_count() > 1


def kernel(fn: Any) -> Kernel:
    """Decorator of a kernel's entry point; its first argument must be a tensor. Helpers it calls take `jit`."""
    return Kernel(fn)


def kernel_of_any_numbers(fn: Any) -> Kernel:
    """`kernel` for what takes long to compile: not anew for integers of 1, or for multiples of 16.

    Where the compiler must know that a number is such a multiple, the kernel tells it.
    """
    return Kernel(fn, specialise=False)


def tile_descriptor(tensor: torch.Tensor, shape: list[int], block: list[int]) -> Any:
    """What a kernel loads tiles of `block` from: a contiguous tensor, read as `shape` [n, columns].

    The tensor begins at a multiple of 16 bytes. Both lists are kept: do not change them.
    """
    return _tensor_descriptor()(tensor, shape, [shape[1], 1], block)


@functools.cache
def _tensor_descriptor() -> Any:
    """Its class, which not every version of Triton has."""
    return importlib.import_module("triton.tools.tensor_descriptor").TensorDescriptor


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
