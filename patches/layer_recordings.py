"""Recordings of decoder layers, for `layer_graphs`: what belongs to one, and when one is made.

A recording is the layer as `whole_layer` runs it around its attention, with whatever it reads at the addresses that it
had then. It is found again by a key of everything that it depends on, which a layer's `Reading` remembers.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from fastgemma.kernels.checkpointed_layer import After, Before
from fastgemma.kernels.graph_replay import Arena, Replay, Tensors
from fastgemma.kernels.key_intervals import KeyIntervals
from fastgemma.kernels.nf4 import NF4Weight
from fastgemma.kernels.workspace import workspace_bytes
from fastgemma.patches.attention import attend, rotary_dim
from fastgemma.patches.engine import Op, PatchError
from fastgemma.patches.interval_masks import IntervalMask
from fastgemma.patches.layer_readings import Reading
from fastgemma.patches.projections import Unsupported
from fastgemma.patches.whole_layer import after_attention_checkpointed, before_attention

# Calls of a shape that run as ever: recording takes about as long as a few of them, and has to come back.
_PLAIN_CALLS = 2
# A layer keeps so many recordings, and a shape is recorded when at least that share of all calls has it: no more shapes
# qualify than are kept.
_MAX_GRAPHS = 4
_MAX_COUNTED = 256
# Gradients of trained tensors are copied once more than without graphs: for adapters that is nothing.
_MAX_TRAINED_BYTES = 64 << 20
# Kernels are compiled for pointers that are aligned to this, and for others.
_VECTOR_BYTES = 16


@dataclass
class _Layer:
    """What is known of one layer: how often calls came, and the recordings, the last used one last."""

    calls: Counter[Any] = field(default_factory=Counter)
    graphs: dict[Any, LayerGraph] = field(default_factory=dict)


class LayerGraph:
    """A recorded layer. Holds the weights that it was recorded with, so that nothing else takes their addresses."""

    def __init__(
        self,
        layer: Any,
        over_intervals: Op,
        arena: Arena,
        reading: Reading,
        inputs: Tensors,
        constants: Tensors,
        form: IntervalForm | None,
        outside: _Key,
    ):
        """`outside`: what the recording depends on beside the layer."""
        self.read = read = reading.before, reading.after
        self.trained = reading.trained
        attention = layer.self_attn
        kind = attention.layer_type
        names = ("hidden_states", "per_layer_input", f"keys {kind}", f"values {kind}")
        masks = ("mask",) if form is None else [f"interval bound {number}" for number in range(len(constants) - 2)]
        self.replay = Replay(
            lambda inputs, constants, trained, reads: _run(
                attention, over_intervals, self._with(trained), inputs, constants, form, reads
            ),
            arena,
            (names, tuple(f"{name} {kind}" for name in ("cos", "sin", *masks))),
            inputs,
            constants,
            self.trained,
            reading.operation.draws,
            (outside, workspace_bytes(arena.device), attention.store_full_length_kv, _likeness(read)),
            recurring=frozenset(names[2:]),
        )

    def _with(self, trained: Sequence[torch.Tensor]) -> tuple[Before, After]:
        return _swap(self.read, {id(old): new for old, new in zip(self.trained, trained)})

    def __call__(self, inputs: Tensors, constants: Tensors) -> tuple[torch.Tensor, ...]:
        return self.replay(inputs, constants, self.trained)


class IntervalForm(NamedTuple):
    """What intervals of keys are beside their tensors: constants of a recording."""

    causal: bool
    window: int | None
    blocks: tuple[int, ...]
    one_run: bool


def _run(
    attention: Any,
    over_intervals: Op,
    read: tuple[Before, After],
    inputs: Tensors,
    constants: Tensors,
    form: IntervalForm | None,
    reads: bool,
) -> tuple[torch.Tensor, ...]:
    """The layer's output, and its keys and values where other layers share them, as [batch, seq_len, heads, dim].

    Where nobody `reads` them, the output may hold anything.
    """
    hidden_states, per_layer_input, key, value = inputs
    cos, sin, *masks = constants
    assert hidden_states is not None and cos is not None and sin is not None
    mask: Any = masks[0]
    if form is not None:
        mask = IntervalMask(KeyIntervals.from_tensors(masks, *form))  # type: ignore[arg-type]
    states = {}
    if key is not None and value is not None:
        states[attention.layer_type] = key.transpose(1, 2), value.transpose(1, 2)
    residual, q, k, v = before_attention(read[0], hidden_states, cos, sin)
    attended, _ = attend(over_intervals, sdpa_attention_forward, attention, q, k, v, mask, states, None)
    out = after_attention_checkpointed(read[1], attended, residual, per_layer_input, reads)
    if not attention.store_full_length_kv:
        return (out,)
    return out, *(x.transpose(1, 2) for x in states[attention.layer_type])


def _swap(item: Any, new: dict[int, torch.Tensor]) -> Any:
    """`item` with other tensors in the places of those whose ids are given."""
    if isinstance(item, torch.Tensor):
        return new.get(id(item), item)
    if isinstance(item, list):
        return [_swap(part, new) for part in item]
    if isinstance(item, tuple):
        parts = [_swap(part, new) for part in item]
        return type(item)(*parts) if hasattr(item, "_fields") else tuple(parts)
    return item


def _signature(item: Any) -> Any:
    """What a recording depends on: addresses of tensors, values of everything else."""
    if isinstance(item, torch.Tensor):
        return id(item), item.data_ptr(), item.requires_grad, item.dtype, item.stride()
    if isinstance(item, NF4Weight):
        return id(item)
    if isinstance(item, tuple | list):
        return tuple([_signature(part) for part in item])
    return item


def _likeness(item: Any) -> Any:
    """What decides which kernels work on these tensors and values: neither where tensors are nor what they hold."""
    if isinstance(item, torch.Tensor):
        return item.shape, item.stride(), item.dtype, item.requires_grad, item.data_ptr() % _VECTOR_BYTES
    if isinstance(item, NF4Weight):
        parts = (item.packed, item.absmax, item.code, *([] if item.nested is None else vars(item.nested).values()))
        return item.shape, item.dtype, item.blocksize, item.in_words, _likeness(parts)
    if isinstance(item, tuple | list):
        return tuple([_likeness(part) for part in item])
    return item


class _Key:
    """Parts that are compared, and hashed once: they are long, and looked up several times in a call."""

    __slots__ = ("_hash", "_parts")

    def __init__(self, *parts: Any) -> None:
        self._parts, self._hash = parts, hash(parts)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self._parts == other._parts


def _modes(kind: str) -> tuple[Any, ...]:
    """Global switches that decide which kernels torch runs on this kind of device."""
    cuda = torch.backends.cuda
    return (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        # Torch's older getter raises where TF32 was switched on by the newer setting.
        getattr(cuda.matmul, "fp32_precision", None),
        torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
    )


def _stream(device: torch.device) -> int:
    return torch._C._cuda_getCurrentRawStream(device.index) if device.type == "cuda" else 0


def _form(tensor: torch.Tensor | None) -> Any:
    return None if tensor is None else (tensor.shape, tensor.dtype, tensor.requires_grad)


_all_graphs: weakref.WeakSet[LayerGraphs] = weakref.WeakSet()


def _after_fork() -> None:
    for graphs in _all_graphs:
        graphs.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class LayerGraphs:
    """All recordings, by layer. They die with their layers, or with `clear`."""

    def __init__(self) -> None:
        self._layers: weakref.WeakKeyDictionary[Any, _Layer] = weakref.WeakKeyDictionary()
        self._arenas: weakref.WeakValueDictionary[Any, Arena] = weakref.WeakValueDictionary()
        self._lock = threading.RLock()
        self._full = False  # a recording found no memory; another attempt would cost as much and find none either
        _all_graphs.add(self)

    def after_fork(self) -> None:
        """In a forked child, where a thread that records at the moment is gone, and would keep the lock."""
        self._lock = threading.RLock()

    def clear(self) -> None:
        with self._lock:
            self._layers.clear()
            self._full = False

    def find(
        self,
        layer: Any,
        reading: Reading,
        over_intervals: Op,
        inputs: Tensors,
        constants: Tensors,
        form: IntervalForm | None,
    ) -> LayerGraph:
        """The recording of this layer, as it was read now, for these arguments; made now if it is time.

        Raises:
            Unsupported: the layer must run without one.
        """
        (hidden_states, *_), attention = inputs, layer.self_attn
        forms = tuple(map(_form, (*inputs, *constants)))
        switches = attention.sliding_window, attention.is_causal, attention.num_key_value_groups, rotary_dim(attention)
        # Recordings share buffers, so they belong to the thread and the stream that they are run from.
        place = (hidden_states.device, _stream(hidden_states.device), threading.get_ident())  # type: ignore[union-attr]
        outside = _Key(place, forms, form, switches, _modes(hidden_states.device.type))  # type: ignore[union-attr]
        with self._lock:
            known = self._layers.get(layer)
            if known is None:
                known = self._layers[layer] = _Layer()
            key = reading.keys.get(outside)
            if key is None:
                if len(reading.keys) >= _MAX_COUNTED:
                    reading.keys.clear()
                key = _Key(outside, attention.scaling, _signature((reading.before, reading.after)))
                reading.keys[outside] = key
            if len(known.calls) >= _MAX_COUNTED:
                known.calls.clear()
            known.calls[key] += 1
            graph = known.graphs.pop(key, None)
            if graph is None:
                if known.calls[key] <= _PLAIN_CALLS:
                    raise Unsupported("first calls of a shape")
                if _MAX_GRAPHS * known.calls[key] < known.calls.total():
                    raise Unsupported("shapes that vary")
                shape = place, *forms[0][:2]
                graph = self._record(layer, outside, shape, over_intervals, reading, inputs, constants, form)
                while len(known.graphs) >= _MAX_GRAPHS:
                    del known.graphs[next(iter(known.graphs))]
            known.graphs[key] = graph
            return graph

    def _record(
        self,
        layer: Any,
        outside: _Key,
        shape: Any,
        over_intervals: Op,
        reading: Reading,
        inputs: Tensors,
        constants: Tensors,
        form: IntervalForm | None,
    ) -> LayerGraph:
        """`outside`: what the recording depends on beside the layer; `shape`: under which recordings share an arena."""
        trained = reading.trained
        if not reading.trains_leaves:
            raise Unsupported("trained tensors that are computed")
        if not trained and not any(tensor is not None and tensor.requires_grad for tensor in inputs):
            raise Unsupported("nothing to differentiate")
        if sum(tensor.numel() * tensor.element_size() for tensor in trained) > _MAX_TRAINED_BYTES:
            raise Unsupported("large trained weights")
        if self._full:
            raise Unsupported("no memory for a recording")
        try:
            arena = self._arenas.get(shape)
            if arena is None:
                arena = self._arenas[shape] = Arena(shape[0][0])
            return LayerGraph(layer, over_intervals, arena, reading, inputs, constants, form, outside)
        except torch.OutOfMemoryError:
            self._full = True
            raise Unsupported("no memory for a recording") from None
        except RuntimeError as error:
            raise PatchError(
                f"fastgemma: a decoder layer could not be recorded as a CUDA graph ({str(error).splitlines()[0]}). No "
                "loss was computed, and the random state of this process may be unusable. Start again with "
                "fastgemma.patch(cuda_graphs=False), and please report it."
            ) from error
