"""Attention over key intervals beside SDPA, with the masks that the model would make for it, flex_attention, and
PyTorch's memory-efficient kernel told of the window ("efficient"), as xformers calls it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_inputs import activation
from kernel_timing import Subject
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from fastgemma.kernels.attention import attention
from fastgemma.kernels.attention_efficient import efficient_attention
from fastgemma.kernels.key_intervals import key_intervals

# Tokens, query heads, key/value heads, head_dim, window (0: none): global and sliding layers of E2B and of E4B.
SHAPES = [
    (tokens, 8, kv_heads, head_dim, window)
    for tokens in (2048, 8192)
    for kv_heads in (1, 2)
    for head_dim, window in ((512, 0), (256, 512))
]


def _expanded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    group = q.shape[2] // k.shape[2]
    return tuple(x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))


@pytest.mark.shapes(SHAPES, tiny=(48, 4, 2, 16, 20))
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("impl", ["fastgemma", "hf", "compile", "efficient"])
def test_attention(measure: Any, shape: tuple[int, ...], impl: str, direction: str) -> None:
    tokens, heads, kv_heads, head_dim, window = shape
    device = measure.device
    intervals = key_intervals(1, tokens, device, window or None)
    mask = intervals.dense()[:, None] if window else None

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(
            *_expanded(q, k, v), attn_mask=mask, is_causal=mask is None, scale=head_dim**-0.5
        )
        return out.transpose(1, 2)

    run: Callable[..., torch.Tensor]
    if impl == "fastgemma":
        run = lambda q, k, v: attention(q, k, v, intervals, head_dim**-0.5)  # noqa: E731
    elif impl == "hf":
        run = sdpa
    elif impl == "efficient":
        if measure.tiny:
            pytest.skip("the kernel runs on a GPU only")
        run = lambda q, k, v: efficient_attention(q, k, v, intervals, head_dim**-0.5)  # noqa: E731
    else:
        if measure.tiny or head_dim > 256:
            pytest.skip("flex_attention compiles for a GPU, and not for heads of 512")

        def keep(b: Any, h: Any, row: Any, key: Any) -> Any:
            return (key <= row) & (row - key < (window or tokens))

        blocks = create_block_mask(keep, None, None, tokens, tokens, device=device)
        compiled = torch.compile(flex_attention)

        def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            return compiled(q, k, v, block_mask=blocks, enable_gqa=True, scale=head_dim**-0.5).transpose(1, 2)

    def make() -> list[torch.Tensor]:
        inputs = [activation(1, tokens, count, head_dim, device=device) for count in (heads, kv_heads, kv_heads)]
        # Triton's interpreter multiplies bfloat16 wrongly.
        return [x.detach().half().requires_grad_() for x in inputs] if measure.tiny else inputs

    pairs = int((intervals.hi - intervals.lo).sum())
    try:
        measure(
            Subject(make, run),
            op="attention",
            impl=impl,
            shape=list(shape),
            direction=direction,
            reference=sdpa,
            flops=(4 if direction == "forward" else 10) * pairs * heads * head_dim,
            host=tokens <= 2048,
        )
    except RuntimeError as error:
        if impl != "compile":
            raise
        pytest.skip(f"flex_attention does not compile: {str(error).splitlines()[0]}")
