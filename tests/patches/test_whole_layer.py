"""A decoder layer as two operations around its attention: when it runs so, when in parts, and that both are stock's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import structures
import torch
from kernel_checks import FLOAT32_BUDGET, relative_error
from peft import LoraConfig, get_peft_model
from quick import slow_after
from torch import nn

import fastgemma
from fastgemma.kernels import post_attention, pre_attention

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each fused operation ran its kernels."""
    counts: Counter[str] = Counter()
    for module, name in ((pre_attention, "_PreAttention"), (post_attention, "_PostAttention")):
        function = getattr(module, name)

        def apply(*args: Any, function: Any = function, name: str = name) -> Any:
            counts[name] += 1
            return function.apply(*args)

        monkeypatch.setattr(module, name, type(name, (), {"apply": staticmethod(apply)}))
    return counts


def adapted(name: str, **options: Any) -> nn.Module:
    model = structures.build(name).to(DEVICE)
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=PROJECTIONS, init_lora_weights=False, **options)
    return get_peft_model(model, config, autocast_adapter_dtype=False).train()


def layers(model: nn.Module) -> nn.ModuleList:
    return model.get_base_model().model.layers


def step(model: nn.Module, **changes: Any) -> dict[str, torch.Tensor]:
    """Loss and gradients; dropout draws the same masks every time."""
    model.zero_grad()
    torch.manual_seed(3)
    loss = model(**{**structures.batch("padding", device=DEVICE), **changes}).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= FLOAT32_BUDGET, name


@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
@pytest.mark.parametrize("name", slow_after(1, structures.STRUCTURES))
def test_every_layer_that_can_runs_whole(name: str, dropout: float, ran: Counter[str]) -> None:
    model = adapted(name, lora_dropout=dropout)
    expected = step(model)
    assert not ran
    with fastgemma.patched():
        assert_equal(step(model), expected)
    count = len(layers(model))
    assert ran["_PreAttention"] == count
    assert ran["_PostAttention"] == (0 if name == "26b-a4b" else count)  # experts run in parts


def _hook_attention(layer: Any) -> None:
    layer.self_attn.register_forward_hook(lambda *_: None)


def _hook_norm(layer: Any) -> None:
    layer.pre_feedforward_layernorm.register_forward_hook(lambda *_: None)


def _hook_mlp(layer: Any) -> None:
    layer.mlp.register_full_backward_hook(lambda *_: None)


def _train_scalar(layer: Any) -> None:
    layer.layer_scalar = nn.Parameter(layer.layer_scalar.clone())


def _subclass_mlp(layer: Any) -> None:
    class Half(type(layer.mlp)):  # type: ignore[misc]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 0.5 * super().forward(x)

    layer.mlp.__class__ = Half


def _other_eps(layer: Any) -> None:
    layer.post_feedforward_layernorm.eps = 1e-3


def _other_eps_of_keys(layer: Any) -> None:
    layer.self_attn.k_norm.eps = 1e-3


def _as_a_replica(norm: Any) -> None:
    """As DataParallel's replicas hold it: an attribute, and no parameter."""
    weight = norm._parameters.pop("weight")
    norm.weight = weight.detach()


def _replicate_norm(layer: Any) -> None:
    _as_a_replica(layer.pre_feedforward_layernorm)


def _replicate_norm_of_queries(layer: Any) -> None:
    _as_a_replica(layer.self_attn.q_norm)


def _other_dropout(layer: Any) -> None:
    layer.mlp.up_proj.lora_dropout["default"] = nn.AlphaDropout(0.5)


@pytest.mark.parametrize(
    ("change", "pre", "post"),
    [
        (_hook_attention, 0, 0),
        (_hook_mlp, 1, 0),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (_hook_norm, 1, 0),
                (_train_scalar, 1, 0),
                (_subclass_mlp, 1, 0),
                (_other_eps, 1, 0),
                (_other_eps_of_keys, 0, 0),
                (_replicate_norm, 1, 0),
                (_replicate_norm_of_queries, 0, 0),
                (_other_dropout, 1, 0),
            )
        ),
    ],
    ids=lambda value: getattr(value, "__name__", "").strip("_"),
)
def test_what_a_layer_does_not_allow_runs_in_parts(
    change: Callable[[Any], None], pre: int, post: int, ran: Counter[str]
) -> None:
    model = adapted("e2b")
    change(layers(model)[1])
    expected = step(model)
    with fastgemma.patched():
        assert_equal(step(model), expected)
    others = len(layers(model)) - 1
    assert ran == {"_PreAttention": others + pre, "_PostAttention": others + post}


@pytest.mark.slow
@pytest.mark.parametrize("feature", ["rms_norm", "rope", "geglu", "lora"])
def test_a_feature_switched_off_means_parts(feature: str, ran: Counter[str]) -> None:
    model = adapted("31b")
    expected = step(model)
    with fastgemma.patched(**{feature: False}):
        assert_equal(step(model), expected)
    assert not ran


def test_attention_weights_can_be_asked_for(ran: Counter[str]) -> None:
    """transformers records them with hooks on the attention modules: the layers run in parts, and nothing is lost."""
    model = structures.build("31b", attn_implementation="eager").to(DEVICE).eval()
    batch = structures.batch("padding", device=DEVICE)
    batch.pop("labels")
    expected = model(**batch, output_attentions=True, output_hidden_states=True)
    with fastgemma.patched():
        actual = model(**batch, output_attentions=True, output_hidden_states=True)
    assert len(actual.attentions) == len(expected.attentions) == len(model.model.layers)
    for name in ("attentions", "hidden_states"):
        for ours, stock in zip(actual[name], expected[name]):
            assert relative_error(ours, stock) <= FLOAT32_BUDGET


def test_a_layer_output_owns_its_memory() -> None:
    """FSDP2 and in-place operations of users rely on it."""
    model, seen = adapted("e2b"), []
    layers(model)[0].register_forward_hook(lambda module, args, output: seen.append(output._is_view()))
    with fastgemma.patched():
        step(model)
    assert seen == [False]


def test_parameters_written_between_forward_and_backward_are_noticed() -> None:
    model = adapted("31b")
    with fastgemma.patched():
        loss = model(**structures.batch("padding", device=DEVICE)).loss
        with torch.no_grad():
            layers(model)[1].mlp.down_proj.lora_B["default"].weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified in place"):
            loss.backward()


@pytest.mark.slow
def test_backward_twice_and_one_gradient_alone() -> None:
    model = adapted("e4b")
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with fastgemma.patched():
        loss = model(**structures.batch("padding", device=DEVICE)).loss
        first = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        second = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
        name = next(n for n in parameters if "layers.1.self_attn.k_proj.lora_A" in n)
        (alone,) = torch.autograd.grad(loss, [parameters[name]])
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert torch.equal(alone, dict(zip(parameters, first))[name])
