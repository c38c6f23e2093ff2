"""A key/value cache by either of transformers' names, filled as stock fills it."""

from __future__ import annotations

from typing import Any

import pytest
import structures
import torch
from kernel_checks import FLOAT32_BUDGET, relative_error
from quick import slow_after
from transformers import DynamicCache

import fastgemma
from fastgemma.patches import caches

# With `rms_norm` and the others a layer is two operations, without it its parts.
WHOLE: dict[str, Any] = {}
PARTS: dict[str, Any] = {"rms_norm": False}


class Recording(DynamicCache):
    """Records what it is updated with beside keys and values."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.updates: list[Any] = []

    def update(self, key: torch.Tensor, value: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        self.updates.append((layer, len(args), {name: sorted(given) for name, given in kwargs.items()}))
        return super().update(key, value, layer, *args, **kwargs)


def decoded(model: Any, name: str) -> tuple[torch.Tensor, list[Any]]:
    """Logits of a row of tokens fed in two pieces, and what the cache saw."""
    ids = torch.randint(3, structures.VOCAB, (1, 9), generator=torch.Generator().manual_seed(0)).to(model.device)
    cache = Recording(config=model.config.get_text_config())
    with torch.no_grad():
        logits = [model(ids[:, start:end], **{name: cache}).logits for start, end in ((0, 6), (6, 9))]
    return torch.cat(logits, dim=1), cache.updates


@pytest.mark.parametrize("features", slow_after(1, [WHOLE, PARTS]), ids=["whole", "parts"])
@pytest.mark.parametrize("name", slow_after(1, dict.fromkeys([caches.CACHE, "past_key_values"])))
@pytest.mark.parametrize("structure", slow_after(1, ["e2b", "12b"]))
def test_it_is_filled_as_by_stock(structure: str, name: str, features: dict[str, Any], device: torch.device) -> None:
    model = structures.build(structure).to(device).eval()
    expected, updates = decoded(model, name)
    before = fastgemma.status()["rope"].fast_calls
    with fastgemma.patched(**features):
        logits, ours = decoded(model, name)
    assert fastgemma.status()["rope"].fast_calls > before
    assert ours == updates and len(updates) > 2
    assert relative_error(logits, expected) <= FLOAT32_BUDGET


@pytest.mark.parametrize("features", [WHOLE, PARTS], ids=["whole", "parts"])
def test_a_layer_s_own_call(features: dict[str, Any], device: torch.device) -> None:
    """With no more than it needs."""
    model = structures.build("12b").to(device).eval()
    layer, config = model.model.layers[0], model.config.get_text_config()
    hidden_states = torch.randn(1, 5, config.hidden_size, device=device)
    angles = model.model.rotary_emb(hidden_states, torch.arange(5, device=device)[None], config.layer_types[0])

    def run() -> tuple[torch.Tensor, list[Any]]:
        cache = Recording(config=config)
        with torch.no_grad():
            out = layer(hidden_states, shared_kv_states={}, position_embeddings=angles, **{caches.CACHE: cache})
        return out, cache.updates

    expected, updates = run()
    with fastgemma.patched(**features):
        output, ours = run()
    assert ours == updates and len(updates) == 1
    assert relative_error(output, expected) <= FLOAT32_BUDGET


@pytest.mark.parametrize("by_name", [True, False])
def test_an_attention_s_own_call(by_name: bool, device: torch.device) -> None:
    """By the old name, or as the last positional argument."""
    model = structures.build("e2b").to(device).eval()
    attention = model.model.layers[0].self_attn
    config = model.config.get_text_config()
    hidden_states = torch.randn(1, 5, config.hidden_size, device=device)
    angles = model.model.rotary_emb(hidden_states, torch.arange(5, device=device)[None], config.layer_types[0])

    def run() -> tuple[torch.Tensor, list[Any]]:
        cache = Recording(config=config)
        given: tuple[Any, ...] = (hidden_states, angles, None, {})
        with torch.no_grad():
            out = attention(*given, past_key_values=cache) if by_name else attention(*given, cache)
        return out[0], cache.updates

    expected, updates = run()
    with fastgemma.patched():
        output, ours = run()
    assert ours == updates and len(updates) == 1
    assert relative_error(output, expected) <= FLOAT32_BUDGET
