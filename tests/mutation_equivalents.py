"""Mutants of the kernels that compute the same, reviewed one by one: (function, line before, line after) -> why."""

from __future__ import annotations

Change = tuple[str, str, str]


def _same(reason: str, *changes: Change) -> dict[Change, str]:
    """Of each: the function, a line of it with {braces} around what changes, and what it changes to."""
    found = {}
    for function, line, new in changes:
        start, _, rest = line.partition("{")
        old, _, end = rest.partition("}")
        found[function, start + old + end, start + new + end] = reason
    return found


NAN = "float('nan')"
_SUM = "(tl.abs(tl.sum(tl.sum(x, axis=1), axis=0)) {} float('inf'))"

EQUIVALENT: dict[Change, str] = {
    **_same(
        "masked lanes meet no others, and are not stored",
        (
            "_geglu_fwd_kernel",
            "gate = tl.load(gate_ptr + rows * gate_row_stride + cols, mask=mask, other={0.0}).to(tl.float32)",
            NAN,
        ),
        (
            "_geglu_fwd_kernel",
            "up = tl.load(up_ptr + rows * up_row_stride + cols, mask=mask, other={0.0}).to(tl.float32)",
            NAN,
        ),
        (
            "_geglu_bwd_kernel",
            "dh = tl.load(dh_ptr + rows * dh_row_stride + cols, mask=mask, other={0.0}).to(tl.float32)",
            NAN,
        ),
        (
            "_geglu_bwd_kernel",
            "gate = tl.load(gate_ptr + rows * gate_row_stride + cols, mask=mask, other={0.0}).to(tl.float32)",
            NAN,
        ),
        (
            "_geglu_bwd_kernel",
            "up = tl.load(up_ptr + rows * up_row_stride + cols, mask=mask, other={0.0}).to(tl.float32)",
            NAN,
        ),
        (
            "_rms_norm_fwd_kernel",
            "y = y * tl.load(weight_ptr + cols, mask=col_mask, other={0.0}).to(tl.float32)[None, :]",
            NAN,
        ),
        (
            "_rms_norm_fwd_kernel",
            "residual = tl.load(residual_ptr + rows[:, None] * residual_row_stride + cols[None, :], mask=mask, "
            "other={0.0})",
            NAN,
        ),
        (
            "_rms_norm_bwd_kernel",
            "addend = tl.load(addend_ptr + rows[:, None] * addend_row_stride + cols[None, :], mask=mask, other={0.0})",
            NAN,
        ),
        ("_dequantize_block", "packed = tl.load(packed_ptr + words, mask=mask, other={0})", "1"),
        ("_dequantize_block", "scale_code = tl.load(absmax_ptr + block, mask=mask, other={0}).to(tl.int32)", "1"),
        (
            "_dequantize_block",
            "absmax = absmax * tl.load(nested_absmax_ptr + block // NESTED_BLOCKSIZE, mask=mask, other={0.0})",
            NAN,
        ),
        ("_dequantize_block", "absmax = tl.load(absmax_ptr + block, mask=mask, other={0.0})", NAN),
    ),
    **_same(
        "the blocks lie within the matrix: before the second begin rows within it, and columns of a block end with it",
        (
            "_block_diagonal_kernel",
            "inside = {mask & (rows < first_row1)} & (own >= 0) & (own < rank0)",
            "(rows < first_row1)",
        ),
    ),
    **_same(
        "masked lanes meet no others, and are not stored",
        (
            "_qk_norm_rope_fwd_kernel",
            "w1 = tl.load(weight_ptr + cols, mask=cols < HALF, other={0.0}).to(tl.float32)[None, :]",
            NAN,
        ),
        (
            "_qk_norm_rope_fwd_kernel",
            "w2 = tl.load(weight_ptr + HALF + cols, mask=cols < HALF, other={0.0}).to(tl.float32)[None, :]",
            NAN,
        ),
        (
            "_qk_norm_rope_fwd_kernel",
            "w1 = tl.load(weight_ptr + cols, mask={cols < HALF}, other=0.0).to(tl.float32)[None, :]",
            "(cols <= HALF)",  # the other half's first weight
        ),
        (
            "_attention_delta_kernel",
            "dout = tl.load(dout_ptr + rows[:, None] * HEAD_DIM + dims, mask=mask, other={0.0}).to(tl.float32)",
            NAN,
        ),
        (
            "_attention_delta_kernel",
            "out = tl.load(out_ptr + rows[:, None] * HEAD_DIM + dims, mask=mask, other={0.0}).to(tl.float32)",
            NAN,
        ),
        ("_gradient_of_keys", "acc += tl.load(ptrs, mask=mask, other={0.0})", NAN),
        (
            "_attention_sum_kernel",
            "total += tl.load(parts_ptr + (side * PARTS + part) * n_elements + offsets, mask=mask, other={0.0})",
            NAN,
        ),
    ),
    **_same(
        "masked lanes become -inf last of all, and their slope is not stored",
        ("_load_logits", "z = tl.load(row_ptr + cols, mask=mask, other={0.0}).to(tl.float32)", NAN),
        ("_load_logits", "z += tl.load(bias_ptr + cols, mask=mask, other={0.0}).to(tl.float32)", NAN),
    ),
    **_same(
        "both choices are a zero at 0", ("_load_logits", "z = softcap * tl.where({z < 0.0}, -tanh, tanh)", "(z <= 0.0)")
    ),
    **_same(
        "the tanh of a zero is a zero of either sign",
        ("_load_tanh", "return tl.where({s < 0.0}, -tanh, tanh), e, r", "(s <= 0.0)"),
    ),
    **_same(
        "what comes before the target begins below any tanh",
        (
            "_softcapped_logits_kernel",
            "before_target = tl.full((BLOCK_V,), -{2.0}, tl.float32)",
            "2.02",
        ),
        (
            "_softcapped_logits_kernel",
            "before_target = tl.maximum(before_target, tl.where(cols < target_col, tanh, -{2.0}))",
            "2.02",
        ),
    ),
    **_same(
        "a lane beyond the vocabulary has any tanh below all others",
        ("_softcapped_logits_kernel", "tanh = tl.where(mask, tanh, {-2.0})", "-2.02"),
    ),
    **_same(
        "where every logit so far is -inf, any finite shift makes every exponential 0",
        (
            "_linear_cross_entropy_fwd_kernel",
            'shift = tl.where(new_peak == float("-inf"), {0.0}, new_peak)',
            "1.0",
        ),
    ),
    **_same(
        "the choice is multiplied by p, which is 0 there",
        (
            "_linear_cross_entropy_bwd_kernel",
            "gradient -= grad_entropy * p * tl.where(p == 0.0, {0.0}, log_p + entropy)",
            "1.0",
        ),
    ),
    **_same(
        "a missing row has no keys, whichever its lo: its hi is 0",
        ("row_tile", "lo = tl.load(lo_ptr + positions, mask=exists, other={0})", "1"),
    ),
    **_same(
        "the lo of a missing row is 0 already",
        (
            "full_bounds",
            "last_lo = tl.max({tl.where(exists, lo, 0)}, axis=0)",
            "lo",
        ),
    ),
    **_same(
        "slower, the same numbers: visits tiles of which no row has a key",
        (
            "key_bounds",
            "return tl.min(tl.where(some, lo, NO_KEY), axis=0), tl.max({tl.where(some, hi, 0)}, axis=0)",
            "hi",
        ),
    ),
    **_same(
        "slower, the same numbers: a tile that all rows attend to is masked all the same",
        ("full_bounds", "first_hi = tl.min({tl.where(exists, hi, NO_KEY)}, axis=0)", "hi"),
        (
            "full_bounds",
            "full = first + (tl.maximum(last_lo - first, 0) + {BLOCK_N - 1}) // BLOCK_N * BLOCK_N",
            "BLOCK_N + 1",
        ),
        (
            "full_bounds",
            "full = first + ({tl.maximum(last_lo - first, 0) + BLOCK_N - 1}) // BLOCK_N * BLOCK_N",
            "tl.maximum(last_lo - first, 0) + BLOCK_N",
        ),
        ("_attention_fwd_kernel", "lo, hi, seq_len, scale_log2, {False}, False, KEY_STRIDE, BLOCK_N,", "True"),
    ),
    **_same(
        "slower, the same numbers: what is filled in is masked, and starts the second pass, which leaves it out",
        ("_tile", "tile = tl.load(ptrs + wide(first) * KEY_STRIDE, mask=mask, other={0.0})", NAN),
        (
            "_attention_fwd_kernel",
            "q = tl.load(q_ptr + start * HEAD_DIM + places, mask=exists[:, None], other={0.0})",
            NAN,
        ),
        (
            "_sum_values",
            "v = tl.load(v_ptrs + wide(key) * KEY_STRIDE, mask=columns[:, None] < seq_len - key, other={0.0})",
            NAN,
        ),
        (
            "_sum_keys",
            "k = tl.load(k_ptrs + wide(key) * KEY_STRIDE, mask=columns[:, None] < seq_len - key, other={0.0})",
            NAN,
        ),
        ("_sum_rows", "x = tl.load(x_ptrs, mask=mask[:, None], other={0.0})", NAN),
    ),
    **_same(
        "slower, the same numbers: there is a second pass where none is needed",
        ("all_finite", 'return {tl.abs(tl.sum(tl.sum(x, axis=1), axis=0)) < float("inf")}', _SUM.format(">=")),
    ),
    **_same(
        "an infinity that came of a weight of 0 is a NaN, so what is infinite alone is what a second pass would give",
        ("all_finite", 'return {tl.abs(tl.sum(tl.sum(x, axis=1), axis=0)) < float("inf")}', _SUM.format("<=")),
    ),
    **_same(
        "programs with an even and an odd number change places",
        ("_gradients_of_keys_and_values", "if {for_k == 1}:", "(not for_k == 1)"),
        ("_gradients_of_keys_and_values", "if {for_k == 1}:", "(for_k != 1)"),
    ),
    **_same(
        "a missing row holds zeros, which are finite",
        ("_sum_rows", "hi = tl.load(hi_ptr + positions, mask=mask, other={0})", "1"),
        ("_sum_rows", "lo = tl.load(lo_ptr + positions, mask=mask, other={0})", "1"),
    ),
    **_same(
        "slower, the same numbers: the first pass looks for what is not finite already",
        ("_attention_fwd_kernel", "lo, hi, seq_len, scale_log2, True, {False}, KEY_STRIDE, BLOCK_N,", "True"),
        ("_attention_fwd_kernel", "lo, hi, seq_len, scale_log2, False, {False}, KEY_STRIDE, BLOCK_N,", "True"),
        (
            "_attention_output_kernel",
            "seq_len, {False}, KV_HEADS * HEAD_DIM, DIMS, BLOCK_M, BLOCK_N, BLOCK_K,",
            "True",
        ),
        (
            "_gradient_of_keys",
            "{False}, KV_HEADS, GROUP, HEAD_DIM, DIMS, BLOCK_N, BLOCK_K, STAGES,",
            "True",
        ),
        (
            "_gradient_of_queries",
            "first, end, ds_rows, k_base, lo, hi, seq_len, n_slots, {False}, KV_HEADS * HEAD_DIM, DIMS, BLOCK_M, "
            "SLOT_N,",
            "True",
        ),
    ),
    **_same(
        "its weights are 0, or NaN where a row attends to it: any finite number does",
        ("finite_rows", "return tl.where(bad[:, None], {0.0}, x).to(x.dtype), bad", "1.0"),
    ),
    **_same(
        "far below any score, as well",
        ("_attention_fwd_kernel", "peak = tl.full([BLOCK_M], -{1e30}, tl.float32)", "1.01e+30"),
        ("_attention_scores_kernel", "s = tl.where(keep, s * scale_log2, -{1e30})", "1.01e+30"),
        ("_attention_output_kernel", "highest = tl.full([BLOCK_M], -{1e30}, tl.float32)", "1.01e+30"),
    ),
    **_same(
        "rows without keys have sums of zeros, whatever divides them, and their lse is set apart",
        ("_store", "total = tl.where(some, total, {1.0})", "1.01"),
        ("_attention_output_kernel", "total = {tl.where(some, total, 1.0)}", "total"),
        (
            "_attention_output_kernel",
            "out = {tl.where(some[:, None], acc / total[:, None], 0.0)}",
            "(acc / total[:, None])",
        ),
    ),
    **_same(
        "-1e30 in place of a score has an exponential of 0 already, but in tiles whose weight is 0 for the row",
        (
            "_attention_scores_kernel",
            "p = {tl.where(keep, tl.exp2(s - peak[:, None]), 0.0)}",
            "tl.exp2(s - peak[:, None])",
        ),
    ),
    **_same(
        "slower, the same numbers: of a tile that no row attends to everything is masked, and 0",
        ("_attention_ds_kernel", "touched = ({first_key < end}) & (first_key + BLOCK_N > first)", "first_key <= end"),
        (
            "_attention_ds_kernel",
            "touched = {(first_key < end) & (first_key + BLOCK_N > first)}",
            "((first_key < end) | (first_key + BLOCK_N > first))",
        ),
    ),
    **_same(
        "writes zeros of a tile that nothing reads",
        (
            "_attention_ds_kernel",
            "wanted = {(position < end_position) & (tl.max(positions, axis=0) >= first_position)}",
            "((position < end_position) | (tl.max(positions, axis=0) >= first_position))",
        ),
    ),
    **_same(
        "writes scores, all of them masked, of a tile that nothing reads",
        (
            "_attention_scores_kernel",
            "if (first_key < end) & ({first_key + BLOCK_N > first}):",
            "first_key + BLOCK_N >= first",
        ),
    ),
    **_same(
        "behind the last tile either of two fillings keeps a tile from being wanted",
        (
            "_attention_ds_kernel",
            "end_position = tl.load(end_ptr + batch * n_tiles + key_tile, mask=known, other={0})",
            "1",
        ),
        (
            "_attention_ds_kernel",
            "first_position = tl.load(first_ptr + batch * n_tiles + key_tile, mask=known, other={NO_KEY})",
            "1",
        ),
    ),
}
