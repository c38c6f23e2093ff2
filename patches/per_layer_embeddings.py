"""The per-layer-embedding table stays in the checkpoint file, memory-mapped; the GPU gets only a batch's rows.

The table is the largest tensor of E2B and E4B (4.4 and 5.25 GiB) and is read by row, so it needs neither a place on the
GPU nor a private copy in host memory. Its module keeps its class's behaviour, but its weight is a plain tensor that
nothing which walks parameters can see: `.to`, device-map sizing, accelerate's hooks, DDP, PEFT's casts, optimizers. The
loader and `save_pretrained` go by state_dict and getattr, and still do.
"""

from __future__ import annotations

import copy
import dataclasses
import glob
import logging
import os
from collections.abc import Callable
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from torch import nn
from transformers.models.gemma4 import modeling_gemma4

from fastgemma.kernels.host_rows import gather_rows
from fastgemma.kernels.workspace import has_cuda
from fastgemma.patches.engine import Op, PatchError
from fastgemma.patches.host_copies import host_copy
from fastgemma.patches.mapped_tensor import DamagedFileError, MappedTensor, map_tensor

logger = logging.getLogger("fastgemma")

# "auto" keeps the table on cards of which it takes less than this share.
_ROOM = 0.2


def _mark_initialized(weight: Any) -> None:
    """Keeps transformers' init, which would write noise over it, off a weight that was read from a file."""
    weight._is_hf_initialized = True


class HostScaledEmbedding(modeling_gemma4.Gemma4TextScaledWordEmbedding):
    """`Gemma4TextScaledWordEmbedding` whose weight is a host tensor: in `state_dict()`, but no parameter."""

    pending_ids: torch.Tensor | None = None
    mapped: MappedTensor | None = None  # what the weight is, if it is read from a file

    @classmethod
    def adopt(cls, module: Any) -> None:
        """Turns a stock embedding into a host one in place; identity, hooks and `isinstance` stay."""
        weight = module._parameters.pop("weight")
        module.__class__ = cls
        module.weight = weight

    def release(self, dtype: torch.dtype) -> None:
        """Back to the stock class, with a parameter on "meta" for the loader to fill."""
        shape = self.__dict__.pop("weight").shape
        module: Any = self
        module.__class__ = modeling_gemma4.Gemma4TextScaledWordEmbedding
        module.weight = nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            initialized = getattr(value, "_is_hf_initialized", False)
            value = value.detach()  # shares the storage; no longer a Parameter, so nn.Module does not register it
            value._is_hf_initialized = initialized  # else transformers' init writes noise over the mapped pages
            self.mapped = None
        super().__setattr__(name, value)

    def map(self, mapped: MappedTensor) -> None:
        """Takes its weight from a file."""
        _mark_initialized(mapped.tensor)
        self.weight = mapped.tensor
        self.mapped = mapped

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.mapped is not None and not torch.compiler.is_compiling():
            self.mapped.check()
        pending, self.pending_ids = self.pending_ids, None
        if pending is None or pending.shape != input_ids.shape:
            pending = host_copy(input_ids)
        # `embed_scale` is an ordinary buffer: it follows the model, so it says where and in what dtype stock's table
        # would be. Casting the gathered rows equals gathering from a cast table.
        scale = self.embed_scale
        rows = gather_rows(self.weight, input_ids if pending is None else pending, scale.device)
        return rows.to(scale.dtype) * scale

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.weight

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        key = prefix + "weight"
        if key not in state_dict:
            missing.append(key)
            return
        unexpected[:] = [name for name in unexpected if name != key]
        if state_dict[key].shape != self.weight.shape:
            errors.append(f"size mismatch for {key}: {state_dict[key].shape} and {self.weight.shape}")
        else:
            self.weight = state_dict[key].to("cpu")  # rebound, not copied into: the old one may be a mapped file
            _mark_initialized(self.weight)

    def __deepcopy__(self, memo: dict[int, Any]) -> HostScaledEmbedding:
        memo[id(self.weight)] = self.weight  # a reference model shares the read-only table
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


