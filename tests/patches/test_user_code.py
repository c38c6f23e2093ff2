"""A user's own classes and compiled code inside a patched model: they run as in stock, and it is counted."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import peft
import pytest
import structures
import torch
from kernel_checks import FLOAT32_BUDGET, attends_in_float32, relative_error
from patch_state import counts
from quick import slow_after, slow_rows_after
from torch import nn
from transformers import Gemma4ForCausalLM
from transformers.models.gemma4 import modeling_gemma4 as gemma4

import fastgemma

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The last layer reads the keys and values of the first.
SHAPE: dict[str, Any] = {
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "num_kv_shared_layers": 1,
}

Results = dict[str, torch.Tensor]


def build(name: str = "e2b", **overrides: Any) -> Any:
    return structures.build(name, **{**SHAPE, **overrides}).to(DEVICE)


def step(model: nn.Module) -> Results:
    """Loss and gradients."""
    model.zero_grad()
    torch.manual_seed(3)
    loss = model.train()(**structures.batch("padding", seq_len=9, device=DEVICE)).loss
    loss.backward()
    grads = {name.replace("_orig_mod.", ""): p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **{name: grad.clone() for name, grad in grads.items()}}


def patched_step(model: nn.Module) -> tuple[Results, dict[str, set[str]]]:
    """Also the reasons for which each feature ran stock code in it."""
    before = counts()
    with fastgemma.patched():
        results = step(model)
    reasons = {
        feature: {reason for reason, n in found.items() if n > before[feature][1].get(reason, 0)}
        for feature, (_, found) in counts().items()
    }
    return results, reasons


def assert_equal(actual: Results, expected: Results, budget: float = FLOAT32_BUDGET) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        error = relative_error(actual[name], value)
        assert error <= budget, f"{name}: relative error {error:.2e}"


calls: list[str] = []


def runs_as_in_stock(model: nn.Module) -> dict[str, set[str]]:
    """Asserts that what writes down its `calls` is called as often, to the same results; the reasons of fallbacks."""
    calls.clear()
    expected = step(model)
    called = len(calls)
    actual, reasons = patched_step(model)
    assert called > 0 and len(calls) == 2 * called
    assert_equal(actual, expected)
    return reasons


# Classes


class OwnNorm(gemma4.Gemma4RMSNorm):
    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        calls.append("norm")
        return 1.1 * super().forward(hidden_states).tanh()


class OwnLayer(gemma4.Gemma4TextDecoderLayer):
    """Reads the mask that it is given."""

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append("layer")
        mask = kwargs["attention_mask"]
        seen = 1.0 if mask is None else mask.to(hidden_states.dtype).mean()
        return super().forward(hidden_states, *args, **kwargs) * (1 + 0.1 * seen)


class OwnTextModel(gemma4.Gemma4TextModel):
    """Reads the masks that a multimodal model makes for it."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        calls.append("text model")
        assert all(mask is None or isinstance(mask, torch.Tensor) for mask in kwargs["attention_mask"].values())
        return super().forward(*args, **kwargs)


