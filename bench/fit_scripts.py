"""Three TRL scripts, as users write them. `fit.py` runs each on a small card.

They differ in how the model reaches the card, which is where loading runs out of memory first:

    trainer_path    the trainer loads the model from its path, and chooses `device_map="auto"`
    device_map_0    the user loads it with `device_map={"": 0}`
    no_device_map   the user loads it without a device map

With fastgemma each of them has one more line at its top: `import fastgemma; fastgemma.patch()`. Nothing else in them
knows about it. `quantization` is the 4-bit configuration of a stock QLoRA script; `settings` are arguments that a
machine without a GPU needs, and `callbacks` is how the benchmark times steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset
from models import LANGUAGE_PROJECTIONS
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer


def lora() -> LoraConfig:
    return LoraConfig(
        r=16,
        lora_alpha=32,
        lora_dropout=0.05,
        target_modules=LANGUAGE_PROJECTIONS,
        task_type="CAUSAL_LM",
    )


def arguments(output_dir: str, max_length: int, max_steps: int, **settings: Any) -> SFTConfig:
    return SFTConfig(
        **{
            "output_dir": output_dir,
            "max_length": max_length,
            "max_steps": max_steps,
            "per_device_train_batch_size": 1,
            "gradient_checkpointing": True,
            "optim": "adamw_8bit",
            "learning_rate": 2e-4,
            "bf16": True,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            **settings,
        }
    )


def trainer_path(
    path: str,
    dataset: Dataset,
    output_dir: str,
    *,
    max_length: int,
    max_steps: int,
    quantization: BitsAndBytesConfig | None,
    settings: dict[str, Any],
    callbacks: list[TrainerCallback],
) -> SFTTrainer:
    """The trainer loads the model."""
    trainer = SFTTrainer(
        model=path,
        args=arguments(
            output_dir,
            max_length,
            max_steps,
            model_init_kwargs={"quantization_config": quantization, "dtype": torch.bfloat16},
            **settings,
        ),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=lora(),
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


def device_map_0(
    path: str,
    dataset: Dataset,
    output_dir: str,
    *,
    max_length: int,
    max_steps: int,
    quantization: BitsAndBytesConfig | None,
    settings: dict[str, Any],
    callbacks: list[TrainerCallback],
) -> SFTTrainer:
    """The user loads the model onto the first device."""
    model = AutoModelForCausalLM.from_pretrained(
        path,
        quantization_config=quantization,
        dtype=torch.bfloat16,
        device_map={"": 0 if torch.cuda.is_available() else "cpu"},
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments(output_dir, max_length, max_steps, **settings),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=lora(),
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


def no_device_map(
    path: str,
    dataset: Dataset,
    output_dir: str,
    *,
    max_length: int,
    max_steps: int,
    quantization: BitsAndBytesConfig | None,
    settings: dict[str, Any],
    callbacks: list[TrainerCallback],
) -> SFTTrainer:
    """The user loads the model and leaves its placement to transformers and the trainer."""
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=quantization, dtype=torch.bfloat16)
    trainer = SFTTrainer(
        model=model,
        args=arguments(output_dir, max_length, max_steps, **settings),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=lora(),
        callbacks=callbacks,
    )
    trainer.train()
    return trainer


SCRIPTS: dict[str, Callable[..., SFTTrainer]] = {
    "trainer_path": trainer_path,
    "device_map_0": device_map_0,
    "no_device_map": no_device_map,
}
