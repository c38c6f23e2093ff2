"""Models with adapters under checkpointing, and what users change about their layers between two steps."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def checkpointed(model: nn.Module, **options: Any) -> Any:
    """`model` in training, with `LoraConfig(**options)` on all its projections."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=_PROJECTIONS, init_lora_weights=False, **options)
    model = get_peft_model(model, config, autocast_adapter_dtype=False).train()
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    return model


def layers(model: Any) -> nn.ModuleList:
    return model.get_base_model().model.layers


def swap_data(model: nn.Module) -> None:
    factor = layers(model)[1].mlp.up_proj.lora_A["default"].weight
    factor.data = 2 * factor.data


def scale(model: nn.Module) -> None:
    layers(model)[1].self_attn.q_proj.scaling["default"] *= 2


def freeze(model: nn.Module) -> None:
    layers(model)[0].self_attn.q_proj.lora_A["default"].weight.requires_grad_(False)


def train_norm(model: nn.Module) -> None:
    layers(model)[1].post_feedforward_layernorm.weight.requires_grad_(True)


def disable(model: nn.Module) -> None:
    layers(model)[1].mlp.down_proj.enable_adapters(False)


def drop(model: nn.Module) -> None:
    layers(model)[1].mlp.down_proj.lora_dropout["default"] = nn.Dropout(0.5)


def rescale_scores(model: nn.Module) -> None:
    layers(model)[0].self_attn.scaling *= 0.5


def new_norm(model: nn.Module) -> None:
    norm = layers(model)[0].input_layernorm
    norm.weight = nn.Parameter(1.5 * norm.weight.detach(), requires_grad=False)


CHANGES = (swap_data, scale, freeze, train_norm, disable, drop, new_norm, rescale_scores)
