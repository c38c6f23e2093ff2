"""NF4 dequantisation, nested scales included, in one launch; bit-equal to bitsandbytes.

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
from dataclasses import dataclass
from typing import Any

import torch

from fastgemma.kernels.backend import cdiv, kernel, runs_kernel, tl
from fastgemma.kernels.launch import launch


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

    @functools.cached_property
    def launch(self) -> tuple[tuple[int], dict[str, Any]]:
        """The grid and all arguments but the output of this weight's launch: it is dequantised again and again."""
        config = launch("dequantize_nf4", "any", self.device)
        n_bytes, nested = self.shape.numel() // 2, self.nested
        arguments = {
            "packed_ptr": self.packed if self.packed.dtype == torch.uint8 else self.packed.view(torch.uint8),
            "absmax_ptr": self.absmax,
            "code_ptr": self.code,
            "nested_absmax_ptr": self.code if nested is None else nested.absmax,
            "nested_code_ptr": self.code if nested is None else nested.code,
            "offset_ptr": self.code if nested is None else nested.offset,
            "n_bytes": n_bytes,
            "NESTED": nested is not None,
            "BYTES_PER_BLOCK": self.blocksize // 2,
            "NESTED_BLOCKSIZE": 1 if nested is None else nested.blocksize,
            **config.kwargs(),
            # The interpreter does not know the option.
            **({} if self.device.type == "cpu" else {"enable_fp_fusion": False}),
        }
        return (cdiv(n_bytes, config.blocks["BLOCK"]),), arguments


@kernel
def _dequantize_nf4_kernel(
    packed_ptr,
    absmax_ptr,
    code_ptr,
    nested_absmax_ptr,
    nested_code_ptr,
    offset_ptr,
    out_ptr,
    n_bytes,
    NESTED: tl.constexpr,
    BYTES_PER_BLOCK: tl.constexpr,
    NESTED_BLOCKSIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n_bytes
    packed = tl.load(packed_ptr + offsets, mask=mask, other=0).to(tl.int32)
    block = offsets // BYTES_PER_BLOCK
    if NESTED:
        scale_code = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        absmax = tl.load(nested_code_ptr + scale_code)
        absmax = absmax * tl.load(nested_absmax_ptr + block // NESTED_BLOCKSIZE, mask=mask, other=0.0)
        absmax = absmax + tl.load(offset_ptr)
    else:
        absmax = tl.load(absmax_ptr + block, mask=mask, other=0.0)
    high = tl.load(code_ptr + ((packed >> 4) & 15)) * absmax
    low = tl.load(code_ptr + (packed & 15)) * absmax
    pairs = tl.interleave(high, low).to(out_ptr.dtype.element_ty)
    elements = tl.program_id(0).to(tl.int64) * (2 * BLOCK) + tl.arange(0, 2 * BLOCK)
    tl.store(out_ptr + elements, pairs, mask=elements < 2 * n_bytes)


def dequantize_nf4(weight: NF4Weight, out: torch.Tensor | None = None) -> torch.Tensor:
    """The dense weight of an NF4 one.

    Args:
        weight: with an even number of elements (every Gemma 4 linear has one).
        out: contiguous buffer to fill, of `weight.shape` and a floating dtype; None allocates `weight.dtype`.

    Returns:
        [out_features, in_features], equal bit for bit to `bitsandbytes.functional.dequantize_4bit`.

    Raises:
        ValueError: an odd number of weights, an `out` that does not fit, or different devices.
    """
    numel = weight.shape.numel()
    if numel % 2:
        raise ValueError(f"fastgemma: dequantize_nf4 needs an even number of weights, got {tuple(weight.shape)}.")
    if out is None:
        out = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    elif out.shape != weight.shape or not out.is_contiguous():
        raise ValueError(
            f"fastgemma: dequantize_nf4 needs a contiguous buffer of {tuple(weight.shape)}, got {tuple(out.shape)}."
        )
    if not runs_kernel(weight.packed, weight.absmax, out):
        return out.copy_(dequantize_nf4_reference(weight))
    if numel:
        grid, arguments = weight.launch
        _dequantize_nf4_kernel[grid](out_ptr=out, **arguments)
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
