"""Every test of whole models begins and ends with stock code."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import fastgemma


@pytest.fixture(autouse=True)
def unpatched() -> Iterator[None]:
    fastgemma.unpatch()
    yield
    fastgemma.unpatch()
