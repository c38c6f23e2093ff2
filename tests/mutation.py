"""Mutation testing of the kernels: whether their tests notice when the maths is perturbed.

    python tests/mutation.py [--minutes 60] [--kernels rms_norm] [--per-kernel 20] [--seed 0]

Changes one expression of a device function at a time (`mutants`) and runs the kernel's own tests, in Triton's
interpreter, on a copy of the package; the checkout is never written. A mutant is caught if a test fails, the process
dies, or the tests take much longer than they should. Outcomes are kept in `.mutation/` by source, so that a run goes on
where the last one stopped; survivors run again once their tests change.

One process imports what takes long, and forks one child for each mutant, which imports the package anew. Before any
mutant of a file the tests must pass as they are, and fail with empty kernels. Exits with 1 if fewer than 95% of a
kernel's mutants are caught. Mutants that `mutation_equivalents` lists are not run, but reported with its reasons.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
from mutants import Function, Mutant, chosen, device_functions, digest, reached
from mutation_equivalents import EQUIVALENT
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / ".mutation" / "results.jsonl"
REQUIRED_SHARE = 0.95
MEMORY_LIMIT = 16 << 30

# The files of kernels, cheapest first, and what tests them: in `tests/kernels`, as `test_<name>.py`.
TESTS: dict[str, tuple[str, ...]] = {
    "adapter_columns": ("adapter_columns",),
    "geglu": ("geglu",),
    "rms_norm": ("rms_norm",),
    "nf4": ("nf4",),
    "qk_norm_rope_launch": ("qk_norm_rope",),
    "logits": ("logits", "linear_cross_entropy"),
    "softcapped_logits": ("softcapped_logits",),
    "attention_tiles": ("attention",),
    "attention_forward": ("attention",),
    "attention_wide": ("attention",),
    "attention_products": ("attention",),
    "attention_backward": ("attention",),
}
SHARED_BY_TESTS = ("conftest.py", "kernel_checks.py", "memory_bounds.py", "kernels/conftest.py")
# What pytest, the tests and Triton's interpreter import, and takes long. Nothing of the package: that is imported anew.
PRELOADED = (
    "_hypothesis_pytestplugin",
    "bitsandbytes.functional",
    "pytest_timeout",
    "transformers.models.gemma4.modeling_gemma4",
    "triton.experimental.gluon",
    "trl",
    "xdist.plugin",
)


@dataclass(frozen=True)
class Result:
    """How the tests ended: "survived", or caught by an "assertion", another "error", a "crash" or a "timeout"."""

    outcome: str
    test: str = ""  # the first to fail
    key: str = ""  # the mutant's
    tests: str = ""  # a digest of what ran
    seconds: float = 0.0

    @property
    def survived(self) -> bool:
        return self.outcome == "survived"


class Watch:
    """A pytest plugin: what caught most mutants comes first, then one test of each function; notes what failed."""

    def __init__(self, catches: Counter[str]) -> None:
        self.catches = catches
        self.failure: Result | None = None

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        seen: Counter[str] = Counter()
        turns = {}
        for item in items:
            function = item.nodeid.partition("[")[0]
            turns[item.nodeid] = (
                -self.catches[item.nodeid],
                item.get_closest_marker("slow") is not None,
                seen[function],
            )
            seen[function] += 1
        items.sort(key=lambda item: turns[item.nodeid])

    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> None:
        if self.failure is None and call.excinfo is not None and not call.excinfo.errisinstance(pytest.skip.Exception):
            how = "assertion" if call.excinfo.errisinstance(AssertionError) else "error"
            self.failure = Result(how, item.nodeid)


class Sandbox:
    """A copy of the package and its tests, and children that run the tests of one file of kernels on it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        for name in ("fastgemma", "kernels", "patches", "tests"):
            # Times of files are copied too: the bytecode of what is not changed stays valid.
            shutil.copytree(ROOT / name, directory / name, symlinks=True)
        shutil.copy2(ROOT / "pyproject.toml", directory)
        os.chdir(directory)
        sys.path[:0] = [str(directory), str(directory / "tests")]
        for name in PRELOADED:
            importlib.import_module(name)
        # A failure need not be made small, and examples must not differ from one mutant to the next.
        from hypothesis import Phase, settings

        settings.register_profile("mutation", phases=(Phase.explicit, Phase.generate), derandomize=True)
        settings.load_profile("mutation")

    def tests_digest(self, file: str) -> str:
        """Of the tests that are run, whatever happens to those of the checkout meanwhile."""
        names = [*SHARED_BY_TESTS, *(f"kernels/test_{name}.py" for name in TESTS[file])]
        return digest("".join((self.directory / "tests" / name).read_text() for name in names))

    def run(self, file: str, source: str | None, catches: Counter[str], timeout: float) -> Result:
        """The tests of a file of kernels, with this source in its place if one is given."""
        path = self.directory / "kernels" / f"{file}.py"
        if source is not None:
            path.write_text(source)
            # Bytecode is found by a source's time in seconds and by its size, which two mutants may share.
            sys.dont_write_bytecode = True
        started = time.monotonic()
        reading, writing = os.pipe()
        gc.freeze()  # pytest collects garbage several times, of which there is none in what a child begins with
        child = os.fork()
        if child == 0:
            result = Result("error")
            try:
                result = self._test(file, catches)
            finally:
                os.write(writing, json.dumps(asdict(result)).encode())
                os._exit(0)
        gc.unfreeze()
        os.close(writing)
        ready, _, _ = select.select([reading], [], [], timeout)
        answer = os.read(reading, select.PIPE_BUF) if ready else b""
        os.close(reading)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        shutil.copy2(ROOT / "kernels" / path.name, path)
        sys.dont_write_bytecode = False
        result = Result(**json.loads(answer)) if answer else Result("crash" if ready else "timeout")
        return replace(result, seconds=round(time.monotonic() - started, 1))

    def _test(self, file: str, catches: Counter[str]) -> Result:
        """In a child: runs the tests in this process, quietly."""
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        watch = Watch(catches)
        tests = [f"tests/kernels/test_{name}.py" for name in TESTS[file]]
        options = ["-x", "-p", "no:randomly", "-p", "no:cacheprovider", "-o", "timeout=0"]
        if pytest.main([*options, *tests], plugins=[watch]) != 0:
            return watch.failure or Result("error")
        origin = sys.modules[f"fastgemma.kernels.{file}"].__file__
        assert origin is not None and Path(origin).resolve().is_relative_to(self.directory.resolve()), origin
        return Result("survived")


