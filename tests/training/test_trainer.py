"""transformers' own Trainer, unchanged: what it does beyond a plain step, patched and stock, from the same seed.

Accumulated gradients and evaluation of a LoRA model are in `test_trl.py`, beside those of TRL's trainers.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import structures
import torch
from datasets import Dataset
from kernel_checks import FLOAT32_BUDGET
from patch_state import counts
from peft import LoraConfig, get_peft_model
from transformers import EvalPrediction, Gemma4ForCausalLM, Trainer, TrainingArguments

import fastgemma
from fastgemma.patches.per_layer_embeddings import HostScaledEmbedding

pytestmark = pytest.mark.slow

STOCK: dict[str, Any] = dict.fromkeys(fastgemma.status(), False)
HOST: dict[str, Any] = {"per_layer_embeddings": "host"}
# Rounding differs by 1e-7 at the first step; Adam's normalisation turns that into a little more at the next ones.
TOLERANCE = 1e-4
# The last layer reads the keys and values of the first.
SHAPE: dict[str, Any] = {
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 1,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    structures.build("e2b", **SHAPE).save_pretrained(path)
    return path


def load(checkpoint: Path, lora: bool = True) -> Any:
    model = Gemma4ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "k_proj", "up_proj", "down_proj"])
    return get_peft_model(model, config) if lora else model


def rows() -> Dataset:
    """Rows of one length, with a different number of labels in each."""
    ids = torch.randint(3, structures.VOCAB, (8, 9), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(9) < torch.arange(8)[:, None], -100)
    return Dataset.from_list([{"input_ids": i, "labels": t} for i, t in zip(ids.tolist(), labels.tolist())])


def trainer(
    model: Any,
    path: Path,
    compute_metrics: Any = None,
    compute_loss_func: Any = None,
    kind: Any = Trainer,
    **settings: Any,
) -> Any:
    defaults: dict[str, Any] = {
        "output_dir": str(path),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "learning_rate": 5e-3,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        "disable_tqdm": True,
        "seed": 3,
    }
    return kind(
        model=model,
        args=TrainingArguments(**{**defaults, **settings}),
        train_dataset=rows(),
        eval_dataset=rows(),
        compute_metrics=compute_metrics,
        compute_loss_func=compute_loss_func,
    )


def history(trainer: Trainer, *names: str) -> list[float]:
    """All that was logged under these names, in its order."""
    return [entry[name] for entry in trainer.state.log_history for name in names if name in entry]


# Losses that are made of logits


def mean_logit(prediction: EvalPrediction) -> dict[str, float]:
    return {"mean_logit": float(abs(prediction.predictions).mean())}


def entropy_too(outputs: Any, labels: torch.Tensor, num_items_in_batch: torch.Tensor) -> torch.Tensor:
    """A user's own loss: cross-entropy and a penalty on confidence."""
    logits = outputs.logits[:, :-1].float().log_softmax(-1)
    targets = labels[:, 1:]
    kept = targets != -100
    losses = -logits.gather(-1, targets.clamp(min=0)[..., None])[..., 0] + 0.1 * (logits.exp() * logits).sum(-1)
    return (losses * kept).sum() / num_items_in_batch


@pytest.mark.parametrize(
    "options",
    [{"label_smoothing_factor": 0.1}, {"compute_loss_func": entropy_too}],
    ids=["label smoothing", "own loss"],
)
def test_losses_of_logits(options: dict[str, Any], checkpoint: Path, tmp_path: Path) -> None:
    """The Trainer keeps the labels to itself, so the model returns true logits, and layers still run fast."""
    runs = []
    before = counts()
    for features in (STOCK, HOST):
        with fastgemma.patched(**features):
            run = trainer(
                load(checkpoint),
                tmp_path,
                mean_logit,
                gradient_accumulation_steps=2,
                eval_strategy="steps",
                eval_steps=1,
                **options,
            )
            run.train()
            runs.append(run)
    stock, ours = (history(run, "loss", "grad_norm", "eval_loss", "eval_mean_logit") for run in runs)
    assert len(stock) == 8 and ours == pytest.approx(stock, rel=TOLERANCE)
    after = counts()
    assert after["lora"][0] > before["lora"][0] and after["attention"][0] > before["attention"][0]
    assert after["cross_entropy"] == before["cross_entropy"], "neither its fast path nor a fallback: no labels"


class Confident(Trainer):
    """A user's own, which lets the model compute its loss and reads the logits beside it."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **options: Any) -> Any:
        outputs = model(**inputs)
        log_probs = outputs.logits.float().log_softmax(-1)
        loss = outputs.loss + 0.1 * (log_probs.exp() * log_probs).sum(-1).mean()
        return (loss, outputs) if return_outputs else loss


def test_a_trainer_that_reads_logits_beside_the_loss(checkpoint: Path, tmp_path: Path) -> None:
    histories = []
    before = counts()
    for features in (STOCK, HOST):
        with fastgemma.patched(**features):
            run = trainer(load(checkpoint), tmp_path, kind=Confident)
            run.train()
        histories.append(history(run, "loss", "grad_norm"))
    stock, ours = histories
    assert len(stock) == 4 and ours == pytest.approx(stock, rel=TOLERANCE)
    assert counts()["cross_entropy"][0] == before["cross_entropy"][0] + 2


# Resuming


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "full"])
def test_a_resumed_run_goes_on_as_if_never_interrupted(lora: bool, checkpoint: Path, tmp_path: Path) -> None:
    """From the checkpoint of a patched run; a stock run resumes from it as well."""
    features = HOST if lora else {}
    settings: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    with fastgemma.patched(**features):
        whole = trainer(load(checkpoint, lora), tmp_path, **settings)
        whole.train()
        rest = trainer(load(checkpoint, lora), tmp_path, **settings)
        rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        if lora:
            assert type(rest.model.get_base_model().model.embed_tokens_per_layer) is HostScaledEmbedding
    stock = trainer(load(checkpoint, lora), tmp_path, **settings)
    stock.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    losses = history(whole, "loss", "grad_norm")
    assert len(losses) == 8 and history(rest, "loss", "grad_norm") == pytest.approx(losses, rel=1e-6)
    assert history(stock, "loss", "grad_norm") == pytest.approx(losses, rel=TOLERANCE)


# Reentrant checkpointing


@pytest.mark.parametrize("zero3", [False, True])
def test_reentrant_checkpointing_that_a_trainer_asks_for(
    zero3: bool, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As TRL does for adapters under ZeRO-3."""
    monkeypatch.setattr("fastgemma.patches.fixes.is_deepspeed_zero3_enabled", lambda: zero3)
    settings: dict[str, Any] = {"max_steps": 1}
    truth = trainer(load(checkpoint), tmp_path, **settings)
    truth.train()
    settings |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with fastgemma.patched(), caplog.at_level(logging.WARNING, "fastgemma"):
        ours = trainer(load(checkpoint), tmp_path, **settings)
        ours.train()
    assert history(ours, "loss", "grad_norm") == pytest.approx(history(truth, "loss", "grad_norm"), rel=FLOAT32_BUDGET)
    (record,) = [record for record in caplog.records if record.name == "fastgemma"]
    assert "using use_reentrant=False, which is exact" in record.getMessage()
    assert ("ZeRO-3" in record.getMessage() and "CheckpointError" in record.getMessage()) is zero3
