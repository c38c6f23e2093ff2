"""What attention asks of its arguments, whichever kernel computes it."""

from __future__ import annotations

import torch

from fastgemma.kernels.backend import check_dtype
from fastgemma.kernels.key_intervals import KeyIntervals


def check_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, intervals: KeyIntervals, scale: float) -> None:
    """Raises what `attention` says."""
    if not scale > 0:
        raise ValueError(f"fastgemma: attention got a scale of {scale}; give one above 0.")
    dtype, shape, of_keys = q.dtype, q.shape, k.shape
    check_dtype("q", q)
    if not dtype == k.dtype == v.dtype:
        raise TypeError(f"fastgemma: attention got q in {dtype}, k in {k.dtype} and v in {v.dtype}; cast them.")
    if len(shape) != 4 or len(of_keys) != 4 or of_keys != v.shape or of_keys[:2] != shape[:2] or of_keys[3] != shape[3]:
        raise ValueError(
            f"fastgemma: attention got q {tuple(shape)}, k {tuple(of_keys)} and v {tuple(v.shape)}; give [batch, "
            "seq_len, heads, head_dim] that agree in all but the number of heads."
        )
    head_dim = shape[3]
    if head_dim < 16 or head_dim & (head_dim - 1) or shape[2] % max(of_keys[2], 1):
        raise ValueError(
            f"fastgemma: attention takes a head_dim that is a power of two from 16 on, and as query heads a multiple "
            f"of the {of_keys[2]} key/value heads; got {head_dim} and {shape[2]}."
        )
    if intervals.shape != shape[:2]:
        raise ValueError(f"fastgemma: key intervals of {tuple(intervals.shape)} do not fit q {tuple(shape)}.")
