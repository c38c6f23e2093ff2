"""The demo's stages, each in a process of its own, and the parent that runs them and compares."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastgemma.demo.checkpoint import prepare
from fastgemma.demo.plan import DemoError, Plan, gpu_problem
from fastgemma.demo.results import EXPECTED, draw, print_results, verdict
from fastgemma.demo.training import train


def run_stage(stage: str, work: Path) -> None:
    """Runs "prepare", "stock" or "patched" in this process: reads `plan.json` in `work` and leaves `<stage>.json`."""
    import warnings

    from transformers.utils import logging as transformers_logging

    # The demo is read by people; what these libraries have to say about a toy model is not for them.
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    plan = Plan(**json.loads((work / "plan.json").read_text(encoding="utf-8")))
    checkpoint = work / "checkpoint"
    if stage == "prepare":
        result = prepare(plan, checkpoint)
    else:
        result = train(plan, checkpoint, work / stage, patched=stage == "patched")
    (work / f"{stage}.json").write_text(json.dumps(result), encoding="utf-8")


def _environment(plan: Plan, stage: str) -> dict[str, str]:
    """A stage's environment: offline, quiet, one GPU at most, and the interpreter only where it is wanted."""
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
    }
    env.pop("TRITON_INTERPRET", None)
    if plan.device == "cpu":
        env["CUDA_VISIBLE_DEVICES"] = ""
        # Tensors this small gain nothing from a second thread, and lose much where other work keeps the cores busy.
        env["OMP_NUM_THREADS"] = "1"
        if stage == "patched":
            # Triton reads it when a kernel is defined, so it has to be set before the process imports one.
            env["TRITON_INTERPRET"] = "1"
    else:
        # On several GPUs the Trainer would wrap the model in DataParallel, which TRL refuses.
        env["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return env


def _run(plan: Plan, work: Path, stage: str, console: Console, message: str) -> dict[str, Any]:
    started = time.perf_counter()
    command = [sys.executable, "-m", "fastgemma", "demo-stage", stage, str(work)]
    with console.status(message):
        done = subprocess.run(command, env=_environment(plan, stage), capture_output=True, text=True, check=False)
    output = work / f"{stage}.json"
    if done.returncode != 0 or not output.exists():
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-30:])
        hint = ""
        if stage == "patched" and plan.device == "cpu" and _numpy_version() >= (2, 4):
            hint = '\nTriton\'s interpreter may not work with numpy 2.4 or later: pip install "numpy<2.4"'
        raise DemoError(f"The {stage} run failed with exit code {done.returncode}:\n{tail}{hint}")
    console.print(f"{message} [dim]{time.perf_counter() - started:.0f} s[/dim]")
    return json.loads(output.read_text(encoding="utf-8"))


def _numpy_version() -> tuple[int, int]:
    major, minor = importlib.metadata.version("numpy").split(".")[:2]
    return int(major), int(minor)


@contextlib.contextmanager
def _writing(output: Path, meaning: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DemoError(f"Cannot write to {output}: {error}. {meaning}") from error


def run_demo(plan: Plan, output: Path, console: Console) -> None:
    """Runs all three stages, prints what they found and saves `demo.png` and `demo.json` in `output`.

    Raises:
        DemoError: `output` cannot be written, a stage failed, an expected feature never ran, or the loss curves part.
    """
    # Before the minutes that it takes, not after them.
    with _writing(output, "Nothing was run. Name another directory with --output."):
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    on_gpu = plan.device == "cuda"
    if on_gpu:
        console.print(f"QLoRA (NF4, bfloat16) on {torch.cuda.get_device_name()}")
    else:
        console.print(f"LoRA (float32) on the CPU: {gpu_problem() or 'as asked'}")
    with tempfile.TemporaryDirectory(prefix="fastgemma-demo-") as folder:
        work = Path(folder)
        (work / "plan.json").write_text(json.dumps(dataclasses.asdict(plan)), encoding="utf-8")
        base = _run(plan, work, "prepare", console, f"1/3 a Gemma 4 of {len(plan.layer_types)} layers, E2B's structure")
        stock = _run(plan, work, "stock", console, f"2/3 stock: {plan.steps} steps of SFTTrainer")
        patched = _run(plan, work, "patched", console, "3/3 patched: the same script and fastgemma.patch()")
    console.print()
    print_results(plan, stock, patched, console)
    problems = verdict(plan, stock, patched)
    record = {"plan": dataclasses.asdict(plan), "base": base, "stock": stock, "patched": patched, "problems": problems}
    found = "; ".join(problems) or "the comparison itself passed"
    with _writing(output, f"What is printed above is all that was kept of this run ({found}); files may be cut short."):
        draw(plan, stock, patched, output / "demo.png")
        (output / "demo.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    console.print(f"Saved {output / 'demo.png'} and {output / 'demo.json'}", markup=False, soft_wrap=True)
    if problems:
        raise DemoError("\n".join(problems))
    worst = max(abs(a - b) for a, b in zip(stock["losses"], patched["losses"]))
    console.print(
        f"Same losses at every step (largest difference {worst:.1e}); {', '.join(EXPECTED)} ran on fastgemma's path.",
        style="bold green",
    )
