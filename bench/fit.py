"""Does a stock TRL script fine-tune Gemma 4 on an 8 GB card?

    python bench/fit.py --model e2b --towers

Each script of `fit_scripts.py` runs in a process of its own, which first limits itself to 7.2 GiB of GPU memory: what
an 8 GB card leaves after the driver's context and a desktop. The limit holds from the first allocation on, loading
included. What is not limited is everything outside PyTorch's allocator, chiefly the CUDA context.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import models
import records
import torch

SCRIPTS = ("trainer_path", "device_map_0", "no_device_map")
CAP_GIB = 7.2
# The first steps compile and autotune kernels and grow the allocator's pool.
UNTIMED_STEPS = 2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--impl", choices=("hf", "fastgemma"), default="fastgemma")
    parser.add_argument("--model", choices=("e2b", "e4b"), default="e2b")
    towers = parser.add_mutually_exclusive_group()
    towers.add_argument("--towers", dest="towers", action="store_true", help="the published form (default)")
    towers.add_argument("--text", dest="towers", action="store_false", help="the language model alone")
    parser.set_defaults(towers=True)
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--max-length", type=int, default=2048)
    parser.add_argument("--max-steps", type=int, default=5)
    parser.add_argument("--cap-gib", type=float, default=CAP_GIB, help=f"0 for no cap (default: {CAP_GIB})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=int, default=1200, help="seconds for one script")
    parser.add_argument("--checkpoint", type=Path, help="directory of the random checkpoint, made if missing")
    parser.add_argument("--out", type=Path, help="result file (default: bench/results/<gpu>/fit.json)")
    parser.add_argument("--tiny", action="store_true", help="smoke run of the tiny structure; recorded only with --out")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: no quantisation, no cap")
    # The process that runs one script is this same file with these two options.
    parser.add_argument("--child", choices=SCRIPTS, help=argparse.SUPPRESS)
    parser.add_argument("--child-result", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        if not arguments.tiny:
            parser.error("--device cpu needs --tiny")
        arguments.cap_gib = 0
    elif not torch.cuda.is_available():
        parser.error("no CUDA device: use --tiny --device cpu")
    return arguments


# ---------------------------------------------------------------------------------------------------------------------
# One script in its own process
# ---------------------------------------------------------------------------------------------------------------------


def run_script(arguments: argparse.Namespace) -> dict[str, Any]:
    """Runs one script under the cap and returns what it took, whether or not it finished."""
    on_gpu = arguments.device == "cuda"
    if on_gpu and arguments.cap_gib:
        records.cap_gpu_memory(arguments.cap_gib)
    if arguments.impl == "fastgemma":
        import fastgemma

        fastgemma.patch()

    import fit_scripts
    from datasets import Dataset
    from transformers import BitsAndBytesConfig, TrainerCallback

    class Clock(TrainerCallback):
        """Times steps, and splits the memory peak into loading and training."""

        def __init__(self) -> None:
            self.times: list[float] = []
            self.loading: dict[str, float] = {}
            self.weights_gib: float | None = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.loading = records.peaks()
            if on_gpu:
                self.weights_gib = records.gib(torch.cuda.memory_allocated())
                torch.cuda.reset_peak_memory_stats()

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            self.started = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            self.times.append(1000 * (time.perf_counter() - self.started))

    quantization = None
    settings: dict[str, Any] = {"seed": arguments.seed}
    if on_gpu:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    else:
        settings |= {"use_cpu": True, "bf16": False, "optim": "adamw_torch"}
    # Twelve characters a token is more than the tokenizer ever reaches, so that every row fills the whole length.
    dataset = Dataset.from_dict({"text": models.passages(8, 12 * arguments.max_length, seed=arguments.seed)})

    clock = Clock()
    found: dict[str, Any] = {"finished": False, "step_ms": None, "loss": None}
    started = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as output_dir:
            trainer = fit_scripts.SCRIPTS[arguments.child](
                str(arguments.checkpoint),
                dataset,
                output_dir,
                max_length=arguments.max_length,
                max_steps=arguments.max_steps,
                quantization=quantization,
                settings=settings,
                callbacks=[clock],
            )
        losses = [round(entry["loss"], 5) for entry in trainer.state.log_history if "loss" in entry]
        rows = {len(ids) for ids in trainer.train_dataset["input_ids"]}
        if rows != {arguments.max_length}:
            raise RuntimeError(f"rows of {sorted(rows)} tokens instead of {arguments.max_length}")
        found |= {"finished": True, "losses": losses, "loss": losses[-1]}
    except Exception as error:  # whatever stops a user's script is this benchmark's result
        traceback.print_exc()
        message = str(error).strip() or repr(error)
        found["error"] = f"{type(error).__name__}: {message.splitlines()[0]}"
    found["total_s"] = round(time.perf_counter() - started, 1)

    now = records.peaks()
    loading = clock.loading or now
    found |= {f"loading_{key}": value for key, value in loading.items()}
    if clock.loading:
        found |= {f"stepping_{key}": value for key, value in now.items()}
    found |= {key: max(loading[key], value) for key, value in now.items()}
    found["weights_gib"] = clock.weights_gib
    timed = clock.times[UNTIMED_STEPS:] or clock.times
    if timed:
        found["step_ms"] = round(statistics.median(timed), 2)
        found["step_ms_all"] = [round(ms, 2) for ms in clock.times]
    # Linux counts in KiB. Pages of the mapped checkpoint count too, although the system can drop them.
    found["host_rss_gib"] = records.gib(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    if arguments.impl == "fastgemma":
        found["status"] = str(fastgemma.status())
        found["features"] = records.feature_counts()
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The process that starts them
# ---------------------------------------------------------------------------------------------------------------------


def start_script(arguments: argparse.Namespace, script: str, checkpoint: Path) -> dict[str, Any]:
    """Runs this file again for one script and reads what it wrote; a process that died is a result as well."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--child", script, "--child-result", str(result)]
        command += ["--impl", arguments.impl, "--model", arguments.model, "--checkpoint", str(checkpoint)]
        command += ["--max-length", str(arguments.max_length), "--max-steps", str(arguments.max_steps)]
        command += ["--cap-gib", str(arguments.cap_gib), "--seed", str(arguments.seed), "--device", arguments.device]
        command += ["--towers" if arguments.towers else "--text"] + (["--tiny"] if arguments.tiny else [])
        # Everything is local: a look-up on the network could only fail, slowly.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        error = None
        try:
            code = subprocess.run(command, env=environment, timeout=arguments.timeout).returncode
            error = f"the process ended with code {code}"
        except subprocess.TimeoutExpired:
            error = f"not finished after {arguments.timeout} s"
        if result.exists():
            return json.loads(result.read_text(encoding="utf-8"))
    return {"finished": False, "step_ms": None, "loss": None, "error": error}


