"""Attention for Gemma 4: heads of 256 under a sliding window and of 512 over everything, grouped, masked by intervals.

    s = scale * q k^T      p = softmax over the keys lo <= j < hi      out = p v

The formulas of the backward are in `attention_backward`. Saved: q, k, v, the output, and 4 bytes a row and head. FLOPs
of the useful work, for P pairs of a row and a key that it attends to: forward 4 P head_dim a head, backward 10.

Source: Dao, "FlashAttention-2" (2023); `Gemma4TextAttention` in transformers.
"""

from __future__ import annotations

import functools

import torch

from fastgemma.kernels._once_differentiable import once_differentiable
from fastgemma.kernels.attention_backward import attention_bwd
from fastgemma.kernels.attention_forward import attention_fwd
from fastgemma.kernels.backend import check_dtype, compiling_ahead, runs_kernel, triton
from fastgemma.kernels.key_intervals import KeyIntervals, key_intervals


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
    if not scale > 0:
        raise ValueError(f"fastgemma: attention got a scale of {scale}; give one above 0.")
    check_dtype("q", q)
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"fastgemma: attention got q in {q.dtype}, k in {k.dtype} and v in {v.dtype}; cast them.")
    if q.dim() != 4 or k.dim() != 4 or k.shape != v.shape or (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]):
        raise ValueError(
            f"fastgemma: attention got q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}; give [batch, "
            "seq_len, heads, head_dim] that agree in all but the number of heads."
        )
    head_dim = q.shape[3]
    if head_dim < 16 or head_dim & (head_dim - 1) or q.shape[2] % max(k.shape[2], 1):
        raise ValueError(
            f"fastgemma: attention takes a head_dim that is a power of two from 16 on, and as query heads a multiple "
            f"of the {k.shape[2]} key/value heads; got {head_dim} and {q.shape[2]}."
        )
    if intervals.shape != q.shape[:2]:
        raise ValueError(f"fastgemma: key intervals of {tuple(intervals.shape)} do not fit q {tuple(q.shape)}.")
    if not runs_kernel(q, k, v, intervals.lo):
        return attention_reference(q, k, v, intervals, scale)
    return _Attention.apply(q, k, v, intervals, scale)


@functools.cache
def attention_problem(device: torch.device) -> str | None:
    """Why the kernels cannot run on this CUDA device, or None."""
    major, _ = torch.cuda.get_device_capability(device)
    if major < 8:
        return "a GPU before Ampere: Triton has no tensor cores there"
    version = triton.__version__.split(".")
    if major == 10 and version[:2] in (["3", "6"], ["3", "7"]):
        return f"Triton {triton.__version__} cannot compile attention for B200; 3.8 can"
    return None


@functools.cache
def compile_attention_ahead(
    dtype: torch.dtype, device: torch.device, num_heads: int, num_key_value_heads: int, head_dim: int, backward: bool
) -> None:
    """Has other threads compile what `attention` of such tensors will launch, once for each kind.

    With nothing in Triton's cache its kernels take half of a first step's time to compile, one after the other.
    """
    # Enough rows for gradients that meet in float32, as those of most lengths do.
    shape = (1, 512, num_heads, head_dim)
    q, k, v = (
        torch.empty((*shape[:2], heads, head_dim), dtype=dtype, device=device)
        for heads in (num_heads, num_key_value_heads, num_key_value_heads)
    )
    intervals = key_intervals(1, 512, device)
    with compiling_ahead():
        out, lse = attention_fwd(q, k, v, intervals, 1.0)
        if backward:
            attention_bwd(out, q, k, v, out, lse, intervals, 1.0, (True, True))


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
