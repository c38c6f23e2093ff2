"""Traps of the stack around Gemma 4: each shown in stock, then fixed or refused."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import peft
import pytest
import structures
import torch
import transformers
from kernel_checks import FLOAT32_BUDGET, attends_in_float32, relative_error, same_bits
from quick import slow_after
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.gemma4_unified import Gemma4UnifiedTextConfig
from transformers.quantizers.base import HfQuantizer

import fastgemma
from fastgemma.patches.engine import PatchError

STOCK: dict[str, Any] = dict.fromkeys(fastgemma.status(), False)
FIXES: dict[str, Any] = {**STOCK, "fixes": True}
CHECKPOINTING: dict[str, Any] = {**STOCK, "checkpointing": True}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.train()(**structures.batch("padding")).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# Reentrant checkpointing

SWITCHES = [
    name
    for name in ("gradient_checkpointing_enable", "activation_checkpointing_enable")
    if hasattr(transformers.PreTrainedModel, name)
]


def wrong(gradients: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> set[str]:
    """Names of the gradients that are missing or off."""
    return {
        name
        for name, expected in truth.items()
        if name not in gradients or relative_error(gradients[name], expected) > FLOAT32_BUDGET
    }


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("kwargs", [{}, {"use_reentrant": True}])
def test_reentrant_checkpointing_becomes_exact(
    kwargs: dict[str, Any], switch: str, caplog: pytest.LogCaptureFixture
) -> None:
    truth = gradients(structures.build("e2b"))
    stock = structures.build("e2b")
    getattr(stock, switch)(dict(kwargs))
    lost = wrong(gradients(stock), truth)
    assert any("k_proj" in name for name in lost) and any("v_proj" in name for name in lost)

    model = structures.build("e2b")
    with fastgemma.patched(**CHECKPOINTING):
        with caplog.at_level(logging.WARNING, "fastgemma"), warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            getattr(model, switch)(given := dict(kwargs))
        assert given == kwargs, "the caller's dict was written"
        assert not warned or switch != SWITCHES[-1], "calls another by a name that is deprecated"
        assert model.is_gradient_checkpointing
        assert not wrong(gradients(model), truth)
    (record,) = caplog.records
    assert "use_reentrant=False" in record.getMessage()


@pytest.mark.parametrize("kwargs", [None, {"use_reentrant": False}, {"use_reentrant": False, "early_stop": True}])
def test_non_reentrant_checkpointing_is_left_alone(
    kwargs: dict[str, Any] | None, caplog: pytest.LogCaptureFixture
) -> None:
    model = structures.build("e2b")
    with fastgemma.patched(**CHECKPOINTING), caplog.at_level(logging.WARNING, "fastgemma"):
        model.gradient_checkpointing_enable(kwargs)
        ours = model.model.layers[0]._gradient_checkpointing_func.keywords
    model.gradient_checkpointing_enable(kwargs)
    assert ours == model.model.layers[0]._gradient_checkpointing_func.keywords
    assert not caplog.records


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint")
@pytest.mark.parametrize("name", ["31b", "12b"])
def test_reentrant_checkpointing_without_shared_keys_is_left_alone(name: str) -> None:
    truth = gradients(structures.build(name))
    model = structures.build(name)
    with fastgemma.patched(**CHECKPOINTING):
        model.gradient_checkpointing_enable({"use_reentrant": True})
        assert model.model.layers[0]._gradient_checkpointing_func.keywords == {"use_reentrant": True}
        assert not wrong(gradients(model), truth)


@pytest.mark.parametrize("kwargs", [{}, {"use_reentrant": True}])
def test_reentrant_checkpointing_from_before_is_refused(kwargs: dict[str, Any]) -> None:
    model = structures.build("e2b")
    model.gradient_checkpointing_enable(kwargs)
    batch = structures.batch("padding")
    with fastgemma.patched(**CHECKPOINTING):
        with pytest.raises(PatchError, match="shares keys and values.*use_reentrant"):
            model.train()(**batch)
        with torch.no_grad():
            model(**batch)
        model.eval()(**batch)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        assert not wrong(gradients(model), gradients(structures.build("e2b")))


def test_a_wrapped_checkpoint_function_is_let_through() -> None:
    """As transformers' own tests do it, with a mock, whose every attribute is something."""
    model = structures.build("e2b")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layer = model.model.layers[0]
    layer._gradient_checkpointing_func = Mock(side_effect=layer._gradient_checkpointing_func)
    with fastgemma.patched(**CHECKPOINTING):
        assert not wrong(gradients(model), gradients(structures.build("e2b")))
    assert layer._gradient_checkpointing_func.called