def summary(script: str, found: dict[str, Any]) -> str:
    """One line for the terminal."""
    if not found["finished"]:
        return f"{script:14s} FAILED  {found['error'][:160]}"
    memory = f"{found['peak_reserved_gib']:.2f} GiB reserved, " if "peak_reserved_gib" in found else ""
    return f"{script:14s} ok      {memory}{found['step_ms']:.0f} ms a step, loss {found['loss']:.4f}"


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        found = run_script(arguments)
        arguments.child_result.write_text(json.dumps(found), encoding="utf-8")
        return

    started = time.perf_counter()
    checkpoint = arguments.checkpoint or models.default_checkpoint_dir(
        arguments.model, towers=arguments.towers, tiny=arguments.tiny, seed=arguments.seed
    )
    models.save_random_checkpoint(
        checkpoint,
        arguments.model,
        towers=arguments.towers,
        tiny=arguments.tiny,
        seed=arguments.seed,
        device=arguments.device,
    )
    print(f"checkpoint in {checkpoint} ({time.perf_counter() - started:.0f} s)", flush=True)

    lines: list[str] = []
    failed = False
    for script in arguments.scripts:
        print(f"--- {script}", flush=True)
        found = start_script(arguments, script, checkpoint)
        record = {
            "bench": "fit",
            "impl": arguments.impl,
            "script": script,
            "model": arguments.model + ("-tiny" if arguments.tiny else ""),
            "towers": arguments.towers,
            "batch": 1,
            "seq_len": arguments.max_length,
            "rank": 16,
            "dropout": 0.05,
            "optimizer": "adamw_8bit" if arguments.device == "cuda" else "adamw_torch",
            "checkpointing": True,
            "autocast": arguments.device == "cuda",
            "cap_gib": arguments.cap_gib or None,
            **found,
            **records.environment(),
            "command": records.command_line(),
        }
        if "status" in found:
            print(found["status"])
        lines.append(summary(script, found))
        failed = failed or not found["finished"]
        if not arguments.tiny or arguments.out:
            records.write_record(record, records.result_path("fit", arguments.out))
    print("\n".join(lines))
    # Stock transformers is expected not to fit; fastgemma is expected to.
    sys.exit(1 if failed and arguments.impl == "fastgemma" else 0)


if __name__ == "__main__":
    main()
