"""Logits beside a fused loss: stock's, and its graph, for whoever reads them; not made for anybody else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import structures
import torch
from accelerate.utils import convert_to_fp32, send_to_device
from kernel_checks import FLOAT32_BUDGET, relative_error
from patch_state import counts
from quick import slow_after
from torch.utils import _pytree as pytree
from transformers.models.gemma4.modeling_gemma4 import Gemma4CausalLMOutputWithPast

import fastgemma
from fastgemma.patches.deferred_logits import DeferredLogits

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE: dict[str, Any] = {"layer_types": ["full_attention", "sliding_attention"], "num_kv_shared_layers": 0}


def build(name: str = "e2b", **overrides: Any) -> Any:
    """A model in training whose output embedding is frozen."""
    model = structures.build(name, **{**SHAPE, **overrides}).to(DEVICE).train()
    model.get_output_embeddings().weight.requires_grad_(False)
    return model


def forward(model: Any) -> Any:
    return model(**structures.batch("padding", seq_len=9, device=DEVICE))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Logits that were made while the test ran."""
    seen: list[torch.Tensor] = []
    make = DeferredLogits._make

    def _make(self: DeferredLogits) -> torch.Tensor:
        seen.append(make(self))
        return seen[-1]

    monkeypatch.setattr(DeferredLogits, "_make", _make)
    return seen


@pytest.mark.parametrize("name", ["e2b", "12b"])
@pytest.mark.parametrize("softcap", slow_after(1, [30.0, None]))
def test_a_loss_of_the_loss_and_the_logits(name: str, softcap: float | None, made: list[torch.Tensor]) -> None:
    model = build(name, final_logit_softcapping=softcap)
    results = []
    before = counts()["cross_entropy"][0]
    for features in (dict.fromkeys(fastgemma.status(), False), {}):
        model.zero_grad()
        with fastgemma.patched(**features):
            outputs = forward(model)
        log_probs = outputs.logits.log_softmax(-1)
        (outputs.loss + 0.1 * (log_probs.exp() * log_probs).sum(-1).mean()).backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append({"loss": outputs.loss.detach(), "logits": outputs.logits.detach(), **grads})
    stock, ours = results
    assert len(made) == 1 and counts()["cross_entropy"][0] == before + 1
    assert ours.keys() == stock.keys() and len(stock) > 10
    for name, value in stock.items():
        assert relative_error(ours[name], value) <= FLOAT32_BUDGET, name


READERS: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda outputs: outputs.logits,
    "key": lambda outputs: outputs["logits"],
    "get": lambda outputs: outputs.get("logits"),
    "index": lambda outputs: outputs[1],
    "slice": lambda outputs: outputs[:2][1],
    "tuple": lambda outputs: outputs.to_tuple()[1],
    "copy": lambda outputs: copy.copy(outputs).logits,
    "pickle": lambda outputs: pickle.loads(pickle.dumps(detached(outputs))).logits,
    "tree": lambda outputs: pytree.tree_map(lambda leaf: leaf, outputs).logits,
}


def detached(outputs: Any) -> Any:
    """Tensors with a graph cannot be pickled."""
    with torch.no_grad():
        return type(outputs)(loss=outputs.loss.detach(), logits=outputs.logits.detach())


@pytest.mark.parametrize("reader", slow_after(1, list(READERS)))
def test_readers(reader: str, made: list[torch.Tensor]) -> None:
    model = build()
    expected = forward(model)
    with fastgemma.patched():
        outputs = forward(model)
    assert isinstance(outputs, Gemma4CausalLMOutputWithPast) and type(outputs).__name__ == type(expected).__name__
    assert "logits" in outputs and list(outputs) == list(expected) and len(outputs) == len(expected)
    assert not made
    logits = READERS[reader](outputs)
    assert isinstance(logits, torch.Tensor) and len(made) == 1
    assert relative_error(logits, expected.logits) <= FLOAT32_BUDGET
    if reader in ("attribute", "key", "get", "index", "slice", "tuple"):
        assert READERS[reader](outputs) is logits and len(made) == 1, "made once"


