"""Log-probabilities and cross-entropy of `hidden @ weight.T`, without keeping the logits.

With u = hidden . W^T + bias and

    z = softcap * tanh(logit_scale * u / softcap) / temperature        (no softcap: z = logit_scale * u / temperature)
    log_prob = z[target] - logsumexp(z)                                loss = -log_prob

    dloss / du_v    = (p_v - 1[v = target]) * dz_v/du_v                p = softmax(z)
    dentropy / du_v = -p_v * (log p_v + entropy) * dz_v/du_v
    dz/du = (1 - tanh^2) * logit_scale / temperature
    dhidden = du . W,  dW = du^T . hidden,  dbias = sum over rows of du

Ignored rows are dropped first. The others pass in chunks through one reused buffer of C x V logits: a GEMM fills it, a
kernel reduces each row and turns it into its gradient in place, and further GEMMs consume that gradient. The gradient
of a unit loss thus exists before the backward, which only scales it. GEMMs, each of 2 * N * V * H FLOP:

    no gradient wanted                                                            1
    frozen head                                                                   2
    trainable head, one scalar loss                                               3
    trainable head, one upstream per row; or any gradient through the entropy     4, two of them on logits made again

Bytes per logit (bf16) beside the GEMMs: 2 read; with a gradient 4 read, 2 written. The softmax, the softcap and every
statistic are computed in float32 from the rounded logits, and the weight's gradient is summed over chunks in float32.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); the final softcap of
`Gemma4ForCausalLM` in transformers; the per-token statistics of TRL's fused head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from fastgemma.kernels.backend import as_rows, check_dtype, jit, kernel, runs_kernel, tl
from fastgemma.kernels.kept_rows import KeptRows
from fastgemma.kernels.launch import launch
from fastgemma.kernels.workspace import workspace_bytes as default_workspace_bytes

# Fewer rows than this make a GEMM that only reads the head; a tighter budget is then exceeded.
MIN_CHUNK_ROWS = 16


class TokenStatistics(NamedTuple):
    """Per-token results, each [N] or None where it was not asked for. Only the first two carry gradients."""

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None


@jit
def _load_logits(
    row_ptr,
    bias_ptr,
    cols,
    mask,
    logit_scale,
    softcap,
    inverse_temperature,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):
    """z, with -inf where masked out, and dz/du."""
    z = tl.load(row_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    z = z * logit_scale
    slope = logit_scale * inverse_temperature
    if HAS_SOFTCAP:
        # exp of a negative number cannot overflow, and 1 - tanh^2 = 4 e / (1 + e)^2 does not cancel near saturation.
        e = tl.exp(tl.abs(z) * (-2.0 / softcap))
        tanh = (1.0 - e) / (1.0 + e)
        z = softcap * tl.where(z < 0.0, -tanh, tanh)
        slope = slope * (4.0 * e / ((1.0 + e) * (1.0 + e)))
    # Last of all: a lane that was -inf before the softcap would be a finite -softcap after it.
    return tl.where(mask, z * inverse_temperature, float("-inf")), slope


@kernel
def _linear_cross_entropy_fwd_kernel(
    logits_ptr,
    bias_ptr,
    targets_ptr,
    log_probs_ptr,
    peak_ptr,
    log_sum_ptr,
    entropy_ptr,
    log_sum_sq_probs_ptr,
    mean_logits_ptr,
    is_top1_ptr,
    logit_scale,
    softcap,
    inverse_temperature,
    n_cols: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_LOG_SUM_SQ_PROBS: tl.constexpr,
    HAS_MEAN_LOGITS: tl.constexpr,
    HAS_IS_TOP1: tl.constexpr,
    STORE_GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    logit_scale = tl.cast(logit_scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    inverse_temperature = tl.cast(inverse_temperature, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * n_cols
    target = tl.load(targets_ptr + row)
    in_range = (target >= 0) & (target < n_cols)
    # Read before the first reduction, whose barrier keeps the second sweep from overwriting it too early.
    target_z, _target_slope = _load_logits(
        row_ptr, bias_ptr, target, in_range, logit_scale, softcap, inverse_temperature, HAS_BIAS, HAS_SOFTCAP
    )

    # Sums stay per lane until the end: one reduction across the program in each block instead of several.
    peak = tl.full((), float("-inf"), tl.float32)
    sum_exp = tl.zeros((BLOCK_V,), tl.float32)
    sum_z_exp = tl.zeros((BLOCK_V,), tl.float32)
    sum_sq_exp = tl.zeros((BLOCK_V,), tl.float32)
    sum_z = tl.zeros((BLOCK_V,), tl.float32)
    before_target = tl.full((BLOCK_V,), float("-inf"), tl.float32)
    for start in range(0, n_cols, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        mask = cols < n_cols
        z, _slope = _load_logits(
            row_ptr, bias_ptr, cols, mask, logit_scale, softcap, inverse_temperature, HAS_BIAS, HAS_SOFTCAP
        )
        new_peak = tl.maximum(peak, tl.max(z, axis=0))
        # While every logit is -inf (a bias can forbid tokens), a peak of -inf would make exp(-inf - -inf) NaN.
        shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        rescale = tl.exp(peak - shift)
        e = tl.exp(z - shift)
        if HAS_ENTROPY:
            # The sum of e * (z - peak), not of e * z: the entropy is then no difference of two large numbers.
            moved = tl.where(peak == float("-inf"), 0.0, peak - shift)
            sum_z_exp = rescale * (sum_z_exp + moved * sum_exp)
            sum_z_exp += e * tl.where(z == float("-inf"), 0.0, z - shift)
        if HAS_LOG_SUM_SQ_PROBS:
            sum_sq_exp = sum_sq_exp * (rescale * rescale) + e * e
        if HAS_MEAN_LOGITS:
            sum_z += tl.where(mask, z, 0.0)
        if HAS_IS_TOP1:
            before_target = tl.maximum(before_target, tl.where(cols < target, z, float("-inf")))
        sum_exp = sum_exp * rescale + e
        peak = new_peak

    total = tl.sum(sum_exp, axis=0)
    log_sum = tl.log(total)
    not_a_number = tl.where(in_range, 0.0, float("nan"))
    tl.store(log_probs_ptr + row, (target_z - peak) - log_sum + not_a_number)
    tl.store(peak_ptr + row, peak)
    tl.store(log_sum_ptr + row, log_sum)
    if HAS_ENTROPY:
        tl.store(entropy_ptr + row, log_sum - tl.sum(sum_z_exp, axis=0) / total)
    if HAS_LOG_SUM_SQ_PROBS:
        tl.store(log_sum_sq_probs_ptr + row, tl.log(tl.sum(sum_sq_exp, axis=0)) - 2.0 * log_sum)
    if HAS_MEAN_LOGITS:
        tl.store(mean_logits_ptr + row, tl.sum(sum_z, axis=0) / n_cols)
    if HAS_IS_TOP1:
        # The first of equal maxima wins, as in argmax.
        is_top1 = (target_z >= peak) & (target_z > tl.max(before_target, axis=0))
        tl.store(is_top1_ptr + row, is_top1.to(tl.uint8))

    if STORE_GRADIENT:
        for start in range(0, n_cols, BLOCK_V):
            cols = start + tl.arange(0, BLOCK_V)
            mask = cols < n_cols
            z, slope = _load_logits(
                row_ptr, bias_ptr, cols, mask, logit_scale, softcap, inverse_temperature, HAS_BIAS, HAS_SOFTCAP
            )
            p = tl.exp((z - peak) - log_sum)
            gradient = (tl.where(cols == target, p - 1.0, p) + not_a_number) * slope
            tl.store(row_ptr + cols, gradient.to(logits_ptr.dtype.element_ty), mask=mask)


@kernel
def _linear_cross_entropy_bwd_kernel(
    logits_ptr,
    bias_ptr,
    targets_ptr,
    peak_ptr,
    log_sum_ptr,
    entropy_ptr,
    grad_log_probs_ptr,
    grad_entropy_ptr,
    logit_scale,
    softcap,
    inverse_temperature,
    n_cols: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_GRAD_LOG_PROBS: tl.constexpr,
    HAS_GRAD_ENTROPY: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    logit_scale = tl.cast(logit_scale, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    inverse_temperature = tl.cast(inverse_temperature, tl.float32)
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * n_cols
    peak = tl.load(peak_ptr + row)
    log_sum = tl.load(log_sum_ptr + row)
    if HAS_GRAD_LOG_PROBS:
        target = tl.load(targets_ptr + row)
        grad_log_prob = tl.load(grad_log_probs_ptr + row)
        grad_log_prob = tl.where((target >= 0) & (target < n_cols), grad_log_prob, float("nan"))
    if HAS_GRAD_ENTROPY:
        entropy = tl.load(entropy_ptr + row)
        grad_entropy = tl.load(grad_entropy_ptr + row)
    for start in range(0, n_cols, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        mask = cols < n_cols
        z, slope = _load_logits(
            row_ptr, bias_ptr, cols, mask, logit_scale, softcap, inverse_temperature, HAS_BIAS, HAS_SOFTCAP
        )
        log_p = (z - peak) - log_sum
        p = tl.exp(log_p)
        gradient = tl.zeros((BLOCK_V,), tl.float32)
        if HAS_GRAD_LOG_PROBS:
            gradient += grad_log_prob * tl.where(cols == target, 1.0 - p, -p)
        if HAS_GRAD_ENTROPY:
            # p log p is 0 at p = 0.
            gradient -= grad_entropy * p * tl.where(p == 0.0, 0.0, log_p + entropy)
        tl.store(row_ptr + cols, (gradient * slope).to(logits_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class _Head:
    """How hidden states become z, and in what steps: the scalars, the dtype of GEMMs and logits, bytes of scratch."""

    softcap: float | None
    logit_scale: float
    temperature: float
    dtype: torch.dtype
    budget: int


@dataclass(frozen=True)
class _Rows:
    """The rows to compute, and how: those of `hidden` [M, H] at `index` (None: all), one target [N] for each."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    targets: torch.Tensor
    index: torch.Tensor | None
    head: _Head

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

    def kernel_arguments(self, rows: slice, logits: torch.Tensor) -> dict[str, Any]:
        head = self.head
        return {
            "logits_ptr": logits,
            "bias_ptr": logits if self.bias is None else self.bias,
            "targets_ptr": self.targets[rows],
            "logit_scale": head.logit_scale,
            "softcap": 1.0 if head.softcap is None else head.softcap,
            "inverse_temperature": 1.0 / head.temperature,
            "n_cols": logits.shape[1],
            "HAS_BIAS": self.bias is not None,
            "HAS_SOFTCAP": head.softcap is not None,
            **launch("linear_cross_entropy", "any", logits.device).kwargs(),
        }


