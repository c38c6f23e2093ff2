"""What a QLoRA training step would take on cards that nobody measured: a prediction from FLOPs and bytes.

    python bench/predict.py

Counts the work of a step from a model's shape: the FLOPs of its matrix products and of attention, and the bytes that
everything else must move. What share of the peak rates each kind of work reaches is taken from one measured profile
(`CALIBRATION`); the others are predicted too, and how far that is off is recorded beside them. A card's time is then
the sum over the kinds of work at the same shares of its own peaks. It leaves out the host, which has less to hide
behind on a slow card, and clocks that fall under load.

Source: the formulas in the docstrings of `fastgemma.kernels`; peak rates from NVIDIA's data sheets and white papers
(GeForce: bf16 with float32 accumulation, without sparsity).
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import models
import records
import torch

WEIGHT_BYTES, SCALE_BYTES, HALF = 0.5, 1 / 64, 2
PEFT_RANK = 16
# Kinds of work as `train_step.KERNEL_GROUPS` names them.
FLOPS, BYTES = ("gemm", "attention"), ("dequantise", "gated activation", "norm and rope", "loss")
CALIBRATION = ("nvidia_h200", 1, 8192)  # folder of results, batch, seq_len
SHAPES = ((1, 2048), (1, 8192))


@dataclass(frozen=True)
class Card:
    """Peak rates: bf16 with float32 accumulation in TFLOP/s, memory in GB/s."""

    name: str
    tflops: float
    gbytes: float


MEASURED = {
    "nvidia_h100_80gb_hbm3": Card("NVIDIA H100 80GB HBM3", 989.4, 3352),
    "nvidia_h200": Card("NVIDIA H200", 989.4, 4800),
}
CARDS = (
    Card("RTX 3060", 25.5, 360),
    Card("RTX 4060", 30.2, 272),
    Card("RTX 5060", 38.4, 448),
    Card("RTX 4070", 58.3, 504),
    Card("RTX 5070", 61.7, 672),
    Card("RTX 4090", 165.2, 1008),
)


@dataclass
class Work:
    """Of one training step."""

    flops: dict[str, float] = field(default_factory=lambda: dict.fromkeys(FLOPS, 0.0))
    bytes: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BYTES, 0.0))
    # Of products with an adapter's few columns, which are as slow as reading their inputs.
    adapter_bytes: float = 0.0


@dataclass(frozen=True)
class Layer:
    """One decoder layer: (in_features, out_features) of its adapted and of its other projections, and its attention."""

    adapted: list[tuple[int, int]]
    others: list[tuple[int, int]]
    heads: int
    head_dim: int
    columns: int
    window: int | None
    intermediate: int


def shape_of(size: str) -> Any:
    """A text model of the published size without memory behind its weights."""
    with torch.device("meta"):
        return models.model_class(size, towers=False)(models.text_config(size))


def layers(model: Any) -> Iterator[Layer]:
    """The decoder layers of a text model without experts."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        own = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj")]
        inputs = [
            linear
            for linear in own
            if linear is not None and not (linear is not own[0] and attention.is_kv_shared_layer)
        ]
        adapted = [*inputs, attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj]
        others = [layer.per_layer_input_gate, layer.per_layer_projection] if layer.hidden_size_per_layer_input else []
        yield Layer(
            [(linear.in_features, linear.out_features) for linear in adapted],
            [(linear.in_features, linear.out_features) for linear in others],
            attention.q_proj.out_features // attention.head_dim,
            attention.head_dim,
            sum(linear.out_features for linear in inputs),
            attention.sliding_window,
            mlp.gate_proj.out_features,
        )


def count(model: Any, batch: int, seq_len: int, rank: int = PEFT_RANK) -> Work:
    """The work of a checkpointed step: every layer forward, once more, and backward, base weights frozen."""
    config, work, tokens = model.config, Work(), batch * seq_len
    hidden, vocab, per_layer = config.hidden_size, config.vocab_size, config.hidden_size_per_layer_input
    for layer in layers(model):
        weights = sum(k * n for k, n in (*layer.adapted, *layer.others))
        work.flops["gemm"] += 3 * 2 * tokens * weights
        # For the forward, its recomputation, and the gradient of the input.
        work.bytes["dequantise"] += 3 * weights * (WEIGHT_BYTES + SCALE_BYTES + HALF)
        work.adapter_bytes += HALF * tokens * sum(4 * k + 2 * n for k, n in layer.adapted)
        work.flops["gemm"] += tokens * rank * sum(10 * k + 8 * n for k, n in layer.adapted)
        window = min(layer.window or seq_len, seq_len)
        pairs = batch * layer.heads * (seq_len * window - window * window / 2)
        # Scores and outputs twice forward; backward scores, their gradient, and those of queries, keys and values.
        work.flops["attention"] += (2 * 2 + 5) * 2 * layer.head_dim * pairs
        gates = layer.intermediate + per_layer
        work.bytes["gated activation"] += tokens * gates * (2 * 6 + 12)
        norms = 5 if per_layer else 4
        forward = 4 * 2 + 6 * (norms - 2)
        work.bytes["norm and rope"] += tokens * (hidden * (2 * forward + 8 + 6 * norms + 6) + 14 * layer.columns)
    work.flops["gemm"] += 2 * 2 * tokens * vocab * hidden
    work.flops["gemm"] += 2 * 2 * tokens * hidden * config.num_hidden_layers * per_layer
    # One sweep over the logits, which reads them and writes their gradient.
    work.bytes["loss"] = 2 * HALF * tokens * vocab
    return work


