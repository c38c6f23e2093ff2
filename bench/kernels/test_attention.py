"""Attention over key intervals beside SDPA, with the masks that the model would make for it, flex_attention, and
PyTorch's memory-efficient kernel told of the window ("efficient"), as xformers calls it."""

from __future__ import annotations

import functools
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
# Of `test_attention_of_layers`.
LAYERS = 10


def _expanded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    group = q.shape[2] // k.shape[2]
    return tuple(x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    out = torch.nn.functional.scaled_dot_product_attention(
        *_expanded(q, k, v), attn_mask=mask, is_causal=mask is None, scale=q.shape[3] ** -0.5
    )
    return out.transpose(1, 2)


def _inputs(measure: Any, shape: tuple[int, ...]) -> list[torch.Tensor]:
    tokens, heads, kv_heads, head_dim, _ = shape
    inputs = [activation(1, tokens, count, head_dim, device=measure.device) for count in (heads, kv_heads, kv_heads)]
    # Triton's interpreter multiplies bfloat16 wrongly.
    return [x.detach().half().requires_grad_() for x in inputs] if measure.tiny else inputs


@pytest.mark.shapes(SHAPES, tiny=(48, 4, 2, 16, 20))
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("impl", ["fastgemma", "hf", "compile", "efficient"])
def test_attention(measure: Any, shape: tuple[int, ...], impl: str, direction: str) -> None:
    tokens, heads, kv_heads, head_dim, window = shape
    device = measure.device
    intervals = key_intervals(1, tokens, device, window or None)
    mask = intervals.dense()[:, None] if window else None

    sdpa = functools.partial(_sdpa, mask=mask)
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

    pairs = int((intervals.hi - intervals.lo).sum())
    try:
        measure(
            Subject(lambda: _inputs(measure, shape), run),
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


@pytest.mark.shapes([shape for shape in SHAPES if shape[0] == 2048], tiny=(48, 4, 2, 16, 20))
@pytest.mark.parametrize("impl", ["fastgemma", "hf"])
def test_attention_of_layers(measure: Any, shape: tuple[int, ...], impl: str) -> None:
    """`LAYERS` of them, each with inputs of its own, differentiated at once: a tenth of the host's time is what a step
    pays for a layer, without autograd's start. The GPU's time beside it is that of a CUDA graph's replay."""
    tokens, heads, kv_heads, head_dim, window = shape
    intervals = key_intervals(1, tokens, measure.device, window or None)
    mask = intervals.dense()[:, None] if window else None

    def of_each(one: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, ...]]:
        return lambda *inputs: tuple(one(*inputs[i : i + 3]) for i in range(0, len(inputs), 3))

    sdpa = of_each(functools.partial(_sdpa, mask=mask))
    ours = of_each(lambda q, k, v: attention(q, k, v, intervals, head_dim**-0.5))

    def make() -> list[torch.Tensor]:
        return [x for _ in range(LAYERS) for x in _inputs(measure, shape)]

    measure(
        Subject(make, ours if impl == "fastgemma" else sdpa),
        op="attention of ten layers",
        impl=impl,
        shape=list(shape),
        direction="forward+backward",
        reference=sdpa,
        flops=14 * int((intervals.hi - intervals.lo).sum()) * heads * head_dim * LAYERS,
    )
