"""patch, unpatch, patched and status: order, undo, refusals."""

from __future__ import annotations

import contextlib
import threading

import pytest
import structures
import torch
from patch_state import attributes
from peft import LoraConfig, get_peft_model
from quick import slow_after
from transformers.models.gemma4 import modeling_gemma4

import fastgemma
from fastgemma.api import FEATURES
from fastgemma.patches.engine import Engine, Op, Row
from fastgemma.patches.table import ENGINE

KERNELS = ("rms_norm", "rope", "geglu", "lora", "cross_entropy")


@pytest.fixture(autouse=True)
def unpatched():
    fastgemma.unpatch()
    yield
    fastgemma.unpatch()


def step(model: torch.nn.Module, seed: int = 5) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(**structures.batch("padding", device=next(model.parameters()).device)).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def lora(model: torch.nn.Module) -> torch.nn.Module:
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))


def close(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        (left[key] - right[key]).norm() <= 1e-5 * right[key].norm() for key in right
    )


def calls() -> dict[str, int]:
    return {feature: fastgemma.status()[feature].fast_calls for feature in KERNELS}


def test_unpatch_restores_every_attribute_exactly():
    before = attributes()
    fastgemma.patch()
    patched = attributes()
    assert all(patched[target] is not before[target] for target in before)
    fastgemma.patch(rope=False, fixes=False)
    fastgemma.patch()
    fastgemma.unpatch()
    assert attributes() == before
    assert all(not op.active and op.state == "off" for op in ENGINE.ops)


def test_patching_twice_is_patching_once():
    fastgemma.patch()
    once = attributes()
    fastgemma.patch()
    assert attributes() == once


@pytest.mark.parametrize("order", slow_after(1, ("after the model", "before the model", "after PEFT")))
def test_patch_works_at_any_time(order, device):
    reference = step(lora(structures.build("31b")).to(device).train())
    if order == "before the model":
        fastgemma.patch()
    model = structures.build("31b").to(device)
    if order == "after the model":
        fastgemma.patch()
    model = lora(model).train()
    if order == "after PEFT":
        fastgemma.patch()
    before = calls()
    loss, grads = step(model)
    assert all(calls()[feature] > before[feature] for feature in KERNELS)
    assert loss == pytest.approx(reference[0], rel=1e-5) and close(grads, reference[1])


@pytest.mark.slow
def test_several_models_at_once(device):
    models = [structures.build(name).to(device).train() for name in ("e4b", "12b", "26b-a4b")]
    stock = [step(model) for model in models]
    fastgemma.patch()
    for model, (loss, grads) in zip(models, stock):
        patched_loss, patched_grads = step(model)
        assert patched_loss == pytest.approx(loss, rel=1e-5) and close(patched_grads, grads)


def test_captured_methods_are_undone_too(device):
    model = structures.build("31b").to(device)
    norm = model.model.norm
    x = torch.randn(3, 64, device=device)
    expected = norm(x)
    fastgemma.patch()
    captured = norm.forward
    before = calls()["rms_norm"]
    captured(x)
    assert calls()["rms_norm"] == before + 1
    fastgemma.unpatch()
    assert torch.equal(captured(x), expected) and calls()["rms_norm"] == before + 1


def test_a_wrapper_put_on_top_survives_unpatch():
    stock = modeling_gemma4.Gemma4RMSNorm.forward
    fastgemma.patch()
    ours = modeling_gemma4.Gemma4RMSNorm.forward

    def theirs(self, hidden_states):
        return ours(self, hidden_states)

    try:
        modeling_gemma4.Gemma4RMSNorm.forward = theirs
        fastgemma.unpatch()
        assert modeling_gemma4.Gemma4RMSNorm.forward is theirs
    finally:
        modeling_gemma4.Gemma4RMSNorm.forward = stock


def test_patched_nests_and_restores():
    with fastgemma.patched(rope=False) as outer:
        assert outer["rope"].state == "off" and outer["rms_norm"].state == "active"
        with fastgemma.patched(rms_norm=False):
            assert fastgemma.status()["rms_norm"].state == "off" and fastgemma.status()["rope"].state == "active"
        assert fastgemma.status()["rope"].state == "off" and fastgemma.status()["rms_norm"].state == "active"
    assert all(report.state == "off" for report in fastgemma.status().values())


