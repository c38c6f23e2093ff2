"""A checkpointed decoder layer as one operation, or as two CUDA graphs where its launches take longer than its kernels.

Both take the place of transformers' own checkpointing of the layer: their backward computes it again. The operation
(`fastgemma.kernels.checkpointed_layer`) is what `decoder_layer` runs in two around the attention, to the bit.

A layer of E2B launches about 150 kernels in a training step. On a large card they take the host longer than the GPU; as
two graphs (`fastgemma.kernels.graph_replay`) the layer costs the host a tenth. A graph is only as good as what it was
recorded for: only one of exactly the layer that a call reads (weights, adapters, scalings, dropout rates, shapes, what
requires gradients) is replayed. Recording waits until it pays: for a shape that comes often, after its first calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastgemma.kernels.attention import attention_problem
from fastgemma.kernels.attention_backward import key_blocks
from fastgemma.kernels.backend import interpreting
from fastgemma.kernels.graph_replay import Tensors
from fastgemma.kernels.key_intervals import KeyIntervals
from fastgemma.kernels.launch import why_efficient_attention
from fastgemma.kernels.workspace import card_bytes
from fastgemma.patches.attention import attend, count_attention, intervals_unusable, rotation_of
from fastgemma.patches.engine import Op
from fastgemma.patches.guards import hooked, is_ours, is_stock, is_transformers_own, unusable
from fastgemma.patches.interval_masks import IntervalMask
from fastgemma.patches.layer_calls import call_noted, plainly_checkpointed
from fastgemma.patches.layer_readings import Reading, Readings
from fastgemma.patches.layer_recordings import IntervalForm, LayerGraphs
from fastgemma.patches.per_layer_inputs import hands_out_states
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


class _Call(NamedTuple):
    """A call of a layer that transformers checkpoints, and that is nothing but what transformers made it."""

    hidden_states: torch.Tensor
    per_layer_input: torch.Tensor | None
    key: torch.Tensor | None  # of another layer, [batch, seq_len, heads, head_dim]
    value: torch.Tensor | None
    cos: torch.Tensor
    sin: torch.Tensor
    mask: Any
    shared: Any

    @property
    def inputs(self) -> Tensors:
        return self[:4]


def _read_call(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call:
    """Raises Unsupported."""
    rest = dict(kwargs)
    hidden_states = args[0] if args else rest.pop("hidden_states")
    # gemma4's layers take it second; gemma4_unified's know none.
    per_layer_input = args[1] if len(args) > 1 else rest.pop("per_layer_input", None)
    if len(args) > (2 if hasattr(layer, "hidden_size_per_layer_input") else 1):
        raise Unsupported("positional arguments")
    reason = unusable(hidden_states)
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
    cos, sin = rest.pop("position_embeddings")
    mask, shared = rest.pop("attention_mask", None), rest.pop("shared_kv_states", None)
    for name, value in rest.items():
        if value is not None and name not in _UNREAD:
            raise Unsupported(f"the argument {name}")
    attention = layer.self_attn
    kind = type(attention)
    if not is_stock(kind):
        raise Unsupported("self_attn does more than stock's")
    if attention.store_full_length_kv and (rest.get("return_shared_kv_states") or hands_out_states()):
        # Those that a recomputed layer hands on are not those that its own attention reads: their gradient is a part.
        raise Unsupported("keys and values that the caller sees")
    key, value = None, None
    if attention.is_kv_shared_layer:
        key, value = (x.transpose(1, 2) for x in shared[attention.layer_type])
    return _Call(hidden_states, per_layer_input, key, value, cos, sin, mask, shared)


def _constants(layer: Any, call: _Call, over_intervals: Op) -> tuple[Tensors, IntervalForm | None]:
    """What a recording reads beside the inputs, and what is known of intervals. Raises Unsupported."""
    attention, mask, device = layer.self_attn, call.mask, call.hidden_states.device
    if isinstance(mask, IntervalMask):
        # What attention cannot take counts its own reason in a plain call.
        dtype = call.hidden_states.dtype
        compiled = device.type == "cuda" and not interpreting()
        if not over_intervals.active or compiled and attention_problem(device, dtype) is not None:
            raise Unsupported("attention other than over intervals")
        intervals = mask.on(device)
        by_runs = why_efficient_attention(device) is not None
        if by_runs and (intervals.runs is None or intervals.runs.bounds is not None):
            raise Unsupported("packed rows, whose lengths PyTorch's memory-efficient kernel is launched by")
        blocks = () if by_runs else key_blocks(attention.head_dim, dtype, device)
        form = IntervalForm(intervals.causal, intervals.window, blocks, one_run=by_runs)
        return (call.cos, call.sin, *intervals.tensors(blocks)), form
    if mask is not None and mask.requires_grad:
        raise Unsupported("gradient through the mask")
    interface = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, attend)
    if interface is not sdpa_attention_forward or attention.attention_dropout:
        raise Unsupported("attention other than SDPA without dropout")
    return (call.cos, call.sin, mask), None


def _intervals(layer: Any, call: _Call, over_intervals: Op) -> KeyIntervals:
    """What the layer's attention runs over as one of its operations. Raises Unsupported."""
    if not over_intervals.active or not isinstance(call.mask, IntervalMask):
        raise Unsupported("attention other than over intervals")
    x = call.hidden_states
    reason = why_efficient_attention(x.device)
    if reason is not None:
        raise Unsupported(f"PyTorch's memory-efficient attention: {reason}")
    intervals = call.mask.on(x.device)
    reason = intervals_unusable(x, layer.self_attn.head_dim, intervals)
    if reason is None and intervals.shape != x.shape[:2]:
        reason = "a mask of another shape"
    for states in (call.key, call.value):
        if states is not None and (states.device, states.dtype, states.shape[:2]) != (x.device, x.dtype, x.shape[:2]):
            reason = "shared keys and values unlike the hidden states"
    if not layer.self_attn.scaling > 0:
        reason = "a scale of the scores that is not above 0"
    if reason is not None:
        raise Unsupported(reason)
    return intervals


