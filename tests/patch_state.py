"""What is patched at the moment, by what stands in the libraries and by what `status()` says."""

from __future__ import annotations

import importlib
from typing import Any

import fastgemma
from fastgemma.patches.table import ROWS


def attributes() -> dict[str, Any]:
    """What stands at every place of the table, inherited or not."""
    found = {}
    for row in ROWS:
        owner: Any = importlib.import_module(row.module)
        *path, name = row.attribute.split(".")
        for part in path:
            owner = getattr(owner, part)
        found[f"{row.module}:{row.attribute}"] = vars(owner).get(name)
    return found


def states() -> dict[str, tuple[str, str | None]]:
    return {name: (feature.state, feature.reason) for name, feature in fastgemma.status().items()}


def counts() -> dict[str, tuple[int, dict[str, int]]]:
    """By feature: fast calls, and how often which fallback."""
    return {name: (feature.fast_calls, dict(feature.fallbacks)) for name, feature in fastgemma.status().items()}
