"""Per-layer inputs are unbound once: stock's gradients to the bit, without a whole tensor of zeros for each layer."""

from __future__ import annotations

from typing import Any

import pytest
import structures
import torch
from kernel_checks import same_bits
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastgemma

ALONE: dict[str, Any] = {**dict.fromkeys(fastgemma.status(), False), "per_layer_embeddings": True}


class Slicing(TorchDispatchMode):
    """Counts the backwards of slices and selections from a tensor of this shape."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        self.count += name in ("slice_backward", "select_backward") and tuple(args[1]) == self.shape
        return func(*args, **(kwargs or {}))


def gradients(model: Any, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], int]:
    """Of all parameters, and how many slices' backwards ran."""
    model.zero_grad()
    out = model(**inputs)
    layers, size = len(model.model.layers), model.config.hidden_size_per_layer_input
    with Slicing((*inputs["input_ids"].shape, layers, size)) as slicing:
        out.loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, slicing.count


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["e2b", "e4b"])
def test_gradients_are_stock_s_to_the_bit(name: str, checkpointing: bool, device: torch.device) -> None:
    model = structures.build(name).to(device).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = structures.batch("padding", device=device)
    stock, slices = gradients(model, inputs)
    assert slices >= len(model.model.layers)
    with fastgemma.patched(**ALONE):
        ours, slices = gradients(model, inputs)
    assert slices == 0
    assert stock.keys() == ours.keys() and all(same_bits(stock[key], ours[key]) for key in stock)


