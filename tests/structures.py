"""The five Gemma 4 structures, tiny: every mechanism of the published sizes, on shapes that a CPU can train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    Gemma4AudioConfig,
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4UnifiedAudioConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
    Gemma4UnifiedVisionConfig,
    Gemma4VisionConfig,
)
from transformers.models.gemma4_unified import Gemma4UnifiedForCausalLM, Gemma4UnifiedTextConfig

VOCAB = 307

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "head_dim": 16,
    "global_head_dim": 32,
    "sliding_window": 8,
    "max_position_embeddings": 256,
    "final_logit_softcapping": 30.0,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}
_PER_LAYER = {"hidden_size_per_layer_input": 64}
_NO_PER_LAYER = {"hidden_size_per_layer_input": 0}


def _layers(sliding: int, repeats: int) -> list[str]:
    return (["sliding_attention"] * sliding + ["full_attention"]) * repeats


STRUCTURES: dict[str, dict[str, Any]] = {
    "e2b": {
        **_COMMON,
        **_PER_LAYER,
        "layer_types": _layers(1, 3),
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
    },
    "e4b": {
        **_COMMON,
        **_PER_LAYER,
        "layer_types": _layers(2, 2),
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": False,
    },
    "12b": {
        **_COMMON,
        "layer_types": _layers(2, 1),
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "use_bidirectional_attention": "vision",
    },
    "26b-a4b": {
        **_COMMON,
        **_NO_PER_LAYER,
        "layer_types": _layers(2, 1),
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 32,
    },
    "31b": {
        **_COMMON,
        **_NO_PER_LAYER,
        "layer_types": _layers(2, 1),
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_global_key_value_heads": 2,
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 0,
    },
}


def build(name: str, attn_implementation: str = "sdpa", seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """A float32 model of one structure with random weights, norms and scalars away from their trivial values."""
    torch.manual_seed(seed)
    settings = {**STRUCTURES[name], **overrides}
    settings["num_hidden_layers"] = len(settings["layer_types"])
    unified = name == "12b"
    config = (Gemma4UnifiedTextConfig if unified else Gemma4TextConfig)(**settings)
    config._attn_implementation = attn_implementation
    return randomize((Gemma4UnifiedForCausalLM if unified else Gemma4ForCausalLM)(config), seed)


def randomize(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Other random weights, with which every part of the model tells in its output and its gradients."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(1.0 + 0.2 * torch.randn(parameter.shape, generator=generator))
                if parameter_name.endswith("q_norm.weight"):
                    # Gemma 4 scales scores by 1: with trivial norms, random queries and keys would give one-hot
                    # attention, whose gradients turn every rounding into noise.
                    parameter.mul_(parameter.shape[0] ** -0.5)
            else:
                scale = 0.7 * parameter.shape[-1] ** -0.5 if "embed" not in parameter_name else 0.2
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("layer_scalar"):
                buffer.fill_(0.9)
    return model


# Outside the vocabulary, as soft tokens are for the text model.
_SOFT_TOKENS = {"image_token_id": 1000, "video_token_id": 1001, "audio_token_id": 1002}


def multimodal(**text: Any) -> Gemma4ForConditionalGeneration:
    """Towers with clipped linear layers around the smallest text model."""
    settings = {**STRUCTURES["e2b"], **text}
    tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "use_clipped_linears": True}
    vision = {**tower, "intermediate_size": 32, "head_dim": 16, "num_key_value_heads": 2, "position_embedding_size": 16}
    vision = {**vision, "patch_size": 2, "pooling_kernel_size": 2}
    audio = {**tower, "subsampling_conv_channels": [16, 8], "output_proj_dims": 32}
    config = Gemma4Config(
        text_config=Gemma4TextConfig(**settings, num_hidden_layers=len(settings["layer_types"])),
        vision_config=Gemma4VisionConfig(**vision),
        audio_config=Gemma4AudioConfig(**audio),
        **_SOFT_TOKENS,
    )
    torch.manual_seed(0)
    return Gemma4ForConditionalGeneration(config)


def unified_multimodal(**text: Any) -> Gemma4UnifiedForConditionalGeneration:
    """Images and sound projected into the 12B text model without towers."""
    settings = {**STRUCTURES["12b"], **text}
    config = Gemma4UnifiedConfig(
        text_config=Gemma4UnifiedTextConfig(**settings, num_hidden_layers=len(settings["layer_types"])),
        vision_config=Gemma4UnifiedVisionConfig(
            patch_size=2, pooling_kernel_size=2, mm_embed_dim=32, output_proj_dims=32, mm_posemb_size=16
        ),
        audio_config=Gemma4UnifiedAudioConfig(audio_embed_dim=32),
        **_SOFT_TOKENS,
    )
    torch.manual_seed(0)
    return Gemma4UnifiedForConditionalGeneration(config)


def quantize(model: torch.nn.Module) -> None:
    """Replaces the decoder layers' linears (routers aside) by NF4 ones with double quantisation, in place."""
    import bitsandbytes

    for layer in model.model.layers:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is not torch.nn.Linear or type(parent).__name__.endswith("Router"):
                    continue
                linear = bitsandbytes.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=False,
                    compute_dtype=child.weight.dtype,
                    quant_type="nf4",
                    compress_statistics=True,
                )
                linear.weight = bitsandbytes.nn.Params4bit(
                    child.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=linear
                )
                # Moving a 4-bit weight is what quantises it, on the CPU as well.
                setattr(parent, name, linear.to(child.weight.device))


