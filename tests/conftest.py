"""Kernels run on the GPU where there is one, else in Triton's interpreter; freshly allocated memory is poisoned."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when a kernel is defined, so before fastgemma is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import quick_interpreter  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    quick_interpreter.install()


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seed_and_poison():
    """Seeds torch, and makes `torch.empty` return NaN, so that an output element nobody wrote cannot pass."""
    torch.manual_seed(0)
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
