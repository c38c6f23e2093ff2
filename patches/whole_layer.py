"""A decoder layer as two operations, around its attention, where every part of it is as transformers made it.

`read_before` and `read_after` read what the layer's modules hold for each operation, or raise `Unsupported`: then the
layer runs in parts, and the part that is not exact counts why.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastgemma.kernels.checkpointed_layer import After, Before
from fastgemma.kernels.post_attention import Matrices, Norms, post_attention_unchecked
from fastgemma.kernels.post_attention_tiles import post_attention_in_tiles, splits_rows
from fastgemma.kernels.pre_attention import Outputs, pre_attention_unchecked
from fastgemma.kernels.qk_norm_rope_launch import Heads
from fastgemma.patches import projections
from fastgemma.patches.attention import qkv_layers, rope_unusable, rotary_dim, rotation_of
from fastgemma.patches.engine import Op
from fastgemma.patches.guards import activation_unusable, hooked, is_ours, is_stock
from fastgemma.patches.norms import norm_unusable
from fastgemma.patches.projections import Unsupported

# Features that a whole layer is made of.
PARTS = ("rms_norm", "rope", "geglu", "lora")
_FEEDFORWARD_NORMS = ("pre_feedforward_layernorm", "post_feedforward_layernorm")


def _part(layer: nn.Module, name: str) -> Any:
    module: Any = layer._modules.get(name)
    kind: Any = type(module)
    if not is_stock(kind) or hooked(module) or not is_ours(kind):
        raise Unsupported(f"{name} does more than stock's")
    return module


def _norm(layer: nn.Module, name: str, x: torch.Tensor, eps: float | None = None) -> Any:
    norm = _part(layer, name)
    reason = norm_unusable(norm, x)
    if reason is None and norm._parameters.get("weight") is None:
        reason = "norm without a weight of its own"  # or a replica of DataParallel's, which has no parameters
    if reason is None and eps not in (None, norm.eps):
        reason = "norms with different eps"
    if reason is not None:
        raise Unsupported(reason)
    return norm


def _check_activation(activation: Any) -> None:
    reason = activation_unusable(activation)
    if reason is not None:
        raise Unsupported(reason)


def _autocast(x: torch.Tensor) -> torch.dtype | None:
    autocast = projections.autocast_dtype(x)
    if autocast not in (None, x.dtype):
        raise Unsupported(f"{x.dtype} under autocast to {autocast}")
    return autocast


def read_before(
    layer: nn.Module, hidden_states: torch.Tensor, position_embeddings: tuple[torch.Tensor, torch.Tensor]
) -> Before:
    """Raises Unsupported."""
    if torch.compiler.is_compiling():
        raise Unsupported("compiling")
    attention = _part(layer, "self_attn")
    reason = rope_unusable(attention, rotation_of(type(attention)), hidden_states, *position_embeddings)
    if reason is not None:
        raise Unsupported(reason)
    if projections.fused_gemm_is_better(attention._modules["q_proj"], hidden_states):
        raise Unsupported("few rows: fused 4-bit product")
    autocast = _autocast(hidden_states)
    norm = _norm(layer, "input_layernorm", hidden_states)
    linears = qkv_layers(attention)
    modules = attention._modules
    q_norm, k_norm = modules["q_norm"], modules.get("k_norm")
    if any(norm is not None and norm._parameters.get("weight") is None for norm in (q_norm, k_norm)):
        raise Unsupported("norm without a weight of its own")
    return Before(
        norm._parameters["weight"],
        projections.read(linears, hidden_states),
        q_norm._parameters["weight"],
        None if k_norm is None else k_norm._parameters["weight"],
        Heads(attention.head_dim, rotary_dim(attention), len(linears) == 2, q_norm.eps),
        norm.eps,
        autocast,
    )


def before_attention(read: Before, hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Outputs:
    """The residual, and q, k and v as [batch, heads, seq_len, head_dim]; k and v None if the layer shares others'."""
    norm_weight, linears, *norms_and_numbers = read
    residual, *qkv = pre_attention_unchecked(
        hidden_states,
        norm_weight,
        linears,
        cos,
        sin,
        *norms_and_numbers,  # type: ignore[arg-type]
    )
    q, k, v = (None if x is None else x.transpose(1, 2) for x in qkv)
    assert q is not None
    return residual, q, k, v


def read_after(layer: Any, residual: torch.Tensor, per_layer_input: torch.Tensor | None) -> After:
    """Raises Unsupported."""
    if getattr(layer, "enable_moe_block", False):
        raise Unsupported("experts")
    mlp = _part(layer, "mlp")
    _check_activation(mlp.act_fn)
    autocast = _autocast(residual)
    scalar = layer.layer_scalar
    if scalar.numel() != 1 or scalar.requires_grad:
        raise Unsupported("layer scalar with a gradient")
    first = _norm(layer, "post_attention_layernorm", residual)
    eps = first.eps
    norms = [first, *(_norm(layer, name, residual, eps) for name in _FEEDFORWARD_NORMS)]
    linears = [mlp._modules[name] for name in ("gate_proj", "up_proj", "down_proj")]
    if getattr(layer, "hidden_size_per_layer_input", 0):
        _check_activation(layer.act_fn)
        if per_layer_input is None or per_layer_input.dtype != residual.dtype:
            raise Unsupported("a per-layer input of another dtype")
        norms.append(_norm(layer, "post_per_layer_input_norm", residual, eps))
        linears += [layer._modules["per_layer_input_gate"], layer._modules["per_layer_projection"]]
    elif per_layer_input is not None:
        raise Unsupported("a per-layer input that nothing reads")
    read = projections.read([layer._modules["self_attn"]._modules["o_proj"], *linears], residual)
    return After(Norms(*(norm._parameters["weight"] for norm in norms)), Matrices(*read), scalar, eps, autocast)


def after_attention(
    read: After, attended: torch.Tensor, residual: torch.Tensor, per_layer_input: torch.Tensor | None
) -> torch.Tensor:
    """The layer's output from what its attention gathered, [batch, seq_len, num_heads * head_dim]."""
    norms, matrices, scalar, eps, autocast = read
    return post_attention_unchecked(attended, residual, norms, matrices, scalar, per_layer_input, eps, autocast)


def after_attention_checkpointed(
    read: After,
    attended: torch.Tensor,
    residual: torch.Tensor,
    per_layer_input: torch.Tensor | None,
    computes: bool,
) -> torch.Tensor:
    """`after_attention` as the last operation of a checkpoint; with `computes` False its output may mean nothing."""
    norms, matrices, scalar, eps, autocast = read
    if not splits_rows(residual, matrices):
        return after_attention(read, attended, residual, per_layer_input)
    return post_attention_in_tiles(
        attended, residual, norms, matrices, scalar, per_layer_input, eps, autocast, computes
    )


def count_before(ops: Mapping[str, Op]) -> None:
    """Counts the fast calls that `before_attention` stands for."""
    for name in ("rms_norm", "rope", "lora"):
        ops[name].fast()


def count_after(ops: Mapping[str, Op], gated: bool) -> None:
    """Counts the fast calls that `after_attention` stands for, with or without a per-layer input."""
    times = 2 if gated else 1
    ops["rms_norm"].fast(2 + times)
    ops["lora"].fast(2 * times)
    ops["geglu"].fast(times)
