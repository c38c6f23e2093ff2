"""Traps around Gemma 4 that ruin runs silently, fixed at the seam where they arise or refused with one clear line."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, masking_utils
from transformers.integrations import is_deepspeed_zero3_enabled

from fastgemma.patches.caches import CACHE, cache_of
from fastgemma.patches.engine import Op, PatchError, replacements
from fastgemma.patches.families import is_gemma4
from fastgemma.patches.guards import is_transformers_own
from fastgemma.patches.host_copies import host_copy
from fastgemma.patches.interval_masks import IntervalMasks, document_starts, wants_apart
from fastgemma.patches.per_layer_inputs import inside_forward
from fastgemma.patches.projections import Unsupported

logger = logging.getLogger("fastgemma")

# TRL asks for reentrant checkpointing of adapters under ZeRO-3 because of what DeepSpeed up to 0.19.2 does: it empties
# frozen weights before torch has compared the recomputed ones, and torch stops the backward.
_UNDER_ZERO3 = (
    " Under DeepSpeed ZeRO-3 with frozen weights it needs a DeepSpeed newer than 0.19.2: if the backward raises "
    "CheckpointError, use ZeRO-2 or train without checkpointing."
)

# What every way of switching checkpointing on leads through, and its options: since 5.24 transformers have two ways,
# which may call each other.
CHECKPOINTING_ENABLE, CHECKPOINTING_KWARGS = (
    ("_activation_checkpointing_enable", "activation_checkpointing_kwargs")
    if hasattr(PreTrainedModel, "_activation_checkpointing_enable")
    else ("gradient_checkpointing_enable", "gradient_checkpointing_kwargs")
)

_TOWERS = r".*\b(vision_tower|audio_tower|embed_vision|embed_audio)\b.*"


def _shares_kv(model: Any) -> bool:
    return getattr(model.config.get_text_config(), "num_kv_shared_layers", 0) > 0


def make_checkpointing_enable(original: Callable[..., Any], ops: dict[str, Op]) -> Callable[..., Any]:
    """Reentrant checkpointing cuts the gradient that consumers of shared keys and values owe to their producers."""
    op = ops["checkpointing"]

    def checkpointing_enable(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.get(CHECKPOINTING_KWARGS)
        # transformers takes None as non-reentrant, but passes an empty dict through to torch, whose default is
        # reentrant.
        if op.active and given is not None and _shares_kv(self):
            if given.get("use_reentrant", True):
                op.fast()
                logger.warning(
                    "fastgemma: reentrant gradient checkpointing loses the gradients of shared keys and values on "
                    "this model; using use_reentrant=False, which is exact.%s",
                    _UNDER_ZERO3 if is_deepspeed_zero3_enabled() else "",
                )
            given = {**given, "use_reentrant": False}
            if args:
                args = (given, *args[1:])
            else:
                kwargs[CHECKPOINTING_KWARGS] = given
        return original(self, *args, **kwargs)

    return checkpointing_enable


def _is_reentrant(layer: nn.Module) -> bool:
    """Whether a layer is checkpointed, and so that autograd does not see what leaves it beside its output."""
    if layer.__dict__.get("checkpoint_impl") is CheckpointImpl.REENTRANT:  # torch's CheckpointWrapper, as with FSDP
        return True
    if not getattr(layer, "gradient_checkpointing", False):
        return False
    function = getattr(layer, "_gradient_checkpointing_func", None)
    if isinstance(function, functools.partial):
        return function.keywords.get("use_reentrant") is not False  # unset, torch takes it as True
    if function is checkpoint:
        return True
    # DeepSpeed's own, beside which it has a `non_reentrant_checkpoint`.
    name, module = getattr(function, "__name__", ""), getattr(function, "__module__", "")
    return name == "checkpoint" and module.startswith("deepspeed.")


def _refuse_reentrant(model: Any) -> None:
    if not (model.training and torch.is_grad_enabled() and _shares_kv(model)):
        return
    if any(map(_is_reentrant, model.layers)):
        raise PatchError(
            "fastgemma: this model shares keys and values between layers, and reentrant gradient checkpointing was "
            "enabled on it before or beside fastgemma.patch(): its gradients would be silently wrong. Call "
            'model.gradient_checkpointing_enable({"use_reentrant": False}) instead.'
        )


def _packed_masks(model: Any, given: dict[str, Any]) -> dict[str, Any] | None:
    """Masks that keep packed documents apart, where stock would let them attend to each other; else None."""
    mask, position_ids = given.get("attention_mask"), given.get("position_ids")
    embeds = given.get("inputs_embeds")
    reference = embeds if embeds is not None else given.get("input_ids")
    if position_ids is None or reference is None or cache_of(given) is not None or not wants_apart(model, given):
        return None
    if position_ids.dim() != 2 or not (mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2)):
        return None
    starts = document_starts(position_ids, mask)
    if not bool(starts.any()):
        return None  # every row is one document
    documents = starts.cumsum(-1).expand(reference.shape[0], -1)
    config = model.config.get_text_config()
    arguments = {
        "config": config,
        # Only its shape, dtype and device are read.
        "inputs_embeds": torch.empty((*reference.shape[:2], 0), dtype=model.dtype, device=reference.device),
        "attention_mask": mask,
        CACHE: None,
        # From 5.23 on masks that find documents themselves call others by positions in them, not by indices.
        "position_ids": None,
        "and_mask_function": masking_utils.packed_sequence_mask_function(documents),
    }
    return {
        "full_attention": masking_utils.create_causal_mask(**arguments),
        "sliding_attention": masking_utils.create_sliding_window_causal_mask(**arguments),
    }


def _kept_apart(model: Any, given: dict[str, Any]) -> bool:
    """Whether intervals keep documents apart that stock would not, where the host knows the positions."""
    if not wants_apart(model, given):
        return False
    position_ids, mask = host_copy(given["position_ids"]), given.get("attention_mask")
    mask = None if mask is None else host_copy(mask)
    return position_ids is not None and bool(document_starts(position_ids, mask).any())


def make_model_forward(original: Callable[..., Any], ops: dict[str, Op]) -> Callable[..., Any]:
    """Text and multimodal models: refuses reentrant checkpointing, keeps packed documents apart, prepares intervals."""
    fixes, checkpointing, attention = ops["fixes"], ops.get("checkpointing"), ops["attention"]
    intervals = IntervalMasks()
    attention.release = intervals.clear
    # What somebody has wrapped around it would be handed masks that are no tensors.
    known = is_transformers_own(original) or original in replacements

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return run(self, *args, **kwargs)
        with inside_forward(kwargs):
            return run(self, *args, **kwargs)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if checkpointing is not None and checkpointing.active:
            _refuse_reentrant(self)
        # A multimodal model has prepared its text model's masks, of either kind.
        if attention.active and not isinstance(kwargs.get("attention_mask"), dict):
            try:
                if args:
                    raise Unsupported("positional arguments")
                if not known:
                    raise Unsupported("another forward of the model")
                masks: Any = intervals.find(self, kwargs, keep_apart=fixes.active)
            except Unsupported as unsupported:
                attention.fallback(str(unsupported))
            else:
                if fixes.active and _kept_apart(self, kwargs):
                    fixes.fast()
                return original(self, **{**kwargs, "attention_mask": masks})
        if fixes.active and not args:
            masks = _packed_masks(self, kwargs)
            if masks is not None:
                fixes.fast()
                kwargs = {**kwargs, "attention_mask": masks}
        return original(self, *args, **kwargs)

    return forward


def _stays_16_bit(model: nn.Module) -> Iterator[nn.Module]:
    """Embeddings, the head, and linears left out of quantisation: they read and write the same residual stream."""
    for module in model.modules():
        if isinstance(module, nn.Embedding) or type(module) is nn.Linear:
            yield module


def make_prepare_for_kbit(original: Callable[..., Any], ops: dict[str, Op]) -> Callable[..., Any]:
    """PEFT's preparation casts every 16-bit tensor to float32: 11 to 14 GB for Gemma 4's embedding tables."""
    op = ops["fixes"]

    def prepare_model_for_kbit_training(model: Any, *args: Any, **kwargs: Any) -> Any:
        if not op.active or not is_gemma4(model):
            return original(model, *args, **kwargs)
        hidden: list[tuple[nn.Module, nn.Parameter]] = []
        for module in _stays_16_bit(model):
            weight = module._parameters.get("weight")
            if weight is not None:
                hidden.append((module, weight))
        for module, _ in hidden:
            module._parameters["weight"] = None
        try:
            prepared = original(model, *args, **kwargs)
        finally:
            for module, weight in hidden:
                weight.requires_grad_(False)
                module._parameters["weight"] = weight
        op.fast()
        return prepared

    return prepare_model_for_kbit_training


def make_modules_to_not_convert(original: Callable[..., Any], ops: dict[str, Op]) -> Callable[..., Any]:
    """A router in 4 bits picks other experts; it is a thousandth of the weights."""
    op = ops["fixes"]

    def get_modules_to_not_convert(model: Any, *args: Any, **kwargs: Any) -> list[str]:
        modules = original(model, *args, **kwargs)
        if op.active and is_gemma4(model) and getattr(model.config.get_text_config(), "enable_moe_block", False):
            op.fast()
            modules = [*modules, "router.proj"]
        return modules

    return get_modules_to_not_convert


def make_inject_adapter(original: Callable[..., Any], ops: dict[str, Op]) -> Callable[..., Any]:
    """`target_modules=["q_proj", ...]` also names the towers' clippable layers, which PEFT cannot adapt.

    What keeps it off them is written into the LoraConfig, so that the saved adapter loads in stock PEFT.
    """
    op = ops["fixes"]

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        config = self.peft_config[adapter_name]
        if op.active and is_gemma4(model) and _names_clippable(model, config):
            config.exclude_modules = _TOWERS
            op.fast()
        return original(self, model, adapter_name, *args, **kwargs)

    return inject_adapter


def _names_clippable(model: nn.Module, config: Any) -> bool:
    targets = getattr(config, "target_modules", None)
    if not isinstance(targets, set | list | tuple) or getattr(config, "exclude_modules", None):
        return False
    return any(
        type(module).__name__ == "Gemma4ClippableLinear" and name.rpartition(".")[2] in targets
        for name, module in model.named_modules()
    )
