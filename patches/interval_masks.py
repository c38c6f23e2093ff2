"""Attention masks as intervals of keys: what stock would attend to, without a matrix in the square of the sequence.

The models take a dict of prepared masks, one for each type of layer, as `generate` gives them. `IntervalMasks.find`
makes such a dict from what a forward was given, or raises `Unsupported`: then stock builds its masks.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fastgemma.kernels.attention import attention_problem, compile_attention_ahead
from fastgemma.kernels.attention_backward import sums_of
from fastgemma.kernels.backend import interpreting
from fastgemma.kernels.key_intervals import KeyIntervals, key_intervals
from fastgemma.kernels.launch import why_efficient_attention
from fastgemma.patches.caches import RENAMED, cache_of
from fastgemma.patches.families import FAMILIES
from fastgemma.patches.guards import is_known, is_ours, is_transformers, is_transformers_own
from fastgemma.patches.host_copies import host_copy
from fastgemma.patches.projections import Unsupported

# Implementations whose masks and results are those of softmax attention over the mask.
_IMPLEMENTATIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3")
_RECORDED = ("output_attentions", "output_router_logits")
# Shapes without padding or documents whose intervals are kept.
_MAX_KEPT = 8


class IntervalMask:
    """What stands in a layer's `attention_mask` for a stock mask."""

    def __init__(self, intervals: KeyIntervals) -> None:
        self._first = intervals
        self._on = {intervals.lo.device: intervals}

    def on(self, device: torch.device) -> KeyIntervals:
        """The intervals on a device: a model's layers may be spread over several."""
        found = self._on.get(device)
        if found is None:
            found = self._on[device] = self._first.to(device)
        return found

    def __getitem__(self, index: tuple[slice, ...]) -> IntervalMask:
        """All of it, as models slice masks to the logits that are kept where all are kept."""
        if any(part not in (slice(None), slice(0, None)) for part in index):
            raise NotImplementedError("fastgemma: a mask made of intervals was sliced; please report this.")
        return self

    def dense(self, implementation: str, query: torch.Tensor) -> torch.Tensor:
        """The mask as stock attention reads it, [batch, 1, seq_len, seq_len]."""
        keep = self.on(query.device).dense()[:, None]
        if implementation != "eager":
            return keep
        return torch.zeros((), dtype=query.dtype, device=query.device).masked_fill(~keep, torch.finfo(query.dtype).min)


def _shows_mask(module: nn.Module) -> bool:
    """Whether a hook of the user's gets the module's keyword arguments. Those of the libraries pass them on."""
    if not (module._forward_pre_hooks_with_kwargs or module._forward_hooks_with_kwargs):
        return False
    return any(
        not str(getattr(hooks.get(key), "__module__", "")).startswith(("torch.", "transformers.", "accelerate."))
        for hooks, with_keywords in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_with_kwargs),
        )
        for key in with_keywords
    )


class IntervalMasks:
    """Makes masks, and keeps those that depend on nothing but the shape."""

    def __init__(self) -> None:
        self._kept: dict[Any, dict[str, IntervalMask]] = {}

    def clear(self) -> None:
        self._kept = {}

    def find(self, model: Any, given: Mapping[str, Any], keep_apart: bool = True) -> dict[str, IntervalMask]:
        """The masks of a forward, by type of layer.

        Args:
            given: the keyword arguments of a text or multimodal model's forward.
            keep_apart: in training, packed documents do not see each other even where stock would let them; an image in
                packed rows is that of its own document in evaluation too.

        Raises:
            Unsupported: intervals do not say what stock would attend to, or attention cannot run on them.
        """
        reference = given.get("inputs_embeds")
        reference = given.get("input_ids") if reference is None else reference
        if reference is None:
            raise Unsupported("no inputs")
        _check(model, given, reference)
        batch, seq_len = reference.shape[:2]
        config = model.config.get_text_config()
        padding = _padding(given.get("attention_mask"), batch, seq_len, config._attn_implementation)
        by_runs = why_efficient_attention(reference.device) is not None
        documents = _documents(model, given, batch, padding, keep_apart, on_host=by_runs)
        blocks, everywhere = _blocks(model, config, given, reference)
        if by_runs and not (padding is None and blocks is None):
            # Rows of padding on the right would attend to padding: stock's loss counts them where they have labels.
            what = "padding" if blocks is None else "images"
            raise Unsupported(f"{what}, which PyTorch's memory-efficient kernel does not take without a dense mask")
        if documents is not None and blocks is not None and not keep_apart:
            # Stock looks images up by positions that restart with every document, or lets them reach across documents.
            raise Unsupported("images in packed rows")
        stream = torch.cuda.current_stream(reference.device).cuda_stream if reference.is_cuda else 0
        key = (batch, seq_len, reference.device, stream, config.sliding_window)
        plain = padding is None and documents is None and blocks is None
        if plain and (found := self._kept.get(key)) is not None:
            return found
        # Tensors of inference mode could not be kept for training.
        with torch.inference_mode(False):
            masks = {
                kind: IntervalMask(
                    key_intervals(
                        batch,
                        seq_len,
                        reference.device,
                        window=config.sliding_window if kind == "sliding_attention" else None,
                        padding_mask=padding,
                        documents=documents,
                        blocks=blocks if everywhere or kind == "sliding_attention" else None,
                        blocks_in_window=not everywhere,
                    )
                )
                for kind in ("full_attention", "sliding_attention")
            }
        if reference.is_cuda and not interpreting() and not by_runs and batch and seq_len:
            _compile_ahead(model, config, masks, reference.device)
        if plain:
            kept = {**self._kept, key: masks}
            while len(kept) > _MAX_KEPT:
                del kept[next(iter(kept))]
            self._kept = kept  # as a whole: models may be trained in several threads
        return masks


