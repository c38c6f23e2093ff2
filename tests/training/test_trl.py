"""Real trainers, unchanged: the same losses and metrics step by step, patched and stock, from the same seed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import structures
import torch
from datasets import Dataset
from kernel_checks import FLOAT32_BUDGET, relative_error
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    EvalPrediction,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

import fastgemma

pytestmark = pytest.mark.slow

KERNELS = ("rms_norm", "rope", "geglu", "lora", "cross_entropy")
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STOCK: dict[str, Any] = dict.fromkeys(fastgemma.status(), False)
ALL: dict[str, Any] = {}
# The interpreter is slow: where norms and rotations are not the subject, they stay stock.
SEAMS: dict[str, Any] = {"rms_norm": False, "rope": False}
# Rounding differs by 1e-7 at the first step; Adam's normalisation turns that into a little more at the next ones.
TOLERANCE = 1e-4
# Of preference and reinforcement learning. The interpreter takes a second for one; thirty agree there as well.
STEPS = 30 if torch.cuda.is_available() else 5

# The last two read the keys and values of the first two.
LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


def model() -> torch.nn.Module:
    return structures.build("e2b", layer_types=LAYERS)


def adapter() -> LoraConfig:
    return LoraConfig(r=4, lora_dropout=0.05, target_modules=PROJECTIONS)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word "w4", "w5" and so on."""
    special = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
    words = {f"w{i}": i for i in range(len(special), structures.VOCAB)}
    built = Tokenizer(models.WordLevel({**special, **words}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def text(words: int, seed: int) -> str:
    """Mostly one word, which a few steps teach a model to predict."""
    drawn = torch.randint(4, structures.VOCAB, (words,), generator=torch.Generator().manual_seed(seed)).tolist()
    return " ".join(f"w{drawn[i] if i % 4 == 0 else 9}" for i in range(words))


def texts() -> Dataset:
    return Dataset.from_list([{"text": text(n, seed)} for seed, n in enumerate((5, 9, 7, 12, 4, 11, 8, 6))])


def token_rows() -> Dataset:
    """Rows of one length, with a different number of labels in each."""
    ids = torch.randint(3, structures.VOCAB, (8, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(9) < torch.arange(8)[:, None], -100)
    return Dataset.from_list([{"input_ids": i, "labels": t} for i, t in zip(ids.tolist(), labels.tolist())])


def arguments(path: Path, **settings: Any) -> dict[str, Any]:
    return {
        "output_dir": str(path),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 2e-2,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "disable_tqdm": True,
        "seed": 3,
        **settings,
    }


def sft(path: Path, callbacks: list[TrainerCallback] | None = None, **settings: Any) -> SFTTrainer:
    torch.manual_seed(0)
    return SFTTrainer(
        model=model(),
        args=SFTConfig(**arguments(path, max_length=16, **settings)),
        train_dataset=texts(),
        processing_class=tokenizer(),
        peft_config=adapter(),
        callbacks=callbacks,
    )


def history(trainer: Trainer, *names: str) -> list[list[float]]:
    """What was logged under these names, step by step."""
    return [[entry[name] for name in names] for entry in trainer.state.log_history if "loss" in entry]


def assert_close(ours: list[list[float]], stock: list[list[float]], tolerance: float = TOLERANCE) -> None:
    assert len(ours) == len(stock) > 0
    for step, (actual, expected) in enumerate(zip(ours, stock)):
        assert actual == pytest.approx(expected, rel=tolerance, abs=1e-6), f"step {step}"


def fast_calls() -> dict[str, int]:
    return {feature: fastgemma.status()[feature].fast_calls for feature in KERNELS}


def fallbacks() -> dict[str, dict[str, int]]:
    return {feature: dict(fastgemma.status()[feature].fallbacks) for feature in KERNELS}


def ran_since(before: dict[str, int]) -> dict[str, int]:
    return {feature: n - before[feature] for feature, n in fast_calls().items()}


# Supervised fine-tuning


@pytest.mark.parametrize("settings", [{}, {"packing": True}], ids=["padding", "packing"])
def test_sft(tmp_path: Path, settings: dict[str, Any]) -> None:
    names = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
    stock = sft(tmp_path, **settings)
    stock.train()
    before, fallen = fast_calls(), fallbacks()
    with fastgemma.patched(**ALL):
        ours = sft(tmp_path, **settings)
        ours.train()
    assert_close(history(ours, *names), history(stock, *names))
    assert max(accuracy for (accuracy,) in history(stock, "mean_token_accuracy")) > 0, "the metric says nothing here"
    assert all(ran_since(before).values()), ran_since(before)
    assert ran_since(before)["cross_entropy"] == 4
    assert fallbacks() == fallen
    assert isinstance(ours.model, PeftModel)
    for (name, a), (_, b) in zip(ours.model.named_parameters(), stock.model.named_parameters()):
        assert relative_error(a.detach(), b.detach()) < 1e-2, name


def test_patch_after_construction(tmp_path: Path) -> None:
    """What TRL captured when it built the trainer stays stock; the rest is patched; the losses are the same."""
    stock = sft(tmp_path, max_steps=2)
    stock.train()
    late = sft(tmp_path, max_steps=2)
    before = fast_calls()
    with fastgemma.patched(**ALL):
        late.train()
    assert_close(history(late, "loss"), history(stock, "loss"))
    ran = ran_since(before)
    assert ran.pop("cross_entropy") == 0
    assert all(ran.values()), ran


class At(TrainerCallback):
    """Does something at the end of one step."""

    def __init__(self, step: int, action: Any) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


def test_unpatch_and_patch_during_training(tmp_path: Path) -> None:
    stock = sft(tmp_path)
    stock.train()
    counts: list[dict[str, int]] = []
    try:
        fastgemma.patch(**SEAMS)
        start = fast_calls()
        undo = At(1, lambda: (fastgemma.unpatch(), counts.append(ran_since(start))))
        redo = At(3, lambda: (counts.append(ran_since(start)), fastgemma.patch(**SEAMS)))
        ours = sft(tmp_path, [undo, redo])
        ours.train()
        end = ran_since(start)
    finally:
        fastgemma.unpatch()
    assert_close(history(ours, "loss", "entropy"), history(stock, "loss", "entropy"))
    assert counts[0]["cross_entropy"] == 1 and counts[0]["lora"] > 0
    assert counts[1] == counts[0], "the fast path ran while unpatched"
    assert end["cross_entropy"] == 2 and end["lora"] == 2 * counts[0]["lora"]


SCRIPT = """
import runpy
import sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import fastgemma

assert "trl" not in sys.modules
fastgemma.patch(rms_norm=False, rope=False)
import trl
from trl.trainer import sft_trainer, utils

assert sft_trainer.add_fused_lm_head is utils.add_fused_lm_head
assert utils.add_fused_lm_head.__module__ == "trl.trainer.utils" and utils.add_fused_lm_head.__wrapped__
here = runpy.run_path(sys.argv[2])
trainer = here["sft"](Path(sys.argv[3]), max_steps=1)
trainer.train()
assert fastgemma.status()["cross_entropy"].fast_calls == 1, fastgemma.status()
print("loss", here["history"](trainer, "loss")[0][0])
"""


def test_patch_before_trl_is_imported(tmp_path: Path) -> None:
    stock = sft(tmp_path, max_steps=1)
    stock.train()
    tests = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", SCRIPT, str(tests), __file__, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tests.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    loss = float(next(line for line in done.stdout.splitlines() if line.startswith("loss ")).split()[1])
    assert loss == pytest.approx(history(stock, "loss")[0][0], rel=1e-5)


# Preference training


def test_dpo(tmp_path: Path) -> None:
    """The reference pass is the same model with its adapters disabled."""
    rows = [
        {"prompt": text(4, seed), "chosen": text(3 + seed, seed + 50), "rejected": text(5, seed + 90)}
        for seed in range(4)
    ]

    def run() -> DPOTrainer:
        torch.manual_seed(0)
        trainer = DPOTrainer(
            model=model(),
            args=DPOConfig(**arguments(tmp_path, max_steps=STEPS)),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
            peft_config=adapter(),
        )
        trainer.train()
        return trainer

    stock = run()
    before, fallen = fast_calls(), fallbacks()
    with fastgemma.patched(**SEAMS):
        ours = run()
    names = ("loss", "grad_norm", "rewards/margins", "logps/chosen", "logps/rejected", "entropy")
    assert_close(history(ours, *names), history(stock, *names))
    ran = ran_since(before)
    assert ran["cross_entropy"] == 2 * STEPS, "a policy and a reference pass in each step"
    assert ran["lora"] > 0 and fallbacks() == fallen


def test_grpo(tmp_path: Path) -> None:
    """Completions are drawn from the model's own logits, so that a wrong one would change what is trained on."""

    def nines(completions: list[str], **_: Any) -> list[float]:
        return [completion.split().count("w9") + 0.1 * len(set(completion.split())) for completion in completions]

    drawn: list[list[str]] = []

    def reward(completions: list[str], **columns: Any) -> list[float]:
        drawn.append(completions)
        return nines(completions, **columns)

    def run() -> GRPOTrainer:
        torch.manual_seed(0)
        settings = arguments(tmp_path, max_steps=STEPS, per_device_train_batch_size=4)
        trainer = GRPOTrainer(
            model=model(),
            reward_funcs=reward,
            args=GRPOConfig(**settings, num_generations=2, max_completion_length=4, beta=0.1, temperature=0.9),
            train_dataset=Dataset.from_list([{"prompt": text(4, seed)} for seed in range(4)]),
            processing_class=tokenizer(),
            peft_config=adapter(),
        )
        trainer.train()
        return trainer

    stock = run()
    theirs = list(drawn)
    drawn.clear()
    before, fallen = fast_calls(), fallbacks()
    with fastgemma.patched(**SEAMS):
        ours = run()
    assert drawn == theirs and len(set(theirs[0])) > 1
    assert_close(history(ours, *(names := ("loss", "grad_norm", "reward", "kl", "entropy"))), history(stock, *names))
    ran = ran_since(before)
    assert ran["cross_entropy"] > 0 and ran["lora"] > 0 and ran["geglu"] > 0
    assert fallbacks() == fallen


# transformers' own trainer


def train_plainly(path: Path, features: dict[str, Any], **settings: Any) -> Trainer:
    with fastgemma.patched(**features):
        torch.manual_seed(0)
        trainer = Trainer(
            model=get_peft_model(model(), adapter()),
            args=TrainingArguments(**arguments(path, max_steps=2, **settings)),
            train_dataset=token_rows(),
        )
        trainer.train()
    return trainer


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
def test_gradient_accumulation(tmp_path: Path, settings: dict[str, Any]) -> None:
    """The Trainer counts the labels of all accumulated batches and hands the number to the loss."""
    settings = {"gradient_accumulation_steps": 2, **settings}
    stock = train_plainly(tmp_path, STOCK, **settings)
    before, fallen = fast_calls(), fallbacks()
    ours = train_plainly(tmp_path, SEAMS, **settings)
    assert ours.model_accepts_loss_kwargs and stock.model_accepts_loss_kwargs
    assert_close(history(ours, "loss", "grad_norm"), history(stock, "loss", "grad_norm"))
    assert ran_since(before)["cross_entropy"] == 4 and fallbacks() == fallen


def test_evaluation_gets_true_logits(tmp_path: Path) -> None:
    rows = token_rows()
    seen: list[EvalPrediction] = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {"positions": float(prediction.predictions.shape[1])}

    results = []
    for features in (STOCK, SEAMS):
        with fastgemma.patched(**features):
            torch.manual_seed(0)
            trainer = Trainer(
                model=get_peft_model(model(), adapter()),
                args=TrainingArguments(**arguments(tmp_path, max_steps=1, per_device_eval_batch_size=4)),
                train_dataset=rows,
                eval_dataset=rows,
                compute_metrics=metrics,
            )
            trainer.train()
            results.append(trainer.evaluate())
    stock, ours = (torch.from_numpy(prediction.predictions) for prediction in seen)
    assert ours.shape == (8, 9, structures.VOCAB)
    assert relative_error(ours, stock) < TOLERANCE
    assert results[1]["eval_positions"] == 9.0
    assert results[1]["eval_loss"] == pytest.approx(results[0]["eval_loss"], rel=TOLERANCE)


def test_sft_evaluation_gets_true_logits(tmp_path: Path) -> None:
    seen: list[EvalPrediction] = []

    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {}

    losses = []
    for features in (STOCK, SEAMS):
        with fastgemma.patched(**features):
            torch.manual_seed(0)
            trainer = SFTTrainer(
                model=model(),
                args=SFTConfig(**arguments(tmp_path, max_length=16, per_device_eval_batch_size=4)),
                train_dataset=texts(),
                eval_dataset=texts(),
                processing_class=tokenizer(),
                peft_config=adapter(),
                compute_metrics=metrics,
            )
            losses.append(trainer.evaluate()["eval_loss"])
    stock, ours = (torch.from_numpy(prediction.predictions) for prediction in seen)
    assert ours.shape[-1] == structures.VOCAB
    real = stock != -100  # the Trainer's padding between batches
    assert relative_error(ours[real], stock[real]) <= FLOAT32_BUDGET
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_model_that_has_trls_own_head_is_reported(monkeypatch):
    import trl.trainer.utils

    stock, ours = structures.build("31b"), structures.build("31b")
    monkeypatch.setattr("fastgemma.patches.trl_head.gc.get_objects", lambda: [stock, ours])
    trl.trainer.utils.add_fused_lm_head(stock)
    with fastgemma.patched() as report:
        assert "built before patch()" in (report["cross_entropy"].reason or "")
        trl.trainer.utils.add_fused_lm_head(ours)
    monkeypatch.setattr("fastgemma.patches.trl_head.gc.get_objects", lambda: [ours])
    with fastgemma.patched() as report:
        assert report["cross_entropy"].reason is None