def _by_torch_s_default(model: nn.Module) -> None:
    model._set_gradient_checkpointing(gradient_checkpointing_func=checkpoint)


def _by_deepspeed(model: nn.Module) -> None:
    def reentrant(function: Any, *args: Any) -> Any:
        return checkpoint(function, *args, use_reentrant=True)

    reentrant.__name__, reentrant.__module__ = "checkpoint", "deepspeed.runtime.activation_checkpointing.checkpointing"
    model._set_gradient_checkpointing(gradient_checkpointing_func=reentrant)


def _every_second_layer(model: nn.Module) -> None:
    """In a model with towers these are not the first ones."""
    model.gradient_checkpointing_enable({"use_reentrant": True})
    for layer in model.model.layers[::2]:
        layer.gradient_checkpointing = False


def _by_wrappers(model: nn.Module, kind: CheckpointImpl = CheckpointImpl.REENTRANT) -> None:
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(layer, checkpoint_impl=kind)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("enable", [_by_torch_s_default, _by_deepspeed, _every_second_layer, _by_wrappers])
def test_reentrant_checkpointing_by_other_ways_is_refused(enable: Callable[[nn.Module], None]) -> None:
    truth = gradients(structures.build("e2b"))
    model = structures.build("e2b")
    model.enable_input_require_grads()  # which reentrant checkpointing needs
    enable(model)
    assert any("k_proj" in name for name in wrong(unwrapped(gradients(model)), truth))
    with fastgemma.patched(**CHECKPOINTING), pytest.raises(PatchError, match="shares keys and values.*use_reentrant"):
        model(**structures.batch("padding"))


def unwrapped(gradients: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.replace("_checkpoint_wrapped_module.", ""): gradient for name, gradient in gradients.items()}


@attends_in_float32
def test_wrappers_that_are_not_reentrant_are_left_alone() -> None:
    truth = gradients(structures.build("e2b"))
    model = structures.build("e2b")
    _by_wrappers(model, CheckpointImpl.NO_REENTRANT)
    before = fastgemma.status()["attention"]
    with fastgemma.patched(**{**CHECKPOINTING, "attention": True}):
        assert not wrong(unwrapped(gradients(model)), truth)
    after = fastgemma.status()["attention"]
    assert after.fast_calls > before.fast_calls and after.fallbacks == before.fallbacks


@pytest.mark.skipif(
    not hasattr(transformers.PreTrainedModel, "activation_checkpointing_enable"), reason="transformers before its name"
)
def test_the_newer_name_is_fixed_too(caplog: pytest.LogCaptureFixture) -> None:
    model = structures.build("e2b")
    with fastgemma.patched(**CHECKPOINTING), caplog.at_level(logging.WARNING, "fastgemma"):
        model.activation_checkpointing_enable({"use_reentrant": True}, every_n_layers=2)
    functions = [layer._gradient_checkpointing_func for layer in model.model.layers]
    assert all(function.keywords == {"use_reentrant": False} for function in functions)
    assert [layer.gradient_checkpointing for layer in model.model.layers[:3]] == [True, False, True]
    assert len(caplog.records) == 1


def test_kbit_preparation_with_its_default_is_not_reentrant() -> None:
    """PEFT passes an empty dict on, which torch takes as reentrant."""
    model = structures.build("e2b")
    model.is_loaded_in_4bit = True
    with fastgemma.patched(**CHECKPOINTING):
        peft.prepare_model_for_kbit_training(model)
    assert model.model.layers[0]._gradient_checkpointing_func.keywords == {"use_reentrant": False}


# Preparation of 4-bit models


def dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["e2b", "12b"])
def test_kbit_preparation_keeps_the_residual_stream_s_weights(name: str, tied: bool) -> None:
    model = structures.build(name, tie_word_embeddings=tied).to(torch.bfloat16)
    embedding = model.model.embed_tokens.weight
    with fastgemma.patched(**FIXES):
        assert peft.prepare_model_for_kbit_training(model) is model
    assert model.model.embed_tokens.weight is embedding
    assert (model.lm_head.weight is embedding) == tied
    kept = {name for name, dtype in dtypes(model).items() if dtype == torch.bfloat16}
    # Whatever reads or writes the residual stream keeps its width; norms are cast, as PEFT means to.
    expected = {f"{module}.weight" for module, layer in model.named_modules() if type(layer) is nn.Linear}
    expected -= {"lm_head.weight"} if tied else set()
    expected |= {"model.embed_tokens.weight"}
    expected |= {"model.embed_tokens_per_layer.weight"} if name == "e2b" else set()
    assert kept == expected
    assert {dtype for name, dtype in dtypes(model).items() if name not in kept} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_kbit_preparation_runs_without_autocast() -> None:
    model = structures.build("e2b").to(torch.bfloat16)
    with fastgemma.patched(**FIXES):
        peft.prepare_model_for_kbit_training(model)
        assert model(**structures.batch("padding")).loss.isfinite()