def _dtype(model: Any) -> torch.dtype:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else model.dtype


def _compile_ahead(model: Any, config: Any, masks: Mapping[str, IntervalMask], device: torch.device) -> None:
    """Before the first layer needs them, and while those around attention compile."""
    heads, dtype = config.num_attention_heads, _dtype(model)
    attentions = [layer.self_attn for layer in getattr(model, "language_model", model).layers]
    kinds = dict.fromkeys((a.head_dim, a.num_key_value_groups, a.sliding_window is not None) for a in attentions)
    for head_dim, group, slides in kinds:
        kv_heads, sums = heads // group, None
        if torch.is_grad_enabled():
            intervals = masks["sliding_attention" if slides else "full_attention"].on(device)
            shape = torch.Size((*intervals.lo.shape, heads, head_dim))
            sums = sums_of(shape, kv_heads, dtype, device, intervals.reach)
        compile_attention_ahead(dtype, device, heads, kv_heads, head_dim, sums)


def _check(model: Any, given: Mapping[str, Any], reference: torch.Tensor) -> None:
    if torch.compiler.is_compiling():
        raise Unsupported("compiling")
    if torch._C._are_functorch_transforms_active():
        raise Unsupported("a transform of torch.func")
    device = reference.device
    if device.type != "cuda" and not (device.type == "cpu" and interpreting()):
        raise Unsupported("no gpu")
    if device.type == "cuda" and not interpreting():
        problem = attention_problem(device, _dtype(model))
        if problem is not None:
            raise Unsupported(problem)
    if cache_of(given) is not None:
        raise Unsupported("a key/value cache")
    config = model.config.get_text_config()
    implementation = config._attn_implementation
    if implementation not in _IMPLEMENTATIONS:
        raise Unsupported(f"attn_implementation {implementation}")
    # Others may have registered their own under transformers' names, as sequence parallelism does; eager attention is
    # a function of the model's module.
    registered = (ALL_ATTENTION_FUNCTIONS.get(implementation), ALL_MASK_ATTENTION_FUNCTIONS.get(implementation))
    if not all(function is None or str(function.__module__).startswith("transformers.") for function in registered):
        raise Unsupported("another attention or mask under transformers' name")
    if config.use_bidirectional_attention == "all" or not getattr(config, "is_causal", True):
        raise Unsupported("bidirectional attention")
    for name in _RECORDED:
        recorded = given.get(name)
        if recorded if recorded is not None else getattr(config, name, False):
            raise Unsupported(name)
    if isinstance(given.get("logits_to_keep", 0), torch.Tensor) or given.get("logits_to_keep", 0) != 0:
        raise Unsupported("logits_to_keep")
    # Code of the user's that is handed a mask may read it.
    text_model = getattr(model, "language_model", model)
    if text_model is not model and not is_transformers(text_model.forward):
        raise Unsupported("another text model")
    for layer in text_model.layers:
        layer = layer._modules.get("_checkpoint_wrapped_module", layer)  # torch's CheckpointWrapper
        if not is_transformers(layer.forward) or not is_known(type(layer)):
            raise Unsupported("another decoder layer")
        attention = layer.self_attn
        if _shows_mask(layer) or _shows_mask(attention):
            raise Unsupported("hooks that are handed the mask")
        if not is_ours(type(attention)) or "forward" in attention.__dict__:
            raise Unsupported("another attention")
        if not attention.is_causal:
            raise Unsupported("bidirectional attention")
        module: Any = sys.modules[type(attention).forward.__module__]
        if implementation == "eager" and not is_transformers_own(module.eager_attention_forward):
            raise Unsupported("another eager_attention_forward")
        if attention.attention_dropout and attention.training:
            raise Unsupported("attention dropout")