def test_layers_read_contiguous_pieces(device: torch.device) -> None:
    model = structures.build("e2b").to(device).train()
    seen: list[torch.Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    with fastgemma.patched(**ALONE):
        model(**structures.batch("padding", device=device))
    assert len(seen) == len(model.model.layers)
    assert all(type(x) is torch.Tensor and x.is_contiguous() for x in seen)


def test_it_stays_a_tensor_for_everybody_else(device: torch.device) -> None:
    model = structures.build("e2b").to(device).train()
    text = model.model
    ids = structures.batch("padding", device=device)["input_ids"]
    embeds = text.embed_tokens(ids).detach().requires_grad_()

    everything = slice(None)

    def project() -> torch.Tensor:
        return text.project_per_layer_inputs(embeds, text.get_per_layer_inputs(ids, None))

    stock = project()
    with fastgemma.patched(**ALONE):
        ours = project()
        assert isinstance(ours, torch.Tensor) and same_bits(ours.detach(), stock.detach())
        tokens = (slice(-1, None), slice(0, None), slice(0, 5), slice(None, None, 2), everything)
        cuts: list[Any] = [(everything, cut, layers, everything) for cut in tokens for layers in (everything, 1)]
        for index in (*cuts, 0, (..., 1), (0, 1, 2, 3), None):
            assert same_bits(ours[index].detach(), stock[index].detach())
        for last in (0, len(text.layers) - 1, -1):
            assert same_bits(ours[:, :, last, :].detach(), stock[:, :, last, :].detach())
        with pytest.raises(IndexError):
            ours[:, :, len(text.layers), :]
        weights = torch.randn_like(stock)
        (mixed,) = torch.autograd.grad((ours * weights).sum() + ours[:, :, 1, :].sum(), embeds)
        (expected,) = torch.autograd.grad((stock * weights).sum() + stock[:, :, 1, :].sum(), embeds)
        torch.testing.assert_close(mixed, expected)
        with torch.no_grad():
            assert type(project()) is torch.Tensor
    assert type(project()) is torch.Tensor


def adapted(checkpointing: bool = True, **config: Any) -> Any:
    model = structures.build("e2b")
    settings = {"r": 2, "init_lora_weights": False, "target_modules": ["q_proj", "down_proj"], **config}
    torch.manual_seed(1)
    peft_model = get_peft_model(model, LoraConfig(**settings))
    if checkpointing:
        peft_model.gradient_checkpointing_enable({"use_reentrant": False})
    peft_model.enable_input_require_grads()
    return peft_model.train()


def layer_inputs(model: Any) -> list[torch.Tensor]:
    """What the layers but the first, which is given the embeddings, were given, by forward, in a list that grows."""
    seen: list[torch.Tensor] = []
    for module in model.modules():
        if type(module).__name__ == "Gemma4TextDecoderLayer" and module.layer_idx:
            module.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    return seen


def step(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


ON: dict[str, Any] = {**dict.fromkeys(fastgemma.status(), False), "per_layer_embeddings": True, "fixes": True}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_gradient_where_nothing_before_them_is_trained(checkpointing: bool, device: torch.device) -> None:
    model = adapted(checkpointing).to(device)
    inputs = structures.batch("padding", device=device)
    stock = step(model, inputs)
    seen = layer_inputs(model)
    with fastgemma.patched(**ON):
        ours = step(model, inputs)
    assert seen and not any(x.requires_grad for x in seen) and all(x.is_contiguous() for x in seen)
    assert stock.keys() == ours.keys() and all(same_bits(stock[key], ours[key]) for key in stock)


def test_no_gradient_in_a_multimodal_model_either(device: torch.device) -> None:
    model: Any = structures.multimodal().to(device).train()
    model.requires_grad_(False)
    model.model.language_model.layers.requires_grad_(True)
    model.enable_input_require_grads()
    inputs = structures.batch("padding", device=device)
    stock = step(model, inputs)
    seen = layer_inputs(model)
    with fastgemma.patched(**ON):
        ours = step(model, inputs)
    assert seen and not any(x.requires_grad for x in seen)
    assert stock.keys() == ours.keys() and all(same_bits(stock[key], ours[key]) for key in stock)


READERS = [
    "adapted projection",
    "trained norm",
    "another hook",
    "own embeddings",
    "hidden states",
    "model.layers.0",
    "model.layers.0.input_layernorm",
    "model.rotary_emb",
    "model.per_layer_model_projection",
    "a subclass of the layer",
    "the layer's class",
    "a module around the layer",
    "compared",
]


class Around(nn.Module):
    """A layer with something of the user's around it, and nothing that a layer has."""

    def __init__(self, layer: nn.Module, caught: list[torch.Tensor]) -> None:
        super().__init__()
        self.layer, self.caught = layer, caught

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.caught.append(hidden_states)
        return self.layer(hidden_states, *args, **kwargs)


@pytest.mark.parametrize("why", READERS)
def test_gradient_where_somebody_reads_it(why: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(
        **({"target_modules": ["q_proj", "per_layer_model_projection"]} if why == "adapted projection" else {})
    ).to(device)
    text = model.base_model.model.model
    inputs = structures.batch("padding", device=device)
    caught: list[torch.Tensor] = []
    if why == "trained norm":
        text.per_layer_projection_norm.weight.requires_grad_(True)
    if why == "another hook":

        def catch(module: Any, given: Any, output: torch.Tensor) -> None:
            caught.append(output)

        text.embed_tokens.register_forward_hook(catch)
    if why.startswith("model."):
        text.get_submodule(why.removeprefix("model.")).register_forward_pre_hook(
            lambda module, given: caught.append(given[0])
        )
    first = text.layers[0]
    if "layer" in why and not why.startswith("model."):
        stock_forward = type(first).forward

        def reading(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if self is first:
                caught.append(hidden_states)
            return stock_forward(self, hidden_states, *args, **kwargs)

        if why == "a subclass of the layer":
            first.__class__ = type("Own", (type(first),), {"forward": reading})
        elif why == "the layer's class":
            monkeypatch.setattr(type(first), "forward", reading)
        else:
            text.layers[0] = Around(first, caught)
    if why == "own embeddings":
        ids = inputs.pop("input_ids")
        with torch.no_grad():
            inputs["inputs_embeds"] = text.embed_tokens(ids).detach()
            inputs["per_layer_inputs"] = text.get_per_layer_inputs(ids, None)
        caught = [inputs["inputs_embeds"].requires_grad_()]

    def both() -> dict[str, torch.Tensor]:
        if why == "hidden states":
            model.zero_grad()
            out = model(**inputs, output_hidden_states=True)
            (gradient,) = torch.autograd.grad(out.loss, out.hidden_states[0])
            return {"embeddings": gradient}
        grads = step(model, inputs)
        if caught:
            grads["embeddings"] = caught[-1].grad.clone()
            caught[-1].grad = None
        return grads

    stock = both()
    seen = layer_inputs(model)
    with fastgemma.patched(**ON):
        ours = both()
    assert any(x.requires_grad for x in seen) == (why != "compared")  # what the others differ from
    assert stock.keys() == ours.keys() and all(same_bits(stock[key], ours[key]) for key in stock)


def test_gradient_where_a_hook_on_a_multimodal_model_s_text_model_reads_it(device: torch.device) -> None:
    model: Any = structures.multimodal().to(device).train()
    model.requires_grad_(False)
    model.model.language_model.layers.requires_grad_(True)
    model.enable_input_require_grads()
    caught: list[torch.Tensor] = []
    model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: caught.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    inputs = structures.batch("padding", device=device)

    def read() -> torch.Tensor:
        step(model, inputs)
        assert caught[-1].grad is not None
        return caught[-1].grad

    stock = read()
    with fastgemma.patched(**ON):
        assert same_bits(read(), stock)


def test_a_multimodal_forward_stays_one_by_keywords(device: torch.device) -> None:
    """Rows of the table stack on it, and masks are made from its keyword arguments."""
    model = structures.multimodal().to(device).train()
    before = fastgemma.status()["attention"].fallbacks.get("positional arguments", 0)
    with fastgemma.patched():
        model(**structures.batch("padding", device=device))
    assert fastgemma.status()["attention"].fallbacks.get("positional arguments", 0) == before
