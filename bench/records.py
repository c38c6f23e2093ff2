"""Benchmark records: what a number must carry, where it is written, and the memory cap that makes a small card.

A result file is a JSON list of flat records. A run replaces the record of an earlier run of the same experiment, so
that a file holds one record for each experiment, the latest.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "bench" / "results"
GIB = 1 << 30

# Two records with equal values here describe the same experiment.
IDENTITY = (
    "bench",
    "impl",
    "script",
    "model",
    "towers",
    "batch",
    "seq_len",
    "rank",
    "without",
    "dropout",
    "optimizer",
    "checkpointing",
    "offload",
    "autocast",
    "cap_gib",
    "pytorch_alloc_conf",
    "op",
    "shape",
    "dtype",
    "direction",
)

# Options that say where files lie and change nothing that is measured.
_UNRECORDED_OPTIONS = ("--out", "--checkpoint")


def gib(num_bytes: float) -> float:
    """Bytes as GiB, to three decimals."""
    return round(num_bytes / GIB, 3)


def slug(name: str) -> str:
    """A GPU's name as a folder name: "NVIDIA H200" becomes "nvidia_h200"."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def gpu_name() -> str:
    """The current CUDA device's name, or "cpu"."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _run(command: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=REPOSITORY, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _driver() -> str:
    if not torch.cuda.is_available():
        return "none"
    versions = _run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    return versions.splitlines()[0].strip() if versions else "unknown"


def _commit() -> str:
    """The commit measured, with "+local" if the package differs from it; `FASTGEMMA_COMMIT` where one was given, as for
    a copy of a working tree whose git history stayed behind."""
    if "FASTGEMMA_COMMIT" in os.environ:
        return os.environ["FASTGEMMA_COMMIT"]
    commit = _run(["git", "rev-parse", "--short=12", "HEAD"])
    if commit is None:
        return "unknown"
    changed = _run(["git", "status", "--porcelain", "--", "fastgemma", "kernels", "patches"])
    return f"{commit}+local" if changed else commit


def package_version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment() -> dict[str, Any]:
    """What every record says about the machine and the software it was measured on."""
    record: dict[str, Any] = {
        "gpu": gpu_name(),
        "driver": _driver(),
        "torch": torch.__version__,
        "commit": _commit(),
    }
    record |= {name: package_version(name) for name in ("triton", "transformers", "peft", "trl", "bitsandbytes")}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if name in os.environ:
            record[name.lower()] = os.environ[name]
    return record


def command_line(argv: Sequence[str] | None = None) -> str:
    """The command as one would type it at the repository's root, without the options that only name files."""
    script, *arguments = sys.argv if argv is None else argv
    path = Path(script).resolve()
    shown = path.relative_to(REPOSITORY).as_posix() if path.is_relative_to(REPOSITORY) else path.name
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in _UNRECORDED_OPTIONS:
            skip = True
        elif not argument.startswith(tuple(f"{option}=" for option in _UNRECORDED_OPTIONS)):
            kept.append(argument)
    return shlex.join(["python", shown, *kept])


def result_path(bench: str, out: str | Path | None = None) -> Path:
    """`out`, or the file of `bench` in this GPU's results folder."""
    return Path(out) if out else RESULTS / slug(gpu_name()) / f"{bench}.json"


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of one result file; none if it is missing."""
    if not path.exists():
        return []
    records = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(records, list):
        raise ValueError(f"{path} is no list of records")
    return records


def write_record(record: dict[str, Any], path: Path, identity: Iterable[str] = IDENTITY) -> None:
    """Adds `record` to a result file in place of an earlier one of the same experiment."""
    keys = tuple(identity)

    def experiment(of: dict[str, Any]) -> list[Any]:
        return [of.get(key) for key in keys]

    records = [old for old in read_records(path) if experiment(old) != experiment(record)]
    records.append(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Written aside and renamed: an interrupted run must not cost the earlier results.
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False, encoding="utf-8") as file:
        json.dump(records, file, indent=1)
        file.write("\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, path)


def cap_gpu_memory(cap_gib: float) -> None:
    """Makes the current GPU look like one with `cap_gib` GiB to this process. Call before anything is allocated.

    The allocator then refuses what would not fit. Loaders also plan by the free memory that the driver reports
    (`device_map="auto"` does), which knows nothing of the allocator's limit, so the query is answered for the small
    card too.
    """
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    cap = int(cap_gib * GIB)
    if cap >= total:
        raise ValueError(f"a cap of {cap_gib} GiB is no cap: the card has {gib(total)} GiB")
    torch.cuda.set_per_process_memory_fraction(cap / total)
    asked = torch.cuda.mem_get_info

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        free, _ = asked(device)
        return max(0, min(free, cap - torch.cuda.memory_reserved(device))), cap

    torch.cuda.mem_get_info = mem_get_info


def peaks(prefix: str = "") -> dict[str, float]:
    """Peak allocated and reserved GiB since the last reset, as record entries; nothing without a GPU."""
    if not torch.cuda.is_available():
        return {}
    return {
        f"{prefix}peak_allocated_gib": gib(torch.cuda.max_memory_allocated()),
        f"{prefix}peak_reserved_gib": gib(torch.cuda.max_memory_reserved()),
    }


def feature_counts() -> dict[str, dict[str, Any]]:
    """What fastgemma did in this process: per feature its state, its fast calls and its fallbacks by reason."""
    import fastgemma

    return {
        name: {"state": row.state, "fast_calls": row.fast_calls, "fallbacks": dict(row.fallbacks)}
        for name, row in fastgemma.status().items()
    }