def test_patched_restores_after_an_exception():
    with pytest.raises(ZeroDivisionError), fastgemma.patched():
        raise ZeroDivisionError
    assert all(report.state == "off" for report in fastgemma.status().values())


def test_another_thread_may_not_change_patches_inside_a_block():
    errors: list[BaseException] = []

    def intrude():
        for action in (fastgemma.patch, fastgemma.unpatch, fastgemma.patched().__enter__):
            try:
                action()
            except fastgemma.PatchError as error:
                errors.append(error)

    with fastgemma.patched():
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()
        assert len(errors) == 3 and "another thread" in str(errors[0])
        assert fastgemma.status()["rms_norm"].state == "active"


def test_unknown_features_and_modes_are_named():
    with pytest.raises(TypeError, match="rmsnorm.*rms_norm, rope"):
        fastgemma.patch(rmsnorm=True)
    with pytest.raises(TypeError, match="per_layer_embeddings='disk'.*'host'"):
        fastgemma.patch(per_layer_embeddings="disk")
    with pytest.raises(TypeError, match="rope"):
        fastgemma.patch(rope="fast")
    assert all(report.state == "off" for report in fastgemma.status().values())


@pytest.mark.slow
def test_features_can_be_chosen_one_by_one(device):
    model = structures.build("e2b").to(device).train()
    loss, grads = step(model)
    for feature in KERNELS:
        before = calls()
        with fastgemma.patched(**{name: name == feature for name in FEATURES}):
            patched_loss, patched_grads = step(model)
        ran = [name for name in KERNELS if calls()[name] > before[name]]
        assert ran == [feature]
        assert patched_loss == pytest.approx(loss, rel=1e-5) and close(patched_grads, grads), feature


def test_report_is_a_table_and_data():
    report = fastgemma.patch()
    assert set(report) == set(FEATURES)
    assert any(target.endswith("Gemma4RMSNorm.forward") for target in report["rms_norm"].targets)
    assert report["rms_norm"].state == "active" and report["rms_norm"].reason is None
    assert isinstance(report["rms_norm"].fast_calls, int) and isinstance(report["rms_norm"].fallbacks, dict)
    assert "rms_norm" in str(report) and "active" in str(report)


@pytest.mark.slow
def test_forward_inside_and_backward_outside(device):
    model = structures.build("e4b").to(device).train()
    loss, grads = step(model)
    model.zero_grad()
    with fastgemma.patched():
        patched_loss = model(**structures.batch("padding", device=device)).loss
    patched_loss.backward()
    patched = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert patched_loss.item() == pytest.approx(loss, rel=1e-5) and close(patched, grads)


def test_patches_that_change_under_a_checkpointed_backward_raise(device):
    model = structures.build("e4b").to(device).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with fastgemma.patched(checkpointing=False):
        loss = model(**structures.batch("padding", device=device)).loss
    with pytest.raises(fastgemma.PatchError, match="between a checkpointed forward and its backward"):
        loss.backward()


@pytest.mark.parametrize("name", slow_after(1, ("e2b", "12b")))
def test_checkpointed_layers_are_recomputed(name, device):
    """transformers checkpoints around a layer's forward or inside it, depending on its version."""
    model = structures.build(name).to(device).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    runs = []
    model.model.layers[1].mlp.register_forward_hook(lambda *_: runs.append(1))
    for block in (contextlib.nullcontext(), fastgemma.patched(), contextlib.nullcontext()):
        runs.clear()
        with block:
            step(model)
        assert len(runs) == 2


@pytest.mark.slow
def test_backward_twice_and_partial_gradients(device):
    model = lora(structures.build("e2b")).to(device).train()
    _, grads = step(model)
    fastgemma.patch()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    torch.manual_seed(5)
    loss = model(**structures.batch("padding", device=device)).loss
    first = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
    second = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert close(dict(zip(parameters, first)), grads)
    chosen = list(parameters)[3]
    (alone,) = torch.autograd.grad(loss, [parameters[chosen]])
    assert close({chosen: alone}, {chosen: grads[chosen]})


