"""Rewrites the benchmark tables of README.md and docs/ from the result files.

    python bench/report.py            rewrite the tables
    python bench/report.py --check    exit with 1 if a document does not show the present results

A table stands between `<!-- bench:NAME:start -->` and `<!-- bench:NAME:end -->`; NAME is one of `TABLES`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "bench" / "results"
NOT_MEASURED = "*Not measured yet.*"

Record = dict[str, Any]

_IMPLEMENTATIONS = {"hf": "Transformers + PEFT", "liger": "Liger", "fastgemma": "**fastgemma**"}
_MODELS = {"e2b": "E2B", "e4b": "E4B", "12b": "12B", "26b-a4b": "26B-A4B", "31b": "31B"}
_SCRIPTS = {
    "trainer_path": '`SFTTrainer(model="...")`',
    "device_map_0": '`device_map={"": 0}`',
    "no_device_map": "no `device_map`",
}
# What stands beside a few kernels only.
_PEERS = {"efficient": "memory-efficient"}
# What a kernel stands in for, under the names that its benchmark gives it.
_STOCK = ("hf", "bitsandbytes", "pageable", "nonzero")


def read_results(folder: Path) -> list[Record]:
    """All records of all GPUs; files that are no list of records (other tools' output) are left out."""
    found: list[Record] = []
    for path in sorted(folder.glob("*/*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, list):
            found += [record for record in content if isinstance(record, dict)]
    return found


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table; the first column reads as text, the others as figures."""
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _position(value: Any, order: dict[str, Any]) -> tuple[int, str]:
    keys = list(order)
    return (keys.index(value) if value in keys else len(keys), str(value))


def _subject(record: Record) -> str:
    name = _MODELS.get(record["model"], record["model"])
    return f"{name}, towers loaded" if record.get("towers") else f"{name}, text"


def _order(record: Record) -> tuple[Any, ...]:
    return (
        _position(record["model"], _MODELS),
        bool(record.get("towers")),
        record.get("seq_len") or 0,
        record.get("batch") or 0,
        record.get("cap_gib") or 0,
        record.get("dropout") or 0,
        _position(record.get("script"), _SCRIPTS),
        _position(record["impl"], _IMPLEMENTATIONS),
    )


def _by_gpu(found: list[Record], body: Callable[[list[Record]], str]) -> str:
    """One table per GPU, each under a line that names the GPU, the software, and the commits measured."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in found:
        groups[record.get("gpu", "unknown")].append(record)
    if not groups:
        return NOT_MEASURED
    parts = []
    for gpu, group in sorted(groups.items()):
        versions = []
        for name in ("torch", "triton", "transformers"):
            values = sorted({str(record[name]) for record in group if record.get(name)})
            if values:
                versions.append(f"{name} {', '.join(values)}")
        # Rows of one table may be of different versions of this package: a run replaces its own row alone.
        commits = sorted({str(record["commit"])[:7] for record in group if record.get("commit")})
        if commits:
            versions.append(f"fastgemma {', '.join(commits)}")
        parts.append(f"{gpu}; {'; '.join(versions)}.\n\n{body(group)}")
    return "\n\n".join(parts)


def _experiment(record: Record) -> tuple[Any, ...]:
    """What two implementations must have in common to be compared."""
    keys = ("model", "towers", "batch", "seq_len", "rank", "dropout", "optimizer", "checkpointing", "offload")
    return tuple(record.get(key) for key in (*keys, "autocast"))


def _remarks(record: Record) -> str:
    """What sets a run apart from the usual settings."""
    remarks = []
    if record.get("cap_gib"):
        remarks.append(f"{record['cap_gib']} GiB card")
    if record.get("dropout"):
        remarks.append(f"dropout {record['dropout']}")
    if record.get("checkpointing") is False:
        remarks.append("no checkpointing")
    if record.get("offload"):
        remarks.append("checkpoints in host memory")
    if record.get("autocast"):
        remarks.append("autocast")
    if record.get("pytorch_alloc_conf"):
        remarks.append(record["pytorch_alloc_conf"])
    return f" ({', '.join(remarks)})" if remarks else ""


def train_step(found: list[Record]) -> str:
    """Step times, each beside stock transformers in the same experiment."""
    chosen = sorted(
        (record for record in found if record.get("bench") == "train_step" and not record.get("without")), key=_order
    )
    stock = {
        (record["gpu"], _experiment(record)): record["step_ms"]
        for record in chosen
        if record["impl"] == "hf" and record.get("step_ms") and not record.get("cap_gib")
    }

    def body(group: list[Record]) -> str:
        rows = []
        for record in group:
            base, own = stock.get((record["gpu"], _experiment(record))), record.get("step_ms")
            rows.append(
                [
                    f"{_subject(record)}, {record['batch']} x {record['seq_len']}{_remarks(record)}",
                    _IMPLEMENTATIONS.get(record["impl"], record["impl"]),
                    _number(own) if own else "out of memory",
                    f"{base / own:.1f}x" if base and own else "-",
                    _number(record.get("tokens_per_s")),
                    _number(record.get("peak_allocated_gib"), 1),
                    # Before any update: of the same weights and tokens, whatever was trained.
                    _number(next(iter(record.get("losses", ())), None), 4),
                ]
            )
        head = ["Training step", "Implementation", "ms", "vs stock", "tokens/s", "peak GiB", "first loss"]
        return _table(head, rows)

    return _by_gpu(chosen, body)


def first_step(found: list[Record]) -> str:
    """The first step, compiling included, with nothing in the compilers' caches."""
    chosen = sorted((record for record in found if record.get("bench") == "first_step"), key=_order)

    def body(group: list[Record]) -> str:
        rows = [
            [
                f"{_subject(record)}, {record['batch']} x {record['seq_len']}{_remarks(record)}",
                _IMPLEMENTATIONS.get(record["impl"], record["impl"]),
                _number(record["first_step_s"], 1),
                _number(record.get("cpus")),
            ]
            for record in group
        ]
        return _table(["First step, nothing compiled", "Implementation", "s", "CPU cores"], rows)

    return _by_gpu(chosen, body)


def fit(found: list[Record]) -> str:
    """Whether stock TRL scripts finish under the cap."""
    chosen = sorted((record for record in found if record.get("bench") == "fit"), key=_order)

    def body(group: list[Record]) -> str:
        rows = []
        for record in group:
            cap = f"{record['cap_gib']} GiB" if record.get("cap_gib") else "none"
            rows.append(
                [
                    f"{_subject(record)}, {record['batch']} x {record['seq_len']}",
                    _SCRIPTS.get(record["script"], record["script"]),
                    _IMPLEMENTATIONS.get(record["impl"], record["impl"]),
                    cap,
                    "trains" if record.get("finished") else "fails",
                    _number(record.get("peak_reserved_gib"), 2),
                    _number(record.get("step_ms")),
                    _number(record.get("host_rss_gib"), 1),
                ]
            )
        head = ["Model", "Script", "Implementation", "card", "result", "peak GiB", "ms/step", "host GiB"]
        return _table(head, rows)

    return _by_gpu(chosen, body)


def memory(found: list[Record]) -> str:
    """Where the memory peak of a training step comes from."""
    chosen = [
        record for record in found if record.get("bench") == "train_step" and record.get("weights_gib") is not None
    ]
    chosen.sort(key=_order)

    def body(group: list[Record]) -> str:
        rows = [
            [
                f"{_subject(record)}, {record['batch']} x {record['seq_len']}{_remarks(record)}",
                _IMPLEMENTATIONS.get(record["impl"], record["impl"]),
                _number(record.get("weights_gib"), 2),
                _number(record.get("loading_peak_allocated_gib"), 2),
                _number(record.get("stepping_peak_allocated_gib"), 2),
                _number(record.get("peak_reserved_gib"), 2),
            ]
            for record in group
        ]
        head = ["GiB", "Implementation", "weights", "loading peak", "step peak", "reserved"]
        return _table(head, rows)

    return _by_gpu(chosen, body)


def kernels(found: list[Record]) -> str:
    """Single operations against what the same card can do, and against what one would use instead."""
    chosen = [record for record in found if record.get("bench") == "kernels"]

    def microseconds(record: Record | None, of: str = "ms") -> str:
        return _number(1000 * record[of] if record and of in record else None, 1)

    def body(group: list[Record]) -> str:
        by_operation: dict[tuple[Any, ...], dict[str, Record]] = defaultdict(dict)
        for record in group:
            by_operation[record["op"], record["direction"], tuple(record["shape"])][record["impl"]] = record
        peers = {impl: name for impl, name in _PEERS.items() if any(record["impl"] == impl for record in group)}
        rows = []
        for (op, direction, shape), by_impl in sorted(by_operation.items()):
            own = by_impl.get("fastgemma")
            if own is None:
                continue
            stock = next((by_impl[impl] for impl in _STOCK if impl in by_impl), None)
            rate, unit = (own.get("tflops"), "TFLOP/s") if "tflops" in own else (own.get("gbps"), "GB/s")
            rows.append(
                [
                    f"`{op}` {direction}, {' x '.join(map(str, shape))}",
                    microseconds(own),
                    f"{_number(rate)} {unit}" if rate else "-",
                    f"{_number(own['pct_of_ceiling'])}%" if own.get("pct_of_ceiling") else "-",
                    microseconds(own, "copy_ms"),
                    microseconds(stock),
                    *(microseconds(by_impl.get(impl)) for impl in ("compile", "liger", *peers)),
                    *(_number(record.get("host_us")) for record in (own, stock or {})),
                ]
            )
        head = [
            "Kernel",
            "**fastgemma** µs",
            "rate",
            "of ceiling",
            "copy µs",
            "stock µs",
            "torch.compile µs",
            "Liger µs",
        ]
        return _table([*head, *(f"{name} µs" for name in peers.values()), "host µs", "stock host µs"], rows)

    return _by_gpu(chosen, body)


def fidelity(found: list[Record]) -> str:
    """Errors against float32, of patched and of stock models."""
    chosen = sorted((record for record in found if record.get("bench") == "fidelity"), key=_order)

    def error(record: Record, what: str) -> str:
        own, stock = (record.get(f"{what}_{whose}") for whose in ("error", "stock_error"))
        if own is None or stock is None:
            return "-"
        return f"{own:.1e} / {stock:.1e} = {own / stock:.2f}"

    def body(group: list[Record]) -> str:
        rows = [
            [
                f"{_MODELS.get(record['model'], record['model'])}, {record['batch']} x {record['seq_len']}",
                record["training"],
                _number(record["seeds"]),
                error(record, "logits"),
                error(record, "gradient"),
                error(record, "shared_kv_gradient"),
                f"{record['worst_gradient_ratio']:.2f}",
                f"{record['gradients_within_1.1']} of {record['gradients']}",
            ]
            for record in group
        ]
        head = ["Model", "trained", "seeds", "logits: patched / stock", "gradients: patched / stock"]
        return _table([*head, "of shared keys and values", "worst gradient", "within 1.1"], rows)

    return _by_gpu(chosen, body)


def predicted(found: list[Record]) -> str:
    """Steps on cards that nobody measured."""
    chosen = [record for record in found if record.get("bench") == "predicted_step"]
    if not chosen:
        return NOT_MEASURED
    gpu, batch, seq_len, commit = chosen[0]["calibrated_with"]
    checks = "; ".join(f"{name}, {b} x {s}: {ratio:.2f}" for name, b, s, ratio in chosen[0]["predicted_over_measured"])
    names = list(dict.fromkeys(record["gpu"] for record in chosen))
    cells = {(r["gpu"], r["model"], r["batch"], r["seq_len"]): r["predicted_ms"] for r in chosen}
    columns = list(dict.fromkeys((r["model"], r["batch"], r["seq_len"]) for r in chosen))
    rows = [[name, *(_number(cells.get((name, *column))) for column in columns)] for name in names]
    head = ["Predicted ms", *(f"{_MODELS.get(model, model)}, {b} x {s}" for model, b, s in columns)]
    return (
        f"Calibrated with {gpu}, {batch} x {seq_len} tokens of E2B, fastgemma {commit}. GPU time of the counted work, "
        f"predicted over measured: {checks}.\n\n{_table(head, rows)}"
    )


TABLES: dict[str, Callable[[list[Record]], str]] = {
    "train_step": train_step,
    "first_step": first_step,
    "fit": fit,
    "memory": memory,
    "kernels": kernels,
    "fidelity": fidelity,
    "predicted": predicted,
}


def render(text: str, found: list[Record]) -> str:
    """`text` with the table of every marker pair in it replaced.

    Raises:
        ValueError: a marker of an unknown table, or a start without its end.
    """

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"no table is called {name!r}; one of {', '.join(TABLES)}")
        return f"<!-- bench:{name}:start -->\n\n{TABLES[name](found)}\n\n<!-- bench:{name}:end -->"

    pattern = r"<!-- bench:(?P<name>[\w-]+):start -->.*?<!-- bench:(?P=name):end -->"
    rendered, pairs = re.subn(pattern, replace, text, flags=re.DOTALL)
    if pairs != len(re.findall(r"<!-- bench:[\w-]+:(?:start|end) -->", text)) / 2:
        raise ValueError("a bench marker has no partner")
    return rendered


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a table is stale")
    parser.add_argument(
        "--documents",
        type=Path,
        nargs="+",
        default=[REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))],
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    found = read_results(arguments.results)
    for document in arguments.documents:
        text = document.read_text(encoding="utf-8")
        rendered = render(text, found)
        if rendered == text:
            continue
        if arguments.check:
            sys.exit(f"{document.name} does not show the present results; run python bench/report.py")
        document.write_text(rendered, encoding="utf-8")
        print(f"rewrote {document.name}")


if __name__ == "__main__":
    main()