def test_kbit_preparation_of_other_architectures_is_stock_s() -> None:
    def llama() -> LlamaForCausalLM:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
        )
        return LlamaForCausalLM(config).to(torch.bfloat16)

    with fastgemma.patched(**FIXES):
        model = peft.prepare_model_for_kbit_training(llama())
    assert dtypes(model) == dtypes(peft.prepare_model_for_kbit_training(llama()))
    assert set(dtypes(model).values()) == {torch.float32}


def test_kbit_preparation_trains_as_stock_s() -> None:
    """In bfloat16 autocast, as the Trainer runs it; the float32 embeddings of stock hold bfloat16 values."""
    losses = []
    for features in (STOCK, FIXES):
        model = structures.build("31b").to(torch.bfloat16)
        structures.quantize(model)
        with fastgemma.patched(**features):
            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
            torch.manual_seed(0)
            model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj", "up_proj"])).train()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**structures.batch("padding")).loss
            loss.backward()
        losses.append(loss)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert relative_error(losses[1].detach(), losses[0].detach()) < 5e-3


# The router


@pytest.mark.parametrize("name", list(structures.STRUCTURES))
def test_the_router_is_not_quantised(name: str) -> None:
    model = structures.build(name)
    stock = HfQuantizer.get_modules_to_not_convert(model, ["some_module"], add_default_skips=True)
    with fastgemma.patched(**FIXES):
        ours = HfQuantizer.get_modules_to_not_convert(model, ["some_module"], add_default_skips=True)
    added = ["router.proj"] if name == "26b-a4b" else []
    assert sorted(ours) == sorted(stock + added)
    if added:
        assert any(path.endswith("router.proj") for path, _ in model.named_modules())


# Adapters by name on a model with towers


def test_adapters_named_by_projection_on_a_multimodal_model(tmp_path: Path) -> None:
    def config() -> peft.LoraConfig:
        return peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

    with pytest.raises(ValueError, match="Gemma4ClippableLinear"):
        peft.get_peft_model(structures.multimodal(), config())
    with fastgemma.patched(**FIXES):
        model = peft.get_peft_model(structures.multimodal(), config())
    adapted = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert adapted and all(".language_model." in name for name in adapted)
    assert len([name for name in adapted if name.endswith("q_proj")]) == 6

    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "vision_tower" in saved["exclude_modules"]
    ids = torch.tensor([[2, 9, 40, 7]])
    with torch.no_grad():
        expected = model.eval()(ids).logits
        loaded = peft.PeftModel.from_pretrained(structures.multimodal(), tmp_path).eval()
        assert same_bits(loaded(ids).logits, expected)


def test_the_user_s_own_choice_of_modules_stands() -> None:
    with fastgemma.patched(**FIXES):
        config = peft.LoraConfig(r=2, target_modules=r".*language_model.*q_proj")
        peft.get_peft_model(structures.multimodal(), config)
        assert config.exclude_modules is None
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], exclude_modules=r".*tower.*")
        peft.get_peft_model(structures.multimodal(), config)
        assert config.exclude_modules == r".*tower.*"
        config = peft.LoraConfig(r=2, target_modules=["q_proj"])
        peft.get_peft_model(structures.build("e2b"), config)
        assert config.exclude_modules is None


# Packed rows


