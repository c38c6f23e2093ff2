"""Checkpointed decoder layers as one operation each: bit-equal to transformers' checkpointing, and left to it where
they could not be."""

from __future__ import annotations

import copy
import functools
import gc
import weakref
from collections import UserDict
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structures
import torch
from kernel_checks import attends_in_float32, same_bits
from layer_changes import CHANGES, checkpointed, layers
from patch_state import counts
from quick import slow_after
from torch import nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint
from transformers.models.gemma4 import modeling_gemma4

import fastgemma
from fastgemma.kernels import lora_mlp
from fastgemma.patches import layer_calls, layer_readings
from fastgemma.patches.engine import directory_of, written_in
from fastgemma.patches.table import ENGINE

pytestmark = attends_in_float32
# What stands for a dict in models that share keys and values.
KVSharingDict: Any = getattr(modeling_gemma4, "KVSharingDict", UserDict)
# Each kind of layer, one of which shares another's keys and values where the structure has such ones.
LAYERS: dict[str, dict[str, Any]] = {
    name: {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "num_kv_shared_layers": 1}
    for name in ("e2b", "e4b")
}
FEATURES: dict[str, Any] = {"cuda_graphs": False, "cross_entropy": False, "per_layer_embeddings": False}
Results = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def no_counts_of_before() -> Iterator[None]:
    for op in ENGINE.ops:
        op.fast_calls, op.fallbacks = 0, type(op.fallbacks)()
    yield


def build(name: str = "e2b", quantized: bool = False, **options: Any) -> Any:
    model = structures.build(name, **LAYERS.get(name, {}))
    if quantized:
        structures.quantize(model)
    return checkpointed(model, **options)


def step(model: Any, kind: str = "padding", seed: int = 0, **changes: Any) -> Results:
    """Loss, gradients, and what the random state became."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(**{**structures.batch(kind), **changes}).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), "random": torch.rand(3), **grads}


def by_transformers(run: Callable[[], Any]) -> Any:
    with fastgemma.patched(**FEATURES, checkpointing=False):
        return run()


def assert_same(actual: Results, expected: Results) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert same_bits(actual[name], value), name


@pytest.mark.parametrize("name", slow_after(1, structures.STRUCTURES))
@pytest.mark.parametrize("kind", ["padding", pytest.param("packing", marks=pytest.mark.slow)])
def test_steps_are_bit_equal(name: str, kind: str) -> None:
    model = build(name, lora_dropout=0.3)
    expected = by_transformers(lambda: [step(model, kind, seed) for seed in range(2)])
    assert counts()["checkpointing"][0] == 0
    with fastgemma.patched(**FEATURES):
        for seed in range(2):
            assert_same(step(model, kind, seed), expected[seed])
        fast, reasons = counts()["checkpointing"]
    if name == "26b-a4b":
        assert fast == 0 and set(reasons) == {"experts"}
    else:
        assert fast == 2 * len(layers(model)) and not reasons


@pytest.mark.slow
@pytest.mark.parametrize("quantized", [False, True])
def test_tiles_of_rows(quantized: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_mlp, "workspace_bytes", lambda device: 1 << 16)
    model, batch = build(quantized=quantized), structures.batch("padding", rows=2, seq_len=150)
    expected = by_transformers(lambda: step(model, **batch))
    with fastgemma.patched(**FEATURES):
        assert_same(step(model, **batch), expected)
        assert counts()["checkpointing"][0] == len(layers(model))


@pytest.mark.slow
def test_all_weights_trained() -> None:
    model = structures.build("e2b", **LAYERS["e2b"]).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = by_transformers(lambda: step(model))
    with fastgemma.patched(**FEATURES):
        assert_same(step(model), expected)
        assert counts()["checkpointing"] == (len(model.model.layers), {})


@pytest.mark.slow
def test_autocast() -> None:
    """The backward runs outside the region, as Trainer's does."""
    model = build()

    def run() -> Results:
        model.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(**structures.batch("padding")).loss
        loss.backward()
        return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = by_transformers(run)
    with fastgemma.patched(**FEATURES):
        assert_same(run(), expected)


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_layer_is_read_anew(change: Callable[[nn.Module], None]) -> None:
    model = build()
    with fastgemma.patched(**FEATURES):
        before = step(model)
    change(model)
    expected = by_transformers(lambda: step(model))
    assert expected.keys() != before.keys() or any(
        not torch.equal(value, before[name]) for name, value in expected.items()
    )
    with fastgemma.patched(**FEATURES):
        assert_same(step(model), expected)


def test_layers_are_read_once_for_all_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    read: list[Any] = []
    original = layer_readings.read_before
    monkeypatch.setattr(
        layer_readings, "read_before", lambda layer, *args: read.append(layer) or original(layer, *args)
    )
    with fastgemma.patched(**FEATURES):
        for seq_len in (5, 9):
            step(model, **structures.batch("padding", seq_len=seq_len))
    assert len(read) == len(layers(model))
    assert not any("_fastgemma_snapshots" in layer.__dict__ for layer in layers(model))


def _hook(model: nn.Module) -> None:
    layers(model)[1].register_forward_hook(lambda *_: None)


def _hook_all(model: nn.Module) -> Any:
    return torch.nn.modules.module.register_module_forward_hook(lambda *_: None)


def _leave_random_state(model: nn.Module) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, reason, left",
    [
        (_hook, "hooks on the layer, or anomaly detection", 1),
        (_hook_all, "hooks on the layer, or anomaly detection", 3),
        (_leave_random_state, "another kind of checkpointing", 3),
    ],
)
def test_what_is_left_to_transformers(change: Callable[[nn.Module], Any], reason: str, left: int) -> None:
    model = build()
    handle = change(model)
    try:
        expected = by_transformers(lambda: step(model))
        with fastgemma.patched(**FEATURES):
            assert_same(step(model), expected)
            assert counts()["checkpointing"] == (len(layers(model)) - left, {reason: left})
    finally:
        if handle is not None:
            handle.remove()


