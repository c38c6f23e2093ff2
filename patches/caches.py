"""What transformers call a key/value cache: `cache` from 5.24 on, which take the old name too, and before it
`past_key_values`; there `cache` is what continuous batching hands to its own attention, beside it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers.masking_utils import create_causal_mask

RENAMED = "cache" in inspect.signature(create_causal_mask).parameters
# What this release's own code hands on, and what it takes: the first of them counts.
CACHE = "cache" if RENAMED else "past_key_values"
_TAKEN = dict.fromkeys((CACHE, "past_key_values"))


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments, or None."""
    return next((given[name] for name in _TAKEN if name in given), None)


def without_cache(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments but for the cache."""
    return {name: value for name, value in given.items() if name not in _TAKEN}


def update(
    cache: Any, key: torch.Tensor | None, value: torch.Tensor | None, layer: int, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values of a layer's cache once these are added, as this release's attention asks for them.

    `kwargs`: what the attention was called with beside them; the cache of continuous batching reads them.
    """
    return cache.update(key, value, layer, **({"kwargs": kwargs} if RENAMED else {}))
