"""The same model in float32, for the time of a `with` block.

Weights mean what they mean to the model: a 16-bit value is taken as it is, a 4-bit one as bitsandbytes dequantises it
in the model's dtype, an embedding's scale as it is rounded to the embedding's dtype. So what is left between a 16-bit
result and the truth is the rounding of arithmetic, in stock and patched code alike.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
from torch import nn
from torch.nn import functional

from fastgemma.verification.preserve import attention_implementation


class _FrozenLinear(torch.autograd.Function):
    """`x @ weight().T` in float32, with a weight that is made anew in the backward instead of being kept."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: Callable[[], torch.Tensor]) -> torch.Tensor:
        ctx.weight = weight
        return x @ weight().T

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        return dy @ ctx.weight(), None


def _is_4bit(module: nn.Module) -> bool:
    return hasattr(module._parameters.get("weight"), "quant_state")


def _upcast_in_passing(module: nn.Module) -> bool:
    """Whether a module's frozen weight is turned to float32 at each use: a float32 copy of all would not fit."""
    weight = module._parameters.get("weight")
    if weight is None or weight.requires_grad:
        return False
    return _is_4bit(module) or type(module) is nn.Linear or isinstance(module, nn.Embedding)


def _weight_in_float32(module: Any) -> torch.Tensor:
    weight = module._parameters["weight"]
    if not _is_4bit(module):
        return weight.detach().float()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state or module.quant_state).float()


def _forward_in_float32(module: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def embed(input_ids: torch.Tensor) -> torch.Tensor:
        rows = functional.embedding(input_ids, module.weight, module.padding_idx).float()
        scale = getattr(module, "embed_scale", None)
        return rows if scale is None else rows * scale

    def linear(x: torch.Tensor) -> torch.Tensor:
        y = _FrozenLinear.apply(x.float(), lambda: _weight_in_float32(module))
        return y if module.bias is None else y + module.bias

    return embed if isinstance(module, nn.Embedding) else linear


def _override_forward(module: nn.Module, stack: contextlib.ExitStack) -> None:
    former = module.__dict__.get("forward")
    if former is None:
        stack.callback(module.__dict__.pop, "forward")
    else:
        stack.callback(module.__dict__.__setitem__, "forward", former)
    module.__dict__["forward"] = _forward_in_float32(module)


def _buffer_in_float32(module: nn.Module, name: str, buffer: torch.Tensor) -> torch.Tensor:
    weight = module._parameters.get("weight")
    if name == "embed_scale" and weight is not None:
        buffer = buffer.to(weight.dtype)  # as its embedding does at each call
    return buffer.float()


def _copied(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Parameters that get a float32 copy: those that train, and the small ones."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or (name == "weight" and _upcast_in_passing(module)):
                continue
            if parameter.is_floating_point() and parameter.dtype != torch.float32:
                yield module, name, parameter


@contextlib.contextmanager
def in_float32(model: Any) -> Iterator[None]:
    """The model computes in float32, without autocast; its parameters' names stay, the parameters are others.

    Trainable parameters get gradients of the same names. FlashAttention, which has no float32, gives way to SDPA.
    Every parameter, buffer and `forward` is the former object again afterwards.
    """
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.is_floating_point():
                    stack.callback(module._buffers.__setitem__, name, buffer)
                    module._buffers[name] = _buffer_in_float32(module, name, buffer)
            if _upcast_in_passing(module):
                _override_forward(module, stack)
        copies: dict[int, nn.Parameter] = {}
        for module, name, parameter in list(_copied(model)):
            if id(parameter) not in copies:  # tied weights stay tied
                copies[id(parameter)] = nn.Parameter(parameter.detach().float(), parameter.requires_grad)
            stack.callback(module._parameters.__setitem__, name, parameter)
            module._parameters[name] = copies[id(parameter)]
        if model.config.get_text_config()._attn_implementation not in ("sdpa", "eager"):
            stack.enter_context(attention_implementation(model, "sdpa"))
        stack.enter_context(torch.autocast(next(model.parameters()).device.type, enabled=False))
        yield


def truth_problem(model: nn.Module, device: torch.device, activation_bytes: int) -> str | None:
    """Why the model cannot run in float32 here, or None.

    Args:
        activation_bytes: what a step in float32 takes beside weights and gradients, estimated.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            return f"{name} is offloaded"
        if not parameter.is_floating_point() and not hasattr(parameter, "quant_state"):
            return f"{name} is quantised in a way that only its own library can undo"
    copies = {id(parameter): parameter for _, _, parameter in _copied(model)}
    weights = 4 * sum(p.numel() * (2 if p.requires_grad else 1) for p in copies.values())
    in_passing = max((_dense_elements(m) for m in model.modules() if _upcast_in_passing(m)), default=0)
    needed = weights + 8 * in_passing + activation_bytes  # a dequantised weight exists in two dtypes for a moment
    free = _free_bytes(device)
    if needed > free:
        return f"it would need some {needed / 2**30:.1f} GiB more, and {free / 2**30:.1f} GiB are free"
    return None


def _dense_elements(module: Any) -> int:
    if isinstance(module, nn.Embedding):
        return 0  # only a batch's rows are upcast
    weight = module._parameters["weight"]
    return weight.quant_state.shape.numel() if _is_4bit(module) and weight.quant_state else weight.numel()


def _free_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    cached = torch.cuda.memory_reserved(device) - allocated
    allowed = int(total * torch.cuda.get_per_process_memory_fraction(device)) - allocated
    return min(free + cached, allowed)