@dataclass(frozen=True)
class Shares:
    """Of a card's peak rate, by kind of work."""

    of: dict[str, float]

    @classmethod
    def measured(cls, work: Work, gpu_ms: dict[str, float], card: Card) -> Shares:
        memory = {kind: work.bytes[kind] / (gpu_ms[kind] * card.gbytes * 1e6) for kind in BYTES}
        # Adapters' products are counted among the products, and read as the norms do.
        adapters = work.adapter_bytes / (memory["norm and rope"] * card.gbytes * 1e6)
        rate = card.tflops * 1e9
        return cls(
            memory
            | {
                "gemm": work.flops["gemm"] / ((gpu_ms["gemm"] - adapters) * rate),
                "attention": work.flops["attention"] / (gpu_ms["attention"] * rate),
            }
        )

    def milliseconds(self, work: Work, card: Card) -> dict[str, float]:
        """By kind of work."""
        times = {kind: work.flops[kind] / (self.of[kind] * card.tflops * 1e9) for kind in FLOPS}
        times |= {kind: work.bytes[kind] / (self.of[kind] * card.gbytes * 1e6) for kind in BYTES}
        times["gemm"] += work.adapter_bytes / (self.of["norm and rope"] * card.gbytes * 1e6)
        return times


def profiles() -> Iterator[tuple[str, dict[str, Any]]]:
    """(folder, record) of the measured profiles of E2B, of the commit of the calibration alone."""
    found = [
        (folder, record)
        for folder in MEASURED
        for record in records.read_records(records.RESULTS / folder / "train_step_profile.json")
        if record["impl"] == "fastgemma" and record["model"] == "e2b" and not record.get("without")
    ]
    commit = next(r["commit"] for folder, r in found if (folder, r["batch"], r["seq_len"]) == CALIBRATION)
    return ((folder, record) for folder, record in found if record["commit"] == commit)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=records.RESULTS / "predicted" / "predicted_step.json")
    path = parser.parse_args().out
    known = {(folder, r["batch"], r["seq_len"]): r for folder, r in profiles()}
    e2b, chosen = shape_of("e2b"), known[CALIBRATION]
    folder, *shape = CALIBRATION
    shares = Shares.measured(count(e2b, *shape), chosen["profile"]["gpu_ms"], MEASURED[folder])
    print("shares of the peak rates:", json.dumps({kind: round(share, 3) for kind, share in shares.of.items()}))

    checks = []
    for (folder, *shape), record in known.items():
        predicted = shares.milliseconds(count(e2b, *shape), MEASURED[folder])
        ratio = sum(predicted.values()) / sum(record["profile"]["gpu_ms"][kind] for kind in predicted)
        checks.append([MEASURED[folder].name, *shape, round(ratio, 3)])
        print(f"{MEASURED[folder].name} {shape[0]} x {shape[1]}: predicted / measured {ratio:.2f}")
    for size in ("e2b", "e4b"):
        model = shape_of(size)
        for card, (batch, seq_len) in itertools.product(CARDS, SHAPES):
            times = shares.milliseconds(count(model, batch, seq_len), card)
            record = {
                "bench": "predicted_step",
                "model": size,
                "gpu": card.name,
                "batch": batch,
                "seq_len": seq_len,
                "rank": PEFT_RANK,
                "predicted_ms": round(sum(times.values())),
                "predicted_gpu_ms": {kind: round(ms, 1) for kind, ms in times.items()},
                "shares": {kind: round(share, 3) for kind, share in shares.of.items()},
                "calibrated_with": [MEASURED[CALIBRATION[0]].name, *CALIBRATION[1:], chosen["commit"]],
                "predicted_over_measured": checks,
            }
            records.write_record(record, path, (*records.IDENTITY, "gpu"))
    print(f"recorded in {path}")


if __name__ == "__main__":
    main()
