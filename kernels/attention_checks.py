"""What attention asks of its arguments, whichever kernel computes it."""

from __future__ import annotations

import torch

from fastgemma.kernels.backend import check_dtype
from fastgemma.kernels.key_intervals import KeyIntervals


def check_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, intervals: KeyIntervals, scale: float) -> None:
    """Raises what `attention` says."""
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
