"""GPU time, host time and memory of one operation, measured so that neither caches nor launches flatter or spoil it.

GPU time comes from CUDA events. Where an operation can be captured, they stand around one replay of a CUDA graph that
holds a call on each of many input sets, together several times the L2 cache: every call finds its inputs in memory,
not in a cache, and no launch is waited for. Other operations are timed one plain call at a time, the host's part
included. Before each timed stretch a buffer larger than the cache is overwritten, outside of it: that evicts what the
last call left, and keeps the GPU busy while the host enqueues what is timed.

Host time is a separate measurement: plain calls, the GPU idle before each, and no waiting for it within.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

# Input sets are added until they exceed the cache this many times over; the buffer that evicts is as large.
_L2_MULTIPLE = 3
_MAX_SETS = 64
_HOST_ROUNDS = 20
# Seconds of GPU time that one measurement may take, and the rounds it is cut into.
_BUDGET_S = 0.1
_MIN_ROUNDS, _MAX_ROUNDS = 5, 30

Call = Callable[[], Any]


@dataclass(frozen=True)
class Subject:
    """What is timed. `make` draws one set of inputs, `run(*inputs)` computes the outputs from it.

    Gradients are taken of every tensor, and every parameter of a module, among the inputs that requires one.
    """

    make: Callable[[], Sequence[Any]]
    run: Callable[..., Any]
    captured: bool = True  # False where the host's part belongs to the operation, or waits for the GPU


def outputs_of(result: Any) -> tuple[torch.Tensor, ...]:
    """The tensors that a subject returned."""
    return tuple(tensor for tensor in (result if isinstance(result, tuple | list) else (result,)) if tensor is not None)


def leaves(inputs: Sequence[Any]) -> list[torch.Tensor]:
    """What of a set of inputs requires a gradient."""

    def tensors() -> Iterator[torch.Tensor]:
        for item in inputs:
            if isinstance(item, nn.Module):
                yield from item.parameters()
            elif isinstance(item, torch.Tensor):
                yield item

    return [tensor for tensor in tensors() if tensor.requires_grad]


def upstream(outputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """Random gradients of outputs; of a loss 1, as a training step's."""
    return [torch.ones_like(output) if output.dim() == 0 else torch.randn_like(output) for output in outputs]


def bind(subject: Subject, direction: str) -> Call:
    """One call in this direction, on a set of inputs of its own.

    A subject with nothing to differentiate only runs: it does by hand what forward and backward have to.
    """
    inputs = subject.make()
    wanted = leaves(inputs)
    if direction == "forward" or not wanted:
        return lambda: subject.run(*inputs)
    if direction == "backward":
        outputs = outputs_of(subject.run(*inputs))
        grads = upstream(outputs)
        return lambda: torch.autograd.grad(outputs, wanted, grads, retain_graph=True)

    def both() -> tuple[torch.Tensor, ...]:
        outputs = outputs_of(subject.run(*inputs))
        return torch.autograd.grad(outputs, wanted, [torch.ones_like(output) for output in outputs])

    return both


class EventClock:
    """A timer in seconds that only goes while something timed runs on the GPU; pytest-benchmark reads it."""

    __name__ = "EventClock"

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


CLOCK = EventClock()


@dataclass
class Timed:
    """Called, it runs a subject once (`calls` times within one graph) and adds one call's time to `milliseconds`."""

    work: Call
    calls: int
    call: Call  # one plain call on one of the sets
    milliseconds: list[float] = field(default_factory=list)

    def __call__(self) -> None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        self.work()
        end.record()
        end.synchronize()
        elapsed = start.elapsed_time(end) / self.calls
        CLOCK.seconds += elapsed / 1000
        self.milliseconds.append(elapsed)

    def median_ms(self) -> float:
        return statistics.median(self.milliseconds)


class GpuTimer:
    """Prepares and times subjects on the current stream of the current device, which must not be the default one."""

    def __init__(self) -> None:
        self._cache_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._buffer = torch.empty(_L2_MULTIPLE * self._cache_bytes, dtype=torch.int8, device="cuda")

    def flush(self) -> None:
        self._buffer.zero_()

    def prepare(self, subject: Subject, direction: str) -> Timed:
        """Compiles and warms up, then binds as many sets of inputs as it takes to exceed the cache."""
        before = torch.cuda.memory_allocated()
        first = bind(subject, direction)
        size = max(1, torch.cuda.memory_allocated() - before)
        for _ in range(2):
            first()
        if not subject.captured:
            bound = [first, bind(subject, direction)]
            bound[1]()
            cycle = itertools.cycle(bound)
            return Timed(lambda: next(cycle)(), 1, first)
        count = min(max(2, math.ceil(_L2_MULTIPLE * self._cache_bytes / size)), _MAX_SETS)
        bound = [first, *(bind(subject, direction) for _ in range(count - 1))]
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            # Results are held, so that no call writes into memory that the one before left in the cache.
            results = [call() for call in bound]

        def replay(_held: Any = (bound, results)) -> None:
            graph.replay()

        return Timed(replay, count, first)

    def rounds(self, timed: Timed) -> int:
        """How many rounds fit the budget, judged by one that is then forgotten."""
        self.flush()
        timed()
        seconds = timed.milliseconds.pop() * timed.calls / 1000
        return min(max(_MIN_ROUNDS, int(_BUDGET_S / max(seconds, 1e-6))), _MAX_ROUNDS)

    def median_ms(self, subject: Subject, direction: str) -> float:
        """Milliseconds of one call, without pytest-benchmark: for the ceilings that others are measured against."""
        timed = self.prepare(subject, direction)
        for _ in range(self.rounds(timed)):
            self.flush()
            timed()
        return timed.median_ms()


def host_us(call: Call) -> float:
    """Median microseconds until a call returns to the host, the GPU idle before it."""
    times = []
    for _ in range(_HOST_ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
        del result
    torch.cuda.synchronize()
    return 1e6 * statistics.median(times)


def extra_mib(call: Call) -> float:
    """Peak MiB allocated within one call above what was allocated before it; results count, inputs do not."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 2**20
