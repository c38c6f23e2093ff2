"""The `measure` fixture: checks one implementation against the reference, times it and writes its record.

    pytest bench/kernels                    on a machine with a CUDA device
    pytest bench/kernels -k rms_norm        one kernel
    pytest bench/kernels --tiny             each body once on small shapes, nothing timed; needs no GPU

Records go to bench/results/<gpu>/kernels.json. pytest-benchmark's own table, `--benchmark-json` and comparison work
too, and show GPU time: its timer here is a clock that only goes while the GPU runs what is timed.
"""

from __future__ import annotations

import gc
import os
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined, so before fastgemma is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import kernel_timing  # noqa: E402
import pytest  # noqa: E402
import records  # noqa: E402
from kernel_timing import CLOCK, GpuTimer, Subject  # noqa: E402

# Relative L2 error of outputs and gradients that an implementation may have before it is timed: a few roundings to
# bfloat16 (2^-9 each; the interpreter truncates, 2^-8), and far less than any wrong formula.
BUDGET = 2e-2
HOST_ROWS = 2048
REQUIRED = {"bench", "impl", "op", "shape", "dtype", "direction", "ms", "gpu", "torch", "triton", "commit", "command"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tiny", action="store_true", help="check each benchmark's body on small shapes, time nothing")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "shapes(real, tiny): what `shape` runs over, and its one value with --tiny")
    if config.getoption("--tiny") and hasattr(config.option, "benchmark_disable"):
        config.option.benchmark_disable = True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("shapes")
    if marker is not None:
        tiny = metafunc.config.getoption("--tiny")
        shapes = [marker.kwargs["tiny"]] if tiny else marker.args[0]
        metafunc.parametrize("shape", shapes, ids=[" x ".join(map(str, shape)) for shape in shapes])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Without the plugin its marker would be unknown; the tests are skipped then.
    for item in items if config.pluginmanager.hasplugin("benchmark") else ():
        item.add_marker(pytest.mark.benchmark(timer=CLOCK, disable_gc=True))


@dataclass
class _Session:
    """What is found once for all benchmarks."""

    timer: GpuTimer | None
    environment: dict[str, Any]
    ceilings: dict[Any, float]  # milliseconds by operation, shape and direction, or by the size of a copy

    def copy_ms(self, *num_bytes: int) -> float:
        """Milliseconds of a kernel for each number that reads half of so many bytes and writes as many.

        clone's memcpy is slower.
        """
        key = ("copy", num_bytes)
        if key not in self.ceilings:
            subject = Subject(
                lambda: [torch.ones(size // 4, dtype=torch.bfloat16, device="cuda") for size in num_bytes],
                lambda *inputs: [torch.neg(x) for x in inputs],
            )
            self.ceilings[key] = 1.0 if self.timer is None else self.timer.median_ms(subject, "forward")
        return self.ceilings[key]

    def copy_rate(self) -> float:
        """Bytes per millisecond of a large copy."""
        return (1 << 31) / self.copy_ms(1 << 31)


@pytest.fixture(scope="session")
def session(request: pytest.FixtureRequest) -> Iterator[_Session]:
    pytest.importorskip("pytest_benchmark", reason='needs the "bench" extra')
    if request.config.getoption("--tiny"):
        yield _Session(None, records.environment(), {})
    elif not torch.cuda.is_available():
        pytest.skip("needs a CUDA device; --tiny checks the benchmarks without one")
    else:
        # One side stream for everything: a graph can only capture a backward whose forward ran on the same stream.
        with torch.cuda.stream(torch.cuda.Stream()):
            yield _Session(GpuTimer(), records.environment(), {})


@dataclass
class Measure:
    """The fixture's value; call it once in a test."""

    session: _Session
    benchmark: Any
    tiny: bool
    path: Path
    command: str

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def choose(
        self,
        impl: str,
        *,
        fastgemma: Callable[..., Any],
        hf: Callable[..., Any],
        compiled: bool = True,
        liger: Callable[[], Callable[..., Any]] | None = None,
    ) -> Callable[..., Any]:
        """The implementation called `impl`; "compile" is torch.compile of `hf`, where `compiled` says so.

        `liger` imports what it needs from Liger and returns the implementation.
        """
        if impl == "compile":
            if not (compiled or self.tiny):
                pytest.skip("not compiled for this shape, to save time")
            # A compiled backward may otherwise overwrite what it saved, and could run once only.
            torch._functorch.config.donated_buffer = False
            # A tiny run traces, with no compiler behind it.
            return torch.compile(hf, dynamic=False, backend="aot_eager" if self.tiny else "inductor")
        if impl == "liger":
            if self.tiny:
                pytest.skip("Liger runs on a GPU only")
            pytest.importorskip("liger_kernel", reason='needs the "bench" extra')
            return liger()
        return {"fastgemma": fastgemma, "hf": hf}[impl]

    def __call__(
        self,
        subject: Subject,
        *,
        op: str,
        impl: str,
        shape: list[int],
        direction: str,
        reference: Callable[..., Any] | None,
        dtype: str = "bfloat16",
        num_bytes: int | Sequence[int] | None = None,
        flops: int | None = None,
        ceiling: Subject | None = None,
        host: bool | None = None,
    ) -> None:
        """Checks, times and records one implementation.

        Args:
            subject: the implementation.
            op, impl, shape, direction, dtype: the record's identity; `shape` starts with the rows.
            reference: what the results of the same inputs must be; None for a ceiling, which computes less.
            num_bytes, flops: what the operation must move or compute, whoever computes it; the bytes of each launch
                where it takes several.
            ceiling: what bounds the time. None: a copy of `num_bytes` at the rate of a large one, if they are given.
            host: whether to measure the host's time (default: up to 2048 rows).
        """
        if reference is not None:
            check(subject, reference, direction)
        record: dict[str, Any] = {"bench": "kernels", "impl": impl, "op": op, "shape": shape, "dtype": dtype}
        record["direction"] = direction
        timer = self.session.timer
        if timer is None:
            self.benchmark.pedantic(kernel_timing.bind(subject, direction))
            ms = 1.0
        else:
            timed = timer.prepare(subject, direction)
            self.benchmark.pedantic(timed, setup=timer.flush, rounds=timer.rounds(timed))
            ms = timed.median_ms()
            record["extra_mib"] = round(kernel_timing.extra_mib(timed.call), 1)
            if shape[0] <= HOST_ROWS if host is None else host:
                record["host_us"] = round(kernel_timing.host_us(timed.call), 1)
        record["ms"] = round(ms, 5)
        launches = [num_bytes] if isinstance(num_bytes, int) else num_bytes
        moved = None if launches is None else sum(launches)
        if moved is not None:
            record["gbps"] = round(moved / ms / 1e6, 1)
        if flops is not None:
            record["tflops"] = round(flops / ms / 1e9, 2)
        best = self._ceiling_ms(ceiling, (op, tuple(shape), direction), moved)
        if best is not None:
            record["pct_of_ceiling"] = round(100 * best / ms, 1)
        if ceiling is None and launches is not None:
            record["copy_ms"] = round(self.session.copy_ms(*launches), 5)
        record |= self.session.environment | {"command": self.command}
        if impl == "liger":
            record["liger_kernel"] = records.package_version("liger-kernel")
        assert record.keys() >= REQUIRED
        self.benchmark.extra_info.update(record)
        records.write_record(record, self.path)

    def _ceiling_ms(self, ceiling: Subject | None, key: Any, num_bytes: int | None) -> float | None:
        if ceiling is None:
            return None if num_bytes is None else num_bytes / self.session.copy_rate()
        if key not in self.session.ceilings:
            timer = self.session.timer
            if timer is None:
                kernel_timing.bind(ceiling, key[-1])()
            self.session.ceilings[key] = 1.0 if timer is None else timer.median_ms(ceiling, key[-1])
        return self.session.ceilings[key]


def check(subject: Subject, reference: Callable[..., Any], direction: str) -> None:
    """Fails unless outputs and gradients agree with the reference's on one set of inputs."""
    inputs = subject.make()
    expected = kernel_timing.outputs_of(reference(*inputs))
    actual = kernel_timing.outputs_of(subject.run(*inputs))
    assert len(actual) == len(expected)
    wanted = kernel_timing.leaves(inputs)
    if wanted:
        grads = kernel_timing.upstream(actual)
        # The reference first: an implementation may use up what it saved.
        expected += torch.autograd.grad(expected, wanted, [g.to(e.dtype) for g, e in zip(grads, expected)])
        actual += torch.autograd.grad(actual, wanted, grads)
    else:
        assert direction == "forward", "nothing to differentiate"
    for index, (got, right) in enumerate(zip(actual, expected)):
        assert got.shape == right.shape, index
        assert bool(right.isfinite().all()), f"result {index} of the reference is not finite"
        error = (got.float() - right.float()).norm() / right.float().norm()
        assert error <= BUDGET, f"result {index} of {len(actual)}: relative error {error:.2e}"


@pytest.fixture
def measure(session: _Session, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Measure]:
    torch.manual_seed(0)
    benchmark = request.getfixturevalue("benchmark")
    tiny = session.timer is None
    path = tmp_path / "kernels.json" if tiny or benchmark.disabled else records.result_path("kernels")
    yield Measure(session, benchmark, tiny, path, shlex.join(["pytest", request.node.nodeid]))
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
