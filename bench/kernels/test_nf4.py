"""NF4 dequantisation of all seven linears of one sliding layer, back to back, beside bitsandbytes' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from kernel_inputs import nf4_weight, quantised
from kernel_timing import Subject

from fastgemma.kernels.nf4 import dequantize_nf4, dequantize_nf4_reference

# Hidden size, MLP width, widths of queries and of keys and values: E2B, its later layers without keys and values, E4B.
SHAPES = [(1536, 6144, 2048, 256), (1536, 12288, 2048, 0), (2560, 10240, 2048, 512)]


@pytest.mark.shapes(SHAPES, tiny=(64, 128, 64, 32))
@pytest.mark.parametrize("impl", ["fastgemma", "bitsandbytes"])
def test_dequantize_nf4(measure, shape, impl):
    hidden, inner, queries, keys = shape
    linears = [(queries, hidden), (hidden, queries), (inner, hidden), (inner, hidden), (hidden, inner)]
    linears += [(keys, hidden)] * (2 if keys else 0)

    def make() -> tuple[Any, Any]:
        dense = [torch.randn(linear, dtype=torch.bfloat16, device=measure.device) for linear in linears]
        theirs = quantised(lambda: [quantize_4bit(w, quant_type="nf4", compress_statistics=True) for w in dense])
        return [nf4_weight(*weight) for weight in theirs], theirs

    run = {
        "fastgemma": lambda ours, theirs: [dequantize_nf4(weight) for weight in ours],
        "bitsandbytes": lambda ours, theirs: [dequantize_4bit(*weight) for weight in theirs],
    }[impl]
    weights = sum(rows * columns for rows, columns in linears)
    measure(
        Subject(make, run),
        op="dequantize_nf4",
        impl=impl,
        shape=list(shape),
        direction="forward",
        reference=lambda ours, theirs: [dequantize_nf4_reference(weight) for weight in ours],
        # Codes, one byte of scale per block of 64, and what is written.
        num_bytes=weights // 2 + weights // 64 + 2 * weights,
        host=True,
    )