def each_alone(model: nn.Module, ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """Logits of the documents of one packed row, each in a forward of its own."""
    starts = [*(position_ids[0] == 0).nonzero().flatten().tolist(), ids.shape[1]]
    with torch.no_grad():
        parts = [model(ids[:, a:b], use_cache=False).logits for a, b in zip(starts, starts[1:])]
    return torch.cat(parts, dim=1)


PACKED = {
    "a mask of ones": {"use_cache": False},
    "a mask of ones and a cache": {},
    "the default cache": {"attention_mask": None},
}


@pytest.mark.parametrize("case", PACKED)
@pytest.mark.parametrize("name", [*structures.STRUCTURES, "multimodal"])
def test_packed_documents_do_not_see_each_other(name: str, case: str) -> None:
    model = (structures.multimodal() if name == "multimodal" else structures.build(name)).train()
    packed = structures.batch("packing")
    ids, position_ids = packed["input_ids"], packed["position_ids"]
    inputs = {"input_ids": ids, "position_ids": position_ids, "attention_mask": torch.ones_like(ids), **PACKED[case]}
    expected = each_alone(model, ids, position_ids)
    with torch.no_grad():
        stock = model(**inputs).logits
        with fastgemma.patched(**FIXES):
            ours = model(**inputs).logits
    if (name, case) != ("multimodal", "the default cache"):  # there the masks are made before the cache
        assert relative_error(stock, expected) > 1e-3, "stock keeps them apart: this fix is not needed any more"
    assert relative_error(ours, expected) <= FLOAT32_BUDGET


def test_packed_documents_with_padding_behind_them() -> None:
    model = structures.build("e2b").train()
    packed = structures.batch("packing")
    ids, position_ids = packed["input_ids"], packed["position_ids"]
    expected = each_alone(model, ids, position_ids)
    zeros = torch.zeros((1, 5), dtype=ids.dtype)
    inputs = {
        "input_ids": torch.cat([ids, zeros], 1),
        "position_ids": torch.cat([position_ids, zeros], 1),
        "attention_mask": torch.cat([torch.ones_like(ids), zeros], 1),
    }
    with torch.no_grad(), fastgemma.patched(**FIXES):
        ours = model(**inputs).logits
    assert relative_error(ours[:, : ids.shape[1]], expected) <= FLOAT32_BUDGET


@pytest.mark.parametrize("features", [{}, {"attention": True}], ids=["masks", "intervals"])
def test_packed_documents_with_padding_between_them(features: dict[str, Any]) -> None:
    """Padding of no position."""
    model = structures.build("e2b").train()
    lengths = (6, 7)
    ids = torch.randint(3, structures.VOCAB, (1, sum(lengths) + 2))
    gap = torch.full((2,), -1)
    position_ids = torch.cat([torch.arange(lengths[0]), gap, torch.arange(lengths[1])])[None]
    with torch.no_grad():
        alone = model(ids[:, -lengths[1] :], use_cache=False).logits
        with fastgemma.patched(**{**FIXES, **features}):
            for mask in ((position_ids >= 0).long(), None):
                ours = model(input_ids=ids, attention_mask=mask, position_ids=position_ids).logits
                assert relative_error(ours[:, -lengths[1] :], alone) <= FLOAT32_BUDGET


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["e2b", "12b", "26b-a4b"])
def test_padded_rows_with_position_ids_are_unchanged(name: str, side: str) -> None:
    model = structures.build(name).train()
    mask = torch.ones(3, 12, dtype=torch.long)
    mask[1, 7:], mask[2, 1:] = 0, 0
    mask = mask.flip(1) if side == "left" else mask
    ids = torch.randint(3, structures.VOCAB, mask.shape) * mask
    for position_ids in (
        (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1),  # as generate makes them
        (mask.cumsum(-1) - 1).clamp(min=0),
    ):
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}
        with torch.no_grad():
            stock = model(**inputs).logits
            with fastgemma.patched(**FIXES):
                ours = model(**inputs).logits
        real = mask.bool()
        assert relative_error(ours[real], stock[real]) <= FLOAT32_BUDGET


JUMPS = {
    "ahead": torch.cat([torch.arange(5), torch.arange(90, 97)]),
    "by two": 2 * torch.arange(12),
    "back, not to 0": torch.cat([torch.arange(7), torch.arange(3, 8)]),
    "all 0": torch.zeros(12, dtype=torch.long),
}


@pytest.mark.parametrize("features", [{}, {"attention": True}], ids=["masks", "intervals"])
@pytest.mark.parametrize("given", slow_after(1, ["a mask of ones", "the default cache", "no cache"]))
@pytest.mark.parametrize("positions", slow_after(1, JUMPS))
def test_positions_that_jump_are_seen_as_by_stock(positions: str, given: str, features: dict[str, Any]) -> None:
    """Without a cache stock itself takes every jump for a new document."""
    model = structures.build("31b").train()
    ids = torch.randint(3, structures.VOCAB, (2, 12))
    inputs = {"input_ids": ids, "position_ids": JUMPS[positions][None].expand(2, -1)}
    if given == "a mask of ones":
        inputs["attention_mask"] = torch.ones_like(ids)
    elif given == "no cache":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    stock = model(**inputs).logits
    before = fastgemma.status()["fixes"].fast_calls
    with fastgemma.patched(**{**FIXES, **features}):
        ours = model(**inputs).logits
    assert relative_error(ours, stock) <= FLOAT32_BUDGET
    assert fastgemma.status()["fixes"].fast_calls == before


