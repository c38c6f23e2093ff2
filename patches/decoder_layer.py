"""Gemma 4's decoder layer: norms fused with their residual adds, and the per-layer-embedding gate."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from fastgemma.patches.engine import Engine, Op, PatchError
from fastgemma.patches.mlp import gate_times_up, project_one
from fastgemma.patches.norms import add_normed


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
        original = inspect.unwrap(decorated)

        def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if not (norms.active or activation.active or lora.active):
                return original(self, hidden_states, *args, **kwargs)
            gated = bool(getattr(self, "hidden_size_per_layer_input", 0))
            takes_per_layer_input = hasattr(self, "hidden_size_per_layer_input")
            # Positional arguments are what checkpointing saves: (hidden_states, per_layer_input) on gemma4, and
            # (hidden_states,) on gemma4_unified.
            per_layer_input: Any = None
            if takes_per_layer_input:
                per_layer_input = args[0] if args else kwargs.pop("per_layer_input", None)
                args = args[1:]
            names = ("shared_kv_states", "position_embeddings", "attention_mask", "position_ids", "past_key_values")
            kwargs.update(zip(names, args))

            residual = hidden_states
            attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
            hidden_states = add_normed(norms, self.post_attention_layernorm, attended, residual, None)

            residual = hidden_states
            hidden_states = self.mlp(self.pre_feedforward_layernorm(hidden_states))
            if getattr(self, "enable_moe_block", False):
                hidden_states = _add_experts(self, norms, hidden_states, residual)
            scalar = None if gated else self.layer_scalar
            hidden_states = add_normed(norms, self.post_feedforward_layernorm, hidden_states, residual, scalar)

            if gated:
                residual = hidden_states
                gate = project_one(lora, self.per_layer_input_gate, hidden_states)
                gate = gate_times_up(activation, self.act_fn, gate, per_layer_input)
                projected = project_one(lora, self.per_layer_projection, gate)
                hidden_states = add_normed(
                    norms, self.post_per_layer_input_norm, projected, residual, self.layer_scalar
                )
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
