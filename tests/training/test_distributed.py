"""Several processes: the loss and the gradients of one, and one copy of the per-layer-embedding table for all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import structures
import torch
import torch.distributed as dist
from distributed_checks import (
    Rank,
    Trained,
    Wrap,
    all_rows,
    data_parallel,
    lora_model,
    sharded_by_layer,
    sharded_within_layers,
    train,
    train_in_processes,
)
from kernel_checks import FLOAT32_BUDGET, relative_error
from memory_maps import on_linux

import fastgemma

pytestmark = pytest.mark.slow

Run = Callable[[Wrap], list[Rank]]

KERNELS = ("rms_norm", "rope", "geglu", "lora", "cross_entropy")
# The last two read the keys and values of the first two.
LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    structures.build("e2b", layer_types=LAYERS).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def stock(checkpoint: Path) -> Trained:
    """One process, unpatched, on the rows of all."""
    return train(lora_model(checkpoint), all_rows())


@pytest.fixture(scope="module")
def run(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    @functools.cache
    def run(wrap: Wrap) -> list[Rank]:
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("TRITON_INTERPRET", "1")  # on a machine with a GPU too: gloo is for the CPU
            # DDP pairs the ranks' buffers by their order, and some supported releases of transformers let the hash seed
            # order the rotary frequencies.
            environment.setenv("PYTHONHASHSEED", "0")
            return train_in_processes(tmp_path_factory.mktemp("ranks"), checkpoint, wrap)

    return run


def assert_equal_one_process(ranks: list[Rank], stock: Trained) -> None:
    for losses in zip(*(rank.trained.losses for rank in ranks)):
        assert sum(losses) / len(losses) == pytest.approx(stock.losses[0], rel=FLOAT32_BUDGET)
    for rank in ranks:
        assert rank.trained.grads.keys() == stock.grads.keys()
        errors = {name: relative_error(rank.trained.grads[name], grad) for name, grad in stock.grads.items()}
        worst = max(errors, key=errors.__getitem__)
        assert errors[worst] <= FLOAT32_BUDGET, f"{worst}: {errors[worst]:.2e}"
        assert not any(name.endswith("embed_tokens_per_layer.weight") for name in rank.tensors)


@pytest.mark.parametrize("wrap", (data_parallel, sharded_by_layer))
def test_ranks_train_as_one_process(wrap: Wrap, run: Run, stock: Trained) -> None:
    """FSDP has gathered a layer's weights when its forward begins, so sharding by layer costs no fast path either."""
    ranks = run(wrap)
    assert_equal_one_process(ranks, stock)
    for rank in ranks:
        assert all(rank.fast_calls[feature] for feature in (*KERNELS, "per_layer_embeddings"))
        assert not any(rank.fallbacks.values())


def test_weights_still_sharded_take_the_original_code(run: Run, stock: Trained) -> None:
    ranks = run(sharded_within_layers)
    assert_equal_one_process(ranks, stock)
    for rank in ranks:
        assert rank.fallbacks["lora"] and rank.fallbacks["rope"] and rank.fallbacks["rms_norm"]
        assert not rank.fast_calls["rope"], "every layer's query norm is sharded"


@on_linux
def test_ranks_share_one_copy_of_the_table(checkpoint: Path, run: Run) -> None:
    table_kib = structures.VOCAB * len(LAYERS) * 16 * torch.float32.itemsize / 1024
    for rank in run(data_parallel):
        mapping = rank.mapping
        assert mapping is not None and mapping.path == str(checkpoint / "model.safetensors")
        assert mapping.kib["Rss"] >= table_kib, "not all of its rows were read"
        assert mapping.kib["Private_Dirty"] == mapping.kib["Anonymous"] == 0


def test_the_table_is_no_second_kind_of_device_to_ddp(checkpoint: Path, tmp_path: Path) -> None:
    """DDP takes parameters of one type of device only; the meta device stands in for a GPU."""
    dist.init_process_group("gloo", init_method=(tmp_path / "rendezvous").as_uri(), rank=0, world_size=1)
    try:
        with fastgemma.patched(per_layer_embeddings="host"):
            model = lora_model(checkpoint).to("meta")
        table = model.get_base_model().model.embed_tokens_per_layer
        assert table.weight.device.type == "cpu"
        # What is on the meta device cannot be sent to other ranks.
        torch.nn.parallel.DistributedDataParallel(model, init_sync=False)
        table.register_parameter("as_in_stock", torch.nn.Parameter(table.weight))
        with pytest.raises(ValueError, match="same type of devices"):
            torch.nn.parallel.DistributedDataParallel(model, init_sync=False)
    finally:
        dist.destroy_process_group()
