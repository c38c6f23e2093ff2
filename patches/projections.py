"""Reads a linear layer as PEFT and bitsandbytes left it, and says whether `kernels.lora` computes the same.

PEFT's forward contract (0.21): disabled adapters and merged ones take the base alone; otherwise each active adapter
adds `lora_B(lora_A(dropout(x))) * scaling`, in the adapter's dtype unless autocast is on. With exactly one active,
vanilla adapter that is `kernels.lora`; anything else is PEFT's own to compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastgemma.kernels.lora import Adapter, Projection, lora_projections
from fastgemma.kernels.nf4 import NestedScales, NF4Weight
from fastgemma.patches.guards import hooked, plain


class Unsupported(Exception):
    """The layer's own forward must run; the message is the counted reason."""


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that a linear layer computes in: autocast's where it is on, else the input's."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def nf4_weight(layer: Any, x: torch.Tensor) -> NF4Weight:
    """The weight of a `bitsandbytes.nn.Linear4bit`. Raises Unsupported."""
    weight = layer.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        state = getattr(layer, "quant_state", None)  # bitsandbytes keeps a second reference here for FSDP
    if state is None:
        raise Unsupported("4-bit weight without a quantisation state")
    if not layer.compute_type_is_set:
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    # Read once per weight: the note goes where bitsandbytes would notice a move, with the state that it describes.
    noted, absmax, address = getattr(state, "_fastgemma_nf4", (None, None, None))
    if noted is not None and absmax is state.absmax and address == weight.data_ptr():
        return noted
    if state.quant_type != "nf4":
        raise Unsupported(f"4-bit type {state.quant_type}")
    if getattr(state, "packing_format_for_cpu", False):
        raise Unsupported("4-bit weight repacked for the cpu")
    nested = None
    if state.nested:
        nested = NestedScales(state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize)
    read = NF4Weight(
        weight.data, state.absmax, state.code, torch.Size(state.shape), state.dtype, state.blocksize, nested
    )
    state._fastgemma_nf4 = (read, state.absmax, weight.data_ptr())
    return read