def test_state_dict_and_classes_are_untouched(device):
    model = structures.build("e2b")
    keys, kind = list(model.state_dict()), type(model.model.norm)
    fastgemma.patch()
    again = structures.build("e2b")
    assert list(again.state_dict()) == keys and type(again.model.norm) is kind
    again.load_state_dict(model.state_dict(), strict=True)


def test_no_gpu_and_no_interpreter_is_a_counted_fallback(monkeypatch):
    monkeypatch.setattr("fastgemma.patches.guards.interpreting", lambda: False)
    model = structures.build("31b").train()
    stock = step(model)
    fastgemma.patch()
    before = calls()
    loss, grads = step(model)
    assert calls() == before and loss == stock[0]
    assert all(torch.equal(grads[name], grad) for name, grad in stock[1].items())
    for feature in KERNELS:
        assert fastgemma.status()[feature].fallbacks.get("no gpu", 0) > 0, feature


def test_float64_model_is_a_counted_fallback(device):
    model = structures.build("31b").double().to(device).train()
    stock = step(model)
    fastgemma.patch()
    loss, grads = step(model)
    assert loss == stock[0] and all(torch.equal(grads[name], grad) for name, grad in stock[1].items())
    assert fastgemma.status()["rms_norm"].fallbacks.get("dtype torch.float64", 0) > 0


@pytest.mark.slow
def test_hooks_on_norms_still_fire(device):
    model = structures.build("31b").to(device).train()
    fastgemma.patch()
    seen = []
    handle = model.model.layers[0].post_attention_layernorm.register_forward_hook(lambda *_: seen.append(1))
    step(model)
    handle.remove()
    assert seen == [1] and fastgemma.status()["rms_norm"].fallbacks.get("hooks on a norm", 0) > 0


def test_another_activation_is_left_alone(device):
    model = structures.build("31b", hidden_activation="silu").to(device).train()
    loss, grads = step(model)
    fastgemma.patch()
    patched_loss, patched_grads = step(model)
    assert patched_loss == pytest.approx(loss, rel=1e-5) and close(patched_grads, grads)
    assert any("activation" in reason for reason in fastgemma.status()["geglu"].fallbacks)


def _toy_rows(**changes) -> list[Row]:
    def make(original, ops: dict[str, Op]):
        return lambda *args, **kwargs: original(*args, **kwargs)

    settings = {"parameters": ("hidden_states",), **changes}
    return [Row(("toy",), modeling_gemma4.__name__, "Gemma4RMSNorm.forward", make, **settings)]


def test_changed_signature_is_refused():
    engine = Engine(_toy_rows(parameters=("hidden_states", "weight_dtype")))
    stock = modeling_gemma4.Gemma4RMSNorm.forward
    engine.apply({"toy": True})
    (op,) = engine.ops
    assert op.state == "refused" and not op.active and modeling_gemma4.Gemma4RMSNorm.forward is stock
    assert "signature changed in transformers" in op.reason and "weight_dtype" in op.reason
    with pytest.raises(fastgemma.PatchError, match="weight_dtype"):
        engine.apply({"toy": True}, strict=True)


def test_changed_body_is_applied_and_marked():
    rows = _toy_rows()
    engine = Engine(rows, {f"{rows[0].module}:{rows[0].attribute}": frozenset({"0" * 12})})
    stock = modeling_gemma4.Gemma4RMSNorm.forward
    engine.apply({"toy": True})
    try:
        (op,) = engine.ops
        assert op.state == "active" and "unverified" in op.reason
    finally:
        engine.apply({})
    with pytest.raises(fastgemma.PatchError, match="unverified"):
        engine.apply({"toy": True}, strict=True)
    assert modeling_gemma4.Gemma4RMSNorm.forward is stock


def test_missing_library_is_refused_without_an_error():
    engine = Engine(_toy_rows(requires="no_such_distribution"))
    engine.apply({"toy": True}, strict=True)
    (op,) = engine.ops
    assert op.state == "refused" and op.reason == "no_such_distribution is not installed"


def test_installed_versions_are_verified():
    report = fastgemma.patch(strict=True)
    assert all(feature.state == "active" and feature.reason is None for feature in report.values())
