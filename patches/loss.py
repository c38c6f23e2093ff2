"""The loss of `Gemma4ForCausalLM` and `Gemma4ForConditionalGeneration`, without logits.

Trainer and plain loops reach it through `model(..., labels=labels)`. Logits are then made where somebody reads them
(`deferred_logits`). Without labels, and in evaluation, the model returns true logits as stock does.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from fastgemma.kernels.linear_cross_entropy import KeptRows, linear_cross_entropy, shift_labels
from fastgemma.patches.deferred_logits import DeferredLogits, deferring
from fastgemma.patches.engine import Op
from fastgemma.patches.guards import hooked, is_transformers, plain, unusable
from fastgemma.patches.projections import compute_dtype


def head_unusable(head: Any, hidden_dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the output embedding's weight alone does not make the logits, or None."""
    if type(head) is not nn.Linear:
        return f"output embedding of type {type(head).__name__} (an adapter on lm_head, perhaps)"
    if hooked(head):
        return "hooks on lm_head"
    if not plain(head.weight) or hasattr(head.weight, "ds_id"):
        return "sharded lm_head"
    if head.weight.device != device:
        return "lm_head on another device"
    if head.weight.dtype != hidden_dtype and not torch.is_autocast_enabled(device.type):
        return f"hidden states {hidden_dtype}, lm_head {head.weight.dtype}"
    return None


def _output_class(model: nn.Module) -> type:
    """The family's output dataclass, from the module that defines the model's class."""
    module = sys.modules[next(c.__module__ for c in type(model).__mro__ if c.__module__.startswith("transformers."))]
    return next(
        value
        for name, value in vars(module).items()
        # Its own: it imports what that derives from, of a similar name.
        if name.endswith("CausalLMOutputWithPast") and getattr(value, "__module__", None) == module.__name__
    )


def _may_defer(model: Any) -> bool:
    """Whether logits can be made later, for whoever reads them."""
    # A head that trains may be another by then. Processes that train together (DDP, FSDP, DeepSpeed) look through
    # outputs for tensors: to hook them, which cannot be done yet, or by reading every field.
    together = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not (model.lm_head.weight.requires_grad or together or getattr(model, "_is_replica", False))


def make_head_forward(original: Callable[..., Any], ops: dict[str, Op]) -> Callable[..., Any]:
    op = ops["cross_entropy"]
    names = [name for name in inspect.signature(original).parameters if name not in ("self", "kwargs")]

    def why_not(model: nn.Module, labels: Any, kwargs: dict[str, Any]) -> str | None:
        if labels is None:
            return "no labels"
        if not model.training:
            return "evaluation: logits may be read"
        if not is_transformers(type(model).forward):
            return "forward of a subclass: logits may be read"
        if model.loss_function is not ForCausalLMLoss:
            return "custom loss function"
        if kwargs.get("return_dict") is False:
            return "tuple output"
        keep = kwargs.get("logits_to_keep", 0)
        if not isinstance(keep, int) or keep != 0:
            return "logits_to_keep beside labels"
        weight = getattr(model.lm_head, "weight", None)
        if weight is None:
            return f"output embedding of type {type(model.lm_head).__name__}"
        return unusable(weight) or head_unusable(model.lm_head, weight.dtype, weight.device)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not op.active:
            return original(self, *args, **kwargs)
        given = {**dict(zip(names, args)), **kwargs}
        labels: Any = given.get("labels")
        reason = why_not(self, labels, given)
        if reason is not None:
            if labels is not None:
                op.fallback(reason)
            return original(self, *args, **kwargs)

        aligned, ignore_index = given.get("shift_labels"), given.get("ignore_index", -100)
        device = self.lm_head.weight.device
        aligned = shift_labels(labels, ignore_index) if aligned is None else aligned
        aligned = aligned.to(device)
        kept = KeptRows(aligned, ignore_index)  # before the backbone, so that its count is there after it
        for name in ("labels", "logits_to_keep"):
            given.pop(name, None)
        outputs = self.model(**{**given, "return_dict": True})
        hidden_states = outputs.last_hidden_state
        weight = self.lm_head.weight
        if hidden_states.dtype != weight.dtype:
            hidden_states = hidden_states.to(compute_dtype(hidden_states))
        num_items = given.get("num_items_in_batch")
        loss = linear_cross_entropy(
            hidden_states.to(device),
            weight,
            aligned,
            softcap=self.config.get_text_config().final_logit_softcapping,
            ignore_index=ignore_index,
            reduction="mean" if num_items is None else "sum",
            num_items_in_batch=num_items,
            kept_rows=kept,
        )
        op.fast()
        output_class = _output_class(self)
        fields = {f.name: getattr(outputs, f.name, None) for f in dataclasses.fields(output_class)} | {"loss": loss}
        if not _may_defer(self):
            return output_class(**fields | {"logits": None})
        logits = DeferredLogits(self.lm_head, hidden_states, self.config.get_text_config().final_logit_softcapping)
        return deferring(output_class)(**fields | {"logits": logits})

    return forward
