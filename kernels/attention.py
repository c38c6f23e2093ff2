"""Attention for Gemma 4: heads of 256 under a sliding window and of 512 over everything, grouped, masked by intervals.

    s = scale * q k^T      p = softmax over the keys lo <= j < hi      out = p v

The formulas of the backward are in `attention_backward`. Saved: q, k, v, the output, and 4 bytes a row and head. FLOPs
of the useful work, for P pairs of a row and a key that it attends to: forward 4 P head_dim a head, backward 10.
Where `launch.EFFICIENT_ATTENTION` says so, intervals that are `runs` go to the kernel of `attention_efficient`, others
to the reference.

Source: Dao, "FlashAttention-2" (2023); `Gemma4TextAttention` in transformers.
"""

from __future__ import annotations

import functools

import torch

from fastgemma.kernels._once_differentiable import once_differentiable
from fastgemma.kernels.attention_backward import Sums, attention_bwd
from fastgemma.kernels.attention_checks import check_attention
from fastgemma.kernels.attention_efficient import efficient_attention, efficient_problem
from fastgemma.kernels.attention_forward import attention_fwd
from fastgemma.kernels.backend import compiling_ahead, runs_kernel
from fastgemma.kernels.key_intervals import KeyIntervals, key_intervals
from fastgemma.kernels.launch import why_efficient_attention


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, intervals, scale):
        rows = q.contiguous(), k.contiguous(), v.contiguous()
        out, lse = attention_fwd(*rows, intervals, scale)
        ctx.intervals, ctx.scale = intervals, scale
        ctx.save_for_backward(*rows, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dq, dk, dv = attention_bwd(
            dout.contiguous(), q, k, v, out, lse, ctx.intervals, ctx.scale, (needs[0], needs[1] or needs[2])
        )
        return dq, dk if needs[1] else None, dv if needs[2] else None, None, None


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, intervals: KeyIntervals, scale: float = 1.0
) -> torch.Tensor:
    """Softmax attention of each row over its interval of keys; a row without keys gives zeros, and no gradient.

    Args:
        q: [batch, seq_len, num_heads, head_dim], float32, bfloat16 or float16; head_dim a power of two from 16 on.
        k, v: [batch, seq_len, num_key_value_heads, head_dim], in q's dtype; num_heads is a multiple of theirs.
        intervals: of [batch, seq_len] rows, on q's device.
        scale: of the scores, above 0; Gemma 4 uses 1.

    Returns:
        [batch, seq_len, num_heads, head_dim], contiguous, in q's dtype.

    Raises:
        TypeError: unsupported or unequal dtypes. ValueError: shapes that do not fit, tensors on different devices, or a
            scale that is not above 0.
    """
    check_attention(q, k, v, intervals, scale)
    if not runs_kernel(q, k, v, intervals.lo):
        return attention_reference(q, k, v, intervals, scale)
    if why_efficient_attention(q.device) is not None:
        if intervals.runs is None:
            return attention_reference(q, k, v, intervals, scale)
        return efficient_attention(q, k, v, intervals, scale)
    return _Attention.apply(q, k, v, intervals, scale)


@functools.cache
def attention_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why attention in this dtype cannot run on this CUDA device, through our kernels or PyTorch's, or None."""
    major, _ = torch.cuda.get_device_capability(device)
    if why_efficient_attention(device) is not None:
        if dtype == torch.bfloat16 and major < 8:
            return "bfloat16 on a GPU before Ampere"
        return efficient_problem(device, dtype)
    if major < 7:
        return "a GPU before Volta"
    return None if dtype in (torch.bfloat16, torch.float16) else str(dtype)


@functools.cache
def compile_attention_ahead(
    dtype: torch.dtype,
    device: torch.device,
    num_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    sums: Sums | None,
) -> None:
    """Has other threads compile what `attention` of such tensors will launch, once for each kind.

    With nothing in Triton's cache its kernels take half of a first step's time to compile, one after the other.
    `sums` is what `attention_backward.sums_of` says of them, None where no gradient is wanted.
    """
    shape = (1, 16, num_heads, head_dim)
    q, k, v = (
        torch.empty((*shape[:2], heads, head_dim), dtype=dtype, device=device)
        for heads in (num_heads, num_key_value_heads, num_key_value_heads)
    )
    intervals = key_intervals(1, shape[1], device)
    with compiling_ahead():
        out, lse = attention_fwd(q, k, v, intervals, 1.0)
        if sums is not None:
            attention_bwd(out, q, k, v, out, lse, intervals, 1.0, (True, True), sums)


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, intervals: KeyIntervals, scale: float = 1.0
) -> torch.Tensor:
    """`attention` in plain torch; float64 inputs stay float64, everything else is computed in float32."""
    high = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[2] // max(k.shape[2], 1)
    # [batch, heads, seq_len, head_dim]
    queries, keys, values = (x.to(high).transpose(1, 2) for x in (q, k, v))
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    mask = intervals.dense()[:, None]
    scores = (scale * queries @ keys.transpose(2, 3)).masked_fill(~mask, float("-inf"))
    # A row without keys is softmax over nothing: its scores are all -inf, and become all 0 instead of NaN.
    some = mask.any(-1, keepdim=True)
    probabilities = torch.softmax(torch.where(some, scores, 0.0), dim=-1) * mask
    return (probabilities @ values).transpose(1, 2).contiguous().to(q.dtype)
