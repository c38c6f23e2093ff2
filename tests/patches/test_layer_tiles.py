"""Checkpointed layers whose last operation runs over tiles of rows: the same as otherwise, and only where they may."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import structures
import torch
from kernel_checks import FLOAT32_BUDGET, relative_error, same_bits
from patch_state import counts
from peft import LoraConfig, get_peft_model
from shortage import Place, shortage
from torch import nn
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop
from transformers import modeling_utils

import fastgemma
from fastgemma.kernels import lora_mlp, post_attention_tiles
from fastgemma.patches import whole_layer
from fastgemma.patches.engine import PatchError

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Each kind of layer, one of which shares another's keys and values where the structure has such ones.
FEW_LAYERS: dict[str, dict[str, Any]] = {
    "e2b": {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "num_kv_shared_layers": 1},
    "12b": {"layer_types": ["sliding_attention", "full_attention"]},
    "31b": {"layer_types": ["full_attention"]},
}
# How attention runs is no question here, and over intervals of keys it takes the interpreter long.
FEATURES: dict[str, Any] = {"attention": False, "cuda_graphs": False}
Results = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few rows at a time as there ever are: 256."""
    monkeypatch.setattr(lora_mlp, "workspace_bytes", lambda device: 1 << 16)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of the operation over tiles whether it computed its output."""
    calls: list[bool] = []
    apply = post_attention_tiles._PostAttentionTiles.apply

    def noted(*arguments: Any) -> torch.Tensor:
        calls.append(arguments[8])
        return apply(*arguments)

    function = type("_PostAttentionTiles", (), {"apply": staticmethod(noted)})
    monkeypatch.setattr(post_attention_tiles, "_PostAttentionTiles", function)
    return calls


def build(name: str = "31b", quantized: bool = False, checkpointing: bool = True, **options: Any) -> Any:
    model = structures.build(name, **FEW_LAYERS[name])
    if quantized:
        structures.quantize(model)
    torch.manual_seed(1)
    config = LoraConfig(r=8, target_modules=PROJECTIONS, init_lora_weights=False, **options)
    model = get_peft_model(model.to(DEVICE), config, autocast_adapter_dtype=False).train()
    model.config.use_cache = False
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    return model


def layers(model: Any) -> Any:
    return model.get_base_model().model.layers


def batch() -> dict[str, Any]:
    """300 rows: a whole tile, and a shorter one."""
    return structures.batch("padding", rows=2, seq_len=150, device=DEVICE)


def loss_of(model: Any) -> torch.Tensor:
    torch.manual_seed(3)
    return model(**batch()).loss


def results(model: Any, loss: torch.Tensor) -> Results:
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def step(model: Any) -> Results:
    model.zero_grad()
    loss = loss_of(model)
    loss.backward()
    return results(model, loss)


def assert_equal(actual: Results, expected: Results) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= FLOAT32_BUDGET, name


def whole(run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """`run` with layers that keep what their backward needs of all rows."""
    with monkeypatch.context() as patch, fastgemma.patched(**FEATURES):
        patch.setattr(whole_layer, "splits_rows", lambda *_: False)
        return run()


@pytest.mark.parametrize(
    "name, quantized",
    [
        pytest.param("12b", False, marks=pytest.mark.slow),
        pytest.param("e2b", True, marks=pytest.mark.slow),
        pytest.param("e2b", False, marks=pytest.mark.slow),
        pytest.param("12b", True, marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients(name: str, quantized: bool, ran: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name, quantized)

    def counted() -> tuple[Results, dict[str, int]]:
        before = counts()
        found = step(model)
        return found, {feature: calls - before[feature][0] for feature, (calls, _) in counts().items()}

    expected, expected_counts = whole(counted, monkeypatch)
    assert not ran
    with fastgemma.patched(**FEATURES):
        actual, actual_counts = counted()
    n_layers = len(layers(model))
    assert ran == [True] * n_layers + [False] * n_layers
    assert_equal(actual, expected)
    assert actual_counts == expected_counts


@pytest.mark.slow
def test_is_stocks(ran: list[bool]) -> None:
    model = build("e2b")
    expected = step(model)
    with fastgemma.patched(**FEATURES):
        assert_equal(step(model), expected)
    assert ran


@pytest.mark.slow
def test_full_fine_tuning(ran: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = structures.build("e2b", **FEW_LAYERS["e2b"]).to(DEVICE).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    expected = whole(lambda: step(model), monkeypatch)
    with fastgemma.patched(**FEATURES):
        assert_equal(step(model), expected)
    assert ran


# Where it does not run


def _drop(model: Any) -> None:
    for module in layers(model)[0].modules():
        if isinstance(module, nn.ModuleDict) and "default" in module and isinstance(module["default"], nn.Identity):
            module["default"] = nn.Dropout(0.3)


def _hook(model: Any) -> None:
    layers(model)[0].register_forward_hook(lambda *_: None)


def _own_forward(model: Any) -> None:
    layer = layers(model)[0]
    layer.forward = layer.forward


def _other_checkpoint(model: Any) -> None:
    def of_the_users_own(function: Any, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(function, *args, **kwargs)

    layers(model)[0]._gradient_checkpointing_func = functools.partial(of_the_users_own, use_reentrant=False)


def _no_checkpoint(model: Any) -> None:
    layers(model)[0].gradient_checkpointing = False


def _train_scalar(model: Any) -> None:
    layer = layers(model)[0]
    layer.layer_scalar = nn.Parameter(layer.layer_scalar.clone())


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [_drop, _hook, _own_forward, _other_checkpoint, _no_checkpoint, _train_scalar], ids=lambda f: f.__name__
)
def test_what_a_layer_does_not_allow(
    change: Callable[[Any], None], ran: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    change(model)
    expected = whole(lambda: step(model), monkeypatch)
    with fastgemma.patched(**FEATURES):
        actual = step(model)
    assert not ran
    assert all(same_bits(actual[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_few_rows_do_not_need_it(ran: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_mlp, "workspace_bytes", lambda device: 1 << 28)
    model = build()
    with fastgemma.patched(**FEATURES):
        step(model)
    assert not ran


def test_a_layer_class_that_someone_wrapped(ran: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """After patching; the wrapper may look at every output."""
    model, seen = build(), []
    kind = type(layers(model)[0])
    expected = step(model)
    with fastgemma.patched(**FEATURES):
        forward = kind.forward

        @functools.wraps(forward)
        def watched(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            assert not any(name.startswith("_fastgemma") for name in kwargs)
            out = forward(self, *args, **kwargs)
            seen.append(bool(out.isfinite().all()))
            return out

        with monkeypatch.context() as patch:
            patch.setattr(kind, "forward", watched)
            actual = step(model)
    assert not ran and seen and all(seen)
    assert_equal(actual, expected)


def test_a_forward_that_is_called_itself(ran: list[bool]) -> None:
    """Where transformers checkpoints within it, it runs twice with nothing that tells the first from the second."""
    model = build()
    layer, outs = layers(model)[0], []

    def direct(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        outs.append(self.forward(*args, **kwargs))
        return outs[-1]

    expected = step(model)
    with fastgemma.patched(**FEATURES), pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(layer), "__call__", direct)
        actual = step(model)
    assert not ran and outs[0].isfinite().all()
    assert_equal(actual, expected)


def test_without_patches_in_between(ran: list[bool]) -> None:
    model = build()
    with fastgemma.patched(**FEATURES):
        loss = loss_of(model)
    with pytest.raises(PatchError, match="between a checkpointed forward and its backward"):
        loss.backward()


# Who else runs layers again, or looks at them


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_users_checkpoint_around_the_model(reentrant: bool, ran: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """It recomputes calls of layers, whose outputs the next one reads."""
    model = build("12b")

    def nested() -> Results:
        model.zero_grad()
        zero = torch.zeros((), device=DEVICE, requires_grad=True)
        loss = checkpoint(lambda zero: loss_of(model) + zero, zero, use_reentrant=reentrant)
        loss.backward()
        return results(model, loss)

    expected = whole(lambda: step(model), monkeypatch)
    with fastgemma.patched(**FEATURES):
        assert_equal(nested(), expected)
    n_layers = len(layers(model))
    assert (
        ran == [True] * (1 if reentrant else 2) * n_layers + [False] * n_layers
    )  # the former's first is without graph


@pytest.mark.slow
def test_without_early_stop(ran: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("e2b")
    expected = whole(lambda: step(model), monkeypatch)
    with fastgemma.patched(**FEATURES), set_checkpoint_early_stop(False):
        assert_equal(step(model), expected)
    assert False in ran


@pytest.mark.slow
def test_two_backwards_and_one_gradient_alone(ran: list[bool]) -> None:
    model = build("e2b")
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with fastgemma.patched(**FEATURES):
        loss = loss_of(model)
        first = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        second = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        name = next(n for n in parameters if "layers.1.mlp.up_proj.lora_A" in n)
        (alone,) = torch.autograd.grad(loss, [parameters[name]])
    assert all(same_bits(a, b) for a, b in zip(first, second))
    assert same_bits(alone, dict(zip(parameters, first))[name])
    assert ran.count(True) == len(layers(model)) and ran.count(False) >= 2 * len(layers(model))


@pytest.mark.slow
def test_gradients_of_inputs_alone(ran: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("e2b").requires_grad_(False)
    inputs = batch()
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()
    tokens = inputs.pop("input_ids")
    text = model.get_base_model().model
    inputs["per_layer_inputs"] = text.get_per_layer_inputs(tokens, inputs["inputs_embeds"]).detach()

    def gradient() -> torch.Tensor:
        return torch.autograd.grad(model(**inputs).loss, inputs["inputs_embeds"])[0]

    expected = whole(gradient, monkeypatch)
    with fastgemma.patched(**FEATURES):
        assert relative_error(gradient(), expected) <= FLOAT32_BUDGET
    assert ran


def _on_the_layer(model: Any, hook: Any) -> Any:
    return layers(model)[0].register_forward_hook(hook)


def _on_all_modules(model: Any, hook: Any) -> Any:
    return nn.modules.module.register_module_forward_hook(hook)


@pytest.mark.slow
@pytest.mark.parametrize("register", [_on_the_layer, _on_all_modules])
def test_a_hook_that_comes_before_the_backward(register: Callable[..., Any], ran: list[bool]) -> None:
    """Where transformers checkpoints around hooks, this one sees the recomputation."""
    model, seen = build(), []

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(not isinstance(output, torch.Tensor) or bool(output.detach().isfinite().all()))

    expected = step(model)
    model.zero_grad()
    with fastgemma.patched(**FEATURES), set_checkpoint_early_stop(False):
        loss = loss_of(model)
        handle = register(model, watch)
        try:
            loss.backward()
        finally:
            handle.remove()
    assert ran == [True, True] and all(seen)
    assert_equal(results(model, loss), expected)


@pytest.mark.slow
def test_a_backward_in_another_thread_while_a_layer_is_called(ran: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's backwards run in threads of autograd's own. The interpreter allows one launch at a time."""
    model = build()
    before, found = whole_layer.before_attention, []
    expected = step(model)
    model.zero_grad()

    def meanwhile(*arguments: Any) -> Any:
        if not found:
            found.append(None)
            thread = threading.Thread(target=first.backward)
            thread.start()
            thread.join()
            found[0] = results(model, first)
            model.zero_grad()
        return before(*arguments)

    with fastgemma.patched(**FEATURES):
        first = loss_of(model)
        monkeypatch.setattr(whole_layer, "before_attention", meanwhile)
        second = loss_of(model)
        second.backward()
    assert ran == [True, False, True, False]
    assert_equal(found[0], expected)
    assert_equal(results(model, second), expected)


