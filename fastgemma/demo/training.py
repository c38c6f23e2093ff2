"""One half of the demo: a TRL fine-tuning script such as anyone might write, but for what it measures."""

from __future__ import annotations

import dataclasses
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastgemma.demo.plan import Plan
from fastgemma.demo.text import DIALOGUES, QUESTION, turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
            turns.append(turn(pool.pop()))
        texts.append("\n".join(turns))
    return texts


def train(plan: Plan, checkpoint: Path, output: Path, *, patched: bool) -> dict[str, Any]:
    """Fine-tunes the checkpoint, stock or patched, and returns what was measured; the trainer writes to `output`."""
    started = time.perf_counter()
    import fastgemma

    if patched:
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
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    settings: dict[str, Any] = {"dtype": torch.float32}
    if on_gpu:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        settings = {"dtype": torch.bfloat16, "quantization_config": quantization, "device_map": {"": 0}}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, **settings)

    clock = StepClock()
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            output_dir=str(output),
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
    if patched:
        report = fastgemma.status()
        result["status"] = {name: dataclasses.asdict(feature) for name, feature in report.items()}
        result["status_text"] = str(report)
        result["sentence"] = _answer(trainer.model, tokenizer)
    result["seconds"] = time.perf_counter() - started
    return result


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
