"""Gemma 4's attention: its projections and norms, and the attention itself where the masks are intervals of keys."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastgemma.kernels.attention import attention as interval_attention
from fastgemma.kernels.attention import attention_problem
from fastgemma.kernels.backend import interpreting
from fastgemma.kernels.key_intervals import KeyIntervals
from fastgemma.kernels.launch import why_efficient_attention
from fastgemma.kernels.qk_norm_rope import qk_norm_rope
from fastgemma.patches import caches, projections
from fastgemma.patches.engine import Op
from fastgemma.patches.guards import for_hooks, hooked, is_known, is_stock, is_transformers_own, plain, unusable
from fastgemma.patches.interval_masks import IntervalMask


def rotary_dim(attention: Any) -> int:
    """How many dimensions of a head turn: all, or a fraction where the layer's RoPE is "proportional"."""
    parameters = attention.config.rope_parameters[attention.layer_type]
    if parameters["rope_type"] == "proportional":
        return 2 * int(parameters.get("partial_rotary_factor", 1.0) * attention.head_dim // 2)
    return attention.head_dim


def qkv_layers(attention: Any) -> list[nn.Module]:
    """A layer's projections: of queries; of keys, unless it shares another's; of values, unless they are the keys."""
    modules = attention._modules
    names = ("q_proj",) if attention.is_kv_shared_layer else ("q_proj", "k_proj", "v_proj")
    return [modules[name] for name in names if modules.get(name) is not None]


def rotation_of(kind: Any) -> Any:
    """What stands as `apply_rotary_pos_emb` in the module of a stock class."""
    return sys.modules[kind.__module__].apply_rotary_pos_emb  # type: ignore[attr-defined]


def angles_unusable(attention: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str | None:
    """Why the heads of x [batch, seq_len, ...] cannot be turned by these angles, or None."""
    if cos.requires_grad or sin.requires_grad:
        return "gradient through the rotation angles"
    if cos.shape[0] not in (1, x.shape[0]) or cos.shape[1:] != (x.shape[1], attention.head_dim):
        return f"rotation angles of shape {tuple(cos.shape)}"
    return None


def rope_unusable(attention: Any, rotate: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str | None:
    """Why `qk_norm_rope` cannot stand in for the norms and rotations of this call, or None.

    `rotate` is what stands as `apply_rotary_pos_emb` in the attention's module; `x` [batch, seq_len, ...] the queries'
    projection, or what they are projected from.
    """
    reason = unusable(x) or angles_unusable(attention, x, cos, sin)
    if reason is not None:
        return reason
    if not is_transformers_own(rotate):
        return "another apply_rotary_pos_emb"
    modules = attention._modules
    norms = [modules[name] for name in ("q_norm", "k_norm", "v_norm") if name in modules]
    for norm in norms:
        if hooked(norm):
            return "hooks on a norm"
        kind: Any = type(norm)
        if not is_stock(kind):
            return "a norm of another class"
        if not is_known(kind):
            return "another forward of the norms"
        weight = norm._parameters.get("weight")
        if weight is not None and (not plain(weight) or weight.device != x.device):
            return "norm weight that is sharded or elsewhere"
        if norm.eps != norms[0].eps:
            return "norms with different eps"
    if norms[0].weight.dtype != norms[min(1, len(norms) - 1)].weight.dtype:
        return "norm weights in different dtypes"
    return None


def intervals_unusable(x: torch.Tensor, head_dim: int, intervals: KeyIntervals) -> str | None:
    """Why attention over intervals cannot run on queries of x's device and dtype, or None."""
    reason = unusable(x)
    if reason is not None:
        return reason
    if x.is_cuda and not interpreting() and (reason := attention_problem(x.device, x.dtype)) is not None:
        return reason
    if intervals.runs is None and why_efficient_attention(x.device) is not None:
        return "a mask for another device"  # layers may lie on GPUs of several kinds
    return f"heads of {head_dim}" if head_dim < 16 or head_dim & (head_dim - 1) else None


def _keys_unusable(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why attention over intervals cannot take these [batch, heads, length, head_dim] together, or None."""
    if not query.dtype == key.dtype == value.dtype:
        return "queries, keys and values in different dtypes"
    return "keys from a cache" if key.shape[2] != query.shape[2] else None


def count_attention(op: Op, device: torch.device) -> None:
    """Counts a call that attended over intervals, and notes where that is not by our kernels."""
    op.fast()
    reason = why_efficient_attention(device)
    op.note = None if reason is None else f"PyTorch's memory-efficient kernel: {reason}"


def attend(
    op: Op,
    eager: Callable[..., Any],
    attention: Any,
    query: torch.Tensor,
    key: torch.Tensor | None,
    value: torch.Tensor | None,
    attention_mask: torch.Tensor | IntervalMask | None,
    shared_kv_states: Any,
    cache: Any,
    /,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention over normed and rotated [batch, heads, seq_len, head_dim], caches and sharing included.

    Over intervals of keys it is ours, over any other mask stock's. `eager` is the family's `eager_attention_forward`.

    Returns:
        [batch, seq_len, heads * head_dim], and the attention weights where the implementation gives them.
    """
    if attention.is_kv_shared_layer:
        key, value = shared_kv_states[attention.layer_type]
        key, value = key.to(query.device), value.to(query.device)
    elif cache is not None:
        key, value = caches.update(cache, key, value, attention.layer_idx, kwargs)
    if attention.store_full_length_kv:
        shared_kv_states[attention.layer_type] = key, value
    if isinstance(attention_mask, IntervalMask):
        assert key is not None and value is not None
        intervals = attention_mask.on(query.device)
        reason = intervals_unusable(query, query.shape[3], intervals) or _keys_unusable(query, key, value)
        if reason is None:
            count_attention(op, query.device)
            q, k, v = (x.transpose(1, 2) for x in (query, key, value))
            return interval_attention(q, k, v, intervals, attention.scaling).flatten(2), None
        op.fallback(reason)
        attention_mask = attention_mask.dense(attention.config._attn_implementation, query)
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)
    output, weights = interface(
        attention,
        query,
        key,
        value,
        attention_mask,
        dropout=attention.attention_dropout if attention.training else 0.0,
        scaling=attention.scaling,
        sliding_window=attention.sliding_window,
        **kwargs,
    )
    return output.reshape(*output.shape[:2], -1), weights


def make_attention(original: Callable[..., Any], ops: dict[str, Op]) -> Callable[..., Any]:
    rope, lora, over_intervals = ops["rope"], ops["lora"], ops["attention"]
    module = importlib.import_module(original.__module__)

    def project(layers: list[nn.Module], x: torch.Tensor) -> list[torch.Tensor]:
        if lora.active:
            reason = unusable(x)
            if reason is None and projections.fused_gemm_is_better(layers[0], x):
                reason = "few rows: fused 4-bit product"
            if reason is None:
                try:
                    outs = projections.project(layers, x)
                    lora.fast()
                    return outs
                except projections.Unsupported as unsupported:
                    reason = str(unsupported)
            lora.fallback(reason)
        return [layer(x) for layer in layers]

    def norm_and_rotate(attention, q, k, v, cos, sin):
        """q, k, v as [batch, heads, seq_len, head_dim]."""
        if rope.active:
            reason = rope_unusable(attention, module.apply_rotary_pos_emb, q, cos, sin)
            if reason is None and k is not None and k.dtype != q.dtype:
                reason = "queries and keys in different dtypes"
            if reason is None:
                rope.fast()
                outs = qk_norm_rope(
                    q,
                    k,
                    v,
                    cos,
                    sin,
                    attention.q_norm.weight,
                    None if k is None else attention.k_norm.weight,
                    attention.head_dim,
                    rotary_dim(attention),
                    values_from_keys=k is not None and v is None,
                    eps=attention.q_norm.eps,
                )
                return [None if out is None else out.transpose(1, 2) for out in outs]
            rope.fallback(reason)
        heads = (-1, attention.head_dim)
        q = module.apply_rotary_pos_emb(attention.q_norm(q.unflatten(-1, heads)), cos, sin, unsqueeze_dim=2)
        if k is None:
            return q.transpose(1, 2), None, None
        k = k.unflatten(-1, heads)
        v = k if v is None else v.unflatten(-1, heads)
        k = module.apply_rotary_pos_emb(attention.k_norm(k), cos, sin, unsqueeze_dim=2)
        return q.transpose(1, 2), k.transpose(1, 2), attention.v_norm(v).transpose(1, 2)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None,
        shared_kv_states: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if args:
            (kwargs[caches.CACHE],) = args
        cache, kwargs = caches.cache_of(kwargs), caches.without_cache(kwargs)
        if not (rope.active or lora.active or over_intervals.active):
            return original(self, hidden_states, position_embeddings, attention_mask, shared_kv_states, cache, **kwargs)
        q, k, v, *_ = [*project(qkv_layers(self), hidden_states), None, None]
        query, key, value = norm_and_rotate(self, q, k, v, *position_embeddings)
        eager = module.eager_attention_forward
        output, weights = attend(
            over_intervals, eager, self, query, key, value, attention_mask, shared_kv_states, cache, **kwargs
        )
        return for_hooks(self, project([self.o_proj], output)[0]), weights

    return forward
