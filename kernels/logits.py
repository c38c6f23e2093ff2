"""Statistics of rows of raw logits, and their gradient written over them.

With u a row of `hidden @ weight.T`:

    s = logit_scale * (u + bias)
    z = softcap * tanh(s / softcap) / temperature      (no softcap: z = s / temperature)
    log_prob = z[target] - logsumexp(z)                loss = -log_prob
    entropy = -sum(p * log p)                          p = softmax(z)

    dloss / du_v    = (p_v - 1[v = target]) * dz_v/du_v
    dentropy / du_v = -p_v * (log p_v + entropy) * dz_v/du_v
    dz/du = (1 - tanh^2) * logit_scale / temperature

One program streams over one row, in float32 throughout. Bytes per logit (bf16): 2 read; with the gradient 4 read and
2 written; from saved statistics 2 read and 2 written.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018); the final softcap of
`Gemma4ForCausalLM` in transformers; the per-token statistics of TRL's fused head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastgemma.kernels.backend import jit, kernel, tl
from fastgemma.kernels.launch import launch


class TokenStatistics(NamedTuple):
    """Per-token results, each [N] or None where it was not asked for. Only the first two carry gradients."""

    log_probs: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None


@dataclass(frozen=True)
class Readout:
    """How raw logits become z, but for the bias."""

    softcap: float | None
    logit_scale: float
    temperature: float


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


def logits_fwd(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    readout: Readout,
    results: dict[str, torch.Tensor],
    overwrite_logits: bool,
) -> None:
    """Fills `results` from rows of logits, without autograd.

    Args:
        logits: [rows, vocabulary], contiguous; `overwrite_logits` writes the gradient of a unit loss over them.
        bias: [vocabulary], contiguous, or None.
        targets: [rows] int64; a row whose target is no token gets NaN.
        readout: what z takes beside them.
        results: [rows] each: "log_probs", "peak" and "log_sum" (logsumexp = peak + log_sum) always, other fields of
            TokenStatistics where wanted; all float32, but `is_top1` uint8.
    """
    _linear_cross_entropy_fwd_kernel[(logits.shape[0],)](
        **{f"{name}_ptr": results.get(name, results["peak"]) for name in (*TokenStatistics._fields, "peak", "log_sum")},
        **{f"HAS_{name.upper()}": name in results for name in TokenStatistics._fields[1:]},
        STORE_GRADIENT=overwrite_logits,
        **_arguments(logits, bias, targets, readout),
    )


def logits_bwd(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    readout: Readout,
    peak: torch.Tensor,
    log_sum: torch.Tensor,
    entropy: torch.Tensor | None,
    grad_log_probs: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
) -> None:
    """Writes over rows of logits their gradient, from what `logits_fwd` found and one upstream per row.

    `entropy` may be None where `grad_entropy` is; all of [rows] are contiguous.
    """
    _linear_cross_entropy_bwd_kernel[(logits.shape[0],)](
        peak_ptr=peak,
        log_sum_ptr=log_sum,
        entropy_ptr=peak if entropy is None else entropy,
        grad_log_probs_ptr=peak if grad_log_probs is None else grad_log_probs,
        grad_entropy_ptr=peak if grad_entropy is None else grad_entropy,
        HAS_GRAD_LOG_PROBS=grad_log_probs is not None,
        HAS_GRAD_ENTROPY=grad_entropy is not None,
        **_arguments(logits, bias, targets, readout),
    )


def _arguments(
    logits: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, readout: Readout
) -> dict[str, Any]:
    """What both kernels take, compiler options last."""
    return {
        "logits_ptr": logits,
        "bias_ptr": logits if bias is None else bias,
        "targets_ptr": targets,
        "logit_scale": readout.logit_scale,
        "softcap": 1.0 if readout.softcap is None else readout.softcap,
        "inverse_temperature": 1.0 / readout.temperature,
        "n_cols": logits.shape[1],
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": readout.softcap is not None,
        **launch("linear_cross_entropy", "any", logits.device).kwargs(),
    }
