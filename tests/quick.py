"""What `make test-fast` runs of a parametrised test."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def slow_after(count: int, values: Iterable[Any]) -> list[Any]:
    """Values of one parameter, of which all after the first `count` are left out of the quick tests."""
    first, rest = list(values)[:count], list(values)[count:]
    return [*first, *(pytest.param(value, marks=pytest.mark.slow) for value in rest)]


def slow_rows_after(count: int, rows: Iterable[tuple[Any, ...]]) -> list[Any]:
    """The same of rows of several parameters, of which some may have marks already."""
    first, rest = list(rows)[:count], list(rows)[count:]
    return [*first, *(_slow(row) for row in rest)]


def _slow(row: Any) -> Any:
    marks = getattr(row, "marks", ())
    return pytest.param(*getattr(row, "values", row), marks=(*marks, pytest.mark.slow))
