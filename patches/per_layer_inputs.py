"""Per-layer inputs as one tensor for each layer, so that their gradient is written once.

Stock gives layer i the slice `[:, :, i, :]` of a tensor [batch, seq_len, layers, size]. The gradient of a slice is as
large as that tensor, zeros elsewhere, and autograd adds one for each layer: of E2B's 35 layers, 35 times 37 MB written
and 34 sums at 2048 tokens. One `unbind` has the same slices, and one `stack` as its gradient, equal to the bit. A slice
is not to be written to, and what is asked of the whole tensor's gradient does not see the layers'.

Where nothing before them is trained they need no gradient at all. Stock computes one, through a product 8960 wide, into
embeddings that `enable_input_require_grads` made require a gradient for checkpointing's sake, and nobody reads it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from torch.nn.modules.module import _has_any_global_hook

from fastgemma.patches.engine import Op
from fastgemma.patches.guards import is_known, is_stock

_ALL, _FROM_THE_FIRST = slice(None), slice(0, None)


class _Unbind(torch.autograd.Function):
    """The tensor again, and its layers."""

    @staticmethod
    def forward(ctx, per_layer_inputs):
        ctx.set_materialize_grads(False)
        # A layer reads its own part several times in a step: as one contiguous piece.
        by_layer = per_layer_inputs.permute(2, 0, 1, 3).contiguous()
        return by_layer.permute(1, 2, 0, 3), *by_layer.unbind()

    @staticmethod
    def backward(ctx, d_whole, *d_layers):
        given = next((gradient for gradient in d_layers if gradient is not None), None)
        if given is None:
            return d_whole
        d_layers = [torch.zeros_like(given) if gradient is None else gradient for gradient in d_layers]
        stacked = torch.stack(d_layers, dim=2)
        return stacked if d_whole is None else stacked + d_whole


class _PerLayerInputs(torch.Tensor):
    """[batch, seq_len, layers, size] with its layers unbound beforehand; all else that is done to it is a tensor's."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _layers: list[torch.Tensor]

    @classmethod
    def of(cls, per_layer_inputs: torch.Tensor) -> _PerLayerInputs:
        whole, *layers = _Unbind.apply(per_layer_inputs)
        whole = whole.as_subclass(cls)
        whole._layers = layers
        return whole

    def __getitem__(self, index: Any) -> torch.Tensor:
        if isinstance(index, tuple) and len(index) == 4:
            batch, seq_len, layer, size = index
            # transformers cuts the tokens that the last layers need, which are all of them in training.
            if batch == size == _ALL and seq_len in (_ALL, _FROM_THE_FIRST):
                if layer == _ALL:
                    return self
                if isinstance(layer, int):
                    return self._layers[layer]
        return super().__getitem__(index)


class _ThisThread(threading.local):
    depth = 0
    embeds = False  # whether the outermost model was given tokens, and so makes the embeddings itself
    hands_out = False  # whether its caller sees the keys and values that layers share


_this_thread = _ThisThread()


@contextlib.contextmanager
def inside_forward(given: Mapping[str, Any]) -> Iterator[None]:
    """The forward of a text or multimodal model with these keyword arguments; the outermost one counts."""
    if not _this_thread.depth:
        _this_thread.embeds = given.get("input_ids") is not None and given.get("inputs_embeds") is None
        _this_thread.hands_out = given.get("shared_kv_states") is not None
    _this_thread.depth += 1
    try:
        yield
    finally:
        _this_thread.depth -= 1


def hands_out_states() -> bool:
    """Whether keys and values that layers share go into an object of the caller's of the model that runs."""
    return _this_thread.depth > 0 and _this_thread.hands_out


def _first_layer(model: Any) -> Iterator[Any]:
    """What of a text model's first layer is called with the embeddings."""
    first = model.layers[0]
    if type(first) is CheckpointWrapper and not _read_by_hooks(first):
        first = first._modules["_checkpoint_wrapped_module"]
    yield first
    kind: Any = type(first)
    if is_stock(kind):  # another module may have nothing of that name
        yield first.input_layernorm


def _passes_on(module: Any) -> bool:
    """Whether a module that is called with the embeddings is known not to hand them out, or keep them.

    transformers records hidden states by hooks on layers, or by forwards of their own.
    """
    kind: Any = type(module)
    # FSDP2 makes a class of its own of a module's.
    own: Any = next(base for base in kind.__mro__ if not base.__module__.startswith("torch.distributed."))
    return is_stock(own) and is_known(kind) and not _read_by_hooks(module)


def _read_by_hooks(module: nn.Module) -> bool:
    """Whether hooks of others than sharding's may read what the module is given."""
    if "forward" in module.__dict__ or _has_any_global_hook():
        return True
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    hooks = (hook for kind in kinds for hook in kind.values())
    return not all(str(getattr(hook, "__module__", "")).startswith("torch.distributed.") for hook in hooks)


def _nobody_reads_their_gradient(model: Any, inputs_embeds: Any, from_tokens: Any) -> bool:
    """Whether `inputs_embeds` are what `enable_input_require_grads` makes of frozen embeddings, and nothing between
    them and the layers is trained. A user's own embeddings, or a hook that could hand these out, want their gradient.
    """
    if not (_this_thread.depth and _this_thread.embeds and inputs_embeds.is_leaf and inputs_embeds.requires_grad):
        return False
    if from_tokens is None or from_tokens.requires_grad:
        return False
    embedding: nn.Module = model.embed_tokens
    if embedding._backward_hooks or embedding._backward_pre_hooks or not embedding._forward_hooks:
        return False
    # transformers', PEFT's and TRL's; none of theirs keeps what it is given.
    names = (getattr(hook, "__name__", "") for hook in embedding._forward_hooks.values())
    if not all(name in ("make_inputs_require_grads", "make_inputs_require_grad") for name in names):
        return False
    if not all(map(_passes_on, [model, model.rotary_emb, *_first_layer(model)])):
        return False
    between = (model.per_layer_model_projection, model.per_layer_projection_norm)
    return not any(map(_read_by_hooks, between)) and not any(
        parameter.requires_grad for module in between for parameter in module.parameters()
    )


def make_projection(original: Callable[..., Any], ops: dict[str, Op]) -> Callable[..., Any]:
    """`project_per_layer_inputs`, which makes what the decoder's loop takes a layer's inputs from."""
    op = ops["per_layer_embeddings"]

    def project_per_layer_inputs(self, inputs_embeds: Any, per_layer_inputs: Any = None) -> Any:
        if not op.active or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return original(self, inputs_embeds, per_layer_inputs)
        constant = _nobody_reads_their_gradient(self, inputs_embeds, per_layer_inputs)
        projected = original(self, inputs_embeds.detach() if constant else inputs_embeds, per_layer_inputs)
        if type(projected) is not torch.Tensor or projected.dim() != 4 or not (projected.requires_grad or constant):
            return projected
        op.fast()
        return _PerLayerInputs.of(projected)

    return project_per_layer_inputs