def _padding(mask: Any, batch: int, seq_len: int, implementation: str = "sdpa") -> torch.Tensor | None:
    """The padding mask, or None where nothing is padding."""
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor) or mask.shape != (batch, seq_len):
        raise Unsupported("a mask that is no padding mask")
    # The answer decides what runs, so where the batch's host copy is lost, the GPU has to be waited for.
    host = host_copy(mask)
    tokens = (mask if host is None else host) != 0
    if bool(tokens.all()):
        return None
    changes = (tokens[:, 1:] != tokens[:, :-1]).sum(1)
    # Padding at either end, at both, or everywhere: tokens make one run.
    one_run = (changes <= 1) | ((changes == 2) & ~tokens[:, 0])
    if not bool(one_run.all()):
        raise Unsupported("padding between tokens")
    # Rows without keys are zeros, but means of all values in stock's eager attention: on the left they predict a token.
    if implementation == "eager" and not bool(tokens[:, 0].all()):
        raise Unsupported("padding on the left under eager attention")
    return mask


def _makes_cache(model: Any, given: Mapping[str, Any]) -> bool:
    """Whether stock makes a key/value cache of its own: text models do, unless they are told not to or checkpointed."""
    use_cache = given.get("use_cache")
    use_cache = model.config.get_text_config().use_cache if use_cache is None else use_cache
    if not use_cache or hasattr(model, "language_model"):
        return False
    checkpointed = getattr(model, "gradient_checkpointing", False) and model.training
    # Before 5.24 transformers did not ask whether there is something to checkpoint for.
    return not checkpointed or (RENAMED and not torch.is_grad_enabled())


def stock_finds_documents(model: Any, given: Mapping[str, Any]) -> bool:
    """Whether stock keeps packed documents apart: it looks for them where there is neither a mask nor a cache."""
    return given.get("attention_mask") is None and not _makes_cache(model, given)


def wants_apart(model: Any, given: Mapping[str, Any]) -> bool:
    """Whether documents are to be kept apart in this forward though stock would let them see each other."""
    return (
        model.training
        and given.get("position_ids") is not None
        and given.get("mm_token_type_ids") is None
        and not stock_finds_documents(model, given)
    )


def document_starts(position_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Where packed documents begin, but for each row's first: at a token's position of 0 behind another position.

    Stock, where it looks for documents, takes any step but one to the next position for a new one. Where it does not
    look, positions that jump (as in training for longer contexts), padding's, and those that are all 0 are but angles.

    Args:
        position_ids: [1 or batch, seq_len]; below 0 are no positions.
        mask: [batch, seq_len], 0 where there is padding; None where there is none.
    """
    zero = position_ids == 0
    starts = zero & ((position_ids >= 0).cumsum(-1) > 1) & ~zero.all(-1, keepdim=True)
    return starts if mask is None else starts & (mask != 0).to(starts.device)


def _documents(
    model: Any, given: Mapping[str, Any], batch: int, padding: torch.Tensor | None, keep_apart: bool, on_host: bool
) -> torch.Tensor | None:
    """[batch, seq_len], a new number from where a document starts; or None.

    Text models make a cache by default, and then do not look for documents: packed rows would attend to each other.
    With `keep_apart` they do not in training.

    Args:
        on_host: whether they must be known there.
    """
    position_ids = given.get("position_ids")
    if position_ids is None:
        return None
    if position_ids.dim() != 2:
        raise Unsupported("position_ids that are no matrix")
    stock_finds_them = stock_finds_documents(model, given)
    if not stock_finds_them and not (keep_apart and wants_apart(model, given)):
        return None
    if on_host:
        host = host_copy(position_ids)
        if host is None and stock_finds_them:
            raise Unsupported("packed rows whose position_ids were not seen before they were on the GPU")
        # Where stock would let documents see each other, the GPU has to be waited for.
        position_ids = position_ids.cpu() if host is None else host
    if stock_finds_them:
        starts = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1) != 1
    else:
        starts = document_starts(position_ids, padding)
    return starts.cumsum(-1).expand(batch, -1)


def _blocks(
    model: Any, config: Any, given: Mapping[str, Any], reference: torch.Tensor
) -> tuple[torch.Tensor | None, bool]:
    """Numbers of images, whose tokens attend to each other; and whether in every layer, beyond the window too."""
    types = given.get("mm_token_type_ids")
    if types is None or config.use_bidirectional_attention != "vision" or not hasattr(model, "language_model"):
        return None, False
    if types.shape != reference.shape[:2]:
        raise Unsupported("token types of another length")
    # A subclass, such as sharding makes, is defined elsewhere.
    family = next(base.__module__ for base in type(model).__mro__ if base.__module__ in FAMILIES.values())
    blocks = importlib.import_module(family).get_block_sequence_ids_for_mask(types, device=reference.device)
    return blocks, family == FAMILIES["Gemma4Unified"]
