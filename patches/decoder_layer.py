"""Gemma 4's decoder layer: two operations around its attention, or its parts, each in the fastest exact form."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from fastgemma.patches import whole_layer
from fastgemma.patches.attention import attend
from fastgemma.patches.caches import CACHE, cache_of, without_cache
from fastgemma.patches.engine import Engine, Op, PatchError
from fastgemma.patches.guards import recomputing
from fastgemma.patches.layer_calls import LayerCall, note_of
from fastgemma.patches.mlp import gate_times_up, project_one
from fastgemma.patches.norms import add_normed
from fastgemma.patches.projections import Unsupported

# What a layer hands to its attention whether it was given it or not.
_DEFAULTS = {"attention_mask": None, "shared_kv_states": None, "position_ids": None}


def _check_generation(engine: Engine, generation: int, grad: torch.Tensor) -> None:
    if engine.generation != generation:
        raise PatchError(
            "fastgemma: patches changed between a checkpointed forward and its backward, so the recomputed layer would "
            "not be the one whose loss was computed. No gradient was produced. Call patch(), unpatch() and leave "
            "patched() only between training steps."
        )


def make_decoder_layer(engine: Callable[[], Engine]) -> Callable[..., Callable[..., Any]]:
    """`engine` gives the engine that the row lives in: checkpointed layers note its generation."""

    def make(decorated: Callable[..., Any], ops: dict[str, Op]) -> Callable[..., Any]:
        norms, activation, lora = ops["rms_norm"], ops["geglu"], ops["lora"]
        rope = ops["rope"]
        original = inspect.unwrap(decorated)
        module = importlib.import_module(original.__module__)

        def in_two_operations(
            layer: Any,
            hidden_states: torch.Tensor,
            per_layer_input: torch.Tensor | None,
            kwargs: dict[str, Any],
            call: LayerCall | None,
        ) -> torch.Tensor | None:
            """The layer around its attention, or None where it has to run in parts."""
            rest = dict(kwargs)
            angles = rest.pop("position_embeddings")
            try:
                before = whole_layer.read_before(layer, hidden_states, angles)
            except Unsupported:
                return None  # the part that is to blame counts it
            residual, q, k, v = whole_layer.before_attention(before, hidden_states, *angles)
            whole_layer.count_before(ops)
            mask, shared = rest.pop("attention_mask"), rest.pop("shared_kv_states")
            how = ops["attention"], module.eager_attention_forward, layer.self_attn
            attended, _ = attend(*how, q, k, v, mask, shared, cache_of(rest), **without_cache(rest))
            try:
                if attended.dtype != residual.dtype:
                    raise Unsupported("another dtype")
                after = whole_layer.read_after(layer, residual, per_layer_input)
            except Unsupported:
                projected = project_one(lora, layer.self_attn.o_proj, attended)
                return behind_attention(layer, projected, residual, per_layer_input)
            if call is None:
                out = whole_layer.after_attention(after, attended, residual, per_layer_input)
            else:
                computes = not call.recomputes_for_gradients(layer)
                out = whole_layer.after_attention_checkpointed(after, attended, residual, per_layer_input, computes)
            whole_layer.count_after(ops, per_layer_input is not None)
            return out

        def in_parts(
            layer: Any, hidden_states: torch.Tensor, per_layer_input: torch.Tensor | None, kwargs: dict[str, Any]
        ) -> torch.Tensor:
            attended, _ = layer.self_attn(hidden_states=layer.input_layernorm(hidden_states), **kwargs)
            return behind_attention(layer, attended, hidden_states, per_layer_input)

        def behind_attention(
            layer: Any, attended: torch.Tensor, residual: torch.Tensor, per_layer_input: torch.Tensor | None
        ) -> torch.Tensor:
            """From the attention's projected output on."""
            gated = bool(getattr(layer, "hidden_size_per_layer_input", 0))
            residual = add_normed(norms, layer.post_attention_layernorm, attended, residual, None)
            hidden_states = layer.mlp(layer.pre_feedforward_layernorm(residual))
            if getattr(layer, "enable_moe_block", False):
                hidden_states = _add_experts(layer, norms, hidden_states, residual)
            scalar = None if gated else layer.layer_scalar
            hidden_states = add_normed(norms, layer.post_feedforward_layernorm, hidden_states, residual, scalar)
            if not gated:
                return hidden_states
            gate = project_one(lora, layer.per_layer_input_gate, hidden_states)
            assert per_layer_input is not None
            gate = gate_times_up(activation, layer.act_fn, gate, per_layer_input)
            projected = project_one(lora, layer.per_layer_projection, gate)
            return add_normed(norms, layer.post_per_layer_input_norm, projected, hidden_states, layer.layer_scalar)

        def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            call = note_of(kwargs)
            if not (norms.active or activation.active or lora.active):
                return original(self, hidden_states, *args, **kwargs)
            takes_per_layer_input = hasattr(self, "hidden_size_per_layer_input")
            # Positional arguments are what checkpointing saves: (hidden_states, per_layer_input) on gemma4, and
            # (hidden_states,) on gemma4_unified.
            per_layer_input: Any = None
            if takes_per_layer_input:
                per_layer_input = args[0] if args else kwargs.pop("per_layer_input", None)
                args = args[1:]
            names = ("shared_kv_states", "position_embeddings", "attention_mask", "position_ids", CACHE)
            kwargs = {**_DEFAULTS, **kwargs, **dict(zip(names, args))}

            if norms.active and activation.active and lora.active and rope.active:
                with recomputing(call is not None and call.over):
                    whole = in_two_operations(self, hidden_states, per_layer_input, kwargs, call)
                hidden_states = in_parts(self, hidden_states, per_layer_input, kwargs) if whole is None else whole
            else:
                hidden_states = in_parts(self, hidden_states, per_layer_input, kwargs)
            if self.gradient_checkpointing and self.training and hidden_states.requires_grad:
                current = engine()
                if not torch.compiler.is_compiling():
                    hidden_states.register_hook(functools.partial(_check_generation, current, current.generation))
            return hidden_states

        if original is decorated:
            return forward
        # Where transformers checkpoints inside `forward` rather than around it (as 5.23 does), it wraps the method when
        # a layer class is defined; defining one wraps ours with the same code.
        return vars(type("PatchedLayer", (GradientCheckpointingLayer,), {"forward": forward}))["forward"]

    return make


def _add_experts(layer: Any, norms: Op, dense: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """The dense branch plus the routed experts, which read the residual."""
    flat = residual.reshape(-1, residual.shape[-1])
    _, top_k_weights, top_k_index = layer.router(flat)
    routed = layer.experts(layer.pre_feedforward_layernorm_2(flat), top_k_index, top_k_weights)
    routed = layer.post_feedforward_layernorm_2(routed.reshape(residual.shape))
    return add_normed(norms, layer.post_feedforward_layernorm_1, dense, routed, None)
