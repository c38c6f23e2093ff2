"""Thirty steps of a TRL run: patched against stock, and both against float32."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from pathlib import Path

import pytest
import structures
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import fastgemma

STEPS = 30


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
    vocabulary |= {f"w{index}": index for index in range(4, structures.VOCAB)}
    fast = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def texts(seed: int) -> Dataset:
    """Words that follow each other by a rule, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for start in torch.randint(4, structures.VOCAB, (64,), generator=generator).tolist():
        words = itertools.accumulate(
            range(40), lambda word, _: 4 + (5 * word + 7) % (structures.VOCAB - 4), initial=start
        )
        rows.append(" ".join(f"w{word}" for word in words))
    return Dataset.from_dict({"text": rows})


@dataclasses.dataclass(frozen=True)
class Run:
    """One way to train; all else is the same, the order of the data included."""

    attention: str = "sdpa"
    dtype: torch.dtype = torch.bfloat16
    dropout: float = 0.05
    patched: bool = False


def curve(tmp_path: Path, seed: int, run: Run, steps: int = STEPS, **overrides: int) -> torch.Tensor:
    """The loss at each step of a TRL run."""
    model = structures.build("e2b", attn_implementation=run.attention, seed=seed, **overrides).to(run.dtype)
    before = fastgemma.status()["cross_entropy"].fast_calls
    with fastgemma.patched() if run.patched else contextlib.nullcontext():
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=str(tmp_path),
                max_steps=steps,
                per_device_train_batch_size=4,
                learning_rate=2e-3,
                logging_steps=1,
                bf16=run.dtype == torch.bfloat16,
                seed=seed,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=texts(seed),
            processing_class=tokenizer(),
            peft_config=LoraConfig(r=8, lora_dropout=run.dropout, target_modules="all-linear"),
        )
        trainer.train()
    assert not run.patched or fastgemma.status()["cross_entropy"].fast_calls >= before + steps
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == steps
    return torch.tensor(losses, dtype=torch.float64)


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest over the steps."""
    return (one - other).abs().max().item()


@pytest.mark.slow
def test_float32_curves_are_one(tmp_path):
    """Without rounding to speak of, a patched run is the stock run, dropout masks included."""
    run = Run(dtype=torch.float32)
    stock = curve(tmp_path, 0, run, steps=4)
    patched = curve(tmp_path, 0, dataclasses.replace(run, patched=True), steps=4)
    assert distance(patched, stock) <= 1e-4 * stock[0]  # TRL logs five digits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="bfloat16 as on the GPU")
def test_bfloat16_curves_are_as_close_to_float32_as_stock(tmp_path):
    """A bfloat16 run leaves the float32 run of the same weights by its rounding: ours no more than stock's."""
    stock, ours = [], []
    for seed in range(3):
        truth = curve(tmp_path, seed, Run(dtype=torch.float32, dropout=0.0))
        stock.append(curve(tmp_path, seed, Run(dropout=0.0)) - truth)
        ours.append(curve(tmp_path, seed, Run(dropout=0.0, patched=True)) - truth)
    theirs, patched = torch.cat(stock), torch.cat(ours)
    rms, largest = (patched.norm() / theirs.norm()).item(), (patched.abs().max() / theirs.abs().max()).item()
    print(f"distance to float32, patched over stock: rms {rms:.2f}, largest {largest:.2f}")
    assert rms <= 1.1 and largest <= 1.5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="bfloat16 as on the GPU")
def test_bfloat16_curves_stay_together(tmp_path):
    """Patched and stock runs part no further than 1.5 times what stock's own two attention backends do.

    The largest distances of a few runs are chance: of eight seeds, fused loss alone parts one run as far as everything
    together, and in seven of them the patched run is nearer to float32's than both of stock's.
    """
    between_backends, ours = [], []
    for seed in range(8):
        sdpa = curve(tmp_path, seed, Run())
        assert sdpa[-1] < sdpa[0] - 0.5, "the run must learn something for its curve to say anything"
        between_backends.append(distance(curve(tmp_path, seed, Run("eager")), sdpa))
        ours.append(distance(curve(tmp_path, seed, Run(patched=True)), sdpa))
    print("largest distance: sdpa to eager", between_backends, "patched to stock", ours)
    assert max(ours) <= 1.5 * max(between_backends)
