"""The checkpoint that both halves of the demo start from: a small Gemma 4 that has read some text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastgemma.demo.plan import Plan
from fastgemma.demo.text import COOKING, DIALOGUES, STORIES, turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


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
    tokenizer.train_from_iterator([*STORIES, *COOKING, *map(turn, DIALOGUES)], trainer)
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


def prepare(plan: Plan, checkpoint: Path) -> dict[str, Any]:
    """Writes the checkpoint: tokenizer, and a model that has read the text. Returns what there is to say about it."""
    tokenizer = build_tokenizer(plan.vocab_size)
    model = build_model(plan, len(tokenizer)).to(plan.device)
    # Every other dialogue, so that the base model knows their form but not all that they say.
    texts = (
        *STORIES,
        *COOKING,
        *("\n".join(map(turn, DIALOGUES[i : i + 8 : 2])) for i in range(0, len(DIALOGUES), 8)),
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
    model.save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    return {"parameters": sum(parameter.numel() for parameter in model.parameters())}
