"""GeGLU with the tanh approximation: the MLP's activation, and the per-layer-embedding gate.

    h = gelu(gate) * up,   gelu(g) = g * (1 + tanh(u)) / 2,   u = sqrt(2/pi) * (g + 0.044715 g^3)

    dgate = dh * up * ((1 + t) / 2 + g * (1 - t^2) / 2 * du/dg),   t = tanh(u)
    dup   = dh * gelu(gate)

Everything inside is float32; the backward recomputes from gate and up, so nothing else is saved. Bytes that must move
per element (bf16): forward 6, backward 10, and 2 more where the backward also rebuilds h.

Source: Shazeer, "GLU Variants Improve Transformer" (2020); Hendrycks and Gimpel, "GELUs" (2016); `Gemma4TextMLP` and
`Gemma4TextDecoderLayer` in transformers.
"""

from __future__ import annotations

import torch

from fastgemma.kernels._once_differentiable import once_differentiable
from fastgemma.kernels.backend import as_rows, cdiv, check_dtype, jit, kernel, runs_kernel, tl
from fastgemma.kernels.launch import Launch, launch


@jit
def _tanh(x):
    # exp overflows to inf for large x, which gives 1, and underflows to 0 for very negative x, which gives -1.
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@jit
def _gelu_and_grad(g):
    """gelu(g) and its derivative."""
    square = g * g
    t = _tanh(0.7978845608028654 * g * (1.0 + 0.044715 * square))
    # Far out, (1 - t^2) is 0 while g * du/dg may overflow to inf; their product is 0, not NaN.
    du = 0.7978845608028654 * (1.0 + 0.134145 * square)
    slope = 0.5 * (1.0 - t * t)
    tail = tl.where(slope == 0.0, 0.0, g * slope * du)
    half = 0.5 * (1.0 + t)
    return g * half, half + tail


