"""On a machine without Triton the package imports, patches, counts why nothing runs, and computes references."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
sys.modules["triton"] = None  # what an `import triton` meets where it is not installed
import torch
import fastgemma
from fastgemma.kernels.geglu import geglu
from fastgemma.kernels.qk_norm_rope import qk_norm_rope
from fastgemma.kernels.rms_norm import rms_norm
from fastgemma.kernels.linear_cross_entropy import linear_cross_entropy
from fastgemma.kernels.lora import Adapter, Projection
from fastgemma.kernels.lora_mlp import lora_mlp
x = torch.randn(4, 16, requires_grad=True)
projection = Projection(torch.randn(16, 16), Adapter(torch.randn(2, 16), torch.randn(16, 2), 1.0))
head = torch.randn(32, 16)
loss = linear_cross_entropy(rms_norm(geglu(x, x), None), head, torch.arange(4)) + lora_mlp(x, *[projection] * 3).sum()
loss.backward()
assert x.grad.isfinite().all()
import structures
model = structures.build("31b").train()
stock = model(**structures.batch("padding")).loss
report = fastgemma.patch()
assert report["rms_norm"].state == "active"
assert torch.equal(model(**structures.batch("padding")).loss, stock)
assert sum(fastgemma.status()["rms_norm"].fallbacks.values()) > 0
assert fastgemma.status()["rms_norm"].fast_calls == 0
"""


@pytest.mark.slow
def test_without_triton():
    tests = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=tests)
    assert done.returncode == 0, done.stderr[-2000:]