def masked(features: dict[str, Any], model: nn.Module, **inputs: Any) -> int:
    """How often a fix acted in one forward."""
    before = fastgemma.status()["fixes"].fast_calls
    with torch.no_grad(), fastgemma.patched(**features):
        model(**inputs)
    return fastgemma.status()["fixes"].fast_calls - before


@pytest.mark.parametrize("filling", [1, 0])
@pytest.mark.parametrize("features", [{}, {"attention": True}], ids=["masks", "intervals"])
def test_labels_on_padding_with_positions(features: dict[str, Any], filling: int) -> None:
    """1, as generate numbers padding, or 0: its logits count in stock's loss where labels are not masked."""
    model = structures.build("e2b").train()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    ids = torch.randint(3, structures.VOCAB, mask.shape)
    position_ids = (mask.cumsum(-1) - 1).masked_fill(mask == 0, filling)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids}
    stock = model(**inputs).logits
    with fastgemma.patched(**{**FIXES, **features}):
        assert relative_error(model(**inputs).logits, stock) <= FLOAT32_BUDGET


@attends_in_float32
def test_documents_that_intervals_keep_apart_are_counted() -> None:
    packed = structures.batch("packing")
    ids, position_ids = packed["input_ids"], packed["position_ids"]
    model = structures.build("e2b").train()
    features = {**FIXES, "attention": True}
    assert masked(features, model, input_ids=ids, position_ids=position_ids) == 1
    assert masked(features, model, input_ids=ids, position_ids=torch.arange(ids.shape[1])[None]) == 0
    assert masked(features, model, input_ids=ids, position_ids=position_ids, use_cache=False) == 0
    assert masked(features, model.eval(), input_ids=ids, position_ids=position_ids) == 0


def test_calls_whose_masks_stock_makes_itself() -> None:
    packed = structures.batch("packing")
    ids, position_ids = packed["input_ids"], packed["position_ids"]
    model = structures.build("e2b").train()
    assert masked(FIXES, model, input_ids=ids, position_ids=position_ids) == 1
    assert masked(FIXES, model, input_ids=ids) == 0
    assert masked(FIXES, model, input_ids=ids, position_ids=torch.arange(ids.shape[1])[None]) == 0  # one document
    assert masked(FIXES, model, input_ids=ids, position_ids=position_ids, use_cache=False) == 0
    dense = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
    assert masked(FIXES, model, input_ids=ids, position_ids=position_ids, attention_mask=dense) == 0
    assert masked(FIXES, model.eval(), input_ids=ids, position_ids=position_ids) == 0
    cache = transformers.DynamicCache(config=model.config)
    assert masked(FIXES, model.train(), input_ids=ids, position_ids=position_ids, past_key_values=cache) == 0


def test_image_tokens_keep_their_bidirectional_mask() -> None:
    """The large sizes let the tokens of one image see each other, which mm_token_type_ids says."""
    text = structures.STRUCTURES["31b"]
    model = structures.multimodal(**text, use_bidirectional_attention="vision").train()
    ids = torch.tensor([[2, 9, 40, 50, 60, 7, 8]])
    kinds = torch.tensor([[0, 0, 1, 1, 1, 0, 0]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(7)[None],
        "mm_token_type_ids": kinds,
    }
    with torch.no_grad():
        stock = model(**inputs).logits
        with fastgemma.patched(**FIXES):
            ours = model(**inputs).logits
        causal = model(**{**inputs, "mm_token_type_ids": None}).logits
    assert same_bits(ours, stock)
    assert relative_error(causal, stock) > 1e-3


def test_unified_image_tokens_keep_their_bidirectional_mask() -> None:
    settings = structures.STRUCTURES["12b"]
    text = Gemma4UnifiedTextConfig(**settings, num_hidden_layers=len(settings["layer_types"]))
    config = transformers.Gemma4UnifiedConfig(
        text_config=text, image_token_id=1000, video_token_id=1001, audio_token_id=1002
    )
    torch.manual_seed(0)
    model = transformers.Gemma4UnifiedForConditionalGeneration(config).train()
    ids = torch.tensor([[2, 9, 40, 50, 60, 7, 8]])
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(7)[None],
        "mm_token_type_ids": torch.tensor([[0, 0, 1, 1, 1, 0, 0]]),
    }
    with torch.no_grad():
        stock = model(**inputs).logits
        with fastgemma.patched(**FIXES):
            assert same_bits(model(**inputs).logits, stock)
        causal = model(**{**inputs, "mm_token_type_ids": None}).logits
    assert relative_error(causal, stock) > 1e-3
