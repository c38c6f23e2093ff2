"""Statistics of rows of softcapped logits and their gradient, in one sweep over each row.

With `logits`'s formulas and t the target, a softcap bounds every |z| by softcap / temperature, so that

    e_v = exp(z_v - z_t)      others = sum of e_v without the target's      total = 1 + others
    loss = log(total)
    dloss / du_v = e_v * dz_v/du_v / total                                  dloss / du_t = -others * dz_t/du_t / total

needs no maximum. All that a row's gradient takes from the end of the sweep is its divisor, and a product with the head
takes that as well afterwards: what is written over the logits is e_v * (1 - tanh_v^2) / 4, dz_v/du_v but for what all
have in common, and 0 for the target, whose part in the gradient is as large as all others' together. With W the head,
what is handed on makes

    dloss / dhidden = scale * (written . W) + of_target * W_t,

one number a row each, in float32.

One program streams over one row, in float32 throughout. Bytes per logit (bf16): 2 read, 2 written. The entropy is
log(total) - sum(e_v * (z_v - z_t)) / total, a difference of two numbers as large as the loss: where that is 30, it is
exact to 1e-5, not to its own last places.

Source: the shift by the target's logit instead of the largest, and the divisor and the target behind the product, are
ours; the softcap is `Gemma4ForCausalLM`'s in transformers.
"""

from __future__ import annotations

import math

import torch

from fastgemma.kernels.backend import jit, kernel, tl
from fastgemma.kernels.launch import launch
from fastgemma.kernels.logits import Readout

# The sum of squares is left to `logits`: e_v^2 has twice the exponent, and would overflow.
OUTPUTS = frozenset(("log_probs", "entropy", "mean_logits", "is_top1"))
# Of |z|: e_v, its sums, and their products with a head then stay far inside of float32's and bfloat16's range.
MAX_BOUND = 32.0


def one_sweep_suffices(readout: Readout, dtype: torch.dtype, outputs: tuple[str, ...]) -> bool:
    """Whether the gradient over logits of this dtype, and these fields of TokenStatistics, can be had here."""
    return (
        readout.softcap is not None
        and readout.softcap <= MAX_BOUND * readout.temperature
        and dtype != torch.float16  # whose range ends at e^11
        and OUTPUTS.issuperset(outputs)
    )


@jit
def _load_tanh(row_ptr, bias_ptr, cols, mask, to_exponent, HAS_BIAS: tl.constexpr):
    """tanh, with e and r of 1 - tanh^2 = 4 e r^2, which does not cancel near saturation."""
    u = tl.load(row_ptr + cols, mask=mask).to(tl.float32)
    if HAS_BIAS:
        u += tl.load(bias_ptr + cols, mask=mask).to(tl.float32)
    s = u * to_exponent
    e = tl.exp2(-tl.abs(s))  # of a negative number, which cannot overflow
    # 1 / (1 + e) by one instruction; the special functions are what this kernel waits for.
    root = tl.rsqrt(1.0 + e)
    r = root * root
    tanh = (1.0 - e) * r
    return tl.where(s < 0.0, -tanh, tanh), e, r


