"""A language model's head, taken a chunk of rows at a time, so that its logits never exist all at once.

    u = hidden . W^T,   dhidden = du . W,   dW = du^T . hidden,   dbias = sum over rows of du

One reused buffer holds C x V logits: a GEMM fills it, `logits` reduces each row and turns it into its gradient in
place, and further GEMMs consume that gradient. The gradient of a unit loss thus exists before the backward, which only
scales it. Where nothing but dhidden is wanted of softcapped logits, `softcapped_logits` passes over them once, and the
GEMM's rows are divided, and given their target's part, in float32. GEMMs, each of 2 * N * V * H FLOP:

    no gradient wanted                                                            1
    frozen head                                                                   2
    trainable head, one scalar loss                                               3
    trainable head, one upstream per row; or any gradient through the entropy     4, two of them on logits made again

Hidden states and weight meet in one dtype, the weight cast slab by slab where it has another; the gradients of weight
and bias are summed over chunks in float32. A chunk's bytes per logit beside the GEMMs are those of the kernels' files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastgemma.kernels.logits import Readout, TokenStatistics, logits_bwd, logits_fwd
from fastgemma.kernels.softcapped_logits import one_sweep_suffices, softcapped_logits

# Fewer rows than this make a GEMM that only reads the head; a tighter budget is then exceeded.
MIN_CHUNK_ROWS = 16


@dataclass(frozen=True)
class Head:
    """How hidden states become z, and in what steps: the dtype of GEMMs and logits, bytes of scratch."""

    readout: Readout
    dtype: torch.dtype
    budget: int


@dataclass(frozen=True)
class Rows:
    """The rows to compute, and how: those of `hidden` [M, H] at `index` (None: all), one target [N] for each."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor
    index: torch.Tensor | None
    head: Head

    def chunks(self) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """(rows, their hidden states, their raw logits) for every chunk; the logits share one buffer."""
        n_rows, n_cols, head = self.targets.shape[0], self.weight.shape[0], self.head
        fits = max(head.budget // (n_cols * head.dtype.itemsize), 1)
        size = min(max(1 << (fits.bit_length() - 1), MIN_CHUNK_ROWS), n_rows)
        buffer = self.hidden.new_empty((size, n_cols), dtype=head.dtype)
        for start in range(0, n_rows, max(size, 1)):
            rows = slice(start, min(start + size, n_rows))
            x = self.hidden[rows] if self.index is None else self.hidden.index_select(0, self.index[rows])
            x = x.to(head.dtype)
            logits = buffer[: x.shape[0]]
            for cols, slab in self.slabs():
                torch.mm(x, slab.t(), out=logits[:, cols])
            yield rows, x, logits

    def slabs(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """The weight in slabs of rows, cast to the dtype of the GEMMs; one slab and no copy if it has that dtype."""
        (n_cols, width), dtype = self.weight.shape, self.head.dtype
        if self.weight.dtype == dtype:
            yield slice(0, n_cols), self.weight
            return
        size = min(max(self.head.budget // 4 // (width * dtype.itemsize), 1), n_cols)
        buffer = self.weight.new_empty((size, width), dtype=dtype)
        for start in range(0, n_cols, size):
            cols = slice(start, min(start + size, n_cols))
            yield cols, buffer[: cols.stop - start].copy_(self.weight[cols])


class Swept(NamedTuple):
    """Of rows [N] that `softcapped_logits` passed over: by what their product with the head is multiplied, and how much
    of the target's row of the head is added to it."""

    scale: torch.Tensor
    of_target: torch.Tensor


class Gradients:
    """What is wanted of the gradients of (hidden, weight, bias), filled chunk by chunk.

    `hidden` holds one row per target, in the dtype of the hidden states; `weight` and `bias` are float32 sums.
    """

    def __init__(self, wanted: list[bool], rows: Rows) -> None:
        n_cols, width = rows.weight.shape
        self.any = any(wanted)
        self.hidden = rows.hidden.new_empty((rows.targets.shape[0], width)) if wanted[0] else None
        self.weight = rows.weight.new_zeros((n_cols, width), dtype=torch.float32) if wanted[1] else None
        self.bias = rows.weight.new_zeros(n_cols, dtype=torch.float32) if wanted[2] else None

    def add(
        self, rows: Rows, chunk: slice, x: torch.Tensor, d_logits: torch.Tensor, swept: Swept | None = None
    ) -> None:
        """`swept`: what `softcapped_logits` left for later; only hidden states have a gradient then."""
        if self.hidden is not None:
            if rows.weight.dtype == d_logits.dtype == self.hidden.dtype and swept is None:
                torch.mm(d_logits, rows.weight, out=self.hidden[chunk])
            else:
                total = torch.zeros_like(x, dtype=torch.float32)
                for cols, slab in rows.slabs():
                    _add_product(total, d_logits[:, cols], slab)
                if swept is not None:
                    # A target that is no token has a NaN to multiply whatever row is taken.
                    targets = rows.targets[chunk].clamp(0, rows.weight.shape[0] - 1)
                    total.mul_(swept.scale.unsqueeze(1))
                    total.addcmul_(rows.weight.index_select(0, targets), swept.of_target.unsqueeze(1))
                self.hidden[chunk] = total
        if self.weight is not None:
            _add_product(self.weight, d_logits.t(), x)
        if self.bias is not None:
            self.bias += d_logits.sum(dim=0, dtype=torch.float32)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b for a float32 total, with no rounding of the product in between."""
    if a.dtype == torch.float32 or total.device.type != "cuda":
        total.addmm_(a.float(), b.float())
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


def head_fwd(
    rows: Rows, outputs: tuple[str, ...], wanted: list[bool]
) -> tuple[TokenStatistics, torch.Tensor, torch.Tensor, Gradients]:
    """The statistics, peak and log-sum of each row (logsumexp = peak + log_sum), and the gradients of a unit loss."""
    n_rows = rows.targets.shape[0]
    names = ("log_probs", "peak", "log_sum", *outputs)
    stats = {name: rows.hidden.new_empty(n_rows, dtype=torch.float32) for name in names}
    if "is_top1" in stats:
        stats["is_top1"] = stats["is_top1"].new_empty(n_rows, dtype=torch.uint8)
    gradients = Gradients(wanted, rows)
    readout = rows.head.readout
    one_sweep = wanted == [True, False, False] and one_sweep_suffices(readout, rows.head.dtype, outputs)
    if one_sweep:
        stats |= {name: torch.empty_like(stats["peak"]) for name in Swept._fields}
    with torch.autocast(rows.hidden.device.type, enabled=False):
        for chunk, x, logits in rows.chunks():
            results = {name: values[chunk] for name, values in stats.items()}
            swept = None
            if one_sweep:
                softcapped_logits(logits, rows.bias, rows.targets[chunk], readout, results)
                swept = Swept(*(results[name] for name in Swept._fields))
            else:
                logits_fwd(logits, rows.bias, rows.targets[chunk], readout, results, gradients.any)
            if gradients.any:
                gradients.add(rows, chunk, x, logits, swept)
    peak, log_sum = stats["peak"], stats["log_sum"]
    if "is_top1" in stats:
        stats["is_top1"] = stats["is_top1"].view(torch.bool)
    found = {name: values for name, values in stats.items() if name in TokenStatistics._fields}
    return TokenStatistics(**found), peak, log_sum, gradients


def head_bwd(
    rows: Rows,
    peak: torch.Tensor,
    log_sum: torch.Tensor,
    entropy: torch.Tensor | None,
    grad_log_probs: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    wanted: list[bool],
) -> Gradients:
    """Gradients for one upstream per row, from logits computed again."""
    if grad_log_probs is not None:
        grad_log_probs = grad_log_probs.contiguous()
    if grad_entropy is not None:
        grad_entropy = grad_entropy.contiguous()
    gradients = Gradients(wanted, rows)
    with torch.autocast(rows.hidden.device.type, enabled=False):
        for chunk, x, logits in rows.chunks():
            logits_bwd(
                logits,
                rows.bias,
                rows.targets[chunk],
                rows.head.readout,
                peak[chunk],
                log_sum[chunk],
                None if entropy is None else entropy[chunk],
                None if grad_log_probs is None else grad_log_probs[chunk],
                None if grad_entropy is None else grad_entropy[chunk],
            )
            gradients.add(rows, chunk, x, logits)
    return gradients
