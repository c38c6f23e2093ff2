"""NF4 dequantisation of all seven linears of one sliding layer, back to back, beside bitsandbytes' own.

In as many launches as the layer takes: what reads the same rows, as q, k and v do, is one stack.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from kernel_inputs import nf4_weight, quantised
from kernel_timing import Subject

from fastgemma.kernels.nf4 import NF4Weight, dequantize_nf4_reference, dequantize_nf4_stack

# Hidden size, MLP width, widths of queries and of keys and values: E2B, its later layers without keys and values, E4B.
SHAPES = [(1536, 6144, 2048, 256), (1536, 12288, 2048, 0), (2560, 10240, 2048, 512)]


@pytest.mark.shapes(SHAPES, tiny=(64, 128, 64, 32))
@pytest.mark.parametrize("impl", ["fastgemma", "bitsandbytes"])
def test_dequantize_nf4(measure, shape, impl):
    hidden, inner, queries, keys = shape
    attention = [(queries, hidden), *[(keys, hidden)] * (2 if keys else 0)]
    stacks = [attention, [(hidden, queries)], [(inner, hidden)] * 2, [(hidden, inner)]]
    weights = [sum(rows * columns for rows, columns in stack) for stack in stacks]

    def make() -> tuple[Any]:
        def quantise(linear: tuple[int, int]) -> Any:
            dense = torch.randn(linear, dtype=torch.bfloat16, device=measure.device)
            return quantised(lambda: quantize_4bit(dense, quant_type="nf4", compress_statistics=True))

        theirs = [[quantise(linear) for linear in stack] for stack in stacks]
        if impl == "bitsandbytes":
            return ([weight for stack in theirs for weight in stack],)
        return ([[nf4_weight(*weight) for weight in stack] for stack in theirs],)

    def ours(stacks: list[list[NF4Weight]]) -> list[torch.Tensor]:
        return [dequantize_nf4_stack(stack, torch.bfloat16) for stack in stacks]

    def theirs(weights: list[Any]) -> list[torch.Tensor]:
        return [dequantize_4bit(*weight) for weight in weights]

    def reference(given: Any) -> list[torch.Tensor]:
        if impl == "bitsandbytes":
            return [dequantize_nf4_reference(nf4_weight(*weight)) for weight in given]
        return [torch.cat([dequantize_nf4_reference(weight) for weight in stack]) for stack in given]

    measure(
        Subject(make, ours if impl == "fastgemma" else theirs),
        op="dequantize_nf4",
        impl=impl,
        shape=list(shape),
        direction="forward",
        reference=reference,
        # Codes, one byte of scale per block of 64, and what is written.
        num_bytes=[count // 2 + count // 64 + 2 * count for count in weights],
        host=True,
    )
