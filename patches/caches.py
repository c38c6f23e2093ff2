"""What transformers call a key/value cache: `cache` from 5.24 on, which take the old name too, and before it
`past_key_values`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers.masking_utils import create_causal_mask

_NAMES = ("cache", "past_key_values")
# What this release's own code hands on.
CACHE = next(name for name in _NAMES if name in inspect.signature(create_causal_mask).parameters)


def cache_of(given: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments, by either name; or None."""
    return next((given[name] for name in _NAMES if given.get(name) is not None), None)


def without_cache(given: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments but for a cache."""
    return {name: value for name, value in given.items() if name not in _NAMES}


def update(
    cache: Any, key: torch.Tensor | None, value: torch.Tensor | None, layer: int, kwargs: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values of a layer's cache once these are added, as this release's attention asks for them.

    `kwargs`: what the attention was called with beside them; the cache of continuous batching reads them.
    """
    return cache.update(key, value, layer, **({"kwargs": kwargs} if CACHE == "cache" else {}))
