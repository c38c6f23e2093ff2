"""`attention` through PyTorch's memory-efficient kernel, for GPUs on which Triton has no tensor cores.

The formulas are those of `attention`, over intervals that are causal and windowed within `runs`. Saved: q, k, v, the
output, and 4 bytes a row and head, where runs count as long as the longest of their launch. The kernel reads one
key/value head for each query head: they are repeated, by a stride of 0 where there is one, and the gradients of a
group, rounded to the inputs' dtype, are added up in float32.

Its backward spreads the keys over programs, which add to dq in float32 in the order in which they come: dq repeats to
the bit only under `torch.use_deterministic_algorithms(True)`, which takes a single program for a head, and its time.

Source: Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory" (2021); the CUTLASS kernel of xformers'
`memory_efficient_attention`, which torch ships as `aten::_efficient_attention_forward` and `_backward`. What its
arguments mean is in torch's sources, `native/transformers/cuda/attention.cu` and `mem_eff_attention/kernel_backward.h`:

    custom_mask_type 1    a key after the row, counted from the start of a run, is masked
    window_size w         a key with row - key >= w is masked
    cu_seqlens            where runs begin in a batch of one entry, and its length; both masks count within a run
    logsumexp             [entries or runs, heads, the longest's rows, rounded up to a multiple of 32]
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastgemma.kernels._once_differentiable import once_differentiable
from fastgemma.kernels.attention_checks import check_attention
from fastgemma.kernels.key_intervals import KeyIntervals, key_intervals
from fastgemma.kernels.workspace import workspace_bytes

_CAUSAL_FROM_TOP_LEFT = 1
# What torch says where it was built without the kernel, or without one for this dtype on this GPU.
_NOT_THERE = ("no kernel found to launch", "was not enabled for build")
# Bytes at a multiple of which the kernel wants tensors to begin.
_ALIGNMENT = 16


def _of_every_head(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    """[batch, seq_len, num_heads, head_dim] of keys or values; a view of a single head."""
    group = num_heads // x.shape[2]
    return x.unsqueeze(3).expand(-1, -1, -1, group, -1).flatten(2, 3)


def _of_their_heads(gradient: torch.Tensor, num_key_value_heads: int) -> torch.Tensor:
    """The gradients of a group added up; torch does so in float32, and rounds once."""
    group = gradient.shape[2] // num_key_value_heads
    return gradient if group == 1 else gradient.unflatten(2, (num_key_value_heads, group)).sum(3)


def _window(intervals: KeyIntervals, longest: int) -> int | None:
    return None if intervals.window is None or intervals.window >= longest else intervals.window


def _as_runs(intervals: KeyIntervals, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """The tensors, or [1, batch * seq_len, ...] of them where runs are not the entries of the batch."""
    assert intervals.runs is not None
    one_run = intervals.runs.bounds is None
    return [x if one_run else x.flatten(0, 1).unsqueeze(0) for x in tensors]


def efficient_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, intervals: KeyIntervals, scale: float
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output as q, and the logarithms of the sums as the backward takes them. Takes contiguous tensors."""
    if q.numel() == 0:
        return torch.empty_like(q), []
    rows = _as_runs(intervals, q, *(_of_every_head(x, q.shape[2]) for x in (k, v)))
    outs, lses = [], []
    for portion in _portions(intervals, workspace_bytes(q.device) // (4 * q.shape[2] * q.shape[3])):
        offsets, longest = portion.offsets, portion.longest
        out, lse, *_ = torch.ops.aten._efficient_attention_forward(
            *(portion.of(x) for x in rows),
            bias=None,
            cu_seqlens_q=offsets,
            cu_seqlens_k=offsets,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            dropout_p=0.0,
            custom_mask_type=_CAUSAL_FROM_TOP_LEFT,
            # Without it rows of a single key are taken for heads, whose numbers the window is then compared with.
            compute_log_sumexp=True,
            scale=scale,
            window_size=_window(intervals, longest),
        )
        outs.append(out)
        lses.append(lse)
    return _joined(outs).view(q.shape), lses


def efficient_bwd(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lses: Sequence[torch.Tensor],
    intervals: KeyIntervals,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk and dv of what `efficient_fwd` took and gave; all contiguous."""
    if q.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    keys, values = (_of_every_head(x, q.shape[2]) for x in (k, v))
    rows = _as_runs(intervals, dout, q, keys, values, out)
    # The forward's portions, whatever the budget is by now.
    portions = _portions(intervals, [len(lse) for lse in lses])
    pieces = []
    for portion, lse in zip(portions, lses):
        window = _window(intervals, portion.longest)
        pieces.append(_bwd([portion.of(x) for x in rows], lse, portion.offsets, portion.longest, window, scale))
    dq, dk, dv = (_joined(parts) for parts in zip(*pieces))
    dk, dv = (_of_their_heads(x.view(q.shape), k.shape[2]) for x in (dk, dv))
    return dq.view(q.shape), dk, dv


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


class _Portion(NamedTuple):
    """What one launch takes of rows [1, batch * seq_len, ...] in runs; all of rows that are runs by themselves."""

    rows: slice
    offsets: torch.Tensor | None
    longest: int

    def of(self, x: torch.Tensor) -> torch.Tensor:
        return x if self.offsets is None else x[:, self.rows]


def _portions(intervals: KeyIntervals, limit: int | Sequence[int]) -> list[_Portion]:
    """Consecutive runs for one launch each: as many as `limit` says of each, or as fit so many rows.

    The kernels hold the logarithms, and dq in float32, for as many rows of every run as the longest has: a long run
    among short ones would take many times the memory of all rows.
    """
    runs = intervals.runs
    assert runs is not None
    if runs.bounds is None or runs.offsets is None:
        return [_Portion(slice(None), None, intervals.shape[1])]
    bounds, offsets = runs.bounds, runs.offsets
    counts = _counts(bounds, limit) if isinstance(limit, int) else limit
    portions, first = [], 0
    for count in counts:
        end = first + count
        longest = max(b - a for a, b in zip(bounds[first:end], bounds[first + 1 : end + 1]))
        rows = slice(bounds[first], bounds[end])
        portions.append(_Portion(rows, offsets[first : end + 1] - bounds[first], longest))
        first = end
    return portions


def _counts(bounds: tuple[int, ...], most_rows: int) -> list[int]:
    """How many consecutive runs go together where each counts as the longest of them."""
    counts, count, longest = [], 0, 0
    for start, stop in zip(bounds, bounds[1:]):
        length = stop - start
        if count and max(longest, length) * (count + 1) > most_rows:
            counts.append(count)
            count, longest = 0, 0
        count, longest = count + 1, max(longest, length)
    return [*counts, count]


def _bwd(
    rows: list[torch.Tensor],
    lse: torch.Tensor,
    offsets: torch.Tensor | None,
    longest: int,
    window: int | None,
    scale: float,
) -> tuple[torch.Tensor, ...]:
    """dq, and dk and dv for every query head, of dout, q, k, v and out."""
    dout, q, k, v, out = rows
    no_dropout = torch.empty((), dtype=torch.int64, device=q.device)  # its seed and offset, which nothing reads
    dq, dk, dv, _ = torch.ops.aten._efficient_attention_backward(
        dout,
        q,
        k,
        v,
        bias=None,
        out=out,
        cu_seqlens_q=offsets,
        cu_seqlens_k=offsets,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        logsumexp=lse,
        dropout_p=0.0,
        philox_seed=no_dropout,
        philox_offset=no_dropout,
        custom_mask_type=_CAUSAL_FROM_TOP_LEFT,
        bias_requires_grad=False,
        scale=scale,
        window_size=window,
    )
    return dq, dk, dv


class _EfficientAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, intervals, scale):
        rows = [_aligned(x) for x in (q, k, v)]
        out, lses = efficient_fwd(*rows, intervals, scale)
        ctx.intervals, ctx.scale = intervals, scale
        ctx.save_for_backward(*rows, out, *lses)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, out, *lses = ctx.saved_tensors
        gradients = efficient_bwd(_aligned(dout), q, k, v, out, lses, ctx.intervals, ctx.scale)
        return *(x if need else None for x, need in zip(gradients, ctx.needs_input_grad)), None, None


def _aligned(x: torch.Tensor) -> torch.Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % _ALIGNMENT == 0 else x.clone()


def efficient_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, intervals: KeyIntervals, scale: float = 1.0
) -> torch.Tensor:
    """As `attention`, of CUDA tensors; bfloat16 from Ampere on.

    Raises:
        ValueError: also where the intervals' `runs` are not known. TypeError: as `attention`.
    """
    check_attention(q, k, v, intervals, scale)
    if intervals.runs is None:
        raise ValueError(
            "fastgemma: PyTorch's memory-efficient kernel takes causal and windowed rows only, and documents that were "
            "on the host."
        )
    return _EfficientAttention.apply(q, k, v, intervals, scale)


@functools.cache
def efficient_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel does not run in this dtype on this device, or None. Runs it once: builds of torch differ."""
    x = torch.zeros(1, 1, 1, 512, dtype=dtype, device=device)  # of its variants, that of all heads wider than 128
    intervals = key_intervals(1, 1, device)
    try:
        with torch.no_grad():
            out, lses = efficient_fwd(x, x, x, intervals, 1.0)
            efficient_bwd(out, x, x, x, out, lses, intervals, 1.0)
    except RuntimeError as error:
        if not any(sign in str(error) for sign in _NOT_THERE):
            raise
        return f"this PyTorch has no memory-efficient kernel for {dtype} on this GPU"
    return None