class _Gradients:
    """What is wanted of the gradients of (hidden, weight, bias), filled chunk by chunk.

    `hidden` holds one row per target, in the dtype of the hidden states; `weight` and `bias` are float32 sums.
    """

    def __init__(self, wanted: list[bool], rows: _Rows) -> None:
        n_cols, width = rows.weight.shape
        self.any = any(wanted)
        self.hidden = rows.hidden.new_empty((rows.targets.shape[0], width)) if wanted[0] else None
        self.weight = rows.weight.new_zeros((n_cols, width), dtype=torch.float32) if wanted[1] else None
        self.bias = rows.weight.new_zeros(n_cols, dtype=torch.float32) if wanted[2] else None

    def add(self, rows: _Rows, chunk: slice, x: torch.Tensor, d_logits: torch.Tensor) -> None:
        if self.hidden is not None:
            if rows.weight.dtype == d_logits.dtype == self.hidden.dtype:
                torch.mm(d_logits, rows.weight, out=self.hidden[chunk])
            else:
                total = torch.zeros_like(x, dtype=torch.float32)
                for cols, slab in rows.slabs():
                    _add_product(total, d_logits[:, cols], slab)
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


def _linear_cross_entropy_fwd(
    rows: _Rows, outputs: tuple[str, ...], wanted: list[bool]
) -> tuple[TokenStatistics, torch.Tensor, torch.Tensor, _Gradients]:
    """The statistics, the peak and log-sum of each row (logsumexp = peak + log_sum), the gradients of a unit loss."""
    n_rows = rows.targets.shape[0]
    names = ("log_probs", "peak", "log_sum", *outputs)
    stats = {name: rows.hidden.new_empty(n_rows, dtype=torch.float32) for name in names}
    if "is_top1" in stats:
        stats["is_top1"] = stats["is_top1"].new_empty(n_rows, dtype=torch.uint8)
    pointers = (*TokenStatistics._fields, "peak", "log_sum")
    gradients = _Gradients(wanted, rows)
    with torch.autocast(rows.hidden.device.type, enabled=False):
        for chunk, x, logits in rows.chunks():
            _linear_cross_entropy_fwd_kernel[(x.shape[0],)](
                **{f"{name}_ptr": stats.get(name, stats["peak"])[chunk] for name in pointers},
                **{f"HAS_{name.upper()}": name in outputs for name in TokenStatistics._fields[1:]},
                STORE_GRADIENT=gradients.any,
                **rows.kernel_arguments(chunk, logits),
            )
            if gradients.any:
                gradients.add(rows, chunk, x, logits)
    peak, log_sum = stats.pop("peak"), stats.pop("log_sum")
    if "is_top1" in stats:
        stats["is_top1"] = stats["is_top1"].view(torch.bool)
    return TokenStatistics(**stats), peak, log_sum, gradients


