"""The portability gate: every row of the launch table, compiled for the cards it serves, on a machine without them.

    python tests/portability/gate.py [--targets sm_86,sm_89] [--kernels attention] [--json]

Prints a line for each (kernel, target), the worst of its launches in every column, or as JSON a line for each launch.
Exits with 1 if a launch does not compile, needs more shared memory than the card has, spills beyond its budget, leaves
tensor cores or 16-byte loads unused, or if a row or a kernel of the package was not launched at all.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import launches
from launches import Recorded, Row
from offline import TARGETS, TRITON, Compiled, compile_all
from rich.console import Console
from rich.table import Table

from fastgemma import kernels
from fastgemma.kernels.backend import Kernel
from fastgemma.kernels.launch import TABLE

CACHE = Path(__file__).parents[2] / ".gate_cache"

# What launches may spill: bytes of a thread's stack on NVIDIA's cards, registers on AMD's. None on 86, 89 and 120.
SPILLS = {
    # Timed, and faster than what does not spill.
    ("_attention_fwd_kernel", "sm_90"): 768,  # in the pass after a result that is not finite alone
    ("_attention_output_kernel", "sm_90"): 384,
    ("_attention_ds_kernel", "sm_90"): 64,
    ("_attention_products_kernel", "sm_90"): 256,  # none of it within a loop
    # Stored before the loop and read behind it, with Triton 3.4.
    ("_attention_ds_kernel", "sm_80"): 64,
    # A few registers, in some versions of Triton.
    ("_rms_norm_bwd_kernel", "sm_90"): 8,
    ("_qk_norm_rope_bwd_kernel", "sm_80"): 8,
    ("_qk_norm_rope_bwd_kernel", "sm_100"): 8,
    ("_attention_products_kernel", "sm_100"): 16,
    ("_attention_output_kernel", "sm_100"): 8,
    # Scalar registers, which go to lanes of vector registers, not to memory.
    ("_attention_fwd_kernel", "gfx942"): 8,
    ("_attention_output_kernel", "gfx942"): 16,
    ("_attention_scores_kernel", "gfx942"): 16,
}
_NARROW = "no access of 16 bytes"
# They read half a byte for every number that they write: it is their stores that are wide.
_MOSTLY_STORE = ("_dequantize_nf4_kernel", "_dequantize_nf4_stack_kernel")


@dataclass(frozen=True)
class Expected:
    """A finding that is known: of launches of these kernels on these targets, with this constexpr if one is named.

    `tritons`: the minor versions that it is limited to, if any.
    """

    kernels: tuple[str, ...]
    targets: tuple[str, ...]
    constexpr: tuple[str, int] | None
    finding: str
    reason: str
    tritons: tuple[str, ...] = ()

    @property
    def due(self) -> bool:
        return not self.tritons or TRITON.rpartition(".")[0] in self.tritons

    def covers(self, result: Compiled, finding: str) -> bool:
        return (
            self.due
            and result.kernel in self.kernels
            and result.target in self.targets
            and (self.constexpr is None or result.constexprs.get(self.constexpr[0]) == self.constexpr[1])
            and finding.startswith(self.finding)
        )


EXPECTED = (
    Expected(
        ("_rms_norm_fwd_kernel", "_rms_norm_bwd_kernel"),
        tuple(TARGETS),
        ("BLOCK_N", 64),
        _NARROW,
        "a number a thread, of rows that are shorter than any language model's of the family",
    ),
    Expected(
        tuple(f"_attention_{name}_kernel" for name in ("fwd", "output", "products")),
        ("sm_100",),
        None,
        "does not compile",
        "a pass of these compilers fails; attention is PyTorch's there (`launch.EFFICIENT_ATTENTION`)",
        tritons=("3.6", "3.7"),
    ),
)


def findings(result: Compiled) -> list[str]:
    """What is wrong with a launch on a target."""
    if result.error is not None:
        return [f"does not compile: {result.error}"]
    limit, budget = TARGETS[result.target].shared_limit, SPILLS.get((result.kernel, result.target), 0)
    found = []
    if result.shared > limit:
        found.append(f"needs {result.shared:,} bytes of shared memory, of {limit:,} on the card")
    if result.spills > budget:
        found.append(f"spills {result.spills}, with a budget of {budget}")
    if result.matmul and not result.tensor_core:
        found.append("multiplies matrices without tensor cores")
    if not _wide(result):
        found.append(_NARROW)
    return found


def _wide(result: Compiled) -> bool:
    return result.wide_store if result.kernel in _MOSTLY_STORE else result.wide_load


def due_rows(target: str) -> set[Row]:
    """The rows that `launch` can return on a target: its own, and "any" where none of its own comes first."""
    own = {(name, shape) for name, shape, architecture in TABLE if architecture == target}
    return {
        (name, shape, architecture)
        for name, shape, architecture in TABLE
        if (TARGETS[target].matmuls or not name.startswith("attention"))
        and (architecture == target or (architecture == "any" and not {(name, shape), (name, "any")} & own))
    }


def package_kernels() -> set[str]:
    """The names of all kernels that the package defines."""
    files = pkgutil.iter_modules(kernels.__path__)
    modules = [importlib.import_module(f"{kernels.__name__}.{file.name}") for file in files]
    return {value.__name__ for module in modules for value in vars(module).values() if isinstance(value, Kernel)}


def record_all(targets: list[str], part: str) -> tuple[list[tuple[Recorded, str]], list[str]]:
    """The launches of kernels with `part` in their names, each with its target, and which rows and kernels have none.

    What has none is only asked of all kernels together, where `part` is empty.
    """
    jobs: list[tuple[Recorded, str]] = []
    missing = []
    for target in targets:
        card = TARGETS[target]
        operations = launches.STREAMING + (launches.MATMULS if card.matmuls else [])
        recorded, taken = launches.record(operations, card.dtype, target)
        jobs += [(launch, target) for launch in recorded if part in launch.name]
        if part:
            continue
        missing += [f"{target}: no launch took row {row}" for row in sorted(due_rows(target) - taken)]
        if card.matmuls:
            unknown = package_kernels() - {launch.name for launch in recorded}
            missing += [f"{target}: {name} was not launched" for name in sorted(unknown)]
    return jobs, missing


def judge(results: list[Compiled], complete: bool) -> tuple[list[str], list[str]]:
    """(failures, known findings) of results; where they are `complete`, known findings must have come up."""
    failures, known = [], {}
    for result in results:
        constexprs = ", ".join(f"{name}={value}" for name, value in result.constexprs.items())
        for finding in findings(result):
            entry = next((entry for entry in EXPECTED if entry.covers(result, finding)), None)
            if entry is None:
                failures.append(f"{result.target}: {result.kernel}({constexprs}, warps={result.warps}): {finding}")
            else:
                known[result.target, entry] = f"{result.target}: {result.kernel}: {finding}: {entry.reason}"
    if complete:
        due = {
            (result.target, entry)
            for result in results
            for entry in EXPECTED
            if entry.due and result.target in entry.targets
        }
        failures += [f"{target}: no longer so, remove it: {entry}" for target, entry in due - set(known)]
    return failures, sorted(known.values())


def summary(results: list[Compiled]) -> Table:
    """A line for each (kernel, target) with the worst of its launches in every column."""
    table = Table(title=f"triton {TRITON}")
    for name in ("kernel", "target"):
        table.add_column(name)
    for name in ("launches", "shared / limit", "registers", "spills / budget", "tensor cores", "16 bytes", ""):
        table.add_column(name, justify="right")
    groups: dict[tuple[str, str], list[Compiled]] = {}
    for result in results:
        groups.setdefault((result.kernel, result.target), []).append(result)
    order = list(TARGETS)
    for (kernel, target), group in sorted(groups.items(), key=lambda item: (item[0][0], order.index(item[0][1]))):
        products = [result for result in group if result.matmul]
        table.add_row(
            kernel,
            target,
            str(len(group)),
            f"{max(result.shared for result in group):,} / {TARGETS[target].shared_limit:,}",
            str(max(result.registers for result in group)),
            f"{max(result.spills for result in group)} / {SPILLS.get((kernel, target), 0)}",
            _yes(all(result.tensor_core for result in products)) if products else "-",
            _yes(all(_wide(result) for result in group)),
            _verdict(group),
        )
    return table


def _yes(whether: bool) -> str:
    return "y" if whether else "n"


def _verdict(group: list[Compiled]) -> str:
    failures, known = judge(group, complete=False)
    return "[red]FAILS[/red]" if failures else "known" if known else "ok"


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--kernels", default="", help="only kernels with this in their names; rows may then be missing")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each launch in place of the table")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--cache", type=Path, default=CACHE, help="where results are kept (default: %(default)s)")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    jobs, missing = record_all(options.targets.split(","), options.kernels)
    results = list(compile_all(jobs, options.cache, options.workers))
    failures, known = judge(results, complete=not options.kernels)
    failures += missing
    if options.json:
        for result in results:
            print(json.dumps({"triton": TRITON, **asdict(result), "findings": findings(result)}))
    else:
        console = Console(width=None if sys.stdout.isatty() else 160)
        console.print(summary(results))
        for line in known:
            console.print(f"known: {line}", highlight=False, markup=False, soft_wrap=True)
    for failure in failures:
        print(f"gate: {failure}", file=sys.stderr)
    took = f"{time.monotonic() - started:.0f} s"
    print(f"gate: triton {TRITON}, {len(results)} launches, {len(failures)} failures, {took}", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
