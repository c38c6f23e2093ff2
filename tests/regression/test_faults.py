"""What goes wrong in the middle of a step, or of a change of patches, leaves nothing behind."""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import structures
import torch
from kernel_checks import same_bits
from patch_state import attributes, counts, states
from quick import slow_after
from shortage import Place, shortage
from transformers import Gemma4ForCausalLM

import fastgemma
from fastgemma.api import engine_ops, settings
from fastgemma.kernels.backend import interpreting
from fastgemma.patches.engine import Engine
from fastgemma.patches.table import ENGINE, ROWS

WHOLE = {
    *(Place("forward", name) for name in ("host_rows", "linear_cross_entropy")),
    *(Place(phase, name) for phase in ("forward", "recompute", "backward") for name in ("pre_attention", "attention")),
    *(Place(phase, "post_attention") for phase in ("forward", "recompute", "backward")),
    Place("backward", "linear_cross_entropy"),
}
PARTS = {Place(phase, name) for phase in ("forward", "backward") for name in ("lora", "lora_mlp", "qk_norm_rope")}

Step = tuple[torch.Tensor, dict[str, torch.Tensor]]


def lora_model(path: Path, quantized: bool = False) -> Any:
    """One layer with dropout in its adapters; its per-layer-embedding table is mapped from a checkpoint in `path`."""
    shape = {"layer_types": ["full_attention"], "num_kv_shared_layers": 0, "use_double_wide_mlp": False}
    structures.build("e2b", **shape).save_pretrained(path)
    with fastgemma.patched(per_layer_embeddings="host"):
        base = Gemma4ForCausalLM.from_pretrained(path, dtype=torch.float32)
    if quantized:
        structures.quantize(base)
    torch.manual_seed(0)
    config = peft.LoraConfig(r=8, lora_dropout=0.2, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(base, config).train()


def step(model: Any, seq_len: int) -> Step:
    model.zero_grad()
    torch.manual_seed(7)
    loss = model(**structures.batch("padding", rows=1, seq_len=seq_len)).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def equal(left: Step, right: Step) -> bool:
    return (
        same_bits(left[0], right[0])
        and left[1].keys() == right[1].keys()
        and all(same_bits(left[1][name], grad) for name, grad in right[1].items())
    )


def counted(model: Any, seq_len: int) -> tuple[Step, dict[str, tuple[int, dict[str, int]]]]:
    """A step, and what it added to the counters."""
    before = counts()
    found = step(model, seq_len)
    return found, {
        name: (calls - before[name][0], {r: n - before[name][1].get(r, 0) for r, n in reasons.items()})
        for name, (calls, reasons) in counts().items()
    }


@pytest.mark.slow
@pytest.mark.skipif(not interpreting(), reason="attention over intervals in float32 runs in the interpreter only")
@pytest.mark.parametrize("checkpointing, features, expected", [(True, {}, WHOLE), (False, {"rms_norm": False}, PARTS)])
def test_after_running_out_of_memory_the_next_step_is_right(
    tmp_path: Path, checkpointing: bool, features: dict[str, bool], expected: set[Place]
) -> None:
    """In the midst of every operation, in a model's first step."""
    model = lora_model(tmp_path, quantized=checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    fastgemma.patch(**features)

    def fresh() -> Any:
        for op in engine_ops():
            if op.release is not None:
                op.release()  # nothing is kept from other runs
        return copy.deepcopy(model)

    step(fresh(), 11)  # what a process makes once is not made again
    with shortage() as places:
        step(fresh(), 11)
    assert expected <= set(places)
    right, right_counts = counted(fresh(), 9)
    assert torch.isfinite(right[0]) and any(grad.any() for grad in right[1].values())
    weights, state = {name: tensor.clone() for name, tensor in model.state_dict().items()}, states()
    for place in sorted(expected):
        moments = [number for number, other in enumerate(places) if other == place]
        moment = moments[2 * len(moments) // 3]
        short = fresh()
        with shortage(moment) as reached, pytest.raises(torch.OutOfMemoryError, match=f"out of memory at {moment},"):
            step(short, 11)
        assert reached == places[:moment]
        found, found_counts = counted(short, 9)
        assert equal(found, right), f"after running out of memory at {moment}, in {place}"
        assert found_counts == right_counts and states() == state
        assert all(same_bits(tensor, weights[name]) for name, tensor in short.state_dict().items())


def test_an_interrupted_step_restores_the_state_before_the_block(tmp_path: Path) -> None:
    model = lora_model(tmp_path)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    fastgemma.patch(rope=False)
    before = states()
    handle = model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt), fastgemma.patched(geglu=False):
        assert states() != before
        step(model, 9)
    assert states() == before
    handle.remove()
    assert torch.isfinite(step(model, 9)[0])


class Stop(Exception):
    pass


@pytest.mark.parametrize("interruption", slow_after(1, (Stop, KeyboardInterrupt)))
@pytest.mark.parametrize("nested", (False, True))
def test_an_interrupted_change_of_patches(
    interruption: type[BaseException], nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the table: `patch` leaves nothing patched, `patched` what was there before it."""
    stock, installs, install = attributes(), iter(range(1000)), Engine._install

    def patched_places() -> set[str]:
        return {place for place, value in attributes().items() if value is not stock[place]}

    def interrupted(engine: Engine, site: Any) -> None:
        install(engine, site)
        if next(installs) == len(ROWS) // 2:
            raise interruption

    block = fastgemma.patched(rope=False) if nested else contextlib.nullcontext(fastgemma.patch(rope=False))
    with block:
        before, places = states(), patched_places()
        with monkeypatch.context() as patch, pytest.raises(interruption):
            patch.setattr(Engine, "_install", interrupted)
            # Other rows than before, or there would be nothing to install.
            if nested:
                with fastgemma.patched(optimizer=False):
                    pass
            else:
                fastgemma.patch(optimizer=False)
        if nested:
            assert states() == before and patched_places() == places and places
    assert not patched_places() and set(states().values()) == {("off", None)} and not any(settings().values())


def test_a_strict_block_that_fails_restores_the_state_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def unverified() -> None:
        raise fastgemma.PatchError("unverified")

    with fastgemma.patched(rope=False):
        before = states()
        monkeypatch.setattr(ENGINE, "_check_all", unverified)
        with pytest.raises(fastgemma.PatchError, match="unverified"), fastgemma.patched(strict=True):
            pass
        assert states() == before


def test_a_block_that_is_left_before_one_inside_it() -> None:
    """A generator is suspended inside its block, and closed while another block runs."""

    def generator() -> Iterator[None]:
        with fastgemma.patched(rope=False):
            yield

    suspended = generator()
    next(suspended)
    with fastgemma.patched(geglu=False):
        inside = states()
        suspended.close()
        assert states() == inside
    assert set(states().values()) == {("off", None)}


def test_a_block_that_another_thread_closes() -> None:
    """A generator is finished, or collected, by whichever thread holds it last."""

    def generator() -> Iterator[None]:
        with fastgemma.patched():
            yield

    suspended = generator()
    next(suspended)
    thread = threading.Thread(target=suspended.close)
    thread.start()
    thread.join()
    assert set(states().values()) == {("off", None)}