def make_layer_call(original: Callable[..., Any], ops: dict[str, Op]) -> Callable[..., Any]:
    """`__call__` of the layer class: around transformers' checkpointing, whatever method it lives in."""
    readings, graphs = Readings(), LayerGraphs()
    recorded, checkpointed = ops["cuda_graphs"], ops["checkpointing"]
    recorded.release, checkpointed.release = graphs.clear, readings.clear
    parts = {name: ops[name] for name in PARTS}
    over_intervals = ops["attention"]

    def replay(layer: Any, call: _Call, reading: Reading) -> tuple[torch.Tensor, ...]:
        """Raises Unsupported."""
        reason = _not_worth(recorded.mode, call.hidden_states)
        if reason is not None:
            raise Unsupported(reason)
        constants, form = _constants(layer, call, over_intervals)
        graph = graphs.find(layer, reading, over_intervals, call.inputs, constants, form)
        recorded.fast()
        if form is not None:
            count_attention(over_intervals, call.hidden_states.device)
        return graph(call.inputs, constants)

    def run(layer: Any, call: _Call, reading: Reading) -> tuple[torch.Tensor, ...]:
        """Raises Unsupported."""
        if not reading.trains_leaves:
            raise Unsupported("trained tensors that are computed")
        intervals = _intervals(layer, call, over_intervals)
        checkpointed.fast()
        count_attention(over_intervals, call.hidden_states.device)
        return reading.operation(*call[:6], intervals)

    def whole(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
        """The layer by the first way that takes it, or None; counts why another did not."""
        ways = [way for way in ((recorded, replay), (checkpointed, run)) if way[0].active]
        outputs = None
        try:
            call = _read_call(layer, args, kwargs)
            reading = readings.find(layer, call.hidden_states, call.per_layer_input, (call.cos, call.sin))
        except Unsupported as unsupported:
            for op, _ in ways:
                op.fallback(str(unsupported))
            return None
        for op, way in ways:
            try:
                outputs = way(layer, call, reading)
                break
            except Unsupported as unsupported:
                op.fallback(str(unsupported))
        if outputs is None:
            return None
        count_before(parts)
        count_after(parts, call.per_layer_input is not None)
        out, *states = outputs
        if states:
            call.shared[layer.self_attn.layer_type] = tuple(x.transpose(1, 2) for x in states)
        return out

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not (
            self.training
            and self.gradient_checkpointing
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and all(part.active for part in parts.values())
        ):
            if not (self.training or torch.compiler.is_compiling()):
                readings.forget(self)  # its weights may be gone, merged or moved
            return original(self, *args, **kwargs)
        # Outside of any handler where the plain call follows: the exception of a failed recording would keep that
        # recording's memory alive.
        out = whole(self, args, kwargs) if recorded.active or checkpointed.active else None
        return call_noted(original, self, args, kwargs) if out is None else out

    return __call__
