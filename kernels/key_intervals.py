"""Attention masks as one interval of keys for every query row.

Row i of a batch entry attends to the keys lo[i] <= j < hi[i]. Causal attention, a sliding window, padding on either
side, documents packed into one row and blocks that attend within themselves in both directions are all of this form,
in 8 bytes a row instead of a [seq_len, seq_len] matrix:

    hi = i + 1, or the end of i's block      lo = max(start of i's document, i - window + 1)

both cut to the keys that are no padding. A row without keys has lo >= hi.

Source: `transformers.masking_utils`; FlashMask (Wang et al., 2024) describes masks by columns in the same spirit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

# Rows whose bounds are taken together where exact ones would cost memory in the square of the sequence.
ROWS_TOGETHER = 64


class Reach(NamedTuple):
    """What is known of intervals without reading them, and bounds the work on the host."""

    seq_len: int
    causal: bool
    window: int | None

    def tiles_of_rows(self, start: int, stop: int, block: int) -> tuple[int, int]:
        """The tiles of `block` keys [first, end) that rows from `start` to `stop` can attend to."""
        first = 0 if self.window is None else max(start - self.window + 1, 0) // block
        return first, -(-(stop if self.causal else self.seq_len) // block)


@dataclass(frozen=True)
class Runs:
    """Rows, numbered through the batch, in runs: a row attends to its run up to itself, as far back as the window goes.

    Both are None where every entry of the batch is one run; else where runs begin, and the number of rows.
    """

    bounds: tuple[int, ...] | None = None
    offsets: torch.Tensor | None = None  # the bounds, int32, on the intervals' device


@dataclass(frozen=True)
class KeyIntervals:
    """`lo` and `hi` are [batch, seq_len] int32, contiguous.

    Of every row `causal` says that hi <= i + 1, and `window` that i - lo < window. `runs` says that they are nothing
    else than causal and windowed, by runs.
    """

    lo: torch.Tensor
    hi: torch.Tensor
    causal: bool = True
    window: int | None = None
    runs: Runs | None = None
    _rows_of_keys: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for name, bound in (("lo", self.lo), ("hi", self.hi)):
            if bound.dtype != torch.int32 or bound.dim() != 2 or not bound.is_contiguous():
                raise ValueError(
                    f"fastgemma: {name} of key intervals must be contiguous int32 [batch, seq_len], got {bound.dtype} "
                    f"{tuple(bound.shape)}."
                )
        if self.lo.shape != self.hi.shape or self.lo.device != self.hi.device:
            raise ValueError("fastgemma: lo and hi of key intervals differ in shape or device.")

    @classmethod
    def from_tensors(
        cls,
        tensors: Sequence[torch.Tensor],
        causal: bool,
        window: int | None,
        blocks: Sequence[int],
        one_run: bool = False,
    ) -> KeyIntervals:
        """The same intervals as those whose `tensors(blocks)` these are, or were copied from.

        `one_run`: that every entry of the batch is one run; other `runs` are not kept.
        """
        lo, hi, *bounds = tensors
        runs = Runs() if one_run else None
        return cls(lo, hi, causal, window, runs, dict(zip(blocks, zip(bounds[::2], bounds[1::2]))))

    def tensors(self, blocks: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """All that kernels read: lo, hi, and `rows_of_keys` of these sizes of blocks."""
        return self.lo, self.hi, *(bound for block in blocks for bound in self.rows_of_keys(block))

    def to(self, device: torch.device) -> KeyIntervals:
        """Itself where it is on that device."""
        if device == self.lo.device:
            return self
        runs = self.runs
        if runs is not None and runs.offsets is not None:
            runs = Runs(runs.bounds, runs.offsets.to(device))
        return KeyIntervals(self.lo.to(device), self.hi.to(device), self.causal, self.window, runs)

    @property
    def shape(self) -> torch.Size:
        return self.lo.shape

    @functools.cached_property
    def reach(self) -> Reach:
        return Reach(self.lo.shape[1], self.causal, self.window)

    def dense(self) -> torch.Tensor:
        """The mask that this stands for: bool [batch, seq_len, seq_len], True where a row attends to a key."""
        keys = torch.arange(self.lo.shape[1], device=self.lo.device)
        return (keys >= self.lo[..., None]) & (keys < self.hi[..., None])

    def rows_of_keys(self, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """For every block of keys the rows [first, end) that may attend to it: two [batch, blocks] int32.

        No row outside attends to a key of the block; rows inside need not either. Computed once for all layers.
        """
        found = self._rows_of_keys.get(block)
        if found is None:
            seq_len = self.lo.shape[1]
            some = self.hi > self.lo
            lo = _by_blocks(torch.where(some, self.lo, seq_len), seq_len).amin(-1)
            hi = _by_blocks(torch.where(some, self.hi, 0), 0).amax(-1)
            starts = torch.arange(0, seq_len, block, device=self.lo.device, dtype=torch.int32)[:, None]
            touched = (lo[:, None] < starts + block) & (hi[:, None] > starts)
            rows = torch.arange(0, max(seq_len, 1), ROWS_TOGETHER, device=self.lo.device, dtype=torch.int32)
            first = torch.where(touched, rows, seq_len).amin(-1)
            end = torch.where(touched, rows + ROWS_TOGETHER, 0).amax(-1).clamp(max=seq_len)
            found = self._rows_of_keys[block] = (first.to(torch.int32), end.to(torch.int32))
        return found


def _by_blocks(bounds: torch.Tensor, filling: int) -> torch.Tensor:
    """[batch, seq_len] as [batch, blocks, ROWS_TOGETHER]."""
    missing = max(-bounds.shape[1] % ROWS_TOGETHER, ROWS_TOGETHER - bounds.shape[1])  # one block at least
    return torch.nn.functional.pad(bounds, (0, missing), value=filling).unflatten(1, (-1, ROWS_TOGETHER))


def key_intervals(
    batch: int,
    seq_len: int,
    device: torch.device,
    window: int | None = None,
    padding_mask: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    blocks: torch.Tensor | None = None,
    blocks_in_window: bool = True,
) -> KeyIntervals:
    """Causal intervals, narrowed and widened as asked.

    Args:
        window: a row attends to itself and the window - 1 keys before it.
        padding_mask: [batch, seq_len], 0 at padding, which must lie at the ends of a row: keys between its first and
            its last token count as tokens.
        documents: [batch, seq_len] int, a new value where another document starts; attention stays within documents.
            Their `runs` are known where this lies on the host.
        blocks: [batch, seq_len] int, -1 or the number of a block of consecutive tokens that attend to each other in
            both directions.
        blocks_in_window: whether the window bounds how far the tokens of a block look back.

    Returns:
        The intervals on `device`. Nothing here waits for the GPU.

    Raises:
        ValueError: a window below 1, or tensors of another shape.
    """
    if window is not None and window < 1:
        raise ValueError(f"fastgemma: an attention window of {window} keys attends to nothing; give at least 1.")
    for name, tensor in (("padding_mask", padding_mask), ("documents", documents), ("blocks", blocks)):
        if tensor is not None and tensor.shape != (batch, seq_len):
            raise ValueError(f"fastgemma: {name} has shape {tuple(tensor.shape)}, not {(batch, seq_len)}.")
    rows = torch.arange(seq_len, device=device).expand(batch, seq_len)
    lo, hi = torch.zeros_like(rows), rows + 1
    block_starts = None
    if blocks is not None:
        blocks = blocks.to(device)
        inside = blocks >= 0
        hi = torch.where(inside, _ends(blocks, rows), hi)
        block_starts = torch.where(inside, _starts(blocks, rows), seq_len)
    if window is not None:
        lo = torch.maximum(lo, rows - window + 1)
        if block_starts is not None and not blocks_in_window:
            lo = torch.minimum(lo, block_starts)
    runs = None
    if padding_mask is None and blocks is None:
        if documents is None:
            runs = Runs()
        elif documents.device.type == "cpu":
            runs = _runs(documents, device)
    if documents is not None:
        documents = documents.to(device, non_blocking=True)
        lo = torch.maximum(lo, _starts(documents, rows))
        hi = torch.minimum(hi, _ends(documents, rows))
    if padding_mask is not None:
        tokens = padding_mask.to(device) != 0
        last = torch.where(tokens, rows + 1, 0).amax(1, keepdim=True) if seq_len else rows
        first = torch.where(tokens, rows, seq_len).amin(1, keepdim=True) if seq_len else rows
        lo, hi = torch.maximum(lo, first), torch.minimum(hi, last)
    return KeyIntervals(
        lo.to(torch.int32).contiguous(),
        hi.to(torch.int32).contiguous(),
        causal=blocks is None,
        window=window if blocks is None or blocks_in_window else None,
        runs=runs,
    )


def _runs(documents: torch.Tensor, device: torch.device) -> Runs:
    """Of documents on the host."""
    changes = _changes(documents)
    bounds = torch.nn.functional.pad(changes.flatten().nonzero().flatten(), (0, 1), value=changes.numel())
    return Runs(tuple(bounds.tolist()), bounds.to(torch.int32).to(device, non_blocking=True))


def _changes(labels: torch.Tensor) -> torch.Tensor:
    """Whether a row is the first of a run of equal labels."""
    changes = torch.ones_like(labels, dtype=torch.bool)
    changes[:, 1:] = labels[:, 1:] != labels[:, :-1]
    return changes


def _starts(labels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """For every row where its run of equal labels starts."""
    return torch.where(_changes(labels), rows, 0).cummax(1).values


def _ends(labels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """For every row where its run of equal labels ends, exclusively."""
    return labels.shape[1] - _starts(labels.flip(1), rows).flip(1)