def _linear_cross_entropy_bwd(
    rows: _Rows,
    peak: torch.Tensor,
    log_sum: torch.Tensor,
    entropy: torch.Tensor | None,
    grad_log_probs: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    wanted: list[bool],
) -> _Gradients:
    """Gradients for one upstream per row, from logits computed again."""
    per_row = {
        "peak_ptr": peak,
        "log_sum_ptr": log_sum,
        "entropy_ptr": peak if entropy is None else entropy,
        "grad_log_probs_ptr": peak if grad_log_probs is None else grad_log_probs.contiguous(),
        "grad_entropy_ptr": peak if grad_entropy is None else grad_entropy.contiguous(),
    }
    gradients = _Gradients(wanted, rows)
    with torch.autocast(rows.hidden.device.type, enabled=False):
        for chunk, x, logits in rows.chunks():
            _linear_cross_entropy_bwd_kernel[(x.shape[0],)](
                **{name: values[chunk] for name, values in per_row.items()},
                HAS_GRAD_LOG_PROBS=grad_log_probs is not None,
                HAS_GRAD_ENTROPY=grad_entropy is not None,
                **rows.kernel_arguments(chunk, logits),
            )
            gradients.add(rows, chunk, x, logits)
    return gradients


def _scaled(values: torch.Tensor | None, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """values * scale, multiplied in float32 and rounded once. The scale has as many dimensions as the values: one of
    fewer would first be rounded to their dtype."""
    if values is None:
        return None
    return torch.mul(values, scale, out=torch.empty_like(values, dtype=dtype))


def _placed(rows: torch.Tensor | None, index: torch.Tensor | None, shape: torch.Size) -> torch.Tensor | None:
    """The gradient of hidden states of this shape: zeros with the given rows at `index`."""
    if rows is None:
        return None
    if index is None:
        return rows.view(shape)
    return rows.new_zeros(shape).view(-1, shape[-1]).index_copy_(0, index, rows).view(shape)


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, index, head, outputs, grad_enabled):
        ctx.set_materialize_grads(False)
        needs = [needed and grad_enabled for needed in ctx.needs_input_grad[:3]]
        # With a frozen head, one upstream per row scales one row of the gradient, so that it can be computed ahead.
        ahead = needs[0] and not (needs[1] or needs[2])
        rows = _Rows(as_rows(hidden), weight, bias, targets, index, head)
        stats, peak, log_sum, gradients = _linear_cross_entropy_fwd(rows, outputs, [ahead, False, False])
        if ahead and "entropy" not in outputs:
            ctx.save_for_backward(gradients.hidden, index)
        elif any(needs):
            ctx.save_for_backward(gradients.hidden, index, hidden, weight, bias, targets, peak, log_sum, stats.entropy)
        ctx.head, ctx.shape = head, hidden.shape
        ctx.mark_non_differentiable(*(extra for extra in stats[2:] if extra is not None))
        return tuple(stats)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_log_probs, grad_entropy, *_):
        nothing = (None,) * 5
        if grad_log_probs is None and grad_entropy is None:
            return None, None, None, *nothing
        ahead, index, *saved = ctx.saved_tensors
        if ahead is not None and grad_entropy is None:
            d_hidden = _scaled(ahead, -grad_log_probs.unsqueeze(1), ahead.dtype)
            return _placed(d_hidden, index, ctx.shape), None, None, *nothing
        hidden, weight, bias, targets, peak, log_sum, entropy = saved
        rows = _Rows(as_rows(hidden), weight, bias, targets, index, ctx.head)
        wanted = list(ctx.needs_input_grad[:3])
        gradients = _linear_cross_entropy_bwd(rows, peak, log_sum, entropy, grad_log_probs, grad_entropy, wanted)
        d_weight = None if gradients.weight is None else gradients.weight.to(weight.dtype)
        d_bias = None if gradients.bias is None else gradients.bias.to(bias.dtype)
        return _placed(gradients.hidden, index, ctx.shape), d_weight, d_bias, *nothing


