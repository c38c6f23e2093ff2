"""TRL's loss seam: `trl.trainer.utils.add_fused_lm_head`.

From 1.15 on, TRL's trainers replace a model's forward by one that returns per-token log-probabilities. Stock finds
the labelled rows with a host synchronisation and recomputes every logit in the backward; here the rows are counted
while the backbone runs, and a frozen head's gradient is made together with its loss.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

from fastgemma.kernels.linear_cross_entropy import KeptRows, linear_log_probs, shift_labels
from fastgemma.patches.engine import Op
from fastgemma.patches.families import is_gemma4
from fastgemma.patches.guards import unusable
from fastgemma.patches.loss import head_unusable

TARGET = "utils.add_fused_lm_head"
_IGNORED = -100
# Logit multipliers that TRL honours for other families; no Gemma 4 config has one.
_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def make_add_fused_lm_head(original: Callable[..., Any], ops: dict[str, Op]) -> Callable[..., Any]:
    op = ops["cross_entropy"]

    def add_fused_lm_head(
        model: Any,
        temperature: float = 1.0,
        cast_lm_head_to_fp32: bool = False,
        outputs: tuple[str, ...] = ("log_probs",),
    ) -> None:
        original(model, temperature, cast_lm_head_to_fp32, outputs)
        if not op.active or not is_gemma4(model):
            return
        text_config = model.config.get_text_config()
        stock = model.forward
        output_class = importlib.import_module("trl.trainer.utils").FusedCausalLMOutput

        def why_not(self: Any, labels: Any, shifted: Any) -> str | None:
            if labels is None and shifted is None:
                return "no labels"
            if getattr(text_config, "output_router_logits", False):
                return "router loss"
            if any(getattr(text_config, name, None) is not None for name in _SCALES):
                return "scaled logits"
            head = self.get_output_embeddings()
            weight = getattr(head, "weight", None)
            if weight is None:
                return f"output embedding of type {type(head).__name__}"
            return unusable(weight) or head_unusable(head, weight.dtype, weight.device)

        @functools.wraps(type(model).forward)
        def forward(
            self: Any,
            *args: Any,
            fused_lm_head: bool = False,
            labels: torch.Tensor | None = None,
            shift_labels: torch.Tensor | None = None,
            num_items_in_batch: Any = None,
            **kwargs: Any,
        ) -> Any:
            stock_kwargs = {
                "fused_lm_head": fused_lm_head,
                "labels": labels,
                "shift_labels": shift_labels,
                "num_items_in_batch": num_items_in_batch,
            }
            if not fused_lm_head or not op.active:
                return stock(*args, **stock_kwargs, **kwargs)
            reason = why_not(self, labels, shift_labels)
            if reason is not None:
                op.fallback(reason)
                return stock(*args, **stock_kwargs, **kwargs)
            op.fast()
            return _fused_forward(
                self, args, kwargs, labels, shift_labels, num_items_in_batch, text_config.final_logit_softcapping
            )

        def _fused_forward(self, args, kwargs, labels, shifted, num_items_in_batch, softcap):
            head = self.get_output_embeddings()
            # Rows of the hidden states are not sliced: the last position of each is an ignored label instead.
            aligned = _shift(labels) if shifted is None else shifted
            aligned = aligned.to(head.weight.device)
            kept = KeptRows(aligned, _IGNORED)
            kwargs["use_cache"] = False
            hidden_states = self.base_model(*args, **kwargs).last_hidden_state.to(head.weight.device)
            index = kept.index()
            rows = hidden_states.reshape(-1, hidden_states.shape[-1]).index_select(0, index)
            with torch.autocast(rows.device.type, enabled=False) if cast_lm_head_to_fp32 else contextlib.nullcontext():
                statistics = linear_log_probs(
                    rows.float() if cast_lm_head_to_fp32 else rows,
                    head.weight,
                    aligned.reshape(-1).index_select(0, index),
                    bias=head.bias,
                    softcap=softcap,
                    temperature=temperature,
                    outputs=tuple(outputs),
                )
            end = -1 if shifted is None else None
            mask = (aligned != _IGNORED)[:, :end]

            def per_token(values: torch.Tensor | None) -> torch.Tensor | None:
                if values is None:
                    return None
                # `index_copy` keeps the graph connected where no label is valid, so that backward still runs.
                full = values.new_zeros(aligned.numel()).index_copy(0, index, values)
                return full.view(aligned.shape)[:, :end]

            log_probs = per_token(statistics.log_probs)
            count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            return output_class(
                loss=-log_probs.sum() / count,
                log_probs=log_probs,
                entropy=per_token(statistics.entropy),
                log_sum_sq_probs=per_token(statistics.log_sum_sq_probs),
                mean_logits=per_token(statistics.mean_logits),
                is_top1=per_token(statistics.is_top1),
                label_mask=mask,
                aux_loss=None,
            )

        model.forward = types.MethodType(forward, model)

    return add_fused_lm_head


def trainer_built_before() -> bool:
    """Whether a Gemma 4 model carries the forward that TRL's own `add_fused_lm_head` gave it."""
    if "trl.trainer.utils" not in sys.modules:
        return False
    return any(
        getattr(getattr(candidate.__dict__.get("forward"), "__code__", None), "co_name", None) == "_fused_forward"
        and candidate.forward.__code__.co_filename == sys.modules["trl.trainer.utils"].__file__
        for candidate in gc.get_objects()
        if issubclass(type(candidate), PreTrainedModel) and is_gemma4(candidate)  # isinstance would wake lazy modules
    )


def _shift(labels: torch.Tensor) -> torch.Tensor:
    return shift_labels(labels, _IGNORED)
