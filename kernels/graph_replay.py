"""A function and its gradient as two CUDA graphs, for work whose launches cost the host more than the GPU.

    forward:   outputs = function(inputs, constants, trained)
    backward:  the function once more, then its gradients: the graph recomputes, so nothing but the inputs is kept

That is gradient checkpointing of `function`, launched twice instead of once per kernel. A replay runs the kernels of a
plain call, in their order, on the same values, and draws the same random numbers: its results are equal to the bit.

Graphs read and write fixed addresses. An `Arena` holds the buffers that graphs of one shape share: inputs are copied in
and results copied out, so that no tensor a caller gets is ever written to again. Trained tensors are read where they
are, and must stay there.

Source: `torch.cuda.make_graphed_callables`, which captures a backward in the same way, for one function at a time.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import operator
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from fastgemma.kernels._once_differentiable import once_differentiable
from fastgemma.kernels.random_state import drawing_from, generator_of

Tensors = Sequence[torch.Tensor | None]
# (inputs, constants, trained, whether the outputs' values are read) -> outputs
Function = Callable[[Tensors, Tensors, Sequence[torch.Tensor], bool], tuple[torch.Tensor, ...]]
# Elements between the starts of gradients that share a buffer: whatever reads one may read in vectors.
_ALIGNMENT = 128


class Graph:
    """Work on the current device, recorded without running it, and run as a whole by `replay`.

    The work must have run before in the same threads: libraries set themselves up in a first call, which a recording
    does not survive, and a failed recording can leave the random generator unusable.
    """

    def __init__(self, work: Callable[[], Any], pool: Any) -> None:
        self._graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        stream = _capture_stream(torch.cuda.current_device())
        stream.wait_stream(current)
        with _no_collection(), torch.cuda.stream(stream):
            # Other threads may go on: one that pins a batch's memory would break a global capture.
            self._graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with contextlib.suppress(RuntimeError):
                    self._graph.capture_end()
                raise
            self._graph.capture_end()
        current.wait_stream(stream)

    def replay(self) -> None:
        self._graph.replay()

    @staticmethod
    def new_pool() -> Any:
        """A handle of memory that graphs share which never run at the same time."""
        # What plain calls of the same work left in the caching allocator is not needed beside it.
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.graph_pool_handle()


@functools.cache
def _capture_stream(device: int) -> torch.cuda.Stream:
    """One for all captures: cuBLAS keeps a workspace for every stream that it was used on."""
    return torch.cuda.Stream(device)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Collecting a cycle that holds CUDA resources would break a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _plain_autograd() -> Iterator[None]:
    """Autograd as in a call of its own: no hooks of an enclosing region on what is saved, no cache of casts."""
    cache = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        # Detached, or an operation that saves its own output would keep itself, and its memory, alive.
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda x: x):
            yield
    finally:
        torch.set_autocast_cache_enabled(cache)


class Arena:
    """Buffers and memory of the graphs of one shape, which one thread runs one after another on one stream.

    Only the backwards run elsewhere: in autograd's thread of the device, on the same stream.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[Any, torch.Tensor] = {}
        self.pool = Graph.new_pool()
        # A pool ends with its last graph: this one outlives those that are evicted, or whose recording fails.
        self._anchor = Graph(lambda: self.buffer("anchor", (1,), torch.float32).zero_(), self.pool)
        self.lock = threading.RLock()  # autograd runs backwards in threads of its own
        self.warm: set[Any] = set()  # kinds of functions whose work has run here
        self._loaded: dict[Any, tuple[torch.Tensor, int]] = {}
        # The same for constants that come together: their buffers, as long as nothing that stays was copied since.
        self._together: dict[Sequence[str], tuple[int, Tensors, list[Any], Tensors]] = {}
        self._copies = 0

    def buffer(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        key = (name, tuple(shape), dtype)
        found = self._buffers.get(key)
        if found is None:
            found = self._buffers[key] = torch.empty(shape, dtype=dtype, device=self.device)
        return found

    def load(self, name: str, tensor: torch.Tensor, stays: bool = False) -> torch.Tensor:
        """The buffer of this name and of the tensor's shape, holding its values.

        `stays`: the tensor comes again and again; it is remembered, and copied only when it is another.
        """
        buffer = self.buffer(name, tensor.shape, tensor.dtype)
        if stays:
            key = (name, tensor.shape, tensor.dtype)
            last, version = self._loaded.get(key, (None, 0))
            same = last is not None and last.data_ptr() == tensor.data_ptr() and last.stride() == tensor.stride()
            if same and version == tensor._version:
                return buffer
            # Forgotten first: a copy that fails leaves a buffer of which nothing is known.
            self._loaded.pop(key, None)
            self._copies += 1
        buffer.copy_(tensor.detach())
        if stays:
            self._loaded[key] = (tensor.detach(), tensor._version)
        return buffer

    def load_constants(self, names: Sequence[str], tensors: Tensors) -> Tensors:
        """`load` of each, or None in place of None; they stay."""
        versions = [None if tensor is None else (tensor._version, tensor.data_ptr()) for tensor in tensors]
        copies, last, last_versions, buffers = self._together.get(names, (-1, (), [], ()))
        if copies == self._copies and versions == last_versions and all(map(operator.is_, tensors, last)):
            return buffers
        buffers = [None if tensor is None else self.load(name, tensor, True) for name, tensor in zip(names, tensors)]
        self._together[names] = (self._copies, tensors, versions, buffers)
        return buffers


class _Place(NamedTuple):
    """Where a gradient lies: in which buffer, and in what layout from which element on."""

    buffer: int
    shape: torch.Size
    strides: tuple[int, ...]
    start: int


class Replay:
    """`function` recorded for inputs, constants and trained tensors like the given ones.

    Args:
        function: launches work on the current stream without waiting for it. Where its outputs are not read, which is
            in the backward, they may hold anything; gradients are asked for.
        arena: of this shape.
        names: of inputs and of constants; those of one name, shape and dtype share a buffer.
        inputs: tensors, differentiated where they require it, or None.
        constants: tensors that are not differentiated, or None.
        trained: leaves to differentiate, read in place.
        draws: whether the function draws random numbers.
        kind: what decides which kernels are launched; the first function of a kind is run once before it is recorded.
        recurring: names of inputs whose tensors come again for other functions of this arena.

    Raises:
        torch.OutOfMemoryError: the recording found no memory; nothing was changed.
    """

    def __init__(
        self,
        function: Function,
        arena: Arena,
        names: tuple[Sequence[str], Sequence[str]],
        inputs: Tensors,
        constants: Tensors,
        trained: Sequence[torch.Tensor],
        draws: bool,
        kind: Any,
        recurring: frozenset[str] = frozenset(),
    ) -> None:
        self.arena, self._names, self._recurring = arena, names, recurring
        self._generator = generator_of(arena.device) if draws else None
        self._wanted = [tensor is not None and tensor.requires_grad for tensor in inputs]
        # Where replays find what autograd hands them, and leave what they compute; set by the recordings.
        self._outs: list[torch.Tensor] = []
        self._differentiable: list[bool] = []
        self._upstream: list[torch.Tensor | None] = []
        self._d_inputs: list[torch.Tensor | None] = []
        self._d_trained: list[torch.Tensor] = []
        self._places: list[_Place | None] = []
        aliases = [tensor.detach().requires_grad_() for tensor in trained]
        with arena.lock:
            buffers, fixed = self._load(inputs, constants)

            def leaves() -> list[torch.Tensor | None]:
                return [
                    None if buffer is None else buffer.detach().requires_grad_(wanted)
                    for buffer, wanted in zip(buffers, self._wanted)
                ]

            def gradients(
                variables: Tensors, outs: Sequence[torch.Tensor], upstream: Tensors
            ) -> Sequence[torch.Tensor | None]:
                wanted = [v for v, is_wanted in zip(variables, self._wanted) if v is not None and is_wanted]
                live = [out for out in outs if out.requires_grad]
                given = [gradient for gradient in upstream if gradient is not None]
                with torch.autocast(arena.device.type, enabled=False):
                    return torch.autograd.grad(live, [*wanted, *aliases], given, allow_unused=True)

            def warm_up() -> None:
                with drawing_from(self._generator, self.state()), _plain_autograd():
                    variables = leaves()
                    outs = function(variables, fixed, aliases, True)
                    zeros = [torch.zeros_like(out) if out.requires_grad else None for out in outs]
                    gradients(variables, outs, zeros)
                # The recordings have memory of their own.
                torch.cuda.empty_cache()

            def forward() -> None:
                with _plain_autograd():
                    outs = function(leaves(), fixed, aliases, True)
                # A buffer made here may lie where an earlier recording works. That harms nothing that is copied out
                # before another graph runs; what is copied in must have its place before a recording starts.
                self._outs = [arena.buffer(f"result {i}", out.shape, out.dtype) for i, out in enumerate(outs)]
                self._differentiable = [out.requires_grad for out in outs]
                for buffer, out in zip(self._outs, outs):
                    buffer.copy_(out.detach())

            def backward() -> None:
                with _plain_autograd():
                    variables = leaves()
                    grads = gradients(variables, function(variables, fixed, aliases, False), self._upstream)
                self._collect(grads[: sum(self._wanted)], grads[sum(self._wanted) :])

            if kind not in arena.warm:
                warm_up()
                arena.warm.add(kind)
            self._forward = Graph(forward, arena.pool)
            self._upstream = [
                arena.buffer(f"result {i}", out.shape, out.dtype) if live else None
                for i, (out, live) in enumerate(zip(self._outs, self._differentiable))
            ]
            self._backward = Graph(backward, arena.pool)

    def _load(self, inputs: Tensors, constants: Tensors) -> tuple[Tensors, Tensors]:
        load, recurring = self.arena.load, self._recurring
        return (
            [None if t is None else load(name, t, name in recurring) for name, t in zip(self._names[0], inputs)],
            self.arena.load_constants(self._names[1], constants),
        )

    def _collect(self, d_inputs: Tensors, d_trained: Tensors) -> None:
        """Copies gradients to where replays leave them.

        Those of trained tensors lie side by side, so that one copy takes them all out; those of inputs, which are
        larger and live shorter, each have a buffer, which may be that of an output and its gradient.
        """
        upstream = {buffer.untyped_storage().data_ptr() for buffer in self._upstream if buffer is not None}

        def own(grad: torch.Tensor | None) -> torch.Tensor | None:
            """What autograd only hands on, whole or a part of it, would be overwritten before it is copied."""
            return grad.clone() if grad is not None and grad.untyped_storage().data_ptr() in upstream else grad

        d_inputs, d_trained = list(map(own, d_inputs)), list(map(own, d_trained))
        self._d_inputs = [
            None if grad is None else self.arena.buffer(f"result {i}", grad.shape, grad.dtype)
            for i, grad in enumerate(d_inputs)
        ]
        totals: dict[torch.dtype, int] = {}
        places: list[_Place | None] = []
        for grad in d_trained:
            if grad is None:
                places.append(None)
                continue
            start = totals.get(grad.dtype, 0)
            totals[grad.dtype] = start + -(-grad.numel() // _ALIGNMENT) * _ALIGNMENT
            strides = torch.empty(grad.shape, device="meta").stride()
            places.append(_Place(list(totals).index(grad.dtype), grad.shape, strides, start))
        self._places = places
        self._d_trained = [self.arena.buffer("gradients", (total,), dtype) for dtype, total in totals.items()]
        targets = [buffer for buffer in self._d_inputs if buffer is not None] + self._views(self._d_trained)
        if targets:
            torch._foreach_copy_(targets, [grad for grad in (*d_inputs, *d_trained) if grad is not None])

    def _views(self, buffers: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [buffers[p.buffer].as_strided(p.shape, p.strides, p.start) for p in self._places if p is not None]

    def __call__(
        self, inputs: Tensors, constants: Tensors, trained: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, ...]:
        """The function's outputs, as leaves of a plain call would get them; `trained` as it was recorded."""
        outs = _Replayed.apply(self, constants, len(inputs), *inputs, *trained)
        return outs

    def forward(self, inputs: Tensors, constants: Tensors) -> tuple[torch.Tensor, ...]:
        with self.arena.lock:
            self._load(inputs, constants)
            self._forward.replay()
            return tuple(out.clone() for out in self._outs)

    def backward(self, inputs: Tensors, constants: Tensors, d_outs: Tensors, drawn_at: Any) -> list[Any]:
        """Gradients of inputs and of trained tensors, None where there is none."""
        with self.arena.lock:
            self._load(inputs, constants)
            for buffer, d_out in zip(self._upstream, d_outs):
                if buffer is not None:
                    buffer.zero_() if d_out is None else buffer.copy_(d_out)
            with drawing_from(self._generator, drawn_at):
                self._backward.replay()
            d_inputs = iter([None if buffer is None else buffer.clone() for buffer in self._d_inputs])
            d_trained = iter(self._views([buffer.clone() for buffer in self._d_trained]))
        return [
            *(next(d_inputs) if wanted else None for wanted in self._wanted),
            *(None if place is None else next(d_trained) for place in self._places),
        ]

    def state(self) -> Any:
        """The random state that a forward starts from, where it draws."""
        return None if self._generator is None else self._generator.get_state()


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, replay, constants, n_inputs, *tensors):
        inputs, trained = tensors[:n_inputs], tensors[n_inputs:]
        ctx.set_materialize_grads(False)
        ctx.replay, ctx.constants, ctx.drawn_at = replay, constants, replay.state()
        ctx.trained = [(tensor, tensor._version, tensor.data_ptr()) for tensor in trained]
        ctx.save_for_backward(*inputs)
        return replay.forward(inputs, constants)

    @staticmethod
    @once_differentiable
    def backward(ctx, *d_outs):
        for tensor, version, address in ctx.trained:
            if tensor._version != version or tensor.data_ptr() != address:
                raise RuntimeError(
                    "fastgemma: a trained parameter was modified in place between a forward and its backward, so that "
                    "its gradient would be that of other weights. No gradient was produced. Step the optimizer after "
                    "backward()."
                )
        return None, None, None, *ctx.replay.backward(ctx.saved_tensors, ctx.constants, d_outs, ctx.drawn_at)
