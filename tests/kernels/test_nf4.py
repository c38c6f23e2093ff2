"""dequantize_nf4, bit for bit, against bitsandbytes."""

from __future__ import annotations

import dataclasses

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import Dispatched, few_examples, record_launches, same_bits, ulp

import fastgemma.kernels.backend as backend
import fastgemma.kernels.nf4 as module
from fastgemma.kernels.backend import interpreting
from fastgemma.kernels.nf4 import (
    NestedScales,
    NF4Weight,
    dequantize_nf4,
    dequantize_nf4_reference,
    dequantize_nf4_stack,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CODE = torch.linspace(-1.0, 1.0, 16)


def quantize(shape, device, dtype=torch.float16, blocksize=64, nested=True, storage=torch.uint8, scale=0.02):
    """A random weight as bitsandbytes stores it: what bitsandbytes dequantises it to, and ours of the same bytes."""
    dense = (scale * torch.randn(shape, device=device)).to(dtype)
    packed, state = bnb.quantize_4bit(
        dense, blocksize=blocksize, compress_statistics=nested, quant_type="nf4", quant_storage=storage
    )
    scales = None
    if nested:
        scales = NestedScales(state.state2.absmax, state.state2.code, state.offset, state.state2.blocksize)
    weight = NF4Weight(packed, state.absmax, state.code, torch.Size(shape), dtype, blocksize, scales)
    # As one flat row: blocks run over rows, which bitsandbytes' code for CPUs with AVX-512 gets wrong where a row ends
    # inside a block, and a weight of a single byte it transposes.
    state.shape = torch.Size((dense.numel(),))
    return bnb.dequantize_4bit(packed, state).reshape(shape), weight


def assert_equal_bits(actual, expected):
    """Equal bit for bit; the interpreter's cast to bfloat16 truncates, so there within one ulp of each element."""
    if actual.dtype == torch.bfloat16 and interpreting():
        assert actual.shape == expected.shape and expected.dtype == actual.dtype
        steps = (actual.view(torch.int16).int() - expected.view(torch.int16).int()).abs()
        assert steps.max() <= 1
    else:
        assert same_bits(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape, blocksize", [((64, 96), 64), ((33, 136), 64), ((7, 40), 128), ((128, 256), 512)])
def test_equal_to_bitsandbytes(dtype, nested, shape, blocksize, device):
    expected, weight = quantize(shape, device, dtype, blocksize, nested)
    assert_equal_bits(dequantize_nf4(weight), expected)
    assert same_bits(dequantize_nf4_reference(weight), expected)


@pytest.mark.parametrize("nested", [False, True])
def test_many_blocks_and_programs(nested, device):
    """More bytes than one program takes, more scales than one second-level block, and a ragged end."""
    expected, weight = quantize((521, 520), device, nested=nested)
    assert_equal_bits(dequantize_nf4(weight), expected)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_storage_dtypes(storage, device):
    expected, weight = quantize((64, 64), device, storage=storage)
    assert weight.packed.dtype == storage
    assert_equal_bits(dequantize_nf4(weight), expected)


@pytest.mark.parametrize("scale", [0.0, 1e-4, 1e4])
def test_extreme_scales(scale, device):
    expected, weight = quantize((32, 64), device, torch.float32, scale=scale)
    assert_equal_bits(dequantize_nf4(weight), expected)


def test_layout_by_hand(device):
    """Codes in order, high nibble first; scales per block, then per group of scales."""
    packed = torch.tensor([0x01, 0xF8, 0x3C, 0x70, 0x2E, 0x4D, 0x96, 0xA5], dtype=torch.uint8, device=device)
    numbers = [0, 1, 15, 8, 3, 12, 7, 0, 2, 14, 4, 13, 9, 6, 10, 5]
    codes = CODE.to(device)[torch.tensor(numbers, device=device)]
    flat = NF4Weight(
        packed, torch.tensor([2.0, 5.0], device=device), CODE.to(device), torch.Size((2, 8)), torch.float32, 8
    )
    assert flat.in_words
    expected = (codes * torch.tensor([2.0] * 8 + [5.0] * 8, device=device)).view(2, 8)
    assert same_bits(dequantize_nf4(flat), expected)
    table = torch.zeros(256, device=device)
    table[200], table[3] = 0.25, -0.5
    nested = NestedScales(
        torch.tensor([2.0, 10.0], device=device), table, torch.tensor(0.125, device=device), blocksize=1
    )
    scale_codes = torch.tensor([200, 3], dtype=torch.uint8, device=device)
    weight = dataclasses.replace(flat, absmax=scale_codes, nested=nested)
    expected = (codes * torch.tensor([0.625] * 8 + [-4.875] * 8, device=device)).view(2, 8)
    assert same_bits(dequantize_nf4(weight), expected)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", [(33, 130), (7, 30), (1, 2)])
def test_weights_that_do_not_come_in_words(nested, shape, device, monkeypatch):
    """And in a stack, and into rows apart: the kernel leaves them to the reference."""
    expected, weight = quantize(shape, device, nested=nested)
    log = record_launches(monkeypatch, module)
    assert same_bits(dequantize_nf4(weight), expected)
    assert same_bits(dequantize_nf4_stack([weight, weight], expected.dtype), torch.cat([expected, expected]))
    assert log == []


@pytest.mark.parametrize("behind", [1, 4, 8, 12])
def test_rows_at_any_distance(behind, device, monkeypatch):
    expected, weight = quantize((5, 64), device)
    whole = torch.full((10, 64 + behind), 7.0, dtype=expected.dtype, device=device)
    log = record_launches(monkeypatch, module)
    dequantize_nf4_stack([weight, weight], expected.dtype, whole[:, :64])
    assert same_bits(whole[:, :64].contiguous(), torch.cat([expected, expected]))
    assert (whole[:, 64:] == 7).all() and len(log) == (behind == 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_into_a_reused_buffer_of_any_dtype(dtype, device):
    dense, weight = quantize((33, 128), device, torch.float32)
    out = torch.full((33, 128), torch.nan, dtype=dtype, device=device)
    with Dispatched() as seen:
        result = dequantize_nf4(weight, out)
    assert result is out and seen.allocated == []
    assert_equal_bits(out, dense.to(dtype))
    other, weight = quantize((33, 128), device, torch.float32)
    assert_equal_bits(dequantize_nf4(weight, out), other.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("heights", [(64, 7), (129, 1, 33), (1, 1, 1), (3, 5, 7, 9), (4,), (0, 8)], ids=str)
def test_a_stack_is_its_weights(heights, nested, dtype, device, monkeypatch):
    weights = [quantize((rows, 192), device, torch.float32, nested=nested)[1] for rows in heights if rows]
    for position in [index for index, rows in enumerate(heights) if not rows]:
        empty = dataclasses.replace(weights[0], packed=weights[0].packed[:0], shape=torch.Size((0, 192)))
        weights.insert(position, empty)
    expected = torch.cat([dequantize_nf4(w, torch.empty(w.shape, dtype=dtype, device=device)) for w in weights])
    log = record_launches(monkeypatch, module)
    for _ in range(2):  # worked out, and remembered
        assert same_bits(dequantize_nf4_stack(weights, dtype), expected)
    assert len(log) == (2 if 2 <= len(heights) <= 3 else 2 * len(heights))


@pytest.mark.parametrize("heights", [(5,), (64, 7), (129, 1, 33), (3, 5, 7, 9)], ids=str)
@pytest.mark.parametrize("columns", [64, 192, 1536])
def test_rows_apart_leave_what_lies_between(heights, columns, device):
    """Into the first columns of a wider matrix, in programs that begin in the middle of a row."""
    weights = [quantize((rows, columns), device, torch.float32)[1] for rows in heights]
    expected = torch.cat([dequantize_nf4(weight) for weight in weights])
    whole = torch.full((sum(heights) + 1, columns + 16), 7.0, device=device)
    out = whole[: sum(heights), :columns]
    assert dequantize_nf4_stack(weights, torch.float32, out).data_ptr() == out.data_ptr()
    assert same_bits(out.contiguous(), expected)
    assert (whole[:, columns:] == 7).all() and (whole[-1] == 7).all()


def test_a_stack_of_unlike_weights(device):
    """Another block size, and scales that are not nested: one launch does not do."""
    weights = [quantize((32, 128), device, torch.float32, blocksize, nested)[1]
               for blocksize, nested in ((64, True), (128, True), (64, False))]  # fmt: skip
    expected = torch.cat([dequantize_nf4(weight) for weight in weights])
    assert same_bits(dequantize_nf4_stack(weights, torch.float32), expected)


def test_one_launch_and_nothing_written(device, monkeypatch):
    _, weight = quantize((65, 64), device)
    tensors = [weight.packed, weight.absmax, weight.code, weight.nested.absmax, weight.nested.code]
    before = [t.clone() for t in tensors]
    log = record_launches(monkeypatch, module)
    with Dispatched() as seen:
        dequantize_nf4(weight)
    assert [launched.name for launched in log] == ["_dequantize_nf4_kernel"]
    assert seen.allocated == [(65, 64)]
    assert all(same_bits(t, b) for t, b in zip(tensors, before))


def test_not_finite_scale_stays_in_its_block(device):
    expected, weight = quantize((4, 64), device, torch.float32, nested=False)
    weight.absmax[2] = torch.nan
    actual = dequantize_nf4(weight)
    assert actual[2].isnan().all()
    assert same_bits(actual[[0, 1, 3]], expected[[0, 1, 3]])


def test_empty_weight(device):
    _, weight = quantize((2, 64), device)
    empty = dataclasses.replace(weight, shape=torch.Size((0, 64)), packed=weight.packed[:0], absmax=weight.absmax[:0])
    assert dequantize_nf4(empty).shape == (0, 64)


def test_device_and_dtype_of_a_weight(device):
    _, weight = quantize((4, 64), device)
    assert weight.device.type == device.type and dequantize_nf4(weight).dtype == weight.dtype == torch.float16


@pytest.mark.parametrize(
    "change, out, message",
    [
        ({"shape": torch.Size((3, 3))}, None, "even number"),
        ({}, torch.empty(64, 4), "row matrix"),
        ({}, torch.empty(64, 4).t(), "row matrix"),
        ({}, torch.empty(4, 64, device="meta"), "meta"),
        ({"absmax": torch.empty(4, device="meta")}, None, "meta"),
    ],
)
def test_errors(change, out, message, device):
    _, weight = quantize((4, 64), device)
    if out is not None and out.device.type == "cpu":
        out = out.to(device)
    with pytest.raises(ValueError, match=message):
        dequantize_nf4(dataclasses.replace(weight, **change), out)


@pytest.mark.parametrize("nested", [False, True])
def test_runs_the_reference_without_triton(nested, device, monkeypatch):
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    log = record_launches(monkeypatch, module)
    expected, weight = quantize((33, 130), device, nested=nested)
    assert same_bits(dequantize_nf4(weight), expected)
    assert same_bits(dequantize_nf4(weight, torch.empty_like(expected)), expected)
    assert log == []


@few_examples
@given(rows=st.integers(1, 60), half=st.integers(1, 60), seed=st.integers(0, 2**31), nested=st.booleans())
def test_any_shape(rows, half, seed, nested, device):
    torch.manual_seed(seed)
    expected, weight = quantize((rows, 2 * half), device, torch.float32, nested=nested)
    assert_equal_bits(dequantize_nf4(weight), expected)


def test_quantisation_error_is_that_of_four_bits(device):
    """Against the weight itself: not a layout that merely agrees with itself."""
    dense = torch.randn(64, 256, device=device)
    packed, state = bnb.quantize_4bit(dense, blocksize=64, compress_statistics=False, quant_type="nf4")
    weight = NF4Weight(packed, state.absmax, state.code, dense.shape, torch.float32, 64)
    error = (dequantize_nf4(weight) - dense).abs()
    widest_gap = state.code.sort().values.diff().max().item() / 2
    bound = widest_gap * dense.abs().view(-1, 64).amax(1).repeat_interleave(64).view_as(dense)
    assert (error <= bound + ulp(4.0, torch.float32)).all()
