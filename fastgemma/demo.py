"""`python -m fastgemma demo`: one LoRA fine-tuning run, stock and patched, side by side.

Three subprocesses, so that nothing leaks from one to the next: `prepare` builds a small Gemma 4 with the structure of
E2B, teaches it some text and writes an ordinary checkpoint; `stock` and `patched` each load that checkpoint and run
the same TRL `SFTTrainer` script on the same data with the same seed. The two differ in one line, `fastgemma.patch()`.

On a GPU the run is QLoRA in bfloat16. Without one it is LoRA in float32, and the kernels run in Triton's interpreter:
that shows that they compute the same, and says nothing about speed.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

from fastgemma.demo_text import COOKING, DIALOGUES, STORIES
from fastgemma.kernels.backend import HAS_TRITON

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STAGES = ("prepare", "stock", "patched")
QUESTION = "When does the ferry leave?"

# Features with kernels of their own: each must have run in the patched half, or the comparison would show nothing.
_EXPECTED = ("rms_norm", "rope", "geglu", "lora", "cross_entropy")
_MODULES = ("trl", "datasets", "matplotlib")
# The first steps compile kernels and fill caches.
_WARM_UP_STEPS = 3
_MAX_TABLE_ROWS = 16


class DemoError(Exception):
    """Why the demo cannot run, or what it found wrong; one message for the user."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One demo run; all three stages read the same one."""

    device: str  # "cuda" or "cpu"
    steps: int
    rows: int  # per batch
    seq_len: int
    hidden_size: int
    intermediate_size: int
    head_dim: int
    global_head_dim: int
    per_layer_size: int
    sliding_layers: int  # before each of the two full-attention layers
    vocab_size: int
    sliding_window: int
    base_steps: int  # in which the base model learns its text
    base_rate: float
    rate: float
    # |patched - stock| <= absolute + relative * |stock|, at every step
    absolute: float
    relative: float
    seed: int = 7
    per_layer_embeddings: str = "auto"  # fastgemma's feature of that name; "auto" is its default

    @property
    def layer_types(self) -> list[str]:
        return (["sliding_attention"] * self.sliding_layers + ["full_attention"]) * 2

    def allowed(self, stock_loss: float) -> float:
        return self.absolute + self.relative * abs(stock_loss)


CPU_PLAN = Plan(
    device="cpu",
    steps=12,
    rows=2,
    seq_len=64,
    hidden_size=64,
    intermediate_size=128,
    head_dim=16,
    global_head_dim=32,
    per_layer_size=16,
    sliding_layers=2,
    vocab_size=640,
    sliding_window=24,
    base_steps=350,
    base_rate=5e-3,
    rate=5e-3,
    # Both halves compute in float32 and differ in the order of their sums only: some 1e-6 of the loss where this was
    # tuned. The rest is room for other machines, since Adam divides by gradients that may be close to zero. A missing
    # dropout mask, the lost gradient of one projection or a single wrong sign show as 1e-3 and more by the second step.
    absolute=0.0,
    relative=2e-4,
)

GPU_PLAN = Plan(
    device="cuda",
    steps=30,
    rows=4,
    seq_len=512,
    hidden_size=512,
    intermediate_size=2048,
    head_dim=256,
    global_head_dim=512,
    per_layer_size=256,
    sliding_layers=4,
    vocab_size=1024,
    sliding_window=128,
    base_steps=200,
    base_rate=1e-3,
    rate=1e-3,
    # bfloat16 keeps 8 bits, so each half is about as far from the exact loss as from the other. On the mean over some
    # two thousand tokens that is a few thousandths at the first step, and it grows as the two runs step along weights
    # that were rounded differently. A wrong gradient or dropout mask parts the curves by far more within a few steps.
    absolute=0.05,
    relative=0.0,
)


# ---------------------------------------------------------------------------------------------------------------------
# The checkpoint
# ---------------------------------------------------------------------------------------------------------------------