def emptied(source: str, functions: dict[str, Function]) -> str:
    """A file of kernels whose device functions do nothing."""
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in functions:
            node.body = [ast.Pass()]
    return ast.unparse(tree)


def run_all(mutants: list[Mutant], functions: dict[str, Function], results: dict[str, Result], end: float) -> None:
    """Adds to `results`, in memory and on the disk, until all have run or it is too late."""
    RESULTS.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, RESULTS.open("a") as log:
        sandbox = Sandbox(Path(temporary))
        untouched: dict[tuple[str, ...], Result] = {}
        for file in TESTS:
            tests = sandbox.tests_digest(file)
            # More tests may catch what survived.
            known = {key for key, result in results.items() if not result.survived or result.tests == tests}
            waiting = [mutant for mutant in mutants if mutant.function.file == file and mutant.key not in known]
            if not waiting or time.monotonic() > end:
                continue
            of_file = {
                mutant.key for function in functions.values() if function.file == file for mutant in function.mutants
            }
            catches = Counter(result.test for key, result in results.items() if key in of_file)
            if TESTS[file] not in untouched:
                untouched[TESTS[file]] = sandbox.run(file, None, catches, 3600.0)
            if not untouched[TESTS[file]].survived:
                raise SystemExit(f"mutation: the tests of kernels/{file}.py do not pass as they are: {untouched}")
            timeout = 20.0 + 3.0 * untouched[TESTS[file]].seconds
            if sandbox.run(file, emptied(waiting[0].function.source, functions), catches, timeout).survived:
                raise SystemExit(f"mutation: the tests of kernels/{file}.py pass with empty kernels")
            for mutant in waiting:
                if time.monotonic() > end:
                    break
                result = replace(sandbox.run(file, mutant.source, catches, timeout), key=mutant.key, tests=tests)
                results[mutant.key] = result
                catches[result.test] += 1
                log.write(json.dumps(asdict(result)) + "\n")
                log.flush()
                print(f"{result.outcome:>9} {result.seconds:6.1f} s  {mutant}", flush=True)


def report(mutants: list[Mutant], functions: dict[str, Function], results: dict[str, Result]) -> bool:
    """Prints a line for each kernel, then survivors; returns whether enough were caught of each that has run."""
    console = Console(width=None if sys.stdout.isatty() else 160)
    table = Table("kernel", "chosen", "run", "caught", "by assertion", "share", "equivalent")
    lines: dict[str, None] = {}
    enough = True
    for name, function in functions.items():
        reaches = reached(name, functions)
        own = [mutant for mutant in mutants if mutant.function.node.name in reaches]
        if not function.is_entry_point or not own:
            continue
        done = [(mutant, results[mutant.key]) for mutant in own if mutant.key in results]
        alive = [mutant for mutant, result in done if result.survived]
        known = [mutant for other in sorted(reaches) for mutant in functions[other].mutants if mutant.reason]
        share = 1.0 - len(alive) / len(done) if done else 1.0
        enough &= share >= REQUIRED_SHARE
        by_assertion = sum(result.outcome == "assertion" for _, result in done)
        numbers = (len(own), len(done), len(done) - len(alive), by_assertion, f"{share:.1%}", len(known))
        table.add_row(name, *map(str, numbers), style=None if share >= REQUIRED_SHARE else "red")
        lines |= {f"equivalent: {mutant} ({mutant.reason})": None for mutant in known}
        lines |= {f"SURVIVED: {mutant}": None for mutant in alive}
    console.print(table)
    for line in sorted(lines, key=lambda line: line.startswith("SURVIVED")):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return enough


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="no mutant is begun later (default: %(default)s)")
    parser.add_argument("--kernels", default="", help="only files of kernels with this in their names")
    parser.add_argument("--per-kernel", type=int, default=20, help="mutants of each kernel (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which mutants (default: %(default)s)")
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60.0 * options.minutes
    functions = device_functions(TESTS)
    everything = {(m.function.node.name, m.before, m.after) for f in functions.values() for m in f.mutants}
    if stale := EQUIVALENT.keys() - everything:
        raise SystemExit(f"mutation: mutation_equivalents lists what is no mutant: {sorted(stale)}")
    mutants = [m for m in chosen(functions, options.per_kernel, options.seed) if options.kernels in m.function.file]
    results: dict[str, Result] = {}
    if RESULTS.exists():
        kept = [Result(**json.loads(line)) for line in RESULTS.read_text().splitlines()]
        results |= {result.key: result for result in kept}
    # As on a machine without a GPU, and before anything imports Triton.
    os.environ |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    run_all(mutants, functions, results, end)
    return 0 if report(mutants, functions, results) else 1


if __name__ == "__main__":
    sys.exit(main())
