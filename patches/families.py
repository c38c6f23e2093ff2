"""Which models are Gemma 4."""

from __future__ import annotations

from typing import Any

# Class prefix -> module that defines the family.
FAMILIES = {
    "Gemma4": "transformers.models.gemma4.modeling_gemma4",
    "Gemma4Unified": "transformers.models.gemma4_unified.modeling_gemma4_unified",
}


def is_gemma4(model: Any) -> bool:
    """Whether a model is of a Gemma 4 family, judged by the modules that define its classes."""
    return any(base.__module__ in FAMILIES.values() for base in type(model).__mro__)
