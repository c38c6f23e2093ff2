"""What the kernel benchmarks compute on: random activations, and layers of Gemma 4 as QLoRA leaves them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import bitsandbytes as bnb
import models
import peft
import torch
from torch import nn
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextDecoderLayer

from fastgemma.kernels.lora import Adapter, Projection
from fastgemma.kernels.nf4 import NestedScales, NF4Weight

RANK = 16


def activation(*shape: int, device: torch.device, grad: bool = True) -> torch.Tensor:
    """Normally distributed bfloat16."""
    return torch.randn(shape, dtype=torch.bfloat16, device=device).requires_grad_(grad)


def nf4_weight(packed: torch.Tensor, state: bnb.functional.QuantState) -> NF4Weight:
    """A double-quantised weight of bitsandbytes', as the kernels take it; the memory is shared."""
    nested = NestedScales(state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize)
    return NF4Weight(packed, state.absmax, state.code, torch.Size(state.shape), state.dtype, state.blocksize, nested)


def quantised(quantise: Callable[[], Any]) -> Any:
    """What `quantise()` returns. bitsandbytes quantises on the default stream, whatever the current one is."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    result = quantise()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result


def qlora(module: nn.Module, names: Iterable[str], device: torch.device, bare: Iterable[str] = ()) -> nn.Module:
    """`module` with NF4 base weights and bfloat16 LoRA adapters, as trained ones, in its linear layers `names`.

    The layers `bare` are NF4 without an adapter.
    """
    names = list(names)
    for name in [*names, *bare]:
        dense = module.get_submodule(name)
        layer = bnb.nn.Linear4bit(
            dense.in_features, dense.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
        )
        weight = torch.randn(dense.weight.shape, dtype=torch.bfloat16, device=device) / dense.in_features**0.5
        parameter = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
        layer.weight = quantised(functools.partial(parameter.to, device))
        module.set_submodule(name, layer)
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names, init_lora_weights=False)
    peft.inject_adapter_in_model(config, module)
    for name, parameter in module.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(device, torch.bfloat16)
    return module


# The linear layers of a decoder layer that keeps keys and values of its own, and of its per-layer embedding.
BEFORE_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
AFTER_ATTENTION = ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
PER_LAYER = ("per_layer_input_gate", "per_layer_projection")


def decoder_layer(
    size: str, device: torch.device, *, adapted: Iterable[str], bare: Iterable[str] = (), tiny: bool
) -> Any:
    """The first decoder layer of a size as QLoRA leaves it; its linear layers beside these stay on "meta"."""
    with torch.device("meta"):
        layer = Gemma4TextDecoderLayer(models.text_config(size, tiny=tiny), 0).requires_grad_(False)
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        if tensor.dim() > 1:
            continue  # a linear layer's
        owner, _, attribute = name.rpartition(".")
        value = 0.5 + torch.rand(tensor.shape, device=device).to(torch.bfloat16)
        kind = nn.Buffer(value) if attribute == "layer_scalar" else nn.Parameter(value, requires_grad=False)
        setattr(layer.get_submodule(owner), attribute, kind)
    return qlora(layer, adapted, device, bare)


def projection(layer: nn.Module, *, dtype: torch.dtype = torch.bfloat16) -> Projection:
    """What one linear layer of `qlora` computes; adapters in `dtype`."""
    if isinstance(layer, bnb.nn.Linear4bit) and not hasattr(layer, "base_layer"):
        return Projection(nf4_weight(layer.weight.data, layer.weight.quant_state))
    weight = layer.base_layer.weight
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    adapter = Adapter(A.to(dtype), B.to(dtype), layer.scaling["default"])
    return Projection(nf4_weight(weight.data, weight.quant_state), adapter)