@pytest.mark.slow
def test_activations_on_the_host(ran: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """As users do it, around whole steps."""
    model = build("e2b")

    def offloaded() -> Results:
        with torch.autograd.graph.save_on_cpu():
            return step(model)

    expected = whole(offloaded, monkeypatch)
    with fastgemma.patched(**FEATURES):
        assert_equal(offloaded(), expected)
    assert False in ran


@pytest.mark.slow
def test_checkpoints_on_the_host(ran: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' own function for that: around torch's checkpoint."""
    if not hasattr(modeling_utils, "save_on_cpu"):
        pytest.skip("these transformers keep checkpoints on the GPU")
    if DEVICE.type == "cpu":  # whose memory cannot be pinned
        plain = functools.partial(torch.autograd.graph.save_on_cpu, pin_memory=False)
        monkeypatch.setattr(modeling_utils, "save_on_cpu", lambda pin_memory, device_type: plain())
    model = build(checkpointing=False)
    model.gradient_checkpointing_enable({"use_reentrant": False}, offload=True)
    model.enable_input_require_grads()
    expected = whole(lambda: step(model), monkeypatch)
    ran.clear()
    with fastgemma.patched(**FEATURES):
        assert_equal(step(model), expected)
    assert ran == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_after_running_out_of_memory_the_next_step_is_right(phase: str) -> None:
    model = build("e2b")
    with fastgemma.patched(**FEATURES):
        right = step(model)
        with shortage() as places:
            step(model)
        moments = [number for number, place in enumerate(places) if place == Place(phase, "post_attention_tiles")]
        for share in (1, 2):
            moment = moments[share * len(moments) // 3]
            with shortage(moment), pytest.raises(torch.OutOfMemoryError, match=f"out of memory at {moment},"):
                step(model)
            found = step(model)
            assert all(same_bits(found[name], value) for name, value in right.items())
