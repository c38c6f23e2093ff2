"""The five Gemma 4 structures, tiny: every mechanism of the published sizes, on shapes that a CPU can train."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    Gemma4AudioConfig,
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
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
    model = (Gemma4UnifiedForCausalLM if unified else Gemma4ForCausalLM)(config)
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


def multimodal(**text: Any) -> Gemma4ForConditionalGeneration:
    """Towers with clipped linear layers around the smallest text model."""
    settings = {**STRUCTURES["e2b"], **text}
    tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "use_clipped_linears": True}
    vision = {**tower, "intermediate_size": 32, "head_dim": 16, "num_key_value_heads": 2, "position_embedding_size": 16}
    audio = {**tower, "subsampling_conv_channels": [16, 8], "output_proj_dims": 32}
    config = Gemma4Config(
        text_config=Gemma4TextConfig(**settings, num_hidden_layers=len(settings["layer_types"])),
        vision_config=Gemma4VisionConfig(**vision),
        audio_config=Gemma4AudioConfig(**audio),
        # Outside the vocabulary, as soft tokens are for the text model.
        image_token_id=1000,
        video_token_id=1001,
        audio_token_id=1002,
    )
    torch.manual_seed(0)
    return Gemma4ForConditionalGeneration(config)


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
                    compute_dtype=torch.float32,
                    quant_type="nf4",
                    compress_statistics=True,
                )
                linear.weight = bitsandbytes.nn.Params4bit(
                    child.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=linear
                )
                # Moving a 4-bit weight is what quantises it, on the CPU as well.
                setattr(parent, name, linear.to("cpu"))


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
        position_ids = torch.cat([torch.arange(n) for n in (9, 1, 7, 6)])[None]
        ids = tokens(1, position_ids.shape[1])
        labels = ids.masked_fill(position_ids == 0, -100)
        tensors = {"input_ids": ids, "position_ids": position_ids, "labels": labels}
    else:
        raise ValueError(kind)
    # With a cache, which is transformers' default, stock would not see that packed rows are several documents.
    return {**{name: tensor.to(device) for name, tensor in tensors.items()}, "use_cache": False}