@kernel
def _softcapped_logits_kernel(
    logits_ptr,
    bias_ptr,
    targets_ptr,
    log_probs_ptr,
    peak_ptr,
    log_sum_ptr,
    scale_ptr,
    of_target_ptr,
    entropy_ptr,
    mean_logits_ptr,
    is_top1_ptr,
    to_exponent,
    bound,
    slope,
    n_cols: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    HAS_MEAN_LOGITS: tl.constexpr,
    HAS_IS_TOP1: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    LOG2_E: tl.constexpr = 1.4426950408889634
    to_exponent = tl.cast(to_exponent, tl.float32)
    bound = tl.cast(bound, tl.float32)
    slope = tl.cast(slope, tl.float32)
    bound_2 = bound * LOG2_E
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * n_cols
    target = tl.load(targets_ptr + row)
    in_range = (target >= 0) & (target < n_cols)
    # A target outside shifts by the logit of token 0, so that nothing overflows; its results are NaN.
    shift, shift_e, shift_r = _load_tanh(row_ptr, bias_ptr, tl.where(in_range, target, 0), None, to_exponent, HAS_BIAS)
    target_col = tl.where(in_range, target, -1).to(tl.int32)
    # Whoever writes first must not outrun those who have yet to read the target's logit.
    tl.debug_barrier()

    sums = tl.zeros((BLOCK_V,), tl.float32)
    moments = tl.zeros((BLOCK_V,), tl.float32)
    sum_tanh = tl.zeros((BLOCK_V,), tl.float32)
    top = tl.full((BLOCK_V,), -2.0, tl.float32)
    before_target = tl.full((BLOCK_V,), -2.0, tl.float32)
    for start in range(0, n_cols, BLOCK_V):
        cols = start + tl.arange(0, BLOCK_V)
        mask = None if n_cols % BLOCK_V == 0 else cols < n_cols
        tanh, e, r = _load_tanh(row_ptr, bias_ptr, cols, mask, to_exponent, HAS_BIAS)
        if mask is not None:
            # No token's tanh: beyond the others, with an exponential of zero and no slope.
            tanh = tl.where(mask, tanh, -2.0)
        # The difference first: relative to a logit like the target's it is exactly 0.
        above = (tanh - shift) * bound_2
        p = tl.exp2(above)
        # The target is left out of the sum, which would lose the others of a confident model beside its 1.
        other = cols != target_col if mask is None else mask & (cols != target_col)
        p = tl.where(other, p, 0.0)
        sums += p
        if HAS_ENTROPY:
            moments += p * above
        if HAS_MEAN_LOGITS:
            sum_tanh += tanh if mask is None else tl.where(mask, tanh, 0.0)
        if HAS_IS_TOP1:
            top = tl.maximum(top, tanh)
            before_target = tl.maximum(before_target, tl.where(cols < target_col, tanh, -2.0))
        tl.store(row_ptr + cols, (p * (e * r * r)).to(logits_ptr.dtype.element_ty), mask=mask)

    others = tl.sum(sums, axis=0)
    total = 1.0 + others
    log_sum = tl.log(total)
    not_a_number = tl.where(in_range, 0.0, float("nan"))
    tl.store(log_probs_ptr + row, not_a_number - log_sum)
    tl.store(peak_ptr + row, shift * bound)
    tl.store(log_sum_ptr + row, log_sum)
    tl.store(scale_ptr + row, slope / total + not_a_number)
    tl.store(of_target_ptr + row, -slope * (shift_e * shift_r * shift_r) * others / total + not_a_number)
    if HAS_ENTROPY:
        tl.store(entropy_ptr + row, log_sum - tl.sum(moments, axis=0) / (total * LOG2_E))
    if HAS_MEAN_LOGITS:
        tl.store(mean_logits_ptr + row, tl.sum(sum_tanh, axis=0) * bound / n_cols)
    if HAS_IS_TOP1:
        # The first of equal maxima wins, as in argmax.
        is_top1 = (shift >= tl.max(top, axis=0)) & (shift > tl.max(before_target, axis=0)) & in_range
        tl.store(is_top1_ptr + row, is_top1.to(tl.uint8))


def softcapped_logits(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    readout: Readout,
    results: dict[str, torch.Tensor],
) -> None:
    """Fills `results` from rows of logits, and writes over each row what its gradient is made of.

    Args:
        logits: [rows, vocabulary], contiguous, float32 or bfloat16.
        bias: [vocabulary], contiguous, or None.
        targets: [rows] int64; a row whose target is no token gets NaN.
        readout: one for which `one_sweep_suffices`.
        results: [rows] each: "log_probs", "scale", "of_target", "peak" (here the target's z) and "log_sum" (logsumexp
            = peak + log_sum) always, other fields of OUTPUTS where wanted; all float32, but `is_top1` uint8.
    """
    softcap = readout.softcap
    assert softcap is not None
    names = ("log_probs", "peak", "log_sum", "scale", "of_target", "entropy", "mean_logits", "is_top1")
    _softcapped_logits_kernel[(logits.shape[0],)](
        logits_ptr=logits,
        bias_ptr=logits if bias is None else bias,
        targets_ptr=targets,
        **{f"{name}_ptr": results.get(name, results["peak"]) for name in names},
        to_exponent=2.0 * math.log2(math.e) * readout.logit_scale / softcap,
        bound=softcap / readout.temperature,
        slope=4.0 * readout.logit_scale / readout.temperature,
        n_cols=logits.shape[1],
        HAS_BIAS=bias is not None,
        **{f"HAS_{name.upper()}": name in results for name in names[5:]},
        **launch("softcapped_logits", "any", logits.device).kwargs(),
    )
