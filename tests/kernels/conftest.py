"""Kernels in the interpreter stay within their tensors; small blocks for the linear cross-entropy's tests."""

from __future__ import annotations

import memory_bounds
import pytest

import fastgemma.kernels.chunked_head as chunked_head
import fastgemma.kernels.launch as launch_module
from fastgemma.kernels.backend import interpreting
from fastgemma.kernels.launch import Launch


@pytest.fixture(autouse=True)
def within_tensors(monkeypatch):
    if interpreting():
        memory_bounds.check(monkeypatch)


@pytest.fixture
def small_blocks(monkeypatch):
    """256 columns and 4 rows at a time, so that small shapes take several blocks and chunks, the last ones partial."""
    monkeypatch.setattr(chunked_head, "MIN_CHUNK_ROWS", 4)
    for kernel in ("linear_cross_entropy", "softcapped_logits"):
        for arch in ("any", "interpreter"):
            monkeypatch.setitem(launch_module.TABLE, (kernel, "any", arch), Launch({"BLOCK_V": 256}, num_warps=4))
    launch_module.launch.cache_clear()
    yield
    launch_module.launch.cache_clear()
