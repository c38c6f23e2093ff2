"""Reads a linear layer as PEFT and bitsandbytes left it, and says whether `kernels.lora` computes the same.

PEFT's forward contract (0.21): disabled adapters and merged ones take the base alone; otherwise each active adapter
adds `lora_B(lora_A(dropout(x))) * scaling`, in the adapter's dtype unless autocast is on. With exactly one active,
vanilla adapter that is `kernels.lora`; anything else is PEFT's own to compute.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastgemma.kernels.lora import Adapter, Projection, lora_projections
from fastgemma.kernels.nf4 import NestedScales, NF4Weight
from fastgemma.patches.guards import hooked, plain


class Unsupported(Exception):
    """The layer's own forward must run; the message is the counted reason."""


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype of the autocast region that `x` is in, or None."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype that a linear layer computes in: autocast's where it is on, else the input's."""
    return autocast_dtype(x) or x.dtype


# Modules are read through `_modules` and `_parameters`: nn.Module looks there last, and this runs for each layer.


def _weight(layer: nn.Module) -> Any:
    weight = layer._parameters.get("weight")
    return layer.weight if weight is None else weight  # where a sharding library made it an attribute


class _Note:
    """How a 4-bit weight was read. Copies are read anew: their tensors are others, and a file could not hold it."""

    def __init__(self, read: NF4Weight, absmax: torch.Tensor, address: int) -> None:
        self.read, self.absmax, self.address = read, absmax, address

    def __reduce__(self) -> Any:
        return type(None), ()


def nf4_weight(layer: Any, x: torch.Tensor) -> NF4Weight:
    """The weight of a `bitsandbytes.nn.Linear4bit`. Raises Unsupported."""
    weight = _weight(layer)
    state = getattr(weight, "quant_state", None)
    if state is None:
        state = getattr(layer, "quant_state", None)  # bitsandbytes keeps a second reference here for FSDP
    if state is None:
        raise Unsupported("4-bit weight without a quantisation state")
    if not layer.compute_type_is_set:
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    # Read once per weight: the note goes where bitsandbytes would notice a move, with the state that it describes.
    note = getattr(state, "_fastgemma_nf4", None)
    if note is not None and note.absmax is state.absmax and note.address == weight.data_ptr():
        return note.read
    if state.quant_type != "nf4":
        raise Unsupported(f"4-bit type {state.quant_type}")
    if getattr(state, "packing_format_for_cpu", False):
        raise Unsupported("4-bit weight repacked for the cpu")
    nested = None
    if state.nested:
        nested = NestedScales(state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize)
    read = NF4Weight(
        weight.data.as_subclass(torch.Tensor),
        state.absmax,
        state.code,
        torch.Size(state.shape),
        state.dtype,
        state.blocksize,
        nested,
    )
    state._fastgemma_nf4 = _Note(read, state.absmax, weight.data_ptr())
    return read


@functools.cache
def _is_4bit(kind: Any) -> bool:
    return kind.__name__ == "Linear4bit" and kind.__module__.startswith("bitsandbytes.")


@functools.cache
def _is_lora(kind: Any) -> bool:
    return kind.__name__ in ("Linear", "Linear4bit") and kind.__module__.startswith("peft.")


def _base_weight(layer: nn.Module, x: torch.Tensor, autocast: torch.dtype | None) -> torch.Tensor | NF4Weight:
    if hooked(layer):
        raise Unsupported("hooks on a linear layer")
    if layer._parameters.get("bias") is not None:
        raise Unsupported("linear layer with a bias")
    kind: Any = type(layer)
    if kind is nn.Linear:
        weight = _weight(layer)
        if not plain(weight):
            raise Unsupported(f"weight of type {type(weight).__name__}")
        if autocast is None and weight.dtype != x.dtype:
            raise Unsupported(f"input {x.dtype}, weight {weight.dtype}")
        return weight
    if _is_4bit(kind):
        packed = nf4_weight(layer, x)
        dtype = autocast or x.dtype
        if layer.compute_dtype not in (None, dtype):
            raise Unsupported(f"4-bit compute dtype {layer.compute_dtype} for {dtype} activations")
        return packed
    raise Unsupported(f"linear layer of type {kind.__name__}")