def test_nobody_who_wants_the_loss_alone_makes_them(made: list[torch.Tensor]) -> None:
    """Neither Trainer's ways of reading it, nor what libraries do to outputs on their way."""
    model = build()
    with fastgemma.patched():
        outputs = forward(model)
    outputs = pytree.tree_map(lambda leaf: leaf, outputs)
    outputs = send_to_device(convert_to_fp32(outputs), DEVICE)
    assert outputs.loss is outputs["loss"] is outputs[0] is outputs.get("loss")
    assert outputs.get("past_key_values") is None and outputs.get("nothing", 3) == 3
    outputs.loss.backward()
    assert not made
    assert relative_error(outputs.logits, forward(model).logits) <= FLOAT32_BUDGET, "after the backward as well"


def test_what_libraries_want_done_is_done(made: list[torch.Tensor]) -> None:
    model = build().to(torch.bfloat16)
    with fastgemma.patched():
        outputs = forward(model)
    assert outputs.__dict__["logits"].dtype == torch.bfloat16
    assert outputs.__dict__["logits"].to(dtype=torch.float16).to("cpu").dtype == torch.float16
    outputs = send_to_device(convert_to_fp32(outputs), "meta")
    assert not made and outputs.__dict__["logits"].dtype == torch.float32
    assert outputs.logits.dtype == torch.float32 and outputs.logits.device.type == "meta"


def test_autocast_and_gradient_mode_are_the_forwards(made: list[torch.Tensor]) -> None:
    model = build()
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        expected = forward(model).logits
        with fastgemma.patched():
            outputs = forward(model)
    with torch.no_grad():
        logits = outputs.logits
    assert logits.dtype == expected.dtype == torch.bfloat16 and logits.requires_grad
    with torch.no_grad(), fastgemma.patched():
        outputs = forward(model)
    assert not outputs.logits.requires_grad and outputs.logits.dtype == torch.float32


@pytest.mark.parametrize("case", slow_after(1, ["a head that trains", "a distributed run", "a replica"]))
def test_where_they_cannot_be_made_later(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build()
    if case == "a head that trains":
        model.get_output_embeddings().weight.requires_grad_(True)
    elif case == "a distributed run":
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    else:
        model._is_replica = True
    with fastgemma.patched():
        outputs = forward(model)
    assert outputs.logits is None and "logits" not in outputs and outputs.loss.requires_grad


@pytest.mark.parametrize("what", slow_after(1, ["hidden states", "output embedding"]))
def test_overwritten(what: str) -> None:
    model = build()
    with fastgemma.patched():
        outputs = forward(model)
    outputs.loss.backward()
    with torch.no_grad():
        if what == "hidden states":
            outputs.__dict__["logits"]._hidden_states.zero_()
        else:
            model.lm_head.weight.mul_(2)
    with pytest.raises(RuntimeError, match=f"overwritten the {what}"):
        outputs.logits  # noqa: B018


def test_inference_mode(made: list[torch.Tensor]) -> None:
    """A loss in it; and logits of a training forward that are first read in it."""
    model = build()
    expected = forward(model).logits
    with fastgemma.patched():
        with torch.inference_mode():
            outputs = forward(model)
        assert relative_error(outputs.logits, expected) <= FLOAT32_BUDGET and not outputs.logits.requires_grad
        outputs = forward(model)
    with torch.inference_mode():
        logits = outputs.logits
    assert logits.requires_grad and not logits.is_inference() and len(made) == 2


def test_among_the_items(made: list[torch.Tensor]) -> None:
    """Whoever takes outputs apart finds something that does as a tensor."""
    model = build()
    with fastgemma.patched():
        outputs = forward(model)
    found = dict(outputs.items())["logits"]
    assert not made
    assert found.shape == (2, 9, structures.VOCAB) and len(made) == 1
    assert torch.equal(found.detach()[0], found[0].detach())
    assert torch.equal(torch.softmax(found, -1), outputs.logits.softmax(-1)) and len(made) == 1
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        found.nothing  # noqa: B018


def test_each_family_has_a_class_of_its_own() -> None:
    with fastgemma.patched():
        kinds = [type(forward(build(name))) for name in ("e2b", "12b")]
    assert len(set(kinds)) == 2
    for kind in kinds:
        spec = pytree.tree_structure(kind(loss=torch.ones(())))
        assert pytree.treespec_loads(pytree.treespec_dumps(spec)).type is kind
        assert kind(logits=torch.ones(1))[0] == 1, "a tuple without a loss"


def test_another_value_can_be_set(made: list[torch.Tensor]) -> None:
    with fastgemma.patched():
        outputs = forward(build())
    outputs.logits = torch.ones(1)
    assert outputs["logits"] is outputs.logits and not made
    outputs.logits = None
    assert outputs.logits is None