@pytest.mark.parametrize("given", slow_after(1, [False, True]), ids=["returned", "given"])
def test_keys_that_the_caller_sees(given: bool) -> None:
    """Their gradient is that of the attention of their own layer too."""
    model = build()

    def gradients() -> Results:
        batch, states = structures.batch("padding"), KVSharingDict()
        if given:
            loss = model(**batch, shared_kv_states=states).loss
        else:
            output = model(**batch, return_shared_kv_states=True)
            loss, states = output.loss, output.shared_kv_states
        (key, value) = states["full_attention"]
        return dict(zip(("key", "value"), torch.autograd.grad(loss, (key, value))))

    expected = by_transformers(gradients)
    with fastgemma.patched(**FEATURES):
        assert_same(gradients(), expected)
        reason = "keys and values that the caller sees"
        assert counts()["checkpointing"][1] == {reason: sum(x.self_attn.store_full_length_kv for x in layers(model))}


@pytest.mark.slow
def test_a_shallow_copy_of_a_layer() -> None:
    model = build()
    with fastgemma.patched(**FEATURES):
        step(model)
        other = copy.copy(layers(model)[0])
        other._modules = dict(other._modules)
        other.mlp = copy.deepcopy(other.mlp)
        _scale_all(other.mlp)
        layers(model)[0] = other
        found = step(model)
    assert_same(found, by_transformers(lambda: step(model)))


def _scale_all(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)


@pytest.mark.slow
def test_evaluation_lets_go_of_weights_that_are_gone() -> None:
    model = build()
    factor = weakref.ref(layers(model)[1].mlp.up_proj.lora_A["default"].weight)
    with fastgemma.patched(**FEATURES):
        step(model)
        model.zero_grad()
        merged = model.merge_and_unload().eval()
        with torch.no_grad():
            merged(**structures.batch("padding"))
        del model
        gc.collect()
        assert factor() is None


@pytest.mark.slow
def test_a_scale_that_attention_does_not_take() -> None:
    model = build()
    layers(model)[0].self_attn.scaling = -0.5
    for checkpointing in (False, True):
        with fastgemma.patched(**FEATURES, checkpointing=checkpointing), pytest.raises(ValueError, match="scale"):
            step(model)


@pytest.mark.slow
def test_a_checkpoint_function_that_stood_in_torch_s_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before fastgemma was imported: that of the layers is then the one that fastgemma takes for torch's."""
    calls: list[int] = []

    def other(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return torch_checkpoint(function, *args, **kwargs)

    monkeypatch.setattr(layer_calls, "checkpoint", other)
    monkeypatch.setattr(layer_calls, "_IS_TORCHS", written_in(other, directory_of(torch)))
    model = build()
    for layer in layers(model):
        layer._gradient_checkpointing_func = functools.partial(other, use_reentrant=False)
    with fastgemma.patched(**FEATURES):
        step(model)
    assert len(calls) == len(layers(model))
    assert counts()["checkpointing"] == (0, {"another kind of checkpointing": len(layers(model))})


@pytest.mark.slow
def test_another_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ours = build(), modeling_gemma4.apply_rotary_pos_emb
    monkeypatch.setattr(modeling_gemma4, "apply_rotary_pos_emb", lambda *args, **kwargs: ours(*args, **kwargs).tanh())
    expected = by_transformers(lambda: step(model))
    with fastgemma.patched(**FEATURES):
        assert_same(step(model), expected)
        assert counts()["checkpointing"][1] == {"another apply_rotary_pos_emb": len(layers(model))}


@pytest.mark.slow
def test_masks_that_are_no_intervals() -> None:
    model = build()
    mask = torch.ones(2, 12, dtype=torch.int64)
    mask[0, 5] = 0
    batch = {**structures.batch("padding", rows=2, seq_len=12), "attention_mask": mask}
    expected = by_transformers(lambda: step(model, **batch))
    with fastgemma.patched(**FEATURES):
        assert_same(step(model, **batch), expected)
        assert counts()["checkpointing"] == (0, {"attention other than over intervals": len(layers(model))})


@pytest.mark.slow
def test_patches_may_go_before_the_backward() -> None:
    model = build()
    expected = by_transformers(lambda: step(model))
    model.zero_grad()
    torch.manual_seed(0)
    with fastgemma.patched(**FEATURES):
        loss = model(**structures.batch("padding")).loss
    loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert same_bits(parameter.grad, expected[name]), name


@pytest.mark.slow
def test_several_forwards_before_their_backwards() -> None:
    model = build(lora_dropout=0.3)
    batches = [structures.batch("padding")]
    batches.append({**batches[0], "input_ids": batches[0]["input_ids"].flip(1)})

    def both() -> Results:
        model.zero_grad()
        torch.manual_seed(0)
        losses = [model(**batch).loss for batch in batches]
        for loss in losses:
            loss.backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = by_transformers(both)
    with fastgemma.patched(**FEATURES):
        assert_same(both(), expected)


@pytest.mark.slow
def test_outside_of_training_nothing_is_asked() -> None:
    model = build()
    with fastgemma.patched(**FEATURES):
        model.eval()
        step(model)
        model.train()
        with torch.no_grad():
            model(**structures.batch("padding"))
        model.gradient_checkpointing_disable()
        step(model)
    assert counts()["checkpointing"] == (0, {})