class OwnModel(Gemma4ForCausalLM):
    """Adds to the loss what it reads from the logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        calls.append("model")
        outputs = super().forward(*args, **kwargs)
        outputs.loss = outputs.loss + 0.1 * outputs.logits.logsumexp(-1).square().mean()
        return outputs


class OwnActivation(nn.GELU):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        calls.append("activation")
        return 1.1 * super().forward(x)


class OwnDropout(nn.Dropout):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        calls.append("dropout")
        return 2 * super().forward(x)


class NoDropout(nn.Identity):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        calls.append("dropout")
        return 2 * x


def with_norms(name: str) -> nn.Module:
    model = build(name, num_kv_shared_layers=0) if name == "26b-a4b" else build(name)
    for module in model.modules():
        if isinstance(module, gemma4.Gemma4RMSNorm):
            module.__class__ = OwnNorm
    return model


def with_layer() -> nn.Module:
    model = build()
    model.model.layers[1].__class__ = OwnLayer
    return model


def with_text_model() -> nn.Module:
    model = structures.multimodal(**SHAPE).to(DEVICE)
    model.model.language_model.__class__ = OwnTextModel
    return model


def with_model() -> nn.Module:
    model = build()
    model.__class__ = OwnModel
    return model


def with_hook() -> nn.Module:
    """Reads the mask that its module is given."""

    def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        calls.append("hook")
        assert kwargs["attention_mask"] is None or kwargs["attention_mask"].dim() == 4

    model = build()
    model.model.layers[1].self_attn.register_forward_pre_hook(hook, with_kwargs=True)
    return model


def with_activation() -> nn.Module:
    model = build()
    model.model.layers[1].mlp.act_fn = model.model.layers[2].act_fn = OwnActivation("tanh")
    return model


def with_hooked_activation(path: str) -> nn.Module:
    """Not only another scale, which the norm behind it would take out."""

    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        calls.append("activation")
        return output.clamp(min=0.0)

    model = build()
    model.model.layers[1].get_submodule(path).register_forward_hook(hook)
    return model


def with_dropout(kind: type) -> nn.Module:
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False, lora_dropout=float(kind is OwnDropout) / 2
    )
    model = peft.get_peft_model(build(), config)
    for module in model.get_base_model().model.layers[1].modules():
        if type(module) in (nn.Dropout, nn.Identity):
            module.__class__ = kind
    return model


@pytest.mark.parametrize(
    ("make", "feature", "reason"),
    slow_rows_after(
        4,
        [
            (lambda: with_norms("e2b"), "rms_norm", "a norm of another class"),
            (lambda: with_norms("e2b"), "rope", "a norm of another class"),
            (lambda: with_norms("26b-a4b"), "rms_norm", "a norm of another class"),
            pytest.param(with_layer, "attention", "another decoder layer", marks=attends_in_float32),
            pytest.param(with_text_model, "attention", "another text model", marks=attends_in_float32),
            pytest.param(with_hook, "attention", "hooks that are handed the mask", marks=attends_in_float32),
            (with_model, "cross_entropy", "forward of a subclass: logits may be read"),
            (with_activation, "geglu", "activation OwnActivation"),
            (lambda: with_hooked_activation("mlp.act_fn"), "geglu", "hooks on an activation"),
            (lambda: with_hooked_activation("act_fn"), "geglu", "hooks on an activation"),
            (lambda: with_dropout(OwnDropout), "lora", "LoRA dropout of type OwnDropout"),
            (lambda: with_dropout(NoDropout), "lora", "LoRA dropout of type NoDropout"),
        ],
    ),
    ids=[
        "norms",
        "norms-rope",
        "norms-experts",
        "layer",
        "text-model",
        "hook",
        "model",
        "activation",
        "hooked",
        "hooked-gate",
        "dropout",
        "no-dropout",
    ],
)
def test_a_user_s_subclass_runs(make: Callable[[], nn.Module], feature: str, reason: str) -> None:
    model = make()
    reasons = runs_as_in_stock(model)
    assert reason in reasons[feature]


@pytest.mark.parametrize("adapted", slow_after(1, [True, False]))
@pytest.mark.parametrize("part", slow_after(1, ["self_attn", "mlp", "input_layernorm", "post_feedforward_layernorm"]))
def test_hooks_that_write_to_an_output(part: str, adapted: bool) -> None:
    """As steering vectors do."""

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        calls.append(part)
        (output[0] if isinstance(output, tuple) else output).add_(0.1)

    model = build()
    if adapted:
        torch.manual_seed(1)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    for name, module in model.named_modules():
        if name.endswith(f"layers.1.{part}"):
            module.register_forward_hook(hook)
    runs_as_in_stock(model)


@pytest.mark.parametrize(
    "features", slow_after(1, [{}, {"lora": False}, {"rms_norm": False}]), ids=["all", "no-lora", "no-norm"]
)
def test_hooks_on_all_modules_are_called(features: dict[str, Any]) -> None:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        calls.append(type(module).__name__)
        return output.tanh() if isinstance(module, gemma4.Gemma4RMSNorm) else None

    model = build()
    calls.clear()
    with torch.nn.modules.module.register_module_forward_hook(hook):
        expected = step(model)
        called = list(calls)
        calls.clear()
        with fastgemma.patched(**features):
            actual = step(model)
    assert sorted(calls) == sorted(called)  # norms of heads are called behind all projections
    assert_equal(actual, expected)


@attends_in_float32
@pytest.mark.parametrize("when", slow_after(1, ["before", "after"]))
def test_layers_of_a_sharded_class_attend_as_others(when: str) -> None:
    """As FSDP2 makes one, with hooks of its own."""
    model = build()
    model.requires_grad_(False)
    model.model.layers.requires_grad_(True)
    model.enable_input_require_grads()
    expected = step(model)

    def hook(module: nn.Module, *args: Any) -> None:
        calls.append("sharding")

    def shard() -> None:
        for layer in model.model.layers:
            kind: Any = type(layer)
            layer.__class__ = type(f"FSDP{kind.__name__}", (kind,), {"__module__": "torch.distributed.fsdp"})
            layer.register_forward_pre_hook(hook)

    hook.__module__ = "torch.distributed.fsdp"
    seen: list[bool] = []
    for layer in model.model.layers[1:]:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[1].requires_grad))
    calls.clear()
    if when == "before":
        shard()
    before = counts()
    with fastgemma.patched():
        if when == "after":
            shard()
        actual = step(model)
    assert_equal(actual, expected)
    assert calls and counts()["attention"][0] > before["attention"][0]
    assert counts()["attention"][1] == before["attention"][1]
    assert seen and not any(seen), "a gradient of per-layer inputs that nobody reads"


# Code that somebody put in the place of the library's


def _replaced(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another formula in the place of transformers', in the guise of it."""
    if name == "apply_rotary_pos_emb":
        owner, attribute = gemma4, name
    else:
        owner, attribute = getattr(gemma4, name), "forward"
    stock = inspect.unwrap(getattr(owner, attribute))

    @functools.wraps(stock)
    def another(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        out = stock(*args, **kwargs)
        return (out[0].tanh(), *out[1:]) if isinstance(out, tuple) else out.tanh()

    monkeypatch.setattr(owner, attribute, another)


def test_another_forward_of_an_activation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    kind = type(model.model.layers[0].mlp.act_fn)
    stock = kind.forward

    def another(self: Any, x: torch.Tensor) -> torch.Tensor:
        calls.append("activation")
        return stock(self, x).clamp(min=0.0)

    monkeypatch.setattr(kind, "forward", another)
    reasons = runs_as_in_stock(model)
    assert "another forward of the activation" in reasons["geglu"]


@attends_in_float32
@pytest.mark.parametrize("when", slow_after(1, ["before", "after"]))
@pytest.mark.parametrize("name", slow_after(1, ["Gemma4TextDecoderLayer", "Gemma4TextAttention", "Gemma4TextModel"]))
def test_wrappers_are_handed_no_intervals(name: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever wraps a class's forward may read the mask that it is given."""
    kind = getattr(gemma4, name)

    def wrap(patch: pytest.MonkeyPatch) -> None:
        wrapped = kind.forward

        @functools.wraps(wrapped)
        def reading(self: Any, *args: Any, **kwargs: Any) -> Any:
            mask = args[2] if name == "Gemma4TextAttention" and len(args) > 2 else kwargs["attention_mask"]
            calls.append(type(mask).__name__)
            return wrapped(self, *args, **kwargs)

        patch.setattr(kind, "forward", reading)

    model = build()
    calls.clear()
    if when == "before":
        wrap(monkeypatch)
        patched_step(model)
    else:
        with fastgemma.patched(), monkeypatch.context() as patch:
            wrap(patch)
            step(model)
    assert calls and set(calls) <= {"Tensor", "NoneType"}


@attends_in_float32
def test_another_eager_attention_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(attn_implementation="eager")
    stock = gemma4.eager_attention_forward

    def another(*args: Any, **kwargs: Any) -> Any:
        calls.append("eager")
        output, weights = stock(*args, **kwargs)
        return output.tanh(), weights

    monkeypatch.setattr(gemma4, "eager_attention_forward", another)
    reasons = runs_as_in_stock(model)
    assert "another eager_attention_forward" in reasons["attention"]


REPLACED = ["Gemma4RMSNorm", "Gemma4TextMLP", "Gemma4TextAttention", "Gemma4TextDecoderLayer", "apply_rotary_pos_emb"]


@pytest.mark.parametrize("features", slow_after(1, [{}, {"rms_norm": False}]), ids=["all", "no-norm"])
@pytest.mark.parametrize("when", slow_after(1, ["before", "after"]))
@pytest.mark.parametrize("name", slow_after(2, REPLACED))
@pytest.mark.filterwarnings("ignore")
def test_what_was_replaced_runs(
    name: str, when: str, features: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build()
    with monkeypatch.context() as patch:
        _replaced(name, patch)
        calls.clear()
        expected = step(model)
        called = len(calls)
    calls.clear()
    if when == "before":
        with monkeypatch.context() as patch:
            _replaced(name, patch)
            with fastgemma.patched(**features):
                reasons = [str(report.reason) for report in fastgemma.status().values()]
                actual = step(model)
        if name != "apply_rotary_pos_emb" and not (name == "Gemma4RMSNorm" and features):
            assert any("replaced or wrapped before patch()" in reason for reason in reasons)
    else:
        with fastgemma.patched(**features), monkeypatch.context() as patch:
            _replaced(name, patch)
            actual = step(model)
    assert called > 0 and len(calls) == called
    assert_equal(actual, expected)


# torch.compile

TWO_LAYERS = {"layer_types": ["full_attention"] * 2}


def compiled(model: nn.Module, what: str) -> nn.Module:
    torch._dynamo.reset()
    if what == "model":
        return torch.compile(model, backend="eager")
    for layer in model.model.layers:
        layer.compile(backend="eager")
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", slow_after(1, ["layers", "model"]))
def test_compiled_code_is_stock_s_and_counted(what: str) -> None:
    expected = step(build(**TWO_LAYERS))
    model = compiled(build(**TWO_LAYERS), what)
    actual, reasons = patched_step(model)
    assert_equal(actual, expected)
    assert all("compiling" in reasons[feature] for feature in ("rms_norm", "rope", "geglu", "lora"))
    assert DEVICE.type == "cuda" or "compiling" in reasons["attention"]  # there it is float32 first
    assert ("compiling" in reasons["cross_entropy"]) is (what == "model")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_code_is_counted_when_it_is_compiled() -> None:
    model = compiled(build(**TWO_LAYERS), "model")
    with fastgemma.patched():
        step(model)
        once = counts()
        step(model)
    assert counts() == once


# Derivatives of other kinds


def test_a_transform_of_torch_func_is_stock_s_and_counted() -> None:
    model = build(**TWO_LAYERS).train()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    inputs = structures.batch("padding", seq_len=9, device=DEVICE)

    def loss(weights: Results) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (), inputs).loss

    expected = torch.func.grad(loss)(weights)
    before = counts()
    with fastgemma.patched():
        assert_equal(torch.func.grad(loss)(weights), expected)
    for feature in ("rms_norm", "rope", "geglu", "lora", "attention", "cross_entropy"):
        assert counts()[feature][1]["a transform of torch.func"] > 0
        assert counts()[feature][0] == before[feature][0]


def test_a_penalty_on_gradients_is_refused() -> None:
    """A gradient that is a constant to autograd would leave the penalty without any effect, and the loss right."""
    model = build(attn_implementation="eager", **TWO_LAYERS).train()
    weight = model.model.layers[0].mlp.up_proj.weight
    inputs = structures.batch("padding", seq_len=9, device=DEVICE)
    with fastgemma.patched():
        loss = model(**inputs).loss
        (gradient,) = torch.autograd.grad(loss, [weight], create_graph=True)
        with pytest.raises(RuntimeError, match="fastgemma.unpatch"):
            (loss + gradient.square().sum()).backward()
    loss = model(**inputs).loss
    (expected,) = torch.autograd.grad(loss, [weight], create_graph=True)
    (loss + expected.square().sum()).backward()
    assert relative_error(gradient.detach(), expected.detach()) <= FLOAT32_BUDGET