class _LinearCrossEntropySum(torch.autograd.Function):
    """The sum of the losses. One upstream for all rows lets every gradient be computed ahead."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, index, head, grad_enabled):
        ctx.set_materialize_grads(False)
        wanted = [needed and grad_enabled for needed in ctx.needs_input_grad[:3]]
        rows = _Rows(as_rows(hidden), weight, bias, targets, index, head)
        stats, _, _, gradients = _linear_cross_entropy_fwd(rows, (), wanted)
        ctx.save_for_backward(gradients.hidden, gradients.weight, gradients.bias, index)
        ctx.shape, ctx.is_empty = hidden.shape, targets.shape[0] == 0
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return (-stats.log_probs).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        if grad_loss is None:
            return (None,) * 7
        d_hidden, d_weight, d_bias, index = ctx.saved_tensors
        if ctx.is_empty:
            # A mean over no rows sends an infinite or NaN upstream; the gradient of no rows is still zero.
            grad_loss = torch.zeros_like(grad_loss)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = _scaled(d_hidden, grad_loss.view(1, 1), ctx.dtypes[0]) if needs_hidden else None
        d_weight = _scaled(d_weight, grad_loss.view(1, 1), ctx.dtypes[1]) if needs_weight else None
        d_bias = _scaled(d_bias, grad_loss.view(1), ctx.dtypes[2]) if needs_bias else None
        return _placed(d_hidden, index, ctx.shape), d_weight, d_bias, None, None, None, None


def _check(
    op: str,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    temperature: float,
    workspace_bytes: int | None,
) -> None:
    check_dtype("hidden_states", hidden_states)
    check_dtype("weight", weight)
    if bias is not None:
        check_dtype("bias", bias)
    if targets.dtype != torch.int64:
        raise TypeError(f"fastgemma: {op} got targets of {targets.dtype}; give int64.")
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(f"fastgemma: {op} needs a weight of [vocabulary, hidden], got {tuple(weight.shape)}.")
    if hidden_states.dim() == 0 or hidden_states.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"fastgemma: {op} got hidden states of shape {tuple(hidden_states.shape)} for a weight of shape "
            f"{tuple(weight.shape)}; their last dimensions must agree."
        )
    if targets.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"fastgemma: {op} got targets of shape {tuple(targets.shape)} for hidden states of shape "
            f"{tuple(hidden_states.shape)}; give one target per row."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"fastgemma: {op} got a bias of shape {tuple(bias.shape)} for {weight.shape[0]} tokens.")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"fastgemma: {op} got softcap={softcap}; give a positive number, or None for no softcap.")
    if not temperature > 0:
        raise ValueError(f"fastgemma: {op} got temperature={temperature}; give a positive number.")
    if workspace_bytes is not None and workspace_bytes <= 0:
        raise ValueError(f"fastgemma: {op} got workspace_bytes={workspace_bytes}; give a positive number of bytes.")


def _check_range(targets: torch.Tensor, n_cols: int) -> None:
    """On the CPU, where looking costs nothing; a GPU would have to be waited for, and its kernel answers NaN."""
    if targets.device.type == "cpu" and bool(((targets < 0) | (targets >= n_cols)).any()):
        raise IndexError(
            f"fastgemma: a target lies outside the vocabulary of {n_cols} tokens, from {targets.min()} to "
            f"{targets.max()}."
        )


def _head(
    hidden: torch.Tensor, softcap: float | None, logit_scale: float, temperature: float, workspace_bytes: int | None
) -> _Head:
    device = hidden.device
    autocast = torch.is_autocast_enabled(device.type)
    return _Head(
        None if softcap is None else float(softcap),
        float(logit_scale),
        float(temperature),
        torch.get_autocast_dtype(device.type) if autocast else hidden.dtype,
        default_workspace_bytes(device) if workspace_bytes is None else workspace_bytes,
    )


def linear_log_probs(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = ("log_probs",),
    workspace_bytes: int | None = None,
) -> TokenStatistics:
    """Per-token statistics of `softcap * tanh(logit_scale * (hidden @ weight.T + bias) / softcap) / temperature`.

    With z those logits and p = softmax(z): `log_probs` is log p[target], `entropy` -sum(p log p), `log_sum_sq_probs`
    log sum(p^2), `mean_logits` mean(z), `is_top1` whether the target is the first argmax of z. Gradients flow to
    `hidden_states`, `weight` and `bias`, through `log_probs` and `entropy` only.

    GEMMs run in the dtype of `hidden_states`, or in autocast's where it is enabled; a weight of another dtype is cast
    slab by slab, never as a whole. (float32 hidden states and a bfloat16 weight make a float32 head.)

    Args:
        hidden_states: [N, hidden_size], float32, bfloat16 or float16, any strides.
        weight: [vocabulary, hidden_size], one of those dtypes.
        targets: [N] int64, from 0 to vocabulary - 1. On the GPU a row whose target lies outside gets NaN, in its
            results and its gradient: finding it earlier would mean waiting for the GPU.
        bias: [vocabulary] or None.
        softcap: positive, or None for none.
        logit_scale: factor before the softcap.
        temperature: positive divisor after the softcap.
        outputs: names of the wanted fields of the result.
        workspace_bytes: bytes of the reused logits buffer; a float32 head takes a quarter more. At least 16 rows are
            processed at a time whatever it says. Default: `workspace.workspace_bytes()`.

    Returns:
        TokenStatistics of [N] float32 (`is_top1`: bool); what is not in `outputs` is None.

    Raises:
        TypeError: unsupported dtypes. ValueError: shapes that do not fit, tensors on different devices, unknown
            outputs, a softcap or temperature that is not positive. IndexError: a target outside the vocabulary (CPU).
    """
    unknown = [name for name in outputs if name not in TokenStatistics._fields]
    if unknown:
        raise ValueError(f"fastgemma: linear_log_probs knows {', '.join(TokenStatistics._fields)}; got {unknown}.")
    _check("linear_log_probs", hidden_states, weight, targets, bias, softcap, temperature, workspace_bytes)
    if hidden_states.dim() != 2:
        raise ValueError(f"fastgemma: linear_log_probs takes [N, hidden], got {tuple(hidden_states.shape)}.")
    on_kernel = runs_kernel(hidden_states, weight, targets, bias)
    _check_range(targets, weight.shape[0])
    if not on_kernel:
        return linear_log_probs_reference(
            hidden_states, weight, targets, bias, softcap, logit_scale, temperature, outputs
        )
    head = _head(hidden_states, softcap, logit_scale, temperature, workspace_bytes)
    stats = TokenStatistics(
        *_LinearLogProbs.apply(
            hidden_states,
            weight,
            _contiguous(bias),
            targets.contiguous(),
            None,
            head,
            tuple(outputs),
            torch.is_grad_enabled(),
        )
    )
    return stats if "log_probs" in outputs else stats._replace(log_probs=None)


def linear_cross_entropy(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: int | torch.Tensor | None = None,
    kept_rows: KeptRows | None = None,
    workspace_bytes: int | None = None,
) -> torch.Tensor:
    """Cross-entropy of the logits that `linear_log_probs` describes, over the rows whose label is not ignored.

    Ignored rows cost nothing, and their gradient is exactly zero. If every row is ignored, the mean is NaN and the sum
    is zero, as in torch, and every gradient is zero. No float32 copy of the head is made, but a trainable head's
    gradient is kept in float32 from the forward to the backward (reductions other than "none").

    Args:
        hidden_states: [..., hidden_size], as in `linear_log_probs`.
        weight: [vocabulary, hidden_size].
        labels: [...] int64, aligned with the hidden states (see `shift_labels`). On the GPU a label outside the
            vocabulary that is not `ignore_index` makes the loss NaN.
        bias, softcap, logit_scale, temperature, workspace_bytes: as in `linear_log_probs`.
        ignore_index: the label of rows without a loss.
        reduction: "mean" over the rows that are not ignored, "sum", or "none".
        num_items_in_batch: an int or a tensor of one element; the loss is then the sum divided by it.
        kept_rows: the rows to keep, from these labels and this `ignore_index`, if they were already worked out (before
            the backbone ran, so that nothing waits here).

    Returns:
        A float32 scalar; for reduction "none" float32 of the shape of `labels`, zero where ignored.

    Raises:
        TypeError, IndexError: as in `linear_log_probs`. ValueError: likewise; an unknown reduction, "none" with
            `num_items_in_batch`, or `kept_rows` of other labels.
    """
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"fastgemma: linear_cross_entropy got reduction={reduction!r}; give mean, sum or none.")
    if reduction == "none" and num_items_in_batch is not None:
        raise ValueError("fastgemma: num_items_in_batch divides a sum; it needs reduction mean or sum.")
    _check("linear_cross_entropy", hidden_states, weight, labels, bias, softcap, temperature, workspace_bytes)
    if kept_rows is not None and (kept_rows.total != labels.numel() or kept_rows.ignore_index != ignore_index):
        raise ValueError(
            f"fastgemma: kept_rows was made from {kept_rows.total} labels with ignore_index={kept_rows.ignore_index}; "
            f"this call has {labels.numel()} with ignore_index={ignore_index}."
        )
    if isinstance(num_items_in_batch, torch.Tensor):
        if num_items_in_batch.numel() != 1:
            raise ValueError(
                f"fastgemma: num_items_in_batch is one number, got a tensor of {tuple(num_items_in_batch.shape)}."
            )
        num_items_in_batch = num_items_in_batch.reshape(()).to(hidden_states.device, non_blocking=True)
    if not runs_kernel(hidden_states, weight, labels, bias):
        return linear_cross_entropy_reference(
            hidden_states,
            weight,
            labels,
            bias,
            softcap,
            logit_scale,
            temperature,
            ignore_index,
            reduction,
            num_items_in_batch,
        )
    kept_rows = KeptRows(labels, ignore_index) if kept_rows is None else kept_rows
    count = kept_rows.count
    index = None if count == labels.numel() else kept_rows.index()
    targets = labels.reshape(-1)
    targets = targets.contiguous() if index is None else targets.index_select(0, index)
    _check_range(targets, weight.shape[0])
    head = _head(hidden_states, softcap, logit_scale, temperature, workspace_bytes)
    arguments = (hidden_states, weight, _contiguous(bias), targets, index, head)
    if reduction == "none":
        losses = -_LinearLogProbs.apply(*arguments, (), torch.is_grad_enabled())[0]
        if index is not None:
            losses = losses.new_zeros(labels.numel()).index_copy(0, index, losses)
        return losses.view(labels.shape)
    total = _LinearCrossEntropySum.apply(*arguments, torch.is_grad_enabled())
    if num_items_in_batch is not None:
        return total / num_items_in_batch
    return total / count if reduction == "mean" else total


def _contiguous(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.contiguous()


def shift_labels(labels: torch.Tensor, ignore_index: int = -100) -> torch.Tensor:
    """Labels moved one place to the left, the last one ignored: row t then holds what position t predicts.

    Moving the labels spares slicing, and so copying, the hidden states.

    Args:
        labels: [..., sequence], any integer dtype.
        ignore_index: what the last place is filled with.

    Returns:
        A new tensor of the same shape and dtype.
    """
    return torch.nn.functional.pad(labels[..., 1:], (0, min(labels.shape[-1], 1)), value=ignore_index)


def _full_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
) -> torch.Tensor:
    high = torch.promote_types(hidden.dtype, torch.float32)
    z = hidden.to(high) @ weight.to(high).t()
    if bias is not None:
        z = z + bias.to(high)
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return z / temperature


def linear_log_probs_reference(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    outputs: tuple[str, ...] = ("log_probs",),
) -> TokenStatistics:
    """`linear_log_probs` in plain torch with full logits; float64 stays float64, the rest is computed in float32."""
    z = _full_logits(hidden_states, weight, bias, softcap, logit_scale, temperature)
    log_p = torch.log_softmax(z, dim=-1)
    results = {}
    if "log_probs" in outputs:
        results["log_probs"] = log_p.gather(1, targets.unsqueeze(1)).squeeze(1)
    if "entropy" in outputs:
        # The bound makes p log p zero, and differentiable, where p is zero.
        results["entropy"] = -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)
    if "log_sum_sq_probs" in outputs:
        results["log_sum_sq_probs"] = torch.logsumexp(2 * log_p.detach(), dim=-1)
    if "mean_logits" in outputs:
        results["mean_logits"] = z.detach().mean(-1)
    if "is_top1" in outputs:
        results["is_top1"] = z.detach().argmax(-1) == targets
    return TokenStatistics(**results)


def linear_cross_entropy_reference(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    bias: torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear_cross_entropy` in plain torch with full logits."""
    z = _full_logits(hidden_states, weight, bias, softcap, logit_scale, temperature).flatten(0, -2)
    summed = reduction if num_items_in_batch is None else "sum"
    loss = torch.nn.functional.cross_entropy(z, labels.reshape(-1), ignore_index=ignore_index, reduction=summed)
    if num_items_in_batch is not None:
        loss = loss / num_items_in_batch
    return loss.view(labels.shape) if reduction == "none" else loss