def build_tokenizer(vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer trained on the demo's text, with Gemma's pad, eos and bos ids (0, 1, 2)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*STORIES, *COOKING, *map(_turn, DIALOGUES)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def build_model(plan: Plan, vocab_size: int) -> Any:
    """A `Gemma4ForCausalLM` with every mechanism of E2B's language model, at the plan's widths."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    types = plan.layer_types
    config = Gemma4TextConfig(  # type: ignore[call-arg]  # its signature hides fields that it takes by name
        vocab_size=vocab_size,
        vocab_size_per_layer_input=vocab_size,
        hidden_size=plan.hidden_size,
        hidden_size_per_layer_input=plan.per_layer_size,
        intermediate_size=plan.intermediate_size,
        use_double_wide_mlp=True,
        num_hidden_layers=len(types),
        layer_types=types,
        # The second half of the layers reads the keys and values of the first.
        num_kv_shared_layers=len(types) // 2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=plan.head_dim,
        global_head_dim=plan.global_head_dim,
        sliding_window=plan.sliding_window,
        max_position_embeddings=2048,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
        rope_parameters={
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1_000_000.0,
                "partial_rotary_factor": 0.25,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    )
    torch.manual_seed(plan.seed)
    return Gemma4ForCausalLM(config)


def prepare(plan: Plan, work: Path) -> None:
    """Writes the checkpoint that both halves start from: tokenizer, and a model that has read the text."""
    tokenizer = build_tokenizer(plan.vocab_size)
    model = build_model(plan, len(tokenizer)).to(plan.device)
    # Every other dialogue, so that the base model knows their form but not all that they say.
    texts = (
        *STORIES,
        *COOKING,
        *("\n".join(map(_turn, DIALOGUES[i : i + 8 : 2])) for i in range(0, len(DIALOGUES), 8)),
    )
    ids = torch.tensor([i for text in texts for i in tokenizer(text)["input_ids"]], device=plan.device)
    rows, window = 8, min(plan.seq_len, 128)
    generator = torch.Generator().manual_seed(plan.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.base_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / plan.base_steps))
    )
    model.train()
    for _ in range(plan.base_steps):
        starts = torch.randint(0, len(ids) - window, (rows,), generator=generator).tolist()
        batch = torch.stack([ids[start : start + window] for start in starts])
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.to(torch.bfloat16 if plan.device == "cuda" else torch.float32)
    model.save_pretrained(_checkpoint(work))
    tokenizer.save_pretrained(_checkpoint(work))
    _write(work, "prepare", {"parameters": sum(parameter.numel() for parameter in model.parameters())})


# ---------------------------------------------------------------------------------------------------------------------
# The two halves
# ---------------------------------------------------------------------------------------------------------------------


def documents(plan: Plan, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """One document per row of the run: dialogues in random order, of differing lengths, so that batches are padded."""
    rng = random.Random(plan.seed)
    texts = []
    pool: list[tuple[str, str]] = []
    for _ in range(plan.steps * plan.rows):
        budget = rng.uniform(0.6, 1.0) * plan.seq_len
        turns: list[str] = []
        while len(tokenizer("\n".join(turns))["input_ids"]) < budget:
            if not pool:
                pool = rng.sample(DIALOGUES, len(DIALOGUES))
            turns.append(_turn(pool.pop()))
        texts.append("\n".join(turns))
    return texts


def train(plan: Plan, work: Path, stage: str) -> None:
    """One half: a TRL fine-tuning script such as anyone might write, but for what it measures."""
    started = time.perf_counter()
    import fastgemma

    if stage == "patched":
        fastgemma.patch(per_layer_embeddings=plan.per_layer_embeddings)  # the one line that the halves differ in

    from datasets import Dataset
    from datasets.utils.logging import disable_progress_bar
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback, set_seed
    from transformers.trainer_callback import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    disable_progress_bar()
    on_gpu = plan.device == "cuda"

    class StepClock(TrainerCallback):
        """Wall time of each optimizer step."""

        def __init__(self) -> None:
            self.milliseconds: list[float] = []

        def _now(self) -> float:
            if on_gpu:
                torch.cuda.synchronize()
            return time.perf_counter()

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self._begin = self._now()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.milliseconds.append(1000 * (self._now() - self._begin))

    set_seed(plan.seed)
    tokenizer = AutoTokenizer.from_pretrained(_checkpoint(work))
    settings: dict[str, Any] = {"dtype": torch.float32}
    if on_gpu:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        settings = {"dtype": torch.bfloat16, "quantization_config": quantization, "device_map": {"": 0}}
    model = AutoModelForCausalLM.from_pretrained(_checkpoint(work), **settings)

    clock = StepClock()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(work / stage),
            max_steps=plan.steps,
            per_device_train_batch_size=plan.rows,
            max_length=plan.seq_len,
            learning_rate=plan.rate,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            seed=plan.seed,
            data_seed=plan.seed,
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            gradient_checkpointing=on_gpu,
            gradient_checkpointing_kwargs={"use_reentrant": False} if on_gpu else None,
            dataloader_pin_memory=on_gpu,
        ),
        train_dataset=Dataset.from_dict({"text": documents(plan, tokenizer)}),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=8,
            lora_alpha=16,
            lora_dropout=0.05,
            target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
            task_type="CAUSAL_LM",
        ),
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()

    result: dict[str, Any] = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "step_ms": clock.milliseconds,
        "memory": _peak_memory(on_gpu),
    }
    if stage == "patched":
        report = fastgemma.status()
        result["status"] = {name: dataclasses.asdict(feature) for name, feature in report.items()}
        result["status_text"] = str(report)
        result["sentence"] = _answer(trainer.model, tokenizer)
    result["seconds"] = time.perf_counter() - started
    _write(work, stage, result)


def _answer(model: Any, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the trained model says to `QUESTION`: its first sentence."""
    model.eval()
    prompt = tokenizer(f"Question: {QUESTION}\nAnswer:", return_tensors="pt").to(model.device)
    tokens = model.generate(
        input_ids=prompt["input_ids"],
        attention_mask=prompt["attention_mask"],
        max_new_tokens=32,
        do_sample=False,
        tokenizer=tokenizer,
        stop_strings=[".", "\n"],
    )
    return str(tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def _peak_memory(on_gpu: bool) -> dict[str, float]:
    """MiB, over the life of this process: loading the model counts too."""
    if on_gpu:
        return {
            "allocated on the GPU": torch.cuda.max_memory_allocated() / 2**20,
            "reserved on the GPU": torch.cuda.max_memory_reserved() / 2**20,
        }
    import resource

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there and in KiB elsewhere
    return {"resident": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}


def run_stage(stage: str, work: Path) -> None:
    """Runs one of `STAGES` in this process, from the plan in `work`, and leaves `<stage>.json` there."""
    import warnings

    from transformers.utils import logging as transformers_logging

    # The demo is read by people; what these libraries have to say about a toy model is not for them.
    warnings.filterwarnings("ignore")
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    plan = Plan(**json.loads((work / "plan.json").read_text(encoding="utf-8")))
    if stage == "prepare":
        prepare(plan, work)
    else:
        train(plan, work, stage)


def _checkpoint(work: Path) -> Path:
    return work / "checkpoint"


def _turn(dialogue: tuple[str, str]) -> str:
    question, answer = dialogue
    return f"Question: {question}\nAnswer: {answer}"


def _write(work: Path, stage: str, result: dict[str, Any]) -> None:
    (work / f"{stage}.json").write_text(json.dumps(result), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# The parent
# ---------------------------------------------------------------------------------------------------------------------


def gpu_problem() -> str | None:
    """Why the kernels cannot run on this machine's GPU, or None."""
    if not HAS_TRITON:
        return "Triton is not installed (it is published for Linux only)"
    if not torch.cuda.is_available():
        return "there is no CUDA GPU, or this build of PyTorch cannot use it"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, and bfloat16 kernels need 8.0"
    return None


def make_plan(device: str = "auto", steps: int | None = None, per_layer_embeddings: str = "auto") -> Plan:
    """The plan for this machine.

    Args:
        device: "cuda", "cpu", or "auto" for the GPU where kernels can run on it.
        steps: optimizer steps of each half (default: the plan's own).
        per_layer_embeddings: mode of that feature in the patched half.

    Raises:
        DemoError: an unknown device; kernels cannot run on it; or a package that the demo needs is missing.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise DemoError(f"--device {device}: it is one of auto, cuda, cpu.")
    problem = gpu_problem()
    if device == "cuda" and problem:
        raise DemoError(f"The kernels cannot run on a GPU here: {problem}.")
    if not HAS_TRITON:
        raise DemoError(f"The kernels cannot run here: {problem}. Without it fastgemma runs stock code everywhere.")
    plan = GPU_PLAN if device == "cuda" or (device == "auto" and problem is None) else CPU_PLAN
    needed = (*_MODULES, "bitsandbytes") if plan.device == "cuda" else _MODULES
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f'The demo needs {", ".join(missing)}: pip install "fastgemma[train]"')
    if steps is not None:
        plan = dataclasses.replace(plan, steps=steps)
    return dataclasses.replace(plan, per_layer_embeddings=per_layer_embeddings)


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


def verdict(plan: Plan, stock: dict[str, Any], patched: dict[str, Any]) -> list[str]:
    """What is wrong with the two halves' results; empty if nothing is."""
    problems = []
    expected = list(_EXPECTED)
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


def _print_results(plan: Plan, stock: dict[str, Any], patched: dict[str, Any], console: Console) -> None:
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
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def run_demo(plan: Plan, output: Path, console: Console) -> None:
    """Runs all three stages, prints what they found and saves `demo.png` and `demo.json` in `output`.

    Raises:
        DemoError: a stage failed, an expected feature never ran, or the loss curves part.
    """
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
    _print_results(plan, stock, patched, console)
    problems = verdict(plan, stock, patched)
    draw(plan, stock, patched, output / "demo.png")
    record = {"plan": dataclasses.asdict(plan), "base": base, "stock": stock, "patched": patched, "problems": problems}
    (output / "demo.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
    console.print(f"Saved {output / 'demo.png'} and {output / 'demo.json'}", markup=False, soft_wrap=True)
    if problems:
        raise DemoError("\n".join(problems))
    worst = max(abs(a - b) for a, b in zip(stock["losses"], patched["losses"]))
    console.print(
        f"Same losses at every step (largest difference {worst:.1e}); {', '.join(_EXPECTED)} ran on fastgemma's path.",
        style="bold green",
    )
