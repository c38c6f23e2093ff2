"""Training a LoRA model in several processes, over gloo on the CPU.

Spawned processes import what they run by name, under which test modules cannot be imported; so it is here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import peft
import structures
import torch
import torch.distributed as dist
from memory_maps import Mapping, mapping_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers import Gemma4ForCausalLM

import fastgemma

RANKS = 2

Wrap = Callable[[Any], nn.Module]
Batch = dict[str, Any]


@dataclass
class Trained:
    losses: list[float]
    grads: dict[str, torch.Tensor]  # whole ones, of the last step, by the unwrapped model's names


@dataclass
class Rank:
    """What one process saw."""

    trained: Trained
    tensors: set[str]  # names of all parameters and buffers
    mapping: Mapping | None  # that holds the per-layer-embedding table
    fast_calls: dict[str, int]
    fallbacks: dict[str, dict[str, int]]


def lora_model(checkpoint: Path) -> Any:
    model = Gemma4ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, config).train()


def rows_of(rank: int) -> Batch:
    """Every rank has as many labels, so that the mean of the ranks' losses is the loss of `all_rows`."""
    return structures.batch("padding", seed=rank)


def all_rows() -> Batch:
    batches = [rows_of(rank) for rank in range(RANKS)]
    return {
        name: torch.cat([batch[name] for batch in batches]) if isinstance(value, torch.Tensor) else value
        for name, value in batches[0].items()
    }


def data_parallel(model: Any) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def averaged(model: Any) -> nn.Module:
    """Gradients summed, then divided: torch 2.8's gloo leaves the sum where FSDP asks it for the mean."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    return model


def sharded_by_layer(model: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    return averaged(fully_shard(model, mesh=mesh))


def sharded_within_layers(model: Any) -> nn.Module:
    """Also in units of their own: modules whose weights a fused operation reads without calling them."""
    mesh = init_device_mesh("cpu", (RANKS,))
    for layer in model.get_base_model().model.layers:
        attention = layer.self_attn
        for module in (attention.q_proj, attention.q_norm, layer.post_attention_layernorm, layer.mlp.down_proj):
            fully_shard(module, mesh=mesh)
    return sharded_by_layer(model)


def train(model: nn.Module, batch: Batch, wrap: Wrap = lambda model: model, steps: int = 1) -> Trained:
    """Forward and backward over and over, without an optimizer."""
    wrapped = wrap(model)
    losses = []
    for _ in range(steps):
        wrapped.zero_grad()
        loss = wrapped(**batch).loss
        loss.backward()
        losses.append(loss.item())
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return Trained(losses, {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()})


def _worker(rank: int, folder: Path, checkpoint: Path, wrap: Wrap) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "rendezvous").as_uri(),
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=120),
    )
    fastgemma.patch(per_layer_embeddings="host")
    model = lora_model(checkpoint)
    # Two steps: DDP regroups the gradients after its first, and notices in the second any that never came.
    trained = train(model, rows_of(rank), wrap, steps=2)
    table = model.get_base_model().model.embed_tokens_per_layer
    table(torch.arange(table.num_embeddings))
    dist.barrier()  # by now all ranks have read all rows,
    mapping = mapping_of(table.weight)
    dist.barrier()  # and none has closed its map yet
    tensors = {name for name, _ in [*model.named_parameters(), *model.named_buffers()]}
    report = fastgemma.status()
    fast_calls = {feature: report[feature].fast_calls for feature in report}
    fallbacks = {feature: dict(report[feature].fallbacks) for feature in report}
    torch.save(Rank(trained, tensors, mapping, fast_calls, fallbacks), folder / f"{rank}.pt")
    dist.destroy_process_group()


def train_in_processes(folder: Path, checkpoint: Path, wrap: Wrap) -> list[Rank]:
    """Trains the wrapped model, patched, in `RANKS` processes, each on its own rows."""
    torch.multiprocessing.spawn(_worker, (folder, checkpoint, wrap), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]
