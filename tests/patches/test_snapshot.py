"""A snapshot of modules holds while nothing changes, and for no change that could change what they compute."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import peft
import pytest
import structures
import torch
from torch import nn

from fastgemma.patches import snapshot as snapshot_module
from fastgemma.patches.snapshot import Notes, Snapshot, Snapshots


@pytest.fixture
def layer() -> Any:
    model = structures.build("e2b", layer_types=["full_attention"] * 2, num_kv_shared_layers=1)
    structures.quantize(model)
    config = peft.LoraConfig(r=4, lora_dropout=0.1, target_modules=["q_proj", "gate_proj"])
    return peft.get_peft_model(model, config).train().get_base_model().model.layers[0]


class Subclass(nn.Linear):
    pass


def _set(path: str, value: Any) -> Callable[[nn.Module], None]:
    def change(layer: nn.Module) -> None:
        owner, _, name = path.rpartition(".")
        setattr(layer.get_submodule(owner), name, value)

    return change


def _call(path: str, *args: Any, **kwargs: Any) -> Callable[[nn.Module], None]:
    def change(layer: nn.Module) -> None:
        owner, _, name = path.rpartition(".")
        getattr(layer.get_submodule(owner), name)(*args, **kwargs)

    return change


def _data(layer: Any) -> None:
    weight = layer.input_layernorm.weight
    weight.data = weight.data.clone()


def _packed_data(layer: Any) -> None:
    weight = layer.self_attn.q_proj.base_layer.weight
    weight.data = weight.data.clone()


def _scales(layer: Any) -> None:
    state = layer.mlp.down_proj.weight.quant_state
    state.absmax = state.absmax.clone()


def _nested_scales(layer: Any) -> None:
    state = layer.mlp.down_proj.weight.quant_state.state2
    state.absmax = state.absmax.clone()


def _class(layer: Any) -> None:
    layer.self_attn.q_proj.lora_A["default"].__class__ = Subclass


def _swap(layer: Any) -> None:
    modules = layer.mlp._modules
    modules["gate_proj"], modules["up_proj"] = modules["up_proj"], modules["gate_proj"]


def _variant(layer: Any) -> None:
    layer.self_attn.q_proj.lora_variant["default"] = object()


def _active(layer: Any) -> None:
    layer.self_attn.q_proj._active_adapter = ["default", "other"]


def _active_in_place(layer: Any) -> None:
    layer.self_attn.q_proj.merged_adapters.append("default")


def _rename(layer: Any) -> None:
    modules = layer.self_attn.q_proj.lora_A._modules
    modules["other"] = modules.pop("default")


def _dtype(layer: Any) -> None:
    weight = layer.input_layernorm.weight
    weight.data = weight.data.view(torch.int32).view(torch.float32).view(torch.bfloat16)[:64]


def _transpose(layer: Any) -> None:
    weight = layer.self_attn.q_proj.lora_A["default"].weight
    weight.data = weight.data.as_strided((4, 64), (1, 4))


def _forward_for_nothing(layer: Any) -> None:
    del layer.mlp.nothing
    layer.mlp.__dict__["forward"] = NOTHING


NOTHING = lambda *args: None  # noqa: E731
CHANGES: dict[str, Callable[[Any], Any]] = {
    "weight moved": _data,
    "packed weight moved": _packed_data,
    "weight replaced": _set("input_layernorm.weight", nn.Parameter(torch.ones(64))),
    "frozen": _call("self_attn.q_proj.lora_A.default.requires_grad_", False),
    "base trained": lambda layer: layer.post_attention_layernorm.weight.requires_grad_(not _trained(layer)),
    "scales": _scales,
    "nested scales": _nested_scales,
    "scaling": lambda layer: layer.self_attn.q_proj.scaling.update(default=0.7),
    "scaling replaced": _set("self_attn.q_proj.scaling", {"default": 0.7}),
    "dropout": _set("self_attn.q_proj.lora_dropout.default.p", 0.2),
    "evaluating": _call("eval"),
    "one module evaluating": _call("self_attn.q_proj.lora_dropout.default.eval"),
    "adapters off": _call("self_attn.q_proj.enable_adapters", False),
    "another adapter": _active,
    "merged": _active_in_place,
    "variant": _variant,
    "class": _class,
    "eps": _set("input_layernorm.eps", 1e-3),
    "submodule replaced": _set("mlp.act_fn", nn.ReLU()),
    "submodule added": _call("mlp.add_module", "extra", nn.ReLU()),
    "submodules swapped": _swap,
    "buffer replaced": lambda layer: layer._buffers.update(layer_scalar=torch.ones(1)),
    "forward of its own": _set("self_attn.q_proj.base_layer.forward", NOTHING),
    "forward hook": _call("mlp.register_forward_hook", NOTHING),
    "forward pre-hook": _call("mlp.down_proj.register_forward_pre_hook", NOTHING),
    "backward hook": _call("input_layernorm.register_full_backward_hook", NOTHING),
    "backward pre-hook": _call("register_full_backward_pre_hook", NOTHING),
    "hook without a handle": lambda layer: layer.mlp._forward_hooks.update({1 << 40: NOTHING}),
    "adapter renamed": _rename,
    "dtype at the same place": _dtype,
    "transposed": _transpose,
    "state of the layer's own": lambda layer: setattr(layer.mlp.up_proj.quant_state, "blocksize", 128),
    "forward in the place of nothing": _forward_for_nothing,
    "attribute added": _set("self_attn.sinks", None),
    "attribute deleted": lambda layer: delattr(layer.self_attn, "scaling"),
    "switch": _set("gradient_checkpointing", True),
    "compute dtype": _set("mlp.up_proj.compute_dtype", torch.float16),
}


def _trained(layer: Any) -> bool:
    return layer.post_attention_layernorm.weight.requires_grad


@pytest.mark.parametrize("change", CHANGES)
def test_does_not_hold_after(change: str, layer: Any) -> None:
    layer.mlp.nothing = None
    snapshot = Snapshot(layer)
    assert snapshot.holds() and snapshot.holds()
    CHANGES[change](layer)
    assert not snapshot.holds()
    assert Snapshot(layer).holds()


@pytest.mark.parametrize("path", ["", "input_layernorm", "self_attn"])
def test_does_not_hold_where_a_class_got_another_forward(
    path: str, layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = Snapshot(layer)
    with monkeypatch.context() as patch:
        patch.setattr(type(layer.get_submodule(path)), "forward", NOTHING)
        assert not snapshot.holds()
    assert snapshot.holds()


def test_holds_through_training_steps(layer: Any) -> None:
    """Values change in place, gradients come and go: nothing that a reading depends on."""
    snapshot = Snapshot(layer)
    trained = [p for p in layer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    layer.state_dict()
    assert snapshot.holds()


def test_a_change_that_is_undone_is_none(layer: Any) -> None:
    snapshot = Snapshot(layer)
    handle = layer.mlp.register_forward_hook(NOTHING)
    assert not snapshot.holds()
    handle.remove()
    assert snapshot.holds()


def test_goes_with_its_root_whatever_refers_to_it() -> None:
    layer: Any = structures.build("31b", layer_types=["full_attention"]).model.layers[0]
    layer.notes = Snapshots()
    layer.notes["key"] = Snapshot(layer), 1
    copied = copy.deepcopy(layer)
    assert copied.notes == {} and isinstance(copied.notes, Snapshots)
    assert pickle.loads(pickle.dumps(layer.notes)) is None
    layer.mlp.register_forward_hook(lambda *args, layer=layer: None)
    layer.forward = layer.forward
    alive = weakref.ref(layer)
    del layer
    gc.collect()
    assert alive() is None


def test_notes_hold_for_as_long_as_their_module_stays(layer: Any) -> None:
    notes = Notes(2)
    assert notes.find(layer, "a") is None
    for key in "abc":
        notes.put(layer, key, key.upper())
    assert [notes.find(layer, key) for key in "abc"] == [None, "B", "C"]
    layer.mlp.register_forward_hook(NOTHING)
    assert notes.find(layer, "b") is None
    notes.put(layer, "b", 1)
    assert notes.find(layer, "b") == 1 and notes.find(layer, "c") is None
    before = set(layer.__dict__)
    notes.clear()
    assert notes.find(layer, "b") is None and len(before - set(layer.__dict__)) == 1


def test_copies_and_pickled_modules_are_noted_anew(layer: Any) -> None:
    notes = Notes(2)
    notes.put(layer, "a", 1)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert notes.find(other, "a") is None
        notes.put(other, "a", 2)
        assert notes.find(other, "a") == 2
        attributes = set(other.__dict__)
        notes.clear()
        assert len(attributes - set(other.__dict__)) == 1
        notes.put(layer, "a", 1)
    assert notes.find(layer, "a") == 1


def test_a_module_that_always_changes_is_not_noted_for_ever(layer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(snapshot_module, "Snapshot", lambda module: made.append(module) or Snapshot(module))
    notes = Notes(2)
    for number in range(100):
        layer.steps = [number]
        assert notes.find(layer, "a") is None
        notes.put(layer, "a", number)
    assert 1 < len(made) < 10
    for number in range(64):
        notes.put(layer, "a", number)
    assert notes.find(layer, "a") is not None
    made.clear()
    for number in range(3):
        layer.steps = [number]
        notes.put(layer, "a", number)
    assert len(made) == 3


def test_a_shallow_copy_is_another_module(layer: Any) -> None:
    """As a replica of DataParallel is, or what somebody changes a part of."""
    notes = Notes(2)
    notes.put(layer, "a", 1)
    other = copy.copy(layer)
    other._modules = dict(layer._modules)
    assert notes.find(other, "a") is None
    notes.put(other, "a", 2)
    assert notes.find(other, "a") == 2 and notes.find(layer, "a") == 1


def test_a_noted_module_goes_without_the_collector() -> None:
    layer: Any = structures.build("31b", layer_types=["full_attention"]).model.layers[0]
    Notes(2).put(layer, "a", layer.mlp.up_proj.weight)
    weight = weakref.ref(layer.mlp.up_proj.weight)
    gc.disable()
    try:
        del layer
        assert weight() is None
    finally:
        gc.enable()
