"""How far a model in bfloat16 is from itself in float32: stock, and patched.

    python bench/fidelity.py [--model e2b] [--seeds 5]

The truth is the same model in float32 on stock code, its weights being those that the 16-bit model has (4-bit ones as
bitsandbytes dequantises them): what is left is the rounding of arithmetic. The errors are relative L2 errors of the
logits, of all gradients as one vector, of those of the projections that make keys and values for other layers (their
gradient is a sum over these layers), and of every single gradient; of several seeds, each with weights, adapters and
tokens of its own, the root of the mean square counts.

The five structures are the tiny ones of the test suite; `e2b` is the published shape, 35 layers deep. Its weights are
random but for the query norms: with scores as spread as random weights make them, attention would be one-hot, and every
rounding would grow to an error of the size of the result, in stock code as well.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import models
import records
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import structures

from fastgemma import api
from fastgemma.verification import measure, truth
from fastgemma.verification.measure import LOGITS, LOSS, Distance
from fastgemma.verification.preserve import preserved

_IDENTITY = ("bench", "impl", "model", "training", "dtype", "batch", "seq_len")
_TRAININGS = ("full", "lora", "qlora")
# Graphs replay the same kernels; the table in the checkpoint's file holds the same rows.
_PATCHED = {name: default for name, (default, _) in api.FEATURES.items()} | {
    "cuda_graphs": False,
    "per_layer_embeddings": "gpu",
}
_STOCK = dict.fromkeys(api.FEATURES, False)
_WHOLE, _SHARED = "all gradients", "gradients of shared keys and values"

Setup = tuple[nn.Module, dict[str, Any]]  # a model, and a batch for it


def adapted(model: nn.Module, seed: int, rank: int) -> Any:
    """With adapters whose B is not zero, as it is before the first step: half of the gradients would be."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=models.LANGUAGE_PROJECTIONS)
    peft_model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return peft_model


def tiny(name: str, training: str, seed: int, device: torch.device) -> Setup:
    """One of the five structures in bfloat16, and two rows of tokens, one padded."""
    # With every expert chosen a rounding cannot send a token to another one, which would outweigh all rounding.
    overrides = {"top_k_experts": 4} if name == "26b-a4b" else {}
    model: Any = structures.build(name, seed=seed, **overrides)
    if training == "qlora":
        structures.quantize(model)
    if training != "full":
        model = adapted(model, seed, rank=4)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.bfloat16
    batch = structures.batch("padding", seq_len=61, seed=seed, device=device)
    return model.to(device, torch.bfloat16), batch