def _read(layer: Any, x: torch.Tensor, autocast: torch.dtype | None) -> Projection:
    modules = layer._modules
    if "lora_A" not in modules or "base_layer" not in modules:
        return Projection(_base_weight(layer, x, autocast))
    if hooked(layer):
        raise Unsupported("hooks on a linear layer")
    kind: Any = type(layer)
    if not _is_lora(kind):
        raise Unsupported(f"adapter of type {kind.__name__}")
    if getattr(layer, "fan_in_fan_out", False):
        raise Unsupported("fan_in_fan_out")
    weight = _base_weight(modules["base_layer"], x, autocast)
    if layer.disable_adapters:
        if layer.merged:
            raise Unsupported("merged adapter being disabled")
        return Projection(weight)
    if layer.merged:
        return Projection(weight)
    factors = modules["lora_A"]._modules
    names = [name for name in layer.active_adapters if name in factors]
    if not names:
        return Projection(weight)
    if len(names) > 1:
        raise Unsupported("several active adapters")
    name = names[0]
    if name in layer.lora_variant:
        raise Unsupported(f"LoRA variant {type(layer.lora_variant[name]).__name__}")
    A, B, dropout = factors[name], modules["lora_B"]._modules[name], modules["lora_dropout"]._modules[name]
    if type(A) is not nn.Linear or type(B) is not nn.Linear:
        raise Unsupported("LoRA factors that are not plain linear layers")
    if A._parameters.get("bias") is not None or B._parameters.get("bias") is not None:
        raise Unsupported("LoRA factors that are not plain linear layers")
    if hooked(A) or hooked(B) or hooked(dropout):
        raise Unsupported("hooks on a LoRA layer")
    a, b = _weight(A), _weight(B)
    if not plain(a) or not plain(b):
        raise Unsupported("sharded LoRA factors")
    rate = 0.0
    if type(dropout) is not nn.Identity:
        if type(dropout) is not nn.Dropout:
            raise Unsupported(f"LoRA dropout of type {type(dropout).__name__}")
        rate = dropout.p if dropout.training else 0.0
        if rate >= 1:
            raise Unsupported("LoRA dropout of everything")
    if autocast is None and a.dtype != x.dtype and not getattr(layer, "cast_input_dtype_enabled", True):
        raise Unsupported("input casting disabled")
    return Projection(weight, Adapter(a, b, float(layer.scaling[name])), rate)


def read(layers: Sequence[nn.Module], x: torch.Tensor) -> list[Projection]:
    """What each of `layers` computes from `x`, for `kernels.lora` in the autocast region of `x`.

    Raises:
        Unsupported: only the layers' own forwards compute it.
    """
    autocast = autocast_dtype(x)
    # A 4-bit weight's class answers torch functions itself: reading its address would cost more than all the rest.
    with torch._C.DisableTorchFunctionSubclass():
        return [_read(layer, x, autocast) for layer in layers]


def project(layers: Sequence[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
    """The layers' outputs for `x`, through `kernels.lora`. Raises Unsupported, as `read`."""
    projections = read(layers, x)
    outs = lora_projections(x, projections, autocast_dtype(x))
    return [as_output(out, projection, x) for out, projection in zip(outs, projections)]


def as_output(y: torch.Tensor, projection: Projection, x: torch.Tensor) -> torch.Tensor:
    """`y` in the dtype that the layer returns: bitsandbytes casts back to its input's, a dense layer does not."""
    return y.to(x.dtype) if isinstance(projection.weight, NF4Weight) else y


def fused_gemm_is_better(layer: Any, x: torch.Tensor) -> bool:
    """Whether bitsandbytes' fused 4-bit product serves this call: a few rows, as in decoding, without gradients."""
    if torch.is_grad_enabled() or x.shape[:-1].numel() > 64:
        return False
    base = getattr(layer, "base_layer", layer)
    return type(base).__name__ == "Linear4bit"