def _base_weight(layer: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | NF4Weight:
    if hooked(layer):
        raise Unsupported("hooks on a linear layer")
    if getattr(layer, "bias", None) is not None:
        raise Unsupported("linear layer with a bias")
    if type(layer) is nn.Linear:
        if not plain(layer.weight):
            raise Unsupported(f"weight of type {type(layer.weight).__name__}")
        if layer.weight.dtype == dtype:
            return layer.weight
        if torch.is_autocast_enabled(x.device.type):
            return layer.weight.to(dtype)
        raise Unsupported(f"input {dtype}, weight {layer.weight.dtype}")
    if type(layer).__name__ == "Linear4bit" and type(layer).__module__.startswith("bitsandbytes."):
        weight = nf4_weight(layer, x)
        if layer.compute_dtype not in (None, dtype):
            raise Unsupported(f"4-bit compute dtype {layer.compute_dtype} for {dtype} activations")
        return weight
    raise Unsupported(f"linear layer of type {type(layer).__name__}")


@dataclass(frozen=True)
class _Plan:
    """What one layer computes, before its dropout is drawn."""

    weight: torch.Tensor | NF4Weight
    A: torch.Tensor | None = None
    B: torch.Tensor | None = None
    scaling: float = 1.0
    dropout: nn.Module | None = None


def _plan_adapter(layer: Any, weight: torch.Tensor | NF4Weight, x: torch.Tensor) -> _Plan:
    if layer.disable_adapters:
        if layer.merged:
            raise Unsupported("merged adapter being disabled")
        return _Plan(weight)
    if layer.merged:
        return _Plan(weight)
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if not names:
        return _Plan(weight)
    if len(names) > 1:
        raise Unsupported("several active adapters")
    name = names[0]
    if name in layer.lora_variant:
        raise Unsupported(f"LoRA variant {type(layer.lora_variant[name]).__name__}")
    A, B, dropout = layer.lora_A[name], layer.lora_B[name], layer.lora_dropout[name]
    if type(A) is not nn.Linear or type(B) is not nn.Linear or A.bias is not None or B.bias is not None:
        raise Unsupported("LoRA factors that are not plain linear layers")
    if hooked(A) or hooked(B) or hooked(dropout):
        raise Unsupported("hooks on a LoRA layer")
    if not plain(A.weight) or not plain(B.weight):
        raise Unsupported("sharded LoRA factors")
    if not isinstance(dropout, nn.Identity | nn.Dropout):
        raise Unsupported(f"LoRA dropout of type {type(dropout).__name__}")
    autocast = torch.is_autocast_enabled(x.device.type)
    if not autocast and A.weight.dtype != x.dtype and not getattr(layer, "cast_input_dtype_enabled", True):
        raise Unsupported("input casting disabled")
    draws = isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training
    return _Plan(weight, A.weight, B.weight, float(layer.scaling[name]), dropout if draws else None)


def _plan(layer: Any, x: torch.Tensor) -> _Plan:
    dtype = compute_dtype(x)
    if not (hasattr(layer, "lora_A") and hasattr(layer, "base_layer")):
        return _Plan(_base_weight(layer, x, dtype))
    if hooked(layer):
        raise Unsupported("hooks on a linear layer")
    if type(layer).__name__ not in ("Linear", "Linear4bit") or not type(layer).__module__.startswith("peft."):
        raise Unsupported(f"adapter of type {type(layer).__name__}")
    if getattr(layer, "fan_in_fan_out", False):
        raise Unsupported("fan_in_fan_out")
    return _plan_adapter(layer, _base_weight(layer.base_layer, x, dtype), x)


def _draw(plan: _Plan, x: torch.Tensor) -> Projection:
    if plan.A is None or plan.B is None:
        return Projection(plan.weight)
    A, B, dropped = plan.A, plan.B, None
    autocast = torch.is_autocast_enabled(x.device.type)
    if plan.dropout is not None:
        # PEFT's own call on PEFT's own input, so that a seed gives PEFT's mask.
        dropped = plan.dropout(x if autocast or A.dtype == x.dtype else x.to(A.dtype))
    if autocast:
        dtype = compute_dtype(x)
        A, B = A.to(dtype), B.to(dtype)
        dropped = None if dropped is None else dropped.to(dtype)
    return Projection(plan.weight, Adapter(A, B, plan.scaling), dropped)


def read(layers: Sequence[nn.Module], x: torch.Tensor) -> list[Projection]:
    """What each of `layers` computes from `x`, for `kernels.lora`; dropout masks are drawn in this order.

    Raises:
        Unsupported: only the layers' own forwards compute it. No mask was drawn then.
    """
    plans = [_plan(layer, x) for layer in layers]
    return [_draw(plan, x) for plan in plans]


def project(layers: Sequence[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """The layers' outputs for `x`, through `kernels.lora`. Raises Unsupported, as `read`."""
    projections = read(layers, x)
    outs = lora_projections(x.to(compute_dtype(x)), projections)
    return [as_output(out, projection, x) for out, projection in zip(outs, projections)]


def as_output(y: torch.Tensor, projection: Projection, x: torch.Tensor) -> torch.Tensor:
    """`y` in the dtype that the layer returns: bitsandbytes casts back to its input's, a dense layer does not."""
    return y.to(x.dtype) if isinstance(projection.weight, NF4Weight) else y


def has_dropout(layer: Any) -> bool:
    """Whether `layer` would draw a dropout mask now."""
    if not hasattr(layer, "lora_dropout") or layer.disable_adapters or layer.merged:
        return False
    return any(
        isinstance(module, nn.Dropout) and module.p > 0 and module.training
        for name, module in layer.lora_dropout.items()
        if name in layer.active_adapters
    )


def fused_gemm_is_better(layer: Any, x: torch.Tensor) -> bool:
    """Whether bitsandbytes' fused 4-bit product serves this call: a few rows, as in decoding, without gradients."""
    if torch.is_grad_enabled() or x.shape[:-1].numel() > 64:
        return False
    base = getattr(layer, "base_layer", layer)
    return type(base).__name__ == "Linear4bit"