def _wants_host(op: Op, table_bytes: int) -> bool:
    if not op.active or op.mode == "gpu":
        return False
    if op.mode == "host":
        return True
    if not has_cuda():
        return False
    index = torch.cuda.current_device()
    card = torch.cuda.get_device_properties(index).total_memory * torch.cuda.get_per_process_memory_fraction(index)
    return table_bytes > _ROOM * card


def _tables(model: nn.Module) -> dict[str, HostScaledEmbedding]:
    return {name: module for name, module in model.named_modules() if isinstance(module, HostScaledEmbedding)}


def make_init(original: Callable[..., Any], ops: dict[str, Op]) -> Callable[..., Any]:
    """Construction, before any device map is computed: "auto" does not count the table either."""
    op = ops["per_layer_embeddings"]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        table = getattr(self, "embed_tokens_per_layer", None)
        if type(table) is not modeling_gemma4.Gemma4TextScaledWordEmbedding:
            return
        # Only a model that is being loaded: one built from a config alone keeps an ordinary table.
        size = table.weight.numel() * table.weight.element_size()
        if table.weight.device.type == "meta" and _wants_host(op, size):
            HostScaledEmbedding.adopt(table)

    return __init__


def make_load(original: Callable[..., Any], ops: dict[str, Op]) -> Callable[..., Any]:
    """Loading: `load_config.device_map` says where each key is read to, and what the allocator's warm-up counts.

    from_pretrained keeps its own device_map for dispatch, so the model does not become a multi-device one.
    """
    op = ops["per_layer_embeddings"]

    def load(model: nn.Module, state_dict: Any, checkpoint_files: Any, load_config: Any, *args: Any, **kwargs: Any):
        mapped: dict[str, MappedTensor] = {}
        dtypes: dict[str, torch.dtype] = {}
        for name, table in _tables(model).items():
            dtypes[name] = table.weight.dtype
            if load_config.device_map is not None:
                device_map = {**load_config.device_map, f"{name}.weight": "cpu"}
                load_config = dataclasses.replace(load_config, device_map=device_map)
            if state_dict or load_config.disable_mmap:
                continue
            try:
                found = map_tensor(checkpoint_files or (), name.rpartition(".")[2] + ".weight")
            except DamagedFileError as error:
                raise PatchError(
                    f"fastgemma: a file of this checkpoint is missing or damaged: {error}. No model was loaded, so "
                    "there is nothing to train. Download or save the checkpoint again."
                ) from error
            if found is not None and found.tensor.shape == table.weight.shape and table.weight.device.type == "meta":
                mapped[name] = found
                # The loader casts to the placeholder's dtype; the file's own dtype makes that no copy.
                table.weight = table.weight.to(found.tensor.dtype)
        result = original(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        unread = result[0].missing_and_mismatched()
        for name, table in _tables(model).items():
            if f"{name}.weight" in unread:
                table.release(dtypes[name])  # stock reports it and initialises it at random: there is no file to map
                continue
            if name in mapped:
                table.map(mapped[name])
            op.fast()
        return result

    return load


def make_lookup(original: Callable[..., Any], ops: dict[str, Op]) -> Callable[..., Any]:
    """`get_per_layer_inputs`: moves the table of a model that was loaded before `patch()`, and guards training it."""
    op = ops["per_layer_embeddings"]

    def get_per_layer_inputs(self, *args: Any, **kwargs: Any) -> Any:
        table = self.embed_tokens_per_layer
        if self.training and torch.is_grad_enabled():
            _refuse_training(table, self.embed_tokens)
        if isinstance(table, HostScaledEmbedding):
            op.fast()
        else:
            _move_if_wanted(op, table, self.config)
        return original(self, *args, **kwargs)

    return get_per_layer_inputs


def _refuse_training(table: Any, tokens: Any) -> None:
    """Full fine-tuning trains the table with the embeddings of `tokens`, and modules_to_save a copy of it. What PEFT
    wraps around those embeddings, to train all or some of them, leaves the table frozen in stock too."""
    if isinstance(table, HostScaledEmbedding):
        kind: Any = type(tokens)
        trained = not kind.__module__.startswith("peft.") and tokens.weight.requires_grad
    else:
        saved = table._modules.get("modules_to_save")
        trained = saved is not None and any(isinstance(module, HostScaledEmbedding) for module in saved.values())
    if trained:
        raise PatchError(
            "fastgemma: the embeddings are being trained, but the per-layer embedding table was left in the checkpoint "
            "file, where it cannot be. Freeze the embeddings (LoRA does), or load the model after "
            'fastgemma.patch(per_layer_embeddings="gpu").'
        )


def _move_if_wanted(op: Op, table: Any, config: Any) -> None:
    """Moves a frozen stock table off the GPU; `config` is the one that knows where the model was loaded from."""
    if type(table) is not modeling_gemma4.Gemma4TextScaledWordEmbedding or not op.active:
        return
    weight = table.weight
    if weight.is_cuda and not weight.requires_grad and _wants_host(op, weight.numel() * weight.element_size()):
        _move_to_host(table, config)


def _checkpoint_files(config: Any) -> list[str]:
    """The safetensors files beside which a loaded model's config lies; a hub's are looked up in its local cache."""
    path = getattr(config, "_name_or_path", None) or ""
    if path and not os.path.isdir(path):
        try:
            found = try_to_load_from_cache(path, "config.json", revision=getattr(config, "_commit_hash", None))
        except ValueError:  # not a repository's name
            found = None
        path = os.path.dirname(found) if isinstance(found, str) else ""
    return sorted(glob.glob(os.path.join(glob.escape(path), "*.safetensors"))) if path else []


def _move_to_host(table: Any, config: Any) -> None:
    weight = table.weight
    try:
        mapped = map_tensor(_checkpoint_files(config), "embed_tokens_per_layer.weight")
    except DamagedFileError:
        mapped = None  # the model was loaded, so its own table is right whatever became of the files
    if mapped is not None and _same(mapped.tensor, weight):
        where = "mapped from its checkpoint"
        HostScaledEmbedding.adopt(table)
        table.map(mapped)
    else:
        copied = weight.detach().to("cpu")
        where = f"copied to host memory ({copied.numel() * copied.element_size() / 2**30:.2f} GiB)"
        _mark_initialized(copied)
        HostScaledEmbedding.adopt(table)
        table.weight = copied
    del weight
    logger.warning(
        "fastgemma: the per-layer embedding table was %s at the first forward. Call fastgemma.patch() before loading "
        "the model to keep it off the GPU from the start.",
        where,
    )


def _same(mapped: torch.Tensor, weight: torch.Tensor, rows: int = 4096) -> bool:
    if mapped.shape != weight.shape or mapped.dtype != weight.dtype:
        return False
    chunks = zip(mapped.split(rows), weight.detach().split(rows))
    return all(torch.equal(ours, theirs.to("cpu")) for ours, theirs in chunks)


def make_multimodal_forward(original: Callable[..., Any], ops: dict[str, Op]) -> Callable[..., Any]:
    """`Gemma4Model.forward` rewrites soft-token ids on the device; the same is done to the host copy beforehand."""
    op = ops["per_layer_embeddings"]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        input_ids = args[0] if args else kwargs.get("input_ids")
        if not op.active or input_ids is None:
            return original(self, *args, **kwargs)
        table: Any = getattr(self.language_model, "embed_tokens_per_layer", None)
        _move_if_wanted(op, table, self.config)  # here, as the text model's own config names no checkpoint
        ids = host_copy(input_ids) if isinstance(table, HostScaledEmbedding) else None
        if ids is not None:
            config = self.config
            soft = [config.image_token_id, config.video_token_id, config.audio_token_id]
            tokens = torch.tensor([token for token in soft if token is not None], dtype=ids.dtype, device=ids.device)
            is_soft = torch.isin(ids, tokens)
            table.pending_ids = ids.masked_fill(is_soft, config.text_config.pad_token_id)
        try:
            return original(self, *args, **kwargs)
        finally:
            if ids is not None:
                table.pending_ids = None

    return forward