def batch(
    kind: str, rows: int = 2, seq_len: int = 13, seed: int = 3, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """A training batch: "padding" (one row right-padded, some labels ignored) or "packing" (documents in one row)."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(*shape: int) -> torch.Tensor:
        return torch.randint(3, VOCAB, shape, generator=generator)

    if kind == "padding":
        ids = tokens(rows, seq_len)
        mask = torch.ones_like(ids)
        mask[-1, seq_len - 4 :] = 0
        ids = ids * mask
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :3] = -100
        tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    elif kind == "packing":
        # Were the longest the first, positions within a document could pass for indices into the row.
        position_ids = torch.cat([torch.arange(n) for n in (6, 1, 9, 7)])[None]
        ids = tokens(1, position_ids.shape[1])
        labels = ids.masked_fill(position_ids == 0, -100)
        tensors = {"input_ids": ids, "position_ids": position_ids, "labels": labels}
    else:
        raise ValueError(kind)
    # With a cache, which is transformers' default, stock would not see that packed rows are several documents.
    return {**{name: tensor.to(device) for name, tensor in tensors.items()}, "use_cache": False}


def multimodal_batch(
    config: Any, rows: Sequence[str], side: str = "right", seed: int = 3, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """A training batch for a multimodal model, as its processor and a collator make it.

    Args:
        rows: what follows what in each row: "3 i4 2" is three tokens, an image of four soft tokens and two tokens; "a5"
            is sound of five soft tokens, "v2" a video frame of two. The frames in one row are one video.
        side: where the shorter rows are padded.
    """
    generator = torch.Generator().manual_seed(seed)
    soft = {"i": (config.image_token_id, 1), "v": (config.video_token_id, 2), "a": (config.audio_token_id, 3)}
    made: list[tuple[torch.Tensor, torch.Tensor]] = []
    lengths: dict[str, list[int]] = {kind: [] for kind in soft}
    for row in rows:
        ids, types = [], []
        for part in row.split():
            if part[0] in soft:
                token, kind = soft[part[0]]
                lengths[part[0]].append(int(part[1:]))
                ids.append(torch.full((int(part[1:]),), token))
            else:
                kind = 0
                ids.append(torch.randint(3, VOCAB, (int(part),), generator=generator))
            types.append(torch.full_like(ids[-1], kind))
        made.append((torch.cat(ids), torch.cat(types)))
    length = max(len(ids) for ids, _ in made)

    def padded(x: torch.Tensor) -> torch.Tensor:
        missing = length - len(x)
        return torch.nn.functional.pad(x, (missing, 0) if side == "left" else (0, missing))

    input_ids = torch.stack([padded(ids) for ids, _ in made])
    types = torch.stack([padded(types) for _, types in made])
    mask = torch.stack([padded(torch.ones_like(ids)) for ids, _ in made])
    tensors = {"input_ids": input_ids, "attention_mask": mask, "mm_token_type_ids": types}
    tensors["labels"] = input_ids.masked_fill((mask == 0) | (types != 0), -100)
    if lengths["i"]:
        tensors["pixel_values"], tensors["image_position_ids"] = _patches(config, lengths["i"], generator)
    if lengths["v"]:
        tensors["pixel_values_videos"], tensors["video_position_ids"] = _patches(config, lengths["v"], generator)
        frames = [sum(part[0] == "v" for part in row.split()) for row in rows]
        tensors["num_frames_per_video"] = torch.tensor([n for n in frames if n])
    if lengths["a"]:
        tensors["input_features"], tensors["input_features_mask"] = _sounds(config, lengths["a"], generator)
    return {**{name: tensor.to(device) for name, tensor in tensors.items()}, "use_cache": False}


def _is_unified(config: Any) -> bool:
    return config.model_type == "gemma4_unified"


def _patches(config: Any, lengths: Sequence[int], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches of images two soft tokens high (one where their number is odd), padded beyond the largest image's."""
    vision = config.vision_config
    pool = 1 if _is_unified(config) else vision.pooling_kernel_size
    side = vision.model_patch_size if _is_unified(config) else vision.patch_size
    n_patches = (max(lengths) + 1) * pool**2
    pixels = torch.zeros(len(lengths), n_patches, 3 * side**2)
    positions = torch.full((len(lengths), n_patches, 2), -1)
    for image, length in enumerate(lengths):
        height = 2 - length % 2
        grid = torch.cartesian_prod(torch.arange(height * pool), torch.arange(length // height * pool)).flip(1)
        pixels[image, : len(grid)] = torch.rand(len(grid), pixels.shape[2], generator=generator)
        positions[image, : len(grid)] = grid
    return pixels, positions


def _sounds(config: Any, lengths: Sequence[int], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Features whose soft tokens are so many, and which frames of them are sound."""
    audio = config.audio_config
    # Two convolutions of stride 2 make a token of four frames, the last of which may be missing.
    of_one, missing = (1, 0) if _is_unified(config) else (4, 1)
    size = audio.audio_embed_dim if _is_unified(config) else audio.subsampling_conv_channels[0]
    frames = torch.tensor([of_one * length - missing for length in lengths])[:, None]
    mask = torch.arange(of_one * (max(lengths) + 1)) < frames
    features = torch.randn(*mask.shape, size, generator=generator)
    return features * mask[..., None], mask
