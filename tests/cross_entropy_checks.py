"""What the tests of the linear cross-entropy share: inputs, and comparisons with float64."""

from __future__ import annotations

import math

import torch
from kernel_checks import FLOAT32_BUDGET, relative_error

from fastgemma.kernels.logits import TokenStatistics

ALL = TokenStatistics._fields
NAMES = ("hidden", "weight", "bias")


def make(n, h, v, device, dtype=torch.float32, bias=True, spread=3.0, frozen=False, ignored=0.0):
    """Logits of standard deviation `spread`; returns ((hidden, weight, bias), labels)."""
    hidden = torch.randn(n, h, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(v, h, device=device) * spread / math.sqrt(h)).to(dtype).requires_grad_(not frozen)
    b = torch.randn(v, device=device).to(dtype).requires_grad_(not frozen) if bias else None
    labels = torch.randint(0, v, (n,), device=device)
    labels[torch.rand(n, device=device) < ignored] = -100
    return (hidden, weight, b), labels


def wanted(tensors):
    return [t for t in tensors if t is not None and t.requires_grad]


def assert_close(actual, truth, name, tolerance=FLOAT32_BUDGET):
    assert actual.shape == truth.shape, name
    assert torch.isfinite(actual).all(), name
    assert relative_error(actual, truth) <= tolerance, (name, relative_error(actual, truth))
    assert (actual[truth == 0] == 0).all(), f"{name}: an exact zero was lost"


def grads(value, tensors, **kwargs):
    return torch.autograd.grad(value, wanted(tensors), **kwargs)
