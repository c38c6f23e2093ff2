"""What the two halves of the demo found: verdict, tables and picture."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from fastgemma.demo.plan import Plan
from fastgemma.demo.text import QUESTION

# Features with kernels of their own: each must have run in the patched half, or the comparison would show nothing.
EXPECTED = ("rms_norm", "rope", "geglu", "lora", "attention", "cross_entropy")
# The first steps compile kernels and fill caches.
_WARM_UP_STEPS = 3
_MAX_TABLE_ROWS = 16


def verdict(plan: Plan, stock: dict[str, Any], patched: dict[str, Any]) -> list[str]:
    """What is wrong with the two halves' results; empty if nothing is."""
    problems = []
    expected = list(EXPECTED)
    if plan.device == "cuda" and plan.per_layer_embeddings == "host":
        expected.append("per_layer_embeddings")
    for name in expected:
        feature = patched["status"].get(name)
        if feature is None or not feature["fast_calls"]:
            why = "it is not in status()" if feature is None else _notes(feature) or feature["state"]
            problems.append(f"{name}: fastgemma's path never ran ({why})")
    ours, theirs = patched["losses"], stock["losses"]
    if len(ours) != plan.steps or len(theirs) != plan.steps:
        problems.append(f"expected {plan.steps} losses; stock logged {len(theirs)}, patched {len(ours)}")
    for step, (a, b) in enumerate(zip(theirs, ours), start=1):
        # Written so that a NaN on either side fails.
        if not abs(a - b) <= plan.allowed(a):
            problems.append(
                f"the loss curves part at step {step}: stock {a:.6f}, patched {b:.6f}, allowed difference "
                f"{plan.allowed(a):.2g}"
            )
            break
    return problems


def _notes(feature: dict[str, Any]) -> str:
    notes = [f"{reason}: {count}" for reason, count in feature["fallbacks"].items()]
    return "; ".join([*notes, *([feature["reason"]] if feature["reason"] else [])])


def _median_ms(result: dict[str, Any]) -> float:
    times = result["step_ms"]
    return statistics.median(times[_WARM_UP_STEPS:] or times)


def print_results(plan: Plan, stock: dict[str, Any], patched: dict[str, Any], console: Console) -> None:
    table = Table(title="Loss")
    for column in ("step", "stock", "patched", "difference", "allowed"):
        table.add_column(column, justify="right")
    count = min(len(stock["losses"]), len(patched["losses"]))
    stride = math.ceil(count / _MAX_TABLE_ROWS)
    for step in range(1, count + 1):
        if (step - 1) % stride == 0 or step == count:
            a, b = stock["losses"][step - 1], patched["losses"][step - 1]
            table.add_row(str(step), f"{a:.5f}", f"{b:.5f}", f"{b - a:+.1e}", f"{plan.allowed(a):.1e}")
    console.print(table)

    table = Table(title="Cost")
    table.add_column("")
    table.add_column("stock", justify="right")
    table.add_column("patched", justify="right")
    table.add_row("step time, median (ms)", f"{_median_ms(stock):.1f}", f"{_median_ms(patched):.1f}")
    for name, value in stock["memory"].items():
        table.add_row(f"peak memory, {name} (MiB)", f"{value:.0f}", f"{patched['memory'][name]:.0f}")
    console.print(table)
    if plan.device == "cpu":
        console.print(
            "Without a GPU the kernels ran in Triton's interpreter, one program at a time in Python: the losses are a "
            "comparison, the times and the memory mean nothing.",
            style="yellow",
        )

    table = Table(title="fastgemma.status() after training")
    for column in ("feature", "state", "fast calls", "fallbacks and notes"):
        table.add_column(column, overflow="fold", justify="right" if column == "fast calls" else "left")
    for name, feature in patched["status"].items():
        table.add_row(name, feature["state"], str(feature["fast_calls"]), _notes(feature))
    console.print(table)
    console.print(f"The patched, fine-tuned model, asked [italic]{QUESTION}[/italic]")
    console.print(f"  {patched['sentence']}", style="bold", markup=False)


def draw(plan: Plan, stock: dict[str, Any], patched: dict[str, Any], path: Path) -> None:
    """Saves a picture of the two loss curves, and of their difference against what is allowed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1.3), layout="constrained"
    )
    steps = range(1, min(len(stock["losses"]), len(patched["losses"])) + 1)
    pairs = list(zip(stock["losses"], patched["losses"]))
    top.plot(steps, [a for a, _ in pairs], color="#f0a030", linewidth=6, alpha=0.55, label="stock")
    top.plot(steps, [b for _, b in pairs], color="#1f4e9e", linewidth=1.6, marker="o", markersize=3.5, label="patched")
    top.set_ylabel("training loss")
    where = torch.cuda.get_device_name() if plan.device == "cuda" else "CPU, kernels in Triton's interpreter"
    kind = "QLoRA, bfloat16" if plan.device == "cuda" else "LoRA, float32"
    top.set_title(f"A small Gemma 4 under TRL's SFTTrainer ({kind}; {where})", fontsize=11)
    top.legend(frameon=False)
    # A log axis cannot show an exact zero.
    floor = 1e-9
    bottom.plot(steps, [max(abs(a - b), floor) for a, b in pairs], color="#1f4e9e", marker="o", markersize=3.5)
    bottom.plot(steps, [plan.allowed(a) for a, _ in pairs], color="#b03030", linestyle="--", label="allowed")
    bottom.set_yscale("log")
    bottom.set_ylabel("|patched - stock|")
    bottom.set_xlabel("step")
    bottom.legend(frameon=False, loc="center right")
    for axes in (top, bottom):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    bottom.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
