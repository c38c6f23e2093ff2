"""NF4 dequantisation, nested scales included, of one weight or a stack in one launch; bit-equal to bitsandbytes.

Two 4-bit codes per byte, high nibble first, over the flattened [out_features, in_features] weight; one scale per
block of `blocksize` weights:

    w = code[nibble] * absmax[block]
    absmax[block] = nested_code[nested_absmax_code[block]] * nested_absmax[block // 256] + offset     (double quantised)

The two roundings of the second line are kept apart (no fused multiply-add), as bitsandbytes does them. Bytes that must
move per weight (bf16): 0.5 of codes, 1/64 or so of scales, 2 written.

Source: Dettmers et al., "QLoRA" (2023); the layout of `bitsandbytes.functional.QuantState`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastgemma.kernels.backend import cdiv, jit, kernel, runs_kernel, tl
from fastgemma.kernels.launch import launch

# Grid and arguments of a launch, but for its output.
_Launch = tuple[tuple[int, ...], dict[str, Any]]
# Weights of one input that one launch takes: queries, keys and values.
_MAX_STACK = 3


@dataclass(frozen=True)
class NestedScales:
    """Scales that are themselves quantised to 8 bits: codes [blocks] uint8 are `NF4Weight.absmax`."""

    absmax: torch.Tensor  # [ceil(blocks / blocksize)] float32
    code: torch.Tensor  # [256] float32
    offset: torch.Tensor  # [] float32
    blocksize: int  # scales per second-level scale; a power of two


@dataclass(frozen=True)
class NF4Weight:
    """A 4-bit weight as bitsandbytes stores it. `dtype` is what it dequantises to."""

    packed: torch.Tensor  # any dtype of storage, 4 bits per weight in order
    absmax: torch.Tensor  # [blocks] float32, or uint8 codes with `nested`
    code: torch.Tensor  # [16] float32
    shape: torch.Size  # (out_features, in_features)
    dtype: torch.dtype
    blocksize: int  # weights per scale; a power of two
    nested: NestedScales | None = None

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def pointers(self, number: str = "") -> dict[str, torch.Tensor]:
        """The kernel's arguments for this weight, or for the weight of this number in a stack."""
        nested = self.nested
        return {
            f"packed{number}_ptr": self.packed.reshape(-1).view(torch.int32),
            f"absmax{number}_ptr": self.absmax,
            f"code{number}_ptr": self.code,
            f"nested_absmax{number}_ptr": self.code if nested is None else nested.absmax,
            f"nested_code{number}_ptr": self.code if nested is None else nested.code,
            f"offset{number}_ptr": self.code if nested is None else nested.offset,
        }

    @functools.cached_property
    def in_words(self) -> bool:
        """Whether the kernel can read it: eight weights of one block from every four bytes."""
        return self.shape.numel() % 8 == 0 and self.blocksize % 8 == 0 and self.packed.data_ptr() % 4 == 0

    @property
    def layout(self) -> dict[str, int]:
        """What weights must agree in to be dequantised by one launch."""
        return {
            "NESTED": self.nested is not None,
            "WORDS_PER_BLOCK": self.blocksize // 8,
            "NESTED_BLOCKSIZE": 1 if self.nested is None else self.nested.blocksize,
        }

    @functools.cached_property
    def launch(self) -> _Launch:
        """How to dequantise this weight, worked out once: it is dequantised again and again."""
        return _launch([self], {**self.pointers(), "n_words": self.shape.numel() // 8})

    @functools.cached_property
    def stacks(self) -> dict[tuple[int, ...], tuple[Sequence[NF4Weight], _Launch | None]]:
        """The same for stacks that begin with this weight, under the other weights' ids, beside these weights; None
        where one launch does not do."""
        return {}


def _launch(weights: Sequence[NF4Weight], arguments: dict[str, Any]) -> _Launch:
    config = launch("dequantize_nf4", "any", weights[0].device)
    blocks = [cdiv(weight.shape.numel() // 8, config.blocks["BLOCK"]) for weight in weights]
    grid = (blocks[0],) if len(weights) == 1 else (max(blocks), len(weights))
    # The interpreter does not know the option.
    options = {} if weights[0].device.type == "cpu" else {"enable_fp_fusion": False}
    return grid, {**arguments, **weights[0].layout, **config.kwargs(), **options}


def _stack_launch(weights: Sequence[NF4Weight]) -> _Launch | None:
    first = weights[0]
    if not 2 <= len(weights) <= _MAX_STACK:
        return None
    if any(weight.layout != first.layout or not weight.in_words for weight in weights):
        return None
    arguments: dict[str, Any] = {}
    for number in range(_MAX_STACK):
        arguments |= weights[min(number, len(weights) - 1)].pointers(str(number))
    for number in range(_MAX_STACK):
        arguments[f"n_words{number}"] = weights[number].shape.numel() // 8 if number < len(weights) else 0
    return _launch(weights, arguments)


@jit
def _dequantize_block(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    out_ptr,
    n_words,
    out_row_stride,
    COLUMNS: tl.constexpr,  # in_features where rows of the output are apart, else 0
    NESTED: tl.constexpr,
    WORDS_PER_BLOCK: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first_word = tl.program_id(0).to(tl.int64) * BLOCK
    numbers = tl.arange(0, BLOCK)
    words = first_word + numbers
    mask = words < n_words
    packed = tl.load(packed_ptr + words, mask=mask, other=0)
    block = words // WORDS_PER_BLOCK
    if NESTED:
        scale_code = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        absmax = tl.load(nested_code_ptr + scale_code)
        absmax = absmax * tl.load(nested_absmax_ptr + block // NESTED_BLOCKSIZE, mask=mask, other=0.0)
        absmax = absmax + tl.load(offset_ptr)
    else:
        absmax = tl.load(absmax_ptr + block, mask=mask, other=0.0)
    # The bytes of a word come lowest first, the halves of a byte highest first.
    places = tl.arange(0, 8)
    codes = (packed[:, None] >> ((places ^ 1) * 4)[None, :]) & 15
    weights = tl.load(code_ptr + codes) * absmax[:, None]
    start = first_word * 8
    row_starts = numbers * 8
    if COLUMNS:
        # The first element's row is worked out once for the program, so that the rest is in 32 bits; a word's weights
        # lie in one row, and are stored together.
        columns = (start % COLUMNS).to(tl.int32) + row_starts
        # Triton 3.6 does not see it, and would store every weight by itself.
        row_starts = tl.multiple_of(columns // COLUMNS * out_row_stride + columns % COLUMNS, 8)
        start = start // COLUMNS * out_row_stride
    out_ptrs = out_ptr + start + row_starts[:, None] + places[None, :]
    tl.store(out_ptrs, weights.to(out_ptr.dtype.element_ty), mask=mask[:, None])


@kernel
def _dequantize_nf4_kernel(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    out_ptr,
    n_words,
    out_row_stride,
    COLUMNS: tl.constexpr,
    NESTED: tl.constexpr,
    WORDS_PER_BLOCK: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _dequantize_block(
        packed_ptr, absmax_ptr, code_ptr, nested_absmax_ptr, nested_code_ptr, offset_ptr, out_ptr, n_words,
        out_row_stride, COLUMNS, NESTED, WORDS_PER_BLOCK, NESTED_BLOCKSIZE, BLOCK,
    )  # fmt: skip


@kernel
def _dequantize_nf4_stack_kernel(
    packed0_ptr,
    absmax0_ptr,
    code0_ptr,
    nested_absmax0_ptr,
    nested_code0_ptr,
    offset0_ptr,
    packed1_ptr,
    absmax1_ptr,
    code1_ptr,
    nested_absmax1_ptr,
    nested_code1_ptr,
    offset1_ptr,
    packed2_ptr,
    absmax2_ptr,
    code2_ptr,
    nested_absmax2_ptr,
    nested_code2_ptr,
    offset2_ptr,
    out_ptr,
    n_words0,
    n_words1,
    n_words2,
    out_row_stride,
    COLUMNS: tl.constexpr,
    NESTED: tl.constexpr,
    WORDS_PER_BLOCK: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start1 = 8 * n_words0.to(tl.int64)
    start2 = start1 + 8 * n_words1
    if COLUMNS:
        start1 = start1 // COLUMNS * out_row_stride
        start2 = start2 // COLUMNS * out_row_stride
    if tl.program_id(1) == 0:
        _dequantize_block(
            packed0_ptr, absmax0_ptr, code0_ptr, nested_absmax0_ptr, nested_code0_ptr, offset0_ptr,
            out_ptr, n_words0, out_row_stride, COLUMNS,
            NESTED, WORDS_PER_BLOCK, NESTED_BLOCKSIZE, BLOCK,
        )  # fmt: skip
    elif tl.program_id(1) == 1:
        _dequantize_block(
            packed1_ptr, absmax1_ptr, code1_ptr, nested_absmax1_ptr, nested_code1_ptr, offset1_ptr,
            out_ptr + start1, n_words1, out_row_stride, COLUMNS,
            NESTED, WORDS_PER_BLOCK, NESTED_BLOCKSIZE, BLOCK,
        )  # fmt: skip
    else:
        _dequantize_block(
            packed2_ptr, absmax2_ptr, code2_ptr, nested_absmax2_ptr, nested_code2_ptr, offset2_ptr,
            out_ptr + start2, n_words2, out_row_stride, COLUMNS,
            NESTED, WORDS_PER_BLOCK, NESTED_BLOCKSIZE, BLOCK,
        )  # fmt: skip


def dequantize_nf4(weight: NF4Weight, out: torch.Tensor | None = None) -> torch.Tensor:
    """The dense weight of an NF4 one.

    The kernel takes weights of blocks and rows of multiples of 8 elements, as every Gemma 4 linear has; others, and a
    strided `out` of other rows, go through the reference.

    Args:
        weight: with an even number of elements.
        out: row matrix to fill, of `weight.shape`, a floating dtype and unit column stride; None allocates one of
            `weight.dtype`.

    Returns:
        [out_features, in_features], equal bit for bit to `bitsandbytes.functional.dequantize_4bit`.

    Raises:
        ValueError: an odd number of weights, an `out` that does not fit, or different devices.
    """
    numel = weight.shape.numel()
    if numel % 2:
        raise ValueError(f"fastgemma: dequantize_nf4 needs an even number of weights, got {tuple(weight.shape)}.")
    if out is None:
        out = weight.absmax.new_empty(weight.shape, dtype=weight.dtype)
    elif out.shape != weight.shape or out.stride(1) != 1 or out.stride(0) < out.shape[1]:
        raise ValueError(
            f"fastgemma: dequantize_nf4 needs a row matrix of {tuple(weight.shape)}, got {tuple(out.shape)} with "
            f"strides {out.stride()}."
        )
    rows = _rows(out)
    if not runs_kernel(weight.packed, weight.absmax, out) or not weight.in_words or rows is None:
        return out.copy_(dequantize_nf4_reference(weight))
    if numel:
        grid, arguments = weight.launch
        _dequantize_nf4_kernel[grid](out_ptr=out, **rows, **arguments)
    return out


def _rows(out: torch.Tensor) -> dict[str, int] | None:
    """Where the kernel writes the rows of `out`; None where eight weights might not lie together."""
    row_stride, columns = out.stride(0), out.shape[1]
    if row_stride == columns:
        return {"out_row_stride": row_stride, "COLUMNS": 0}
    return None if row_stride % 8 or columns % 8 else {"out_row_stride": row_stride, "COLUMNS": columns}


def dequantize_nf4_stack(
    weights: Sequence[NF4Weight], dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The dense weights, one below the other: [sum of out_features, in_features], in one launch for up to three.

    `out` is a row matrix of that shape, dtype and unit column stride to fill, or None.
    """
    heights = [weight.shape[0] for weight in weights]
    first = weights[0]
    if out is None:
        out = first.absmax.new_empty((sum(heights), first.shape[1]), dtype=dtype)
    if len(weights) == 1:
        return dequantize_nf4(first, out)
    key = tuple(map(id, weights[1:]))
    stack = first.stacks.get(key)
    if stack is None:
        # The entry keeps the others, and so their ids, alive.
        fits = runs_kernel(out, *(weight.packed for weight in weights))
        stack = first.stacks[key] = (weights[1:], _stack_launch(weights) if fits else None)
    rows = _rows(out)
    if stack[1] is None or rows is None:
        for weight, part in zip(weights, out.split_with_sizes(heights)):
            dequantize_nf4(weight, part)
    elif out.numel():
        grid, arguments = stack[1]
        _dequantize_nf4_stack_kernel[grid](out_ptr=out, **rows, **arguments)
    return out


def dequantize_nf4_reference(weight: NF4Weight) -> torch.Tensor:
    """`dequantize_nf4` in plain torch."""
    numel = weight.shape.numel()
    packed = weight.packed.view(torch.uint8).flatten().int()
    codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten()[:numel]
    absmax = weight.absmax
    if weight.nested is not None:
        nested = weight.nested
        scales = nested.absmax.repeat_interleave(nested.blocksize)[: absmax.numel()]
        absmax = nested.code[absmax.int()] * scales + nested.offset
    absmax = absmax.repeat_interleave(weight.blocksize)[:numel]
    return (weight.code[codes] * absmax).to(weight.dtype).view(weight.shape)
