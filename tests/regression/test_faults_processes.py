"""Patched models in forked children, in loaders' workers, in several threads, and in copies."""

from __future__ import annotations

import copy
import io
import os
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import structures
import torch
from kernel_checks import same_bits
from patch_state import states
from processes import can_fork, in_forked_child
from torch.utils.data import DataLoader, Dataset
from transformers import Gemma4ForCausalLM

import fastgemma
from fastgemma import api
from fastgemma.kernels.backend import Kernel
from fastgemma.patches.engine import Engine
from fastgemma.patches.layer_recordings import LayerGraphs

SHAPE: dict[str, Any] = {"layer_types": ["full_attention"], "num_kv_shared_layers": 0}
OFF = {("off", None)}

Step = tuple[torch.Tensor, dict[str, torch.Tensor]]


def lora(base: Any) -> Any:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(base, config).train()


def step(model: Any, seed: int = 3) -> Step:
    model.zero_grad()
    loss = model(**structures.batch("padding", rows=1, seq_len=9, seed=seed)).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def equal(left: Step, right: Step) -> bool:
    return (
        bool(torch.isfinite(left[0]))
        and same_bits(left[0], right[0])
        and left[1].keys() == right[1].keys()
        and all(same_bits(left[1][name], grad) for name, grad in right[1].items())
    )


def in_thread(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


# Forks


@can_fork
def test_a_child_forked_while_another_thread_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    """It finds the state before or after the change, and can change it."""
    fastgemma.status()  # the table is imported
    installing, install = threading.Event(), Engine._install

    def slowly(engine: Engine, site: Any) -> None:
        installing.set()
        install(engine, site)

    def work() -> tuple[set[str], bool, bool]:
        state = {feature for feature, (name, _) in states().items() if name == "active"}
        fastgemma.unpatch()
        off = set(states().values()) == OFF
        with fastgemma.patched(rope=False) as report:
            return state, off, report["rms_norm"].state == "active"

    monkeypatch.setattr(Engine, "_install", slowly)
    thread = in_thread(fastgemma.patch)
    assert installing.wait(10)
    state, off, again = in_forked_child(work)
    thread.join()
    assert state == set(fastgemma.status()) and off and again


@can_fork
def test_a_child_does_not_wait_for_a_block_of_a_thread_that_it_lacks() -> None:
    inside, leave = threading.Event(), threading.Event()

    def block() -> None:
        with fastgemma.patched(rope=False):
            inside.set()
            leave.wait(30)

    def work() -> set[Any]:
        fastgemma.patch()
        fastgemma.unpatch()
        return set(states().values())

    thread = in_thread(block)
    assert inside.wait(10)
    try:
        assert in_forked_child(work) == OFF
        with pytest.raises(fastgemma.PatchError, match="another thread"):
            fastgemma.patch()
    finally:
        leave.set()
        thread.join()
    assert set(states().values()) == OFF


@can_fork
def test_a_child_forked_inside_a_block_leaves_it() -> None:
    fastgemma.patch(geglu=False)
    before = states()

    def fork_inside() -> tuple[bool, bool]:
        with fastgemma.patched(rope=False):
            child = in_forked_child(lambda: (states(), api.settings()))
            inside = child == (states(), api.settings())
        return inside, states() == before

    assert in_forked_child(fork_inside) == (True, True)
    assert states() == before


@can_fork
def test_a_child_forked_while_another_thread_records_a_layer() -> None:
    graphs = LayerGraphs()
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with graphs._lock:
            held.set()
            release.wait(30)

    thread = in_thread(hold)
    assert held.wait(10)
    try:
        assert in_forked_child(graphs.clear, seconds=5) is None
    finally:
        release.set()
        thread.join()


class Asking(Dataset[dict[str, torch.Tensor]]):
    """Rows made in a worker, which looks at the patches; the first changes its own."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        assert fastgemma.status()["rms_norm"].state == "active"
        if index == 0:
            with fastgemma.patched(rms_norm=False) as report:
                assert report["rms_norm"].state == "off"
        ids = structures.batch("packing", seed=index)["input_ids"][0, :9]
        return {"input_ids": ids, "labels": ids, "process": torch.tensor(os.getpid())}


@pytest.mark.slow
@can_fork
def test_workers_of_a_loader() -> None:
    model = lora(structures.build("e2b", **SHAPE))
    fastgemma.patch()
    losses: list[list[float]] = []
    for workers in (0, 2):
        options: dict[str, Any] = {"multiprocessing_context": "fork", "timeout": 60} if workers else {}
        loader = DataLoader(Asking(), batch_size=2, num_workers=workers, **options)
        losses.append([])
        for batch in loader:
            assert (os.getpid() in batch.pop("process").tolist()) is not bool(workers)
            loss = model(**batch).loss
            loss.backward()
            losses[-1].append(loss.item())
    assert len(losses[0]) == 2 and losses[0] == losses[1]
    assert fastgemma.status()["rms_norm"].state == "active"


# Copies


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [True, False])
def test_copies_of_a_patched_model_train_alike(tmp_path: Path, quantized: bool) -> None:
    structures.build("e2b", **SHAPE).save_pretrained(tmp_path)
    fastgemma.patch(per_layer_embeddings="host")
    base = Gemma4ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    if quantized:
        structures.quantize(base)
    model = lora(base)
    right = step(model)  # what a step notes in the model is copied too
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    if not quantized:
        copies.append(pickle.loads(pickle.dumps(model)))  # bitsandbytes' weights cannot be pickled so
    for parameter in model.parameters():
        parameter.data.zero_()  # a copy that reads the original's weights shows it
    for copied in copies:
        assert equal(step(copied), right)
    with fastgemma.patched(rope=False):
        pass
    assert set(dict(copies[0].named_parameters())) == set(dict(model.named_parameters()))


# Threads


@pytest.mark.slow
def test_two_models_trained_in_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = threading.Lock()  # Triton's interpreter runs one kernel at a time
    get = Kernel.__getitem__

    def one_at_a_time(kernel: Kernel, grid: tuple[int, ...]) -> Callable[..., None]:
        start = get(kernel, grid)

        def launch(**kwargs: Any) -> None:
            with launches:
                start(**kwargs)

        return launch

    monkeypatch.setattr(Kernel, "__getitem__", one_at_a_time)
    models = [lora(structures.build(name, **SHAPE)) for name in ("e2b", "31b")]
    fastgemma.patch()
    alone = [[step(model, seed) for seed in (1, 2)] for model in models]
    fastgemma.unpatch()
    fastgemma.patch()
    found: list[list[Step]] = [[], []]
    start = threading.Barrier(2)

    def train(number: int) -> None:
        start.wait(10)
        for seed in (1, 2):
            found[number].append(step(models[number], seed))

    threads = [in_thread(lambda number=number: train(number)) for number in (0, 1)]
    for thread in threads:
        thread.join()
    for steps, expected in zip(found, alone):
        assert len(steps) == 2 and all(map(equal, steps, expected))
