"""Attention over intervals of keys in the models: stock's results, no dense mask, and stock where it has to be."""

from __future__ import annotations

from typing import Any

import pytest
import structures
import torch
import transformers
from kernel_checks import FLOAT32_BUDGET, attends_in_float32, relative_error
from quick import slow_after
from torch import nn
from transformers.models.gemma4 import modeling_gemma4
from transformers.models.gemma4_unified import modeling_gemma4_unified

import fastgemma
from fastgemma.kernels.key_intervals import key_intervals
from fastgemma.patches import host_copies
from fastgemma.patches.interval_masks import IntervalMasks, _blocks, _padding
from fastgemma.patches.projections import Unsupported

# On a GPU float32 attention is stock's: there tests/regression compares models in bfloat16.
pytestmark = attends_in_float32

STOCK: dict[str, Any] = dict.fromkeys(fastgemma.status(), False)
ATTENTION: dict[str, Any] = {**STOCK, "attention": True}
WITH_FIXES: dict[str, Any] = {**ATTENTION, "fixes": True}


def counts() -> tuple[int, dict[str, int]]:
    report = fastgemma.status()["attention"]
    return report.fast_calls, dict(report.fallbacks)


def gained(before: tuple[int, dict[str, int]]) -> tuple[int, dict[str, int]]:
    fast, reasons = counts()
    new = {reason: n - before[1].get(reason, 0) for reason, n in reasons.items()}
    return fast - before[0], {reason: n for reason, n in new.items() if n}


