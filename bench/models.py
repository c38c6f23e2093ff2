"""Gemma 4 configurations with the published values, and random-weight checkpoints of the published form.

Speed and memory depend on shapes, not on what the weights say, so every benchmark runs on random weights and needs no
download. A checkpoint written here loads through the ordinary `from_pretrained` call: the same parameter names, dtype
and sharding as a published one, with a small tokenizer beside it.

`tiny=True` keeps the structure of a size (layer pattern, KV sharing, double-wide MLP, per-layer embeddings, experts)
and shrinks every width, for smoke runs on a machine without a GPU.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    Gemma4AudioConfig,
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4VisionConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SIZES = ("e2b", "e4b", "12b", "26b-a4b", "31b")

# The seven projections of the language model, with and without towers around it. The towers' layers have projections
# of the same names in a class that PEFT cannot adapt, so a plain list of names does not do.
LANGUAGE_PROJECTIONS = r"model\.(language_model\.)?layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"

# Ids from here upwards stand for image and audio placeholders; random text must not contain them.
FIRST_PLACEHOLDER_ID = 255_999

_MARKER = "bench_checkpoint.json"
_SHARD_BYTES = 5_000_000_000
_CHUNK_ELEMENTS = 1 << 28
_TINY_VOCAB = 1024


def _pattern(sliding: int, repeats: int) -> list[str]:
    """`sliding` sliding-window layers and one full-attention layer, `repeats` times."""
    return (["sliding_attention"] * sliding + ["full_attention"]) * repeats


# What differs between sizes. Everything else is common to all five and set in `text_config`.
_PUBLISHED: dict[str, dict[str, Any]] = {
    "e2b": {
        "hidden_size": 1536,
        "intermediate_size": 6144,
        "layer_types": _pattern(4, 7),
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 20,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 256,
    },
    "e4b": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "layer_types": _pattern(5, 7),
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 18,
        "hidden_size_per_layer_input": 256,
    },
    "12b": {
        "hidden_size": 3840,
        "intermediate_size": 15360,
        "layer_types": _pattern(5, 8),
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 1,
    },
    "26b-a4b": {
        "hidden_size": 2816,
        "intermediate_size": 2112,
        "layer_types": _pattern(5, 5),
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "num_global_key_value_heads": 2,
        "enable_moe_block": True,
        "num_experts": 128,
        "top_k_experts": 8,
        "moe_intermediate_size": 704,
    },
    "31b": {
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "layer_types": _pattern(5, 10),
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "num_global_key_value_heads": 4,
    },
}

# The large sizes share these three settings.
for _large in ("12b", "26b-a4b", "31b"):
    _PUBLISHED[_large] |= {
        "attention_k_eq_v": True,
        "use_bidirectional_attention": "vision",
        "sliding_window": 1024,
        "max_position_embeddings": 262_144,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
    }


def _check_size(size: str) -> None:
    if size not in SIZES:
        raise ValueError(f"unknown size {size!r}; one of {', '.join(SIZES)}")


def _tiny_text(fields: dict[str, Any]) -> dict[str, Any]:
    """The same structure with two repeats of the layer pattern, 64 channels and a small vocabulary."""
    types = fields["layer_types"]
    period = types.index("full_attention") + 1
    small = {
        **fields,
        "hidden_size": 64,
        "intermediate_size": 128,
        "layer_types": types[: 2 * period],
        # The first repeat owns keys and values, so that a producer of either kind precedes the shared layers.
        "num_kv_shared_layers": period if fields["num_kv_shared_layers"] else 0,
        "num_attention_heads": 4,
        "num_key_value_heads": min(2, fields["num_key_value_heads"]),
        "head_dim": 32,
        "global_head_dim": 64,
        "sliding_window": 32,
        "vocab_size": _TINY_VOCAB,
        "vocab_size_per_layer_input": _TINY_VOCAB,
        "max_position_embeddings": 4096,
    }
    if fields["hidden_size_per_layer_input"]:
        # A whole 4-bit block to a row, as every published width has: bitsandbytes' code for some CPUs relies on it.
        small["hidden_size_per_layer_input"] = 64
    if fields.get("num_global_key_value_heads"):
        small["num_global_key_value_heads"] = 1
    if fields.get("enable_moe_block"):
        small |= {"num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 64}
    return small


def text_config(size: str, *, tiny: bool = False) -> Gemma4TextConfig:
    """The language model of a size.

    Returns:
        A `Gemma4TextConfig`; for "12b" a `Gemma4UnifiedTextConfig`, the class of that model.
    """
    _check_size(size)
    fields = {
        "vocab_size": 262_144,
        "vocab_size_per_layer_input": 262_144,
        "head_dim": 256,
        "global_head_dim": 512,
        "hidden_activation": "gelu_pytorch_tanh",
        "rms_norm_eps": 1e-6,
        "final_logit_softcapping": 30.0,
        "sliding_window": 512,
        "max_position_embeddings": 131_072,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "proportional",
                "rope_theta": 1_000_000.0,
                "partial_rotary_factor": 0.25,
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        **_PUBLISHED[size],
    }
    if tiny:
        fields = _tiny_text(fields)
    fields["num_hidden_layers"] = len(fields["layer_types"])
    if size == "12b":
        # The unified classes have neither experts, KV sharing nor per-layer embeddings to configure.
        for name in ("num_kv_shared_layers", "hidden_size_per_layer_input", "vocab_size_per_layer_input"):
            fields.pop(name)
        return transformers.Gemma4UnifiedTextConfig(**fields)
    return Gemma4TextConfig(**fields)


def multimodal_config(size: str, *, tiny: bool = False) -> Gemma4Config:
    """A size with its towers: vision and audio on E2B and E4B, vision alone on 26B-A4B and 31B.

    Raises:
        ValueError: for "12b", which has no towers and other classes.
    """
    _check_size(size)
    if size == "12b":
        raise ValueError("12b has no towers; use text_config")
    on_device = size in ("e2b", "e4b")
    if on_device:
        vision = {"use_clipped_linears": True}
        shape = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 16, "head_dim": 64}
        heads = 12
    else:
        vision = {"standardize": True}
        shape = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "head_dim": 72}
        heads = 16
    audio: dict[str, Any] = {}
    if tiny:
        shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
        heads = 2
        vision["position_embedding_size"] = 64
        audio = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "subsampling_conv_channels": [16, 8],
            "output_proj_dims": 48,
        }
    return Gemma4Config(
        text_config=text_config(size, tiny=tiny),
        vision_config=Gemma4VisionConfig(**shape, **vision, num_attention_heads=heads, num_key_value_heads=heads),
        audio_config=Gemma4AudioConfig(**audio) if on_device else None,
    )


def model_class(size: str, *, towers: bool) -> type[PreTrainedModel]:
    """The transformers class whose checkpoint `save_random_checkpoint` writes."""
    if towers:
        return Gemma4ForConditionalGeneration
    return transformers.Gemma4UnifiedForCausalLM if size == "12b" else Gemma4ForCausalLM


def _fill(name: str, shape: torch.Size, std: float, generator: torch.Generator) -> torch.Tensor:
    """One parameter or buffer in bfloat16 on the CPU, with the values the model classes themselves start from.

    Large tensors are drawn in pieces on the generator's device: the per-layer embedding table alone has more than
    2^31 elements.
    """
    leaf = name.rsplit(".", 1)[-1]
    constant: float | None = None
    if leaf.endswith(("_min", "_max")):  # clipping bounds: no clipping
        constant = float("-inf") if leaf.endswith("_min") else float("inf")
    elif leaf in ("bias", "std_bias", "per_dim_scale"):
        constant = 0.0
    elif len(shape) < 2 or leaf == "position_embedding_table":  # norm weights, layer_scalar, scales
        constant = 1.0
    if constant is not None:
        return torch.full(shape, constant, dtype=torch.bfloat16)
    out = torch.empty(shape, dtype=torch.bfloat16)
    flat = out.view(-1)
    for start in range(0, flat.numel(), _CHUNK_ELEMENTS):
        piece = flat[start : start + _CHUNK_ELEMENTS]
        if generator.device.type == "cpu":
            piece.normal_(0.0, std, generator=generator)
        else:
            drawn = torch.empty(piece.shape, dtype=torch.bfloat16, device=generator.device)
            piece.copy_(drawn.normal_(0.0, std, generator=generator))
    return out


def _shards(sizes: dict[str, int]) -> Iterator[list[str]]:
    """Names grouped, in order, into shards of at most `_SHARD_BYTES` (or one larger tensor)."""
    names: list[str] = []
    total = 0
    for name, num_bytes in sizes.items():
        if names and total + num_bytes > _SHARD_BYTES:
            yield names
            names, total = [], 0
        names.append(name)
        total += num_bytes
    if names:
        yield names


def save_random_checkpoint(
    path: str | Path,
    size: str,
    *,
    towers: bool,
    tiny: bool = False,
    seed: int = 0,
    device: str | torch.device | None = None,
) -> Path:
    """Writes a random-weight bfloat16 checkpoint with its tokenizer, or reuses the same one already there.

    Holds at most one shard in host memory. Random numbers come from the GPU where there is one, so a checkpoint is
    reproducible on one kind of device only.

    Args:
        path: Directory, created if missing.
        size: One of `SIZES`.
        towers: `Gemma4ForConditionalGeneration` with its towers, else the text model alone.
        tiny: The shrunken structure.
        seed: Seed of the weights.
        device: Where random numbers are drawn (default: the GPU if there is one).

    Raises:
        FileExistsError: `path` holds something else.
    """
    path = Path(path)
    identity = {
        "size": size,
        "towers": towers,
        "tiny": tiny,
        "seed": seed,
        "transformers": transformers.__version__,
    }
    marker = path / _MARKER
    if marker.exists() and json.loads(marker.read_text(encoding="utf-8")) == identity:
        return path
    if path.exists() and any(path.iterdir()):
        raise FileExistsError(f"{path} holds another or an incomplete checkpoint; remove it or name another directory")
    path.mkdir(parents=True, exist_ok=True)

    config = multimodal_config(size, tiny=tiny) if towers else text_config(size, tiny=tiny)
    cls = model_class(size, towers=towers)
    config.architectures = [cls.__name__]
    config.dtype = torch.bfloat16
    with torch.device("meta"):
        model = cls(config)
    # A tied head is not stored; the loader ties it again.
    tied = set(model.all_tied_weights_keys)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in tied}
    del model

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    generator = torch.Generator(device=device).manual_seed(seed)
    std = config.get_text_config().initializer_range
    sizes = {name: 2 * shape.numel() for name, shape in shapes.items()}
    shards = list(_shards(sizes))
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards, start=1):
        file_name = f"model-{index:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {name: _fill(name, shapes[name], std, generator) for name in names}
        save_file(tensors, path / file_name, metadata={"format": "pt"})
        del tensors
        weight_map |= dict.fromkeys(names, file_name)
    if len(shards) > 1:
        index_json = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index_json, indent=2), encoding="utf-8")
    if device.type == "cuda":
        torch.cuda.empty_cache()

    config.save_pretrained(path)
    GenerationConfig(pad_token_id=0, eos_token_id=1, bos_token_id=2).save_pretrained(path)
    make_tokenizer(config.get_text_config().vocab_size).save_pretrained(path)
    # Last, so that an interrupted run leaves no checkpoint that looks complete.
    marker.write_text(json.dumps(identity), encoding="utf-8")
    return path


def default_checkpoint_dir(size: str, *, towers: bool, tiny: bool = False, seed: int = 0) -> Path:
    """A directory in shared memory if a checkpoint fits there with room to spare, else in the temporary directory."""
    name = f"fastgemma-bench-{size}-{'towers' if towers else 'text'}{'-tiny' if tiny else ''}-seed{seed}"
    with torch.device("meta"):
        model = model_class(size, towers=towers)(
            multimodal_config(size, tiny=tiny) if towers else text_config(size, tiny=tiny)
        )
    needed = 2 * sum(parameter.numel() for parameter in model.parameters())
    memory = Path("/dev/shm")
    if (memory / name / _MARKER).exists():
        return memory / name
    if memory.is_dir() and shutil.disk_usage(memory).free > 2 * needed:
        return memory / name
    return Path(tempfile.gettempdir()) / name


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------

_SENTENCES = (
    "The river rises in the hills above the old quarry and reaches the town before noon.",
    "A baker who wakes at three knows which windows are lit and which dogs will bark.",
    "Every bridge in the valley was built twice, once of timber and once of stone.",
    "She kept the measurements in a blue notebook, one page for each storm since the spring.",
    "Copper turns green in the rain, and iron turns red, but the slate roof never changes.",
    "If the train is late, the second boat waits; if the boat is late, nobody waits at all.",
    "Three schools share one orchestra, so the violins travel more than the teachers do.",
    "The map showed a road that had been planned, surveyed, paid for and then forgotten.",
    "Wind from the north brings clear mornings, long shadows and the smell of cut hay.",
    "He repaired clocks for forty years and was never once on time for supper.",
    "Apples picked too early are sour, and apples picked too late belong to the wasps.",
    "The library lends tools as well as books: ladders, drills, a tent and one good kite.",
    "When the lamp on the pier goes out, the harbour master counts the boats by their bells.",
    "A short proof is a kindness to the reader, and a long one is a kindness to nobody.",
    "Snow closed the pass in October, opened it in November and closed it again for good.",
    "They painted the station yellow because yellow was the only paint left after the war.",
)

_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|turn>{{ message['role'] }}\n{{ message['content'] }}<turn|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn>model\n{% endif %}"
)


def passages(count: int, num_chars: int, seed: int = 0) -> list[str]:
    """`count` different texts of at least `num_chars` characters, the same for the same seed."""
    rng = random.Random(seed)
    texts = []
    for _ in range(count):
        parts: list[str] = []
        length = 0
        while length < num_chars:
            part = f"{rng.choice(_SENTENCES)} ({rng.randrange(10_000)})"
            parts.append(part)
            length += len(part) + 1
        texts.append(" ".join(parts))
    return texts


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the sentences above, with Gemma's pad, eos and bos ids (0, 1, 2).

    It has at most `vocab_size` entries; a model's larger embedding simply keeps unused rows.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(vocab_size, _TINY_VOCAB),
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(passages(8, 4096), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast
