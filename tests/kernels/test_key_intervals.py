"""Intervals of keys: they are transformers' own masks, and their block bounds leave nothing out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma4TextConfig
from transformers.masking_utils import (
    blockwise_overlay,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sliding_window_overlay,
)

from fastgemma.kernels.key_intervals import KeyIntervals, key_intervals

CPU = torch.device("cpu")


def stock_mask(batch: int, seq_len: int, window: int | None, blocks: torch.Tensor | None = None, **given: Any) -> Any:
    """What transformers builds for SDPA, as bool [batch, seq_len, seq_len]."""
    config = Gemma4TextConfig(sliding_window=window or 4, num_hidden_layers=2)
    config._attn_implementation = "eager"
    arguments = {
        "config": config,
        "inputs_embeds": torch.zeros(batch, seq_len, 4),
        "attention_mask": None,
        "past_key_values": None,
        **given,
    }
    if blocks is not None:
        mask = create_causal_mask(
            **arguments,
            or_mask_function=blockwise_overlay(blocks),
            and_mask_function=sliding_window_overlay(window) if window else None,
        )
    else:
        mask = (create_sliding_window_causal_mask if window else create_causal_mask)(**arguments)
    return (mask == 0).expand(batch, 1, seq_len, seq_len)[:, 0]


@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("seq_len", [1, 2, 13])
def test_causal(seq_len: int, window: int | None) -> None:
    intervals = key_intervals(2, seq_len, CPU, window)
    assert torch.equal(intervals.dense(), stock_mask(2, seq_len, window))
    assert intervals.causal and intervals.window == window


@pytest.mark.parametrize("side", ["left", "right", "both"])
@pytest.mark.parametrize("window", [None, 3])
def test_padding(window: int | None, side: str) -> None:
    mask = torch.ones(3, 11, dtype=torch.long)
    for row, length in enumerate((0, 4, 11)):  # none, some, all of a row is padding
        if side != "right":
            mask[row, :length] = 0
        if side != "left":
            mask[row, 11 - length :] = 0
    assert torch.equal(key_intervals(3, 11, CPU, window, mask).dense(), stock_mask(3, 11, window, attention_mask=mask))


@pytest.mark.parametrize("window", [None, 3])
def test_packed_documents(window: int | None) -> None:
    position_ids = torch.stack(
        [torch.cat([torch.arange(n) for n in lengths]) for lengths in ((5, 1, 1, 6), (13,), (1,) * 13, (1, 12))]
    )
    documents = (position_ids == 0).cumsum(1)
    actual = key_intervals(4, 13, CPU, window, documents=documents).dense()
    assert torch.equal(actual, stock_mask(4, 13, window, position_ids=position_ids))


@pytest.mark.parametrize("window", [None, 4])
def test_blocks_that_look_both_ways(window: int | None) -> None:
    blocks = torch.tensor([[-1, 0, 0, 0, -1, 1, 1, 2, 2, 2, 2, 2, -1], [-1] * 13, [0] * 13])
    intervals = key_intervals(3, 13, CPU, window, blocks=blocks)
    assert not intervals.causal
    assert torch.equal(intervals.dense(), stock_mask(3, 13, window, blocks=blocks))


@pytest.mark.parametrize("block", [16, 64])
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_block_bounds_leave_nothing_out(block: int, data: st.DataObject) -> None:
    seq_len = data.draw(st.integers(1, 200))
    bounds = st.lists(st.integers(0, seq_len), min_size=seq_len, max_size=seq_len)
    lo, hi = (torch.tensor([data.draw(bounds)], dtype=torch.int32) for _ in range(2))
    intervals = KeyIntervals(lo, hi, causal=False)
    first, end = intervals.rows_of_keys(block)
    mask = intervals.dense()[0]
    for index in range(first.shape[1]):
        rows = mask[:, index * block : (index + 1) * block].any(1).nonzero().flatten()
        if rows.numel():
            assert first[0, index] <= rows[0] and rows[-1] < end[0, index] <= seq_len
    assert intervals.rows_of_keys(block)[0] is first


def test_bounds_of_a_causal_window_are_close() -> None:
    first, end = key_intervals(1, 640, CPU, 100).rows_of_keys(64)
    assert first[0].tolist() == list(range(0, 640, 64))
    assert end[0].tolist() == [min(640, 64 * (index + 3)) for index in range(10)]


def test_rows_without_keys_widen_nothing() -> None:
    mask = torch.zeros(1, 256, dtype=torch.long)
    mask[0, 200:] = 1  # all before is padding
    first, end = key_intervals(1, 256, CPU, padding_mask=mask).rows_of_keys(64)
    assert (first >= end).tolist() == [[True, True, True, False]]
    assert first[0, 3] == 192 and end[0, 3] == 256


def test_empty() -> None:
    for shape in ((0, 5), (2, 0)):
        intervals = key_intervals(*shape, CPU, 3, padding_mask=torch.ones(shape))
        assert intervals.dense().shape == (*shape, shape[1])
        assert all(bound.shape[0] == shape[0] for bound in intervals.rows_of_keys(64))


def test_errors() -> None:
    with pytest.raises(ValueError, match="window of 0 keys"):
        key_intervals(1, 4, CPU, 0)
    with pytest.raises(ValueError, match=r"documents has shape \(2, 4\), not \(1, 4\)"):
        key_intervals(1, 4, CPU, documents=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="contiguous int32"):
        KeyIntervals(torch.zeros(1, 4), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="differ in shape"):
        KeyIntervals(torch.zeros(1, 4, dtype=torch.int32), torch.zeros(1, 5, dtype=torch.int32))
