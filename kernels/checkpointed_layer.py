"""A decoder layer as one operation that saves its inputs alone, and computes itself again in the backward.

    residual, q, k, v = pre_attention(hidden_states)
    attended = attention(q, k, v)                                   k and v may be those of another layer
    out = post_attention(attended, residual, per_layer_input)

That is gradient checkpointing of three operations, by their own forwards and backwards, with nothing of autograd's
between them, whose notes of a layer the host would have to write down. The same kernels run in the same order on the
same values as under torch's checkpointing, and draw the same random numbers: results are equal to the bit. The formulas
are in the three operations.

Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016); `torch.utils.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fastgemma.kernels._autograd import (
    Context,
    backward_without_autocast,
    keep,
    kept,
    numbers_of,
    parts_of,
    split_trained,
)
from fastgemma.kernels._lora_parts import Projection
from fastgemma.kernels._once_differentiable import once_differentiable
from fastgemma.kernels.attention import _Attention
from fastgemma.kernels.key_intervals import KeyIntervals
from fastgemma.kernels.post_attention import Matrices, Norms, _PostAttention
from fastgemma.kernels.post_attention_tiles import _PostAttentionTiles, splits_rows
from fastgemma.kernels.pre_attention import _PreAttention
from fastgemma.kernels.qk_norm_rope_launch import Heads
from fastgemma.kernels.random_state import drawing_from, generator_of


class Before(NamedTuple):
    """What a layer holds for the operation before its attention, as `pre_attention` takes it."""

    norm_weight: torch.Tensor
    projections: list[Projection]
    q_norm_weight: torch.Tensor
    k_norm_weight: torch.Tensor | None
    heads: Heads
    eps: float
    autocast: torch.dtype | None


class After(NamedTuple):
    """What a layer holds for the operation after its attention, as `post_attention` takes it."""

    norms: Norms
    matrices: Matrices
    layer_scalar: torch.Tensor
    eps: float
    autocast: torch.dtype | None


class _Run(NamedTuple):
    """One run of a layer: its outputs, and of each operation what its backward reads."""

    outputs: tuple[torch.Tensor, ...]
    before: Context
    attention: Context
    after: Context
    operation: Any  # the one after the attention
    n_plain: int  # how many arguments it takes between its inputs and its trained tensors


# Arguments of `_PreAttention` between hidden_states and its trained tensors.
_N_PLAIN_BEFORE = 7


class CheckpointedLayer:
    """A layer of given weights.

    Args:
        before, after: what its operations are made of; their kernels must be able to run. Trained tensors are leaves.
        scale: of the attention's scores.
        hands_on_keys: whether other layers read its keys and values; it then returns them too.
    """

    def __init__(self, before: Before, after: After, scale: float, hands_on_keys: bool) -> None:
        norm_weight, projections, q_norm_weight, k_norm_weight, *rest = before
        tensors = [norm_weight, q_norm_weight, k_norm_weight, *parts_of(projections)]
        static, self.trained_before = split_trained(tensors)
        self._before = static, numbers_of(projections), *rest
        self._matrices = after.matrices
        matrices = [matrix for matrix in after.matrices if matrix is not None]
        static, self.trained_after = split_trained([*after.norms, *parts_of(matrices)])
        self._after = after.layer_scalar, static, numbers_of(matrices), after.eps, after.autocast
        self._scale, self._hands_on_keys = scale, hands_on_keys
        self.draws = any(p.dropout > 0 for p in (*projections, *matrices))

    def __call__(
        self,
        hidden_states: torch.Tensor,
        per_layer_input: torch.Tensor | None,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        cos: torch.Tensor,
        sin: torch.Tensor,
        intervals: KeyIntervals,
    ) -> tuple[torch.Tensor, ...]:
        """The layer's output, then its keys and values if it hands them on.

        Args:
            hidden_states: [batch, seq_len, hidden_size], bfloat16 or float16 (float32 in the interpreter).
            per_layer_input: [batch, seq_len, width] in the same dtype, or None, as the layer's matrices have it.
            key, value: [batch, seq_len, num_key_value_heads, head_dim] of another layer, or None.
            cos, sin: [batch or 1, seq_len, head_dim], constants.
            intervals: of keys, for [batch, seq_len] rows.

        Returns:
            [batch, seq_len, hidden_size]; keys and values as above.

        Raises:
            RuntimeError, from the backward: a trained tensor was written to after the forward.
        """
        inputs = hidden_states, per_layer_input, key, value
        outputs: tuple[torch.Tensor, ...] = _CheckpointedLayer.apply(
            self, cos, sin, intervals, *inputs, *self.trained_before, *self.trained_after
        )
        return outputs

    def generator(self, device: torch.device) -> torch.Generator | None:
        """What the layer draws its dropout from, if it does."""
        return generator_of(device) if self.draws else None

    def run(self, arguments: Sequence[Any], for_backward: bool) -> _Run:
        """`arguments` are those of a call. With `for_backward` everything is kept for it, and the output may hold
        anything."""
        hidden_states, per_layer_input, key, value, cos, sin, intervals = arguments
        before, attention, after = Context(for_backward), Context(for_backward), Context(for_backward)
        residual, q, k, v = _PreAttention.forward(before, hidden_states, cos, sin, *self._before, *self.trained_before)
        if key is not None:
            k, v = key, value
        attended = _Attention.forward(attention, q, k, v, intervals, self._scale).flatten(2)
        states = (k, v) if self._hands_on_keys else ()
        del q, k, v  # before the rest takes memory
        operation: Any = _PostAttention
        plain: tuple[Any, ...] = self._after
        if splits_rows(residual, self._matrices):
            operation, plain = _PostAttentionTiles, (*plain, not for_backward)
        out = operation.forward(after, attended, residual, per_layer_input, *plain, *self.trained_after)
        return _Run((out, *states), before, attention, after, operation, len(plain))


def _sum(own: torch.Tensor | None, others: torch.Tensor | None) -> torch.Tensor | None:
    if own is None or others is None:
        return others if own is None else own
    return own.add_(others)


# Where hidden_states, per_layer_input, key and value, and what is trained begin among `_CheckpointedLayer`'s arguments.
_INPUTS, _KEY, _TRAINED = 4, 6, 8


def _needs_own(layer: CheckpointedLayer, needs: tuple[bool, ...]) -> bool:
    """Whether the layer's own queries, keys and values require a gradient: all do as soon as one of what they come from
    does, as autograd has it for the outputs of an operation. `needs` is that of `_CheckpointedLayer`."""
    return needs[_INPUTS] or any(needs[_TRAINED : _TRAINED + len(layer.trained_before)])


class _CheckpointedLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, layer, cos, sin, intervals, hidden_states, per_layer_input, key, value, *trained):
        # As under torch's checkpointing, hooks on what is saved see what one layer hands to the next, and not what many
        # layers share: offloading would copy that for each of them.
        ctx.layer, ctx.rest = layer, (key, value, cos, sin, intervals)
        ctx.set_materialize_grads(False)
        generator = layer.generator(hidden_states.device)
        ctx.drawn_at = None if generator is None else generator.get_state()
        keep(ctx, trained, (hidden_states, per_layer_input))
        outputs = layer.run((hidden_states, per_layer_input, *ctx.rest), for_backward=False).outputs
        if not _needs_own(layer, ctx.needs_input_grad):
            ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    @once_differentiable
    @backward_without_autocast
    def backward(ctx, d_out, d_key=None, d_value=None):
        layer, needs = ctx.layer, ctx.needs_input_grad
        _, inputs = kept(ctx)
        shares = ctx.rest[0] is not None
        with drawing_from(layer.generator(inputs[0].device), ctx.drawn_at):
            run = layer.run((*inputs, *ctx.rest), for_backward=True)
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.rest = None  # goes with what is saved, even if somebody keeps the loss
        # What is not needed any more goes before the next operation takes memory.
        outputs, before, attention, after, operation, n_plain = run
        del run, outputs, inputs

        first = _TRAINED + len(layer.trained_before)
        needs_before, needs_after = needs[_TRAINED:first], needs[first:]
        needs_own = _needs_own(layer, needs)
        needs_key, needs_value = needs[_KEY:_TRAINED] if shares else (needs_own, needs_own)
        needs_attended = needs_own or needs_key or needs_value

        d_attended, d_residual, d_input, d_after = None, None, None, (None,) * len(needs_after)
        if d_out is not None:
            needs_input = needs[_INPUTS + 1]
            after.needs_input_grad = needs_attended, needs_own, needs_input, *(False,) * n_plain, *needs_after
            d_attended, d_residual, d_input, *rest = operation.backward(after, d_out)
            d_after = rest[n_plain:]
        del after
        d_q, d_k, d_v = None, None, None
        if d_attended is not None:
            attention.needs_input_grad = needs_own, needs_key, needs_value, False, False
            d_attended = d_attended.view(attention.saved_tensors[0].shape)
            d_q, d_k, d_v, *_ = _Attention.backward(attention, d_attended)
        del attention, d_attended
        of_others: tuple[Any, Any] = (None, None)
        if shares:
            of_others, d_k, d_v = (d_k, d_v), None, None
        else:
            d_k, d_v = _sum(d_k, d_key), _sum(d_v, d_value)
        d_hidden, d_before = None, (None,) * len(needs_before)
        if needs_own:
            before.needs_input_grad = needs[_INPUTS], *(False,) * _N_PLAIN_BEFORE, *needs_before
            d_hidden, *rest = _PreAttention.backward(before, d_residual, d_q, d_k, d_v)
            d_before = rest[_N_PLAIN_BEFORE:]
        return None, None, None, None, d_hidden, d_input, *of_others, *d_before, *d_after