def published(size: str, seed: int, seq_len: int, device: torch.device) -> Setup:
    """The published shape, quantised, with adapters of rank 16, and a row of random tokens."""
    from transformers import BitsAndBytesConfig

    checkpoint = models.save_random_checkpoint(
        models.default_checkpoint_dir(size, towers=False, seed=0), size, towers=False, seed=0
    )
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    cls = models.model_class(size, towers=False)
    model: Any = cls.from_pretrained(
        checkpoint, dtype=torch.bfloat16, device_map={"": device}, quantization_config=quantization
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("q_norm.weight"):
                parameter.mul_(parameter.shape[0] ** -0.5)
    model = adapted(model, seed, rank=16).to(torch.bfloat16)
    generator = torch.Generator().manual_seed(seed)
    vocab_size = min(model.config.get_text_config().vocab_size, models.FIRST_PLACEHOLDER_ID)
    ids = torch.randint(3, vocab_size, (1, seq_len), generator=generator).to(device)
    return model, {"input_ids": ids, "labels": ids, "use_cache": False}


def distances(model: Any, batch: dict[str, Any], device: torch.device) -> dict[str, tuple[Distance, Distance]]:
    """By tensor: how far the patched and the stock result are from the truth."""
    sample = measure.sample_logits(batch, model.config.get_text_config().vocab_size)
    with preserved(model, []):
        model.train()
        with api.patched(**_STOCK):
            stock = measure.run(model, batch, sample)
        with api.patched(**_PATCHED):
            patched = measure.run(model, batch, sample)
        with api.patched(**_STOCK), truth.in_float32(model):
            exact = measure.run(model, batch, sample)
    found = {
        name: (measure.distance(patched[name], tensor, device), measure.distance(stock[name], tensor, device))
        for name, tensor in exact.items()
        if tensor.any()
    }
    makers = tuple(
        f"{name}.{projection}."
        for name, module in model.named_modules()
        if getattr(module, "store_full_length_kv", False)
        for projection in ("k_proj", "v_proj")
    )
    gradients = {name: pair for name, pair in found.items() if name not in (LOSS, LOGITS)}
    shared = [pair for name, pair in gradients.items() if name.startswith(makers)]
    for group, pairs in ((_WHOLE, list(gradients.values())), (_SHARED, shared)):
        if pairs:
            ours, theirs = (measure.pooled(side) for side in zip(*pairs))
            found[group] = ours, theirs
    return found


def summarise(seeds: list[dict[str, tuple[Distance, Distance]]]) -> dict[str, Any]:
    """A record's figures."""
    squares: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for found in seeds:
        for name, (patched, stock) in found.items():
            squares[name].append((patched.relative**2, stock.relative**2))
    roots = {name: [math.sqrt(sum(side) / len(side)) for side in zip(*each)] for name, each in squares.items()}
    several = (LOSS, LOGITS, _WHOLE, _SHARED)
    singles = {name: patched / stock for name, (patched, stock) in roots.items() if name not in several and stock}
    worst = max(singles, key=singles.__getitem__)
    return {
        "logits_error": roots[LOGITS][0],
        "logits_stock_error": roots[LOGITS][1],
        "gradient_error": roots[_WHOLE][0],
        "gradient_stock_error": roots[_WHOLE][1],
        # None where no layer has keys and values for others.
        "shared_kv_gradient_error": roots[_SHARED][0] if _SHARED in roots else None,
        "shared_kv_gradient_stock_error": roots[_SHARED][1] if _SHARED in roots else None,
        "gradients": len(singles),
        "gradients_within_1.1": sum(ratio <= 1.1 for ratio in singles.values()),
        "worst_gradient": worst,
        "worst_gradient_ratio": singles[worst],
    }


def experiments(chosen: list[str], device: torch.device, seq_len: int) -> Iterator[tuple[dict[str, Any], Callable]]:
    """What identifies a record, and what sets up a seed of it."""
    for name in chosen:
        if name in models.SIZES:
            of = {"model": name, "training": "qlora", "batch": 1, "seq_len": seq_len}
            yield of, lambda seed, name=name: published(name, seed, seq_len, device)
            continue
        for training in _TRAININGS:
            of = {"model": name, "training": training, "batch": 2, "seq_len": 61}
            yield of, lambda seed, name=name, t=training: tiny(name.removesuffix("-tiny"), t, seed, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [*(f"{name}-tiny" for name in structures.STRUCTURES), "e2b", "e4b"]
    parser.add_argument("--model", dest="models", action="append", choices=every, help="repeat; default: all but e4b")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--seq-len", type=int, default=512, help="of the published shapes")
    parser.add_argument("--out", type=Path, help="result file (default: bench/results/<gpu>/fidelity.json)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: Triton's interpreter does not compute in bfloat16")
    device = torch.device("cuda", torch.cuda.current_device())
    for of, make in experiments(arguments.models or every[:-1], device, arguments.seq_len):
        seeds = []
        before = {name: report.fast_calls for name, report in api.status().items()}
        for seed in range(arguments.seeds):
            model, batch = make(seed)
            seeds.append(distances(model, batch, device))
            del model
            torch.cuda.empty_cache()
        ran = [name for name, report in api.status().items() if report.fast_calls > before[name]]
        record = {
            "bench": "fidelity",
            "impl": "fastgemma",
            **of,
            "dtype": "bfloat16",
            "seeds": arguments.seeds,
            **summarise(seeds),
            "features": ran,
            **records.environment(),
            "command": records.command_line(),
        }
        print(json.dumps({key: value for key, value in record.items() if key not in ("gpu", "driver")}), flush=True)
        records.write_record(record, records.result_path("fidelity", arguments.out), _IDENTITY)


if __name__ == "__main__":
    main()