def results(model: nn.Module, **inputs: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    tokens = inputs["labels"] != -100
    return {"loss": out.loss.detach(), "logits": model(**inputs).logits.detach()[tokens], **gradients}


@pytest.mark.parametrize("implementation", slow_after(1, ["sdpa", "eager"]))
@pytest.mark.parametrize("kind", ["padding", "packing"])
@pytest.mark.parametrize("name", slow_after(1, ["e2b", "12b"]))
def test_equals_stock_and_builds_no_mask(
    name: str, kind: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = structures.build(name, implementation).train()
    inputs = structures.batch(kind)
    stock = results(model, **inputs)
    module = modeling_gemma4_unified if name == "12b" else modeling_gemma4
    for function in ("create_causal_mask", "create_sliding_window_causal_mask"):
        monkeypatch.setattr(module, function, lambda *args, **kwargs: pytest.fail("a dense mask was built"))
    before = counts()
    with fastgemma.patched(**ATTENTION):
        ours = results(model, **inputs)
    assert gained(before) == (2 * len(model.model.layers), {})
    for key, value in stock.items():
        assert relative_error(ours[key], value) <= FLOAT32_BUDGET, key


def test_checkpointing_recomputes_it() -> None:
    model = structures.build("e2b").train()
    inputs = structures.batch("padding")
    stock = results(model, **inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with fastgemma.patched(**ATTENTION):
        ours = results(model, **inputs)
    for key, value in stock.items():
        assert relative_error(ours[key], value) <= FLOAT32_BUDGET, key


def test_the_default_cache_of_a_training_loop() -> None:
    model = structures.build("e2b").train()
    inputs = {**structures.batch("padding"), "use_cache": True}
    stock = results(model, **inputs)
    before = counts()
    with fastgemma.patched(**ATTENTION):
        ours = results(model, **inputs)
    assert gained(before) == (12, {})
    for key, value in stock.items():
        assert relative_error(ours[key], value) <= FLOAT32_BUDGET, key


def _cache(model: nn.Module, inputs: dict[str, Any]) -> None:
    inputs["past_key_values"] = transformers.DynamicCache(config=model.config)


def _hole(model: nn.Module, inputs: dict[str, Any]) -> None:
    inputs["attention_mask"][0, 4] = 0


def _custom_mask(model: nn.Module, inputs: dict[str, Any]) -> None:
    length = inputs["input_ids"].shape[1]
    inputs["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool).tril(1)


def _dropout(model: Any, inputs: dict[str, Any]) -> None:
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5


def _weights(model: Any, inputs: dict[str, Any]) -> None:
    inputs["output_attentions"] = True


def _another(model: Any, inputs: dict[str, Any]) -> None:
    attention = model.model.layers[0].self_attn
    attention.forward = attention.forward


def _not_causal(model: Any, inputs: dict[str, Any]) -> None:
    model.config.is_causal = False


UNSUPPORTED = {
    "bidirectional attention": _not_causal,
    "a key/value cache": _cache,
    "padding between tokens": _hole,
    "a mask that is no padding mask": _custom_mask,
    "attention dropout": _dropout,
    "output_attentions": _weights,
    "another attention": _another,
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_stock_runs_where_intervals_do_not_say_it(reason: str) -> None:
    model = structures.build("e2b", "eager").train()
    inputs = structures.batch("padding")
    del inputs["labels"]
    UNSUPPORTED[reason](model, inputs)
    torch.manual_seed(0)
    stock = model(**inputs)
    if reason == "a key/value cache":
        _cache(model, inputs)
    before = counts()
    with fastgemma.patched(**ATTENTION):
        torch.manual_seed(0)
        ours = model(**inputs)
    assert torch.equal(ours.logits, stock.logits)
    assert gained(before) == (0, {reason: 1})
    if reason == "output_attentions":
        assert ours.attentions is not None and torch.equal(ours.attentions[0], stock.attentions[0])


def test_attention_in_other_dtypes_runs_stock_over_the_same_mask() -> None:
    """The intervals are made before the queries are seen."""
    model = structures.build("e2b").double()
    inputs = structures.batch("padding")
    with torch.no_grad():
        stock = model(**inputs).logits
        before = counts()
        with fastgemma.patched(**ATTENTION):
            ours = model(**inputs).logits
    assert gained(before) == (0, {"dtype torch.float64": 6})
    tokens = inputs["attention_mask"] == 1
    assert relative_error(ours[tokens], stock[tokens]) <= 1e-12


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_padding_change_no_token(side: str) -> None:
    model = structures.build("e4b")
    inputs = structures.batch("padding")
    if side == "left":
        inputs = {k: v.flip(1) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    tokens = inputs["attention_mask"] == 1
    with torch.no_grad():
        stock = model(**inputs).logits[tokens]
        with fastgemma.patched(**ATTENTION):
            ours = model(**inputs).logits[tokens]
    assert relative_error(ours, stock) <= FLOAT32_BUDGET


def test_images_see_themselves_in_both_directions() -> None:
    model = structures.multimodal(**structures.STRUCTURES["31b"], use_bidirectional_attention="vision")
    ids = torch.tensor([[2, 9, 40, 50, 60, 7, 8, 41, 42, 43, 44, 45, 46, 47, 48, 49, 51, 52, 9]])
    kinds = torch.tensor([[0, 0, 1, 1, 1, 0, 0, *([2] * 11), 0]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds, "use_cache": False}
    with torch.no_grad():
        stock = model(**inputs).logits
        before = counts()
        with fastgemma.patched(**ATTENTION):
            ours = model(**inputs).logits
        causal = model(**{**inputs, "mm_token_type_ids": None}).logits
    assert gained(before) == (3, {})
    assert relative_error(ours, stock) <= FLOAT32_BUDGET
    assert relative_error(causal, stock) > 1e-3


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_unified_image_blocks_reach_beyond_the_window(kind: str) -> None:
    config = structures.build("12b").config
    config._attn_implementation = "eager"
    types = torch.tensor([[0, 1, 1, 0, *([1] * 12), 0, 2, 2]])
    embeds = torch.zeros(1, types.shape[1], 4)

    class Model:
        language_model = None

    Model.__module__ = modeling_gemma4_unified.__name__
    blocks, everywhere = _blocks(Model(), config, {"mm_token_type_ids": types}, embeds)
    stock = transformers.masking_utils.create_masks_for_generate(
        config, embeds, None, None, position_ids=None, block_sequence_ids=blocks
    )[kind]
    window = config.sliding_window if kind == "sliding_attention" else None
    ours = key_intervals(1, types.shape[1], embeds.device, window, blocks=blocks, blocks_in_window=not everywhere)
    assert torch.equal(ours.dense()[:, None], stock == 0)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", slow_after(1, ["text", "multimodal"]))
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("use_cache", slow_after(1, [False, None]))
def test_documents_are_those_that_stock_finds(use_cache: bool | None, masked: bool, name: str, training: bool) -> None:
    model = structures.build("e2b") if name == "text" else structures.multimodal()
    model.train(training)
    packed = structures.batch("packing")
    inputs = {"input_ids": packed["input_ids"], "position_ids": packed["position_ids"]}
    if masked:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if use_cache is not None:
        inputs["use_cache"] = use_cache
    if name == "multimodal" and training:
        inputs["mm_token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    with torch.no_grad():
        stock = model(**inputs).logits
        with fastgemma.patched(**ATTENTION):
            ours = model(**inputs).logits
        assert relative_error(ours, stock) <= FLOAT32_BUDGET
        if name == "text" and training:
            apart = model(**{**inputs, "attention_mask": None, "use_cache": False}).logits
            with fastgemma.patched(**WITH_FIXES):
                ours = model(**inputs).logits
            assert relative_error(ours, apart) <= FLOAT32_BUDGET


@pytest.mark.parametrize("grad", [True, False])
def test_documents_are_those_that_a_checkpointed_stock_finds(grad: bool) -> None:
    """Checkpointed, a text model makes no cache in training, and looks for documents; how is a matter of releases."""
    model = structures.build("e2b").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    packed = structures.batch("packing")
    inputs = {"input_ids": packed["input_ids"], "position_ids": packed["position_ids"]}
    with torch.set_grad_enabled(grad):
        stock = model(**inputs).logits
        before = counts()
        with fastgemma.patched(**ATTENTION):
            ours = model(**inputs).logits
    assert relative_error(ours, stock) <= FLOAT32_BUDGET
    assert counts()[0] > before[0]


def test_another_s_attention_under_transformers_name_is_not_bypassed(monkeypatch: pytest.MonkeyPatch) -> None:
    interface = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    original = interface["sdpa"]

    def halved(*args: Any, **kwargs: Any) -> Any:
        output, weights = original(*args, **kwargs)
        return 0.5 * output, weights

    monkeypatch.setitem(interface._global_mapping, "sdpa", halved)
    model = structures.build("e2b")
    inputs = structures.batch("padding")
    with torch.no_grad():
        stock = model(**inputs).logits
        before = counts()
        with fastgemma.patched(**ATTENTION):
            assert torch.equal(model(**inputs).logits, stock)
    assert gained(before) == (0, {"another attention or mask under transformers' name": 1})


def test_masks_first_made_in_inference_mode_serve_training() -> None:
    model = structures.build("e2b").train()
    inputs = structures.batch("packing")
    inputs = {"input_ids": inputs["input_ids"], "labels": inputs["labels"], "use_cache": False}
    with fastgemma.patched(**ATTENTION):
        with torch.inference_mode():
            model(**inputs)
            batch = {"attention_mask": torch.ones(1, 3)}
            host_copies.remember(batch["attention_mask"], batch["attention_mask"])  # no error
            found = IntervalMasks().find(model.model, {"input_ids": inputs["input_ids"]})
            assert not found["full_attention"].on(inputs["input_ids"].device).lo.is_inference()
        model(**inputs).loss.backward()


def test_plain_masks_are_made_once() -> None:
    model = structures.build("e2b").train()
    masks = IntervalMasks()
    ids = torch.ones(2, 9, dtype=torch.long)
    with fastgemma.patched(**ATTENTION):
        first = masks.find(model.model, {"input_ids": ids})
        assert masks.find(model.model, {"input_ids": ids, "attention_mask": torch.ones(2, 9)}) is first
        padded = torch.ones(2, 9)
        padded[0, 7:] = 0
        assert masks.find(model.model, {"input_ids": ids, "attention_mask": padded}) is not first
        masks.clear()
        assert masks.find(model.model, {"input_ids": ids}) is not first


def test_padding_is_asked_of_the_host_copy() -> None:
    """A GPU would have to be waited for; the meta device cannot answer at all."""
    host = torch.ones(2, 5)
    device_mask = host.to("meta")
    with pytest.raises(Exception, match="meta"):
        _padding(device_mask, 2, 5)
    host_copies.remember(device_mask, host)
    assert _padding(device_mask, 2, 5) is None
    host[1, 2] = 0
    with pytest.raises(Exception, match="meta"):
        _padding(device_mask, 2, 5)  # written to since
    host_copies.remember(device_mask, host)
    with pytest.raises(Unsupported, match="between"):
        _padding(device_mask, 2, 5)
    host[1, 2:] = 0
    host_copies.remember(device_mask, host)
    assert _padding(device_mask, 2, 5) is device_mask


def test_undone() -> None:
    model = structures.build("e2b").train()
    inputs = structures.batch("padding")
    stock = model(**inputs).logits
    with fastgemma.patched(**ATTENTION):
        model(**inputs)
    before = counts()
    assert torch.equal(model(**inputs).logits, stock)
    assert gained(before) == (0, {})
