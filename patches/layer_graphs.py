"""A checkpointed decoder layer as two CUDA graphs, where launching its kernels would take longer than running them.

A layer of E2B launches about 150 kernels in a training step. On a large card they take the host longer than the GPU; as
two graphs the layer costs the host a tenth. What is replayed is the layer as `whole_layer` runs it around its
attention, to the bit; `fastgemma.kernels.graph_replay` says how. It takes the place of transformers' own checkpointing
of the layer: the backward's graph recomputes it.

A graph is only as good as what it was recorded for. A call reads the layer as an ordinary call does, unless nothing in
the layer has changed since the last one, and only a graph of exactly that (weights, adapters, scalings, dropout rates,
shapes, what requires gradients) is replayed.
Recording waits until it pays: for a shape that comes often, after its first calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastgemma.kernels.attention import attention_problem
from fastgemma.kernels.attention_backward import key_blocks
from fastgemma.kernels.backend import interpreting
from fastgemma.kernels.graph_replay import Tensors
from fastgemma.kernels.launch import why_efficient_attention
from fastgemma.kernels.workspace import card_bytes
from fastgemma.patches.attention import attend, count_attention, rotation_of
from fastgemma.patches.engine import Op
from fastgemma.patches.guards import hooked, is_ours, is_stock, is_transformers_own, unusable
from fastgemma.patches.interval_masks import IntervalMask
from fastgemma.patches.layer_calls import call_noted, plainly_checkpointed
from fastgemma.patches.layer_recordings import IntervalForm, LayerGraphs
from fastgemma.patches.projections import Unsupported
from fastgemma.patches.whole_layer import PARTS, count_after, count_before

# The host is the limit up to about this many rows for each of the card's multiprocessors. Cards with less memory than
# this keep it for what must fit.
_ROWS_PER_MULTIPROCESSOR = 64
_LEAST_CARD_BYTES = 20 << 30
# Keyword arguments of a layer that stock SDPA attention does not read.
_UNREAD = frozenset(
    {
        "position_ids", "use_cache", "cache_position", "return_dict", "output_hidden_states", "num_items_in_batch",
        "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "return_shared_kv_states",
    }
)  # fmt: skip


def _not_worth(mode: bool | str, hidden_states: torch.Tensor) -> str | None:
    """Why a graph would not pay here, or None."""
    device = hidden_states.device
    if device.type != "cuda":
        return "no gpu"
    if device.index != torch.cuda.current_device():
        return "another device than the current one"
    if mode == "always":
        return None
    if card_bytes(device) < _LEAST_CARD_BYTES:
        return "a card with little memory"
    limit = _ROWS_PER_MULTIPROCESSOR * torch.cuda.get_device_properties(device).multi_processor_count
    return "many rows: the GPU is the limit" if hidden_states.shape[:-1].numel() > limit else None


def make_layer_call(original: Callable[..., Any], ops: dict[str, Op]) -> Callable[..., Any]:
    """`__call__` of the layer class: around transformers' checkpointing, whatever method it lives in."""
    graphs = LayerGraphs()
    op = ops["cuda_graphs"]
    op.release = graphs.clear
    parts = {name: ops[name] for name in PARTS}
    over_intervals = ops["attention"]

    def arguments(
        layer: Any, hidden_states: torch.Tensor, per_layer_input: torch.Tensor | None, kwargs: dict[str, Any]
    ) -> tuple[Tensors, Tensors, IntervalForm | None, Any]:
        """(inputs, constants, what is known of intervals, shared states). Raises Unsupported."""
        reason = unusable(hidden_states) or _not_worth(op.mode, hidden_states)
        if reason is not None:
            raise Unsupported(reason)
        kind: Any = type(layer)
        if not is_stock(kind) or not is_ours(kind) or layer._compiled_call_impl is not None:
            raise Unsupported("a layer whose own call is not stock's")
        if not is_transformers_own(rotation_of(kind)):
            raise Unsupported("another apply_rotary_pos_emb")
        if hooked(layer) or torch.is_anomaly_enabled():
            raise Unsupported("hooks on the layer, or anomaly detection")
        if not plainly_checkpointed(layer):
            raise Unsupported("another kind of checkpointing")
        rest = dict(kwargs)
        cos, sin = rest.pop("position_embeddings")
        mask, shared = rest.pop("attention_mask", None), rest.pop("shared_kv_states", None)
        for name, value in rest.items():
            if value is not None and name not in _UNREAD:
                raise Unsupported(f"the argument {name}")
        attention = layer.self_attn
        kind = type(attention)
        if not is_stock(kind):
            raise Unsupported("self_attn does more than stock's")
        key, value = None, None
        if attention.is_kv_shared_layer:
            key, value = (x.transpose(1, 2) for x in shared[attention.layer_type])
        inputs = hidden_states, per_layer_input, key, value
        if isinstance(mask, IntervalMask):
            # What attention cannot take counts its own reason in a plain call.
            device, dtype = hidden_states.device, hidden_states.dtype
            compiled = device.type == "cuda" and not interpreting()
            if not over_intervals.active or compiled and attention_problem(device, dtype) is not None:
                raise Unsupported("attention other than over intervals")
            intervals = mask.on(device)
            by_runs = why_efficient_attention(device) is not None
            if by_runs and (intervals.runs is None or intervals.runs.bounds is not None):
                raise Unsupported("packed rows, whose lengths PyTorch's memory-efficient kernel is launched by")
            blocks = () if by_runs else key_blocks(attention.head_dim, dtype, device)
            form = IntervalForm(intervals.causal, intervals.window, blocks, one_run=by_runs)
            return inputs, (cos, sin, *intervals.tensors(blocks)), form, shared
        if mask is not None and mask.requires_grad:
            raise Unsupported("gradient through the mask")
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, attend)
        if interface is not sdpa_attention_forward or attention.attention_dropout:
            raise Unsupported("attention other than SDPA without dropout")
        return inputs, (cos, sin, mask), None, shared

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (
            self.training
            and self.gradient_checkpointing
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and all(part.active for part in parts.values())
        ):
            return original(self, *args, **kwargs)
        if not op.active:
            return call_noted(original, self, args, kwargs)
        rest = dict(kwargs)
        hidden_states = args[0] if args else rest.pop("hidden_states")
        # gemma4's layers take it second; gemma4_unified's know none.
        per_layer_input = args[1] if len(args) > 1 else rest.pop("per_layer_input", None)
        reason = None
        try:
            if len(args) > (2 if hasattr(self, "hidden_size_per_layer_input") else 1):
                raise Unsupported("positional arguments")
            inputs, constants, form, shared = arguments(self, hidden_states, per_layer_input, rest)
            graph = graphs.find(self, over_intervals, inputs, constants, form)
        except Unsupported as unsupported:
            # Left before the plain call: the exception of a failed recording keeps that recording's memory alive.
            reason = str(unsupported)
        if reason is not None:
            op.fallback(reason)
            return call_noted(original, self, args, kwargs)
        op.fast()
        if form is not None:
            count_attention(over_intervals, hidden_states.device)
        count_before(parts)
        count_after(parts, per_layer_input is not None)
        out, *states = graph(inputs, constants)
        if states:
            shared[self.self_attn.layer_type] = tuple(x.transpose(1, 2) for x in states)
        return out

    return __call__
