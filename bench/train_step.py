"""One QLoRA training step of a whole model: time, memory, loss, and where the time goes.

    python bench/train_step.py --impl fastgemma --model e2b --batch 1 --seq-len 2048

One process measures one implementation, because a patch to transformers' classes cannot be compared with its absence
in the same process. All of them run the same loop on the same random checkpoint and the same batches: an NF4 base with
double quantisation, LoRA on the seven projections of the language model, gradient checkpointing and 8-bit AdamW.
Adapters are held in bfloat16, as TRL does it for a quantised model.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import models
import records
import torch
from torch import nn

# A kernel belongs to the first group whose pattern its name matches, so the order matters: fused attention kernels
# are named after the GEMM library they are built from.
KERNEL_GROUPS: tuple[tuple[str, str], ...] = (
    ("dequantise", r"dequant|nf4"),
    ("loss", r"log_?softmax|softcapped|cross_entropy|nll_loss|logsumexp|log_?prob|online_lse"),
    ("attention", r"fmha|flash|attention|attn|sdpa|softmax"),
    ("optimizer", r"optimizer|adam|multi_tensor"),
    ("gemm", r"gemm|gemv|cutlass|cublas|nvjet|xmma|splitk|matmul|lora"),
    ("norm and rope", r"norm|rope|rotary|rms"),
    ("gated activation", r"geglu|gelu"),
    ("copy", r"^memcpy|^memset|copy|cat_?array|index|gather|scatter|embedding"),
    ("elementwise", r"elementwise|reduce|vectorized|triton|arange|fill|dropout|distribution"),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impl", choices=("hf", "liger", "fastgemma"), default="fastgemma")
    parser.add_argument("--model", choices=models.SIZES, default="e2b")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0, help="LoRA dropout")
    parser.add_argument("--steps", type=int, default=8, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them, at least one")
    parser.add_argument("--seed", type=int, default=0)
    towers = parser.add_mutually_exclusive_group()
    towers.add_argument("--towers", dest="towers", action="store_true", help="with vision and audio towers loaded")
    towers.add_argument("--text", dest="towers", action="store_false", help="the language model alone (default)")
    parser.set_defaults(towers=False)
    parser.add_argument("--optimizer", choices=("adamw8bit", "paged_adamw8bit", "adamw"), default="adamw8bit")
    parser.add_argument("--no-checkpointing", dest="checkpointing", action="store_false")
    parser.add_argument("--offload", action="store_true", help="keep the checkpointed activations in host memory")
    parser.add_argument("--autocast", action="store_true", help="bfloat16 autocast, as Trainer's bf16=True")
    parser.add_argument("--cap-gib", type=float, help="limit this process's GPU memory, loading included")
    parser.add_argument("--without", action="append", default=[], metavar="FEATURE", help="leave a feature out; repeat")
    parser.add_argument(
        "--cold",
        action="store_true",
        help="start with nothing compiled; recorded in first_step.json",
    )
    parser.add_argument("--profile", action="store_true", help="profile two more steps into train_step_profile.json")
    parser.add_argument("--checkpoint", type=Path, help="directory of the random checkpoint, made if missing")
    parser.add_argument("--out", type=Path, help="result file (default: bench/results/<gpu>/train_step.json)")
    parser.add_argument("--tiny", action="store_true", help="smoke run of the tiny structure; recorded only with --out")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        if not arguments.tiny:
            parser.error("no CUDA device: only --tiny runs here")
        if arguments.cap_gib or arguments.profile:
            parser.error("--cap-gib and --profile need a CUDA device")
    if arguments.offload and not arguments.checkpointing:
        parser.error("--offload needs gradient checkpointing")
    return arguments


def apply_implementation(impl: str, *, towers: bool, without: Sequence[str] = ()) -> None:
    """Patches transformers the way a user of `impl` would: one call before the model is loaded."""
    if impl == "fastgemma":
        import fastgemma

        print(fastgemma.patch(**dict.fromkeys(without, False)))
    elif impl == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_gemma4, apply_liger_kernel_to_gemma4_text

        (apply_liger_kernel_to_gemma4 if towers else apply_liger_kernel_to_gemma4_text)()


def load_model(arguments: argparse.Namespace, checkpoint: Path, device: torch.device) -> nn.Module:
    """The quantised base with its adapters, ready to train. Unquantised without a GPU."""
    from peft import LoraConfig, get_peft_model
    from transformers import BitsAndBytesConfig

    placement: dict[str, Any] = {}
    if device.type == "cuda":
        placement["device_map"] = {"": 0}
        placement["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    cls = models.model_class(arguments.model, towers=arguments.towers)
    model = cls.from_pretrained(checkpoint, dtype=torch.bfloat16, **placement)
    model.config.use_cache = False
    torch.manual_seed(arguments.seed)
    model = get_peft_model(
        model,
        LoraConfig(
            r=arguments.rank,
            lora_alpha=2 * arguments.rank,
            lora_dropout=arguments.dropout,
            target_modules=models.LANGUAGE_PROJECTIONS,
            task_type="CAUSAL_LM",
        ),
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    if arguments.checkpointing:
        options = {"offload": True} if arguments.offload else {}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False}, **options)
        model.enable_input_require_grads()
    return model.train()


def make_optimizer(name: str, model: nn.Module, device: torch.device) -> torch.optim.Optimizer:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if name == "adamw" or device.type == "cpu":
        return torch.optim.AdamW(trainable, lr=1e-4, fused=device.type == "cuda")
    import bitsandbytes

    cls = bitsandbytes.optim.AdamW8bit if name == "adamw8bit" else bitsandbytes.optim.PagedAdamW8bit
    return cls(trainable, lr=1e-4)


def batches(arguments: argparse.Namespace, vocab_size: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Endless random token ids, the same for every implementation; ids that stand for images or audio are left out."""
    generator = torch.Generator().manual_seed(arguments.seed)
    last = min(vocab_size, models.FIRST_PLACEHOLDER_ID)
    while True:
        yield torch.randint(3, last, (arguments.batch, arguments.seq_len), generator=generator).to(device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _busy_us(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of intervals: kernels on two streams at once count once."""
    busy, end = 0.0, float("-inf")
    for start, stop in sorted(intervals):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy


def kernel_group(name: str) -> str:
    """The group of a GPU kernel, by its name."""
    return next((group for group, pattern in KERNEL_GROUPS if re.search(pattern, name, re.IGNORECASE)), "other")


def profile_steps(step: Callable[[], Any], count: int, step_ms: float) -> dict[str, Any]:
    """GPU milliseconds per step by group of kernels, kernel launches and their host time, and the longest kernels.

    Idle time is the unprofiled step less the time in which the GPU was busy: the profiler slows the CPU down, and
    would otherwise be measured itself.
    """
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(count):
            step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]

    spans: list[tuple[float, float]] = []
    by_group: dict[str, float] = defaultdict(float)
    by_kernel: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    launches, launching = 0, 0.0
    for event in events:
        category, name = event.get("cat"), event.get("name", "")
        if category in ("kernel", "gpu_memcpy", "gpu_memset"):
            spans.append((event["ts"], event["ts"] + event["dur"]))
            by_group[kernel_group(name)] += event["dur"]
            by_kernel[name] += event["dur"]
            calls[name] += 1
        elif category in ("cuda_runtime", "cuda_driver") and "Launch" in name:
            launches += 1
            launching += event.get("dur", 0.0)

    def per_step(microseconds: float) -> float:
        return round(microseconds / count / 1000, 3)

    busy = per_step(_busy_us(spans))
    longest = sorted(by_kernel.items(), key=lambda item: -item[1])[:25]
    groups = {group: per_step(us) for group, us in sorted(by_group.items(), key=lambda item: -item[1])}
    return {
        "busy_ms": busy,
        "gpu_ms": groups | {"idle": round(max(0.0, step_ms - busy), 3)},
        "kernels_per_step": round(sum(calls.values()) / count),
        "launches_per_step": round(launches / count),
        # The driver's share of the host's time; the rest of a step that waits for the host is Python and dispatch.
        "launching_ms": per_step(launching),
        "longest_kernels": [
            {"name": name[:160], "ms": per_step(us), "calls": round(calls[name] / count, 1)} for name, us in longest
        ],
    }


def print_profile(profile: dict[str, Any]) -> None:
    for group, ms in profile["gpu_ms"].items():
        print(f"  {group:18s} {ms:9.2f} ms")
    print(
        f"  {profile['launches_per_step']} launches that took the host {profile['launching_ms']} ms, "
        f"{profile['kernels_per_step']} kernels and copies a step"
    )
    for kernel in profile["longest_kernels"]:
        print(f"  {kernel['ms']:9.2f} ms {kernel['calls']:8.1f}x  {kernel['name'][:110]}")


def measure(arguments: argparse.Namespace, checkpoint: Path, device: torch.device, record: dict[str, Any]) -> None:
    """Loads, trains and writes what it finds into `record` as it goes, so that a failed run keeps what it had."""
    on_gpu = device.type == "cuda"
    record["stage"] = "loading"
    apply_implementation(arguments.impl, towers=arguments.towers, without=arguments.without)
    model = load_model(arguments, checkpoint, device)
    optimizer = make_optimizer(arguments.optimizer, model, device)
    record |= records.peaks("loading_")
    if on_gpu:
        record["weights_gib"] = records.gib(torch.cuda.memory_allocated())
        torch.cuda.reset_peak_memory_stats()

    record["stage"] = "stepping"
    source = batches(arguments, model.config.get_text_config().vocab_size, device)
    losses: list[torch.Tensor] = []

    def step() -> float:
        ids = next(source)
        synchronize(device)
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=torch.bfloat16) if arguments.autocast else nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        elapsed = time.perf_counter() - start
        losses.append(loss.detach())
        return 1000 * elapsed

    record["first_step_s"] = round(step() / 1000, 2)
    for _ in range(arguments.warmup - 1):
        step()
    times = [step() for _ in range(arguments.steps)]
    record |= records.peaks("stepping_")
    for kind in ("peak_allocated_gib", "peak_reserved_gib") if on_gpu else ():
        record[kind] = max(record[f"loading_{kind}"], record[f"stepping_{kind}"])
    values = [round(loss.item(), 5) for loss in losses]
    median = statistics.median(times)
    record |= {
        "step_ms": round(median, 2),
        "step_ms_min": round(min(times), 2),
        "step_ms_all": [round(ms, 2) for ms in times],
        "tokens_per_s": round(arguments.batch * arguments.seq_len / median * 1000),
        "loss": values[-1],
        "losses": values,
        "finished": True,
    }
    if arguments.profile:
        record["stage"] = "profiling"
        record["profile"] = profile_steps(step, 2, median)
    del record["stage"]


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """Triton and torch.compile look for compiled code in an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        yield


def main() -> None:
    arguments = parse_arguments()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    bench = "first_step" if arguments.cold else "train_step_profile" if arguments.profile else "train_step"
    checkpoint = arguments.checkpoint or models.default_checkpoint_dir(
        arguments.model, towers=arguments.towers, tiny=arguments.tiny, seed=arguments.seed
    )
    started = time.perf_counter()
    models.save_random_checkpoint(
        checkpoint, arguments.model, towers=arguments.towers, tiny=arguments.tiny, seed=arguments.seed
    )
    print(f"checkpoint in {checkpoint} ({time.perf_counter() - started:.0f} s)")
    if arguments.cap_gib:
        records.cap_gpu_memory(arguments.cap_gib)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()

    record: dict[str, Any] = {
        "bench": bench,
        "impl": arguments.impl,
        "model": arguments.model + ("-tiny" if arguments.tiny else ""),
        "towers": arguments.towers,
        "batch": arguments.batch,
        "seq_len": arguments.seq_len,
        "rank": arguments.rank,
        "dropout": arguments.dropout,
        "optimizer": arguments.optimizer if device.type == "cuda" else "adamw",
        "checkpointing": arguments.checkpointing,
        "offload": arguments.offload or None,
        "autocast": arguments.autocast,
        "cap_gib": arguments.cap_gib,
        "without": sorted(arguments.without) or None,
        "cpus": len(os.sched_getaffinity(0)),
        "step_ms": None,
        "loss": None,
        "finished": False,
        **records.environment(),
        "command": records.command_line(),
    }
    if arguments.impl == "liger":
        record["liger_kernel"] = records.package_version("liger-kernel")
    try:
        with _nothing_compiled() if arguments.cold else nullcontext():
            measure(arguments, checkpoint, device, record)
    except RuntimeError as error:
        # Not fitting is a result, and under a cap it is the one that was asked for. The loader may report a refused
        # allocation as an error of its own.
        if not isinstance(error, torch.OutOfMemoryError) and not arguments.cap_gib:
            raise
        record |= records.peaks() | {"error": str(error).splitlines()[0]}
    if arguments.impl == "fastgemma":
        import fastgemma

        print(fastgemma.status())
        record["features"] = records.feature_counts()

    shown = {key: value for key, value in record.items() if key not in ("profile", "features", "step_ms_all")}
    print(json.dumps(shown, indent=1))
    if "profile" in record:
        print_profile(record["profile"])
    if not arguments.tiny or arguments.out:
        path = records.result_path(bench, arguments.out)
        records.write_record(record, path)
        print(f"recorded in {path}")


if __name__ == "__main__":
    main()