@kernel
def _geglu_fwd_kernel(
    gate_ptr,
    up_ptr,
    h_ptr,
    gate_row_stride,
    up_row_stride,
    h_row_stride,
    n_rows,
    n_cols,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < n_rows) & (cols < n_cols)
    gate = tl.load(gate_ptr + rows * gate_row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * up_row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    t = _tanh(0.7978845608028654 * gate * (1.0 + 0.044715 * gate * gate))
    h = 0.5 * gate * (1.0 + t) * up
    tl.store(h_ptr + rows * h_row_stride + cols, h.to(h_ptr.dtype.element_ty), mask=mask)


@kernel
def _geglu_bwd_kernel(
    dh_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    h_ptr,
    dh_row_stride,
    gate_row_stride,
    up_row_stride,
    dgate_row_stride,
    dup_row_stride,
    h_row_stride,
    n_rows,
    n_cols,
    NEEDS_DGATE: tl.constexpr,
    NEEDS_DUP: tl.constexpr,
    NEEDS_H: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Neighbours take the tiles of one row, where the forward's walk down the rows: each is faster so within a step.
    tiles = tl.cdiv(n_cols, BLOCK_N)
    rows = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    cols = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    mask = (rows < n_rows) & (cols < n_cols)
    dh = tl.load(dh_ptr + rows * dh_row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + rows * gate_row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + rows * up_row_stride + cols, mask=mask, other=0.0).to(tl.float32)
    gelu, dgelu = _gelu_and_grad(gate)
    if NEEDS_DGATE:
        dgate = (dh * up * dgelu).to(dgate_ptr.dtype.element_ty)
        tl.store(dgate_ptr + rows * dgate_row_stride + cols, dgate, mask=mask)
    if NEEDS_DUP:
        tl.store(dup_ptr + rows * dup_row_stride + cols, (dh * gelu).to(dup_ptr.dtype.element_ty), mask=mask)
    if NEEDS_H:
        tl.store(h_ptr + rows * h_row_stride + cols, (gelu * up).to(h_ptr.dtype.element_ty), mask=mask)


def _tiles(gate: torch.Tensor) -> tuple[Launch, tuple[int, int]]:
    n_rows, n_cols = gate.shape
    config = launch("geglu", str(n_cols), gate.device)
    return config, (cdiv(n_rows, config.blocks["BLOCK_M"]), cdiv(n_cols, config.blocks["BLOCK_N"]))


def geglu_fwd(gate: torch.Tensor, up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """h [rows, columns] of row matrices gate and up with unit column stride, without autograd; `out`, if given."""
    if not runs_kernel(gate, up):
        h = geglu_reference(gate, up)
        return h if out is None else out.copy_(h)
    h = gate.new_empty(gate.shape) if out is None else out
    if h.numel() == 0:
        return h
    config, grid = _tiles(gate)
    _geglu_fwd_kernel[grid](
        gate_ptr=gate,
        up_ptr=up,
        h_ptr=h,
        gate_row_stride=gate.stride(0),
        up_row_stride=up.stride(0),
        h_row_stride=h.stride(0),
        n_rows=gate.shape[0],
        n_cols=gate.shape[1],
        **config.kwargs(),
    )
    return h


def geglu_bwd(
    dh: torch.Tensor,
    gate: torch.Tensor,
    up: torch.Tensor,
    dgate: torch.Tensor | None,
    dup: torch.Tensor | None,
    h: torch.Tensor | None = None,
) -> None:
    """Fills the given ones of dgate, dup and h from row matrices with unit column stride, without autograd.

    The buffers are the caller's own, and may be `dh`, `gate` and `up` themselves, which are read before they are
    written.
    """
    if not runs_kernel(dh, gate, up):
        with torch.enable_grad():
            g, u = gate.detach().requires_grad_(), up.detach().requires_grad_()
            out = geglu_reference(g, u)
            results = (*torch.autograd.grad(out, (g, u), dh), out.detach())
        for buffer, result in zip((dgate, dup, h), results):
            if buffer is not None:
                buffer.copy_(result)
        return
    if gate.numel() == 0:
        return
    config, (rows, columns) = _tiles(gate)
    _geglu_bwd_kernel[(rows * columns,)](
        dh_ptr=dh,
        gate_ptr=gate,
        up_ptr=up,
        dgate_ptr=dh if dgate is None else dgate,
        dup_ptr=dh if dup is None else dup,
        h_ptr=dh if h is None else h,
        dh_row_stride=dh.stride(0),
        gate_row_stride=gate.stride(0),
        up_row_stride=up.stride(0),
        dgate_row_stride=0 if dgate is None else dgate.stride(0),
        dup_row_stride=0 if dup is None else dup.stride(0),
        h_row_stride=0 if h is None else h.stride(0),
        n_rows=gate.shape[0],
        n_cols=gate.shape[1],
        NEEDS_DGATE=dgate is not None,
        NEEDS_DUP=dup is not None,
        NEEDS_H=h is not None,
        **config.kwargs(),
    )


class _GeGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return geglu_fwd(as_rows(gate), as_rows(up)).view(gate.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        gate, up = ctx.saved_tensors
        rows = as_rows(gate)
        dgate, dup = (
            torch.empty(rows.shape, dtype=gate.dtype, device=gate.device) if needed else None
            for needed in ctx.needs_input_grad
        )
        geglu_bwd(as_rows(dh), rows, as_rows(up), dgate, dup)
        return (
            None if dgate is None else dgate.view(gate.shape),
            None if dup is None else dup.view(gate.shape),
        )


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`gelu_tanh(gate) * up`.

    Args:
        gate: [..., columns], float32, bfloat16 or float16, any strides.
        up: same shape and dtype, any strides.

    Returns:
        [..., columns], contiguous, in the inputs' dtype.

    Raises:
        TypeError: unsupported or unequal dtypes. ValueError: unequal shapes, or tensors on different devices.
    """
    check_dtype("gate", gate)
    if gate.dtype != up.dtype:
        raise TypeError(f"fastgemma: geglu got gate in {gate.dtype} and up in {up.dtype}; cast one.")
    if gate.shape != up.shape or gate.dim() == 0:
        raise ValueError(f"fastgemma: geglu got gate {tuple(gate.shape)} and up {tuple(up.shape)}; shapes must agree.")
    if not runs_kernel(gate, up):
        return geglu_reference(gate, up)
    return _GeGLU.apply(gate, up)


def geglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`geglu` in plain torch; float64 inputs stay float64, everything else is computed in float32."""
    high = torch.promote_types(gate.dtype, torch.float32)
    return (torch.nn.functional.gelu(gate.to(high), approximate="tanh") * up.to(high)).to(gate.dtype)
