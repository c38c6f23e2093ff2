"""RMSNorm as Gemma 4 defines it, alone or fused with the residual add that follows it.

    rms_norm:           y = x * rstd * w,                          rstd = (mean(x^2) + eps)^-1/2
    rms_norm_residual:  y = (residual + x * rstd * w) * scale      (scale: the layer scalar, optional)

with everything inside in float32 and one rounding at the end. The weight multiplies directly (not 1 + w), and may be
missing (v_norm, the router's norm).

    dx = rstd * (g - x * rstd^2 * mean(g * x)),   g = dy * scale * w     (+ a gradient that x has from elsewhere)
    dw = sum over rows of dy * scale * x * rstd
    dresidual = dy * scale

Bytes that must move per element (bf16): forward 4 (+ 4 per row for rstd), with residual 6; backward 6, with a scale 8.

Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019); `Gemma4RMSNorm` in transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastgemma.kernels._once_differentiable import once_differentiable
from fastgemma.kernels.backend import as_rows, cdiv, check_dtype, kernel, next_power_of_2, runs_kernel, tl
from fastgemma.kernels.launch import Launch, launch

# A row is held in registers at once; Gemma 4's widest hidden size is 5376.
MAX_COLUMNS = 8192


@kernel
def _rms_norm_fwd_kernel(
    x_ptr,
    weight_ptr,
    residual_ptr,
    scale_ptr,
    y_ptr,
    rstd_ptr,
    x_row_stride,
    residual_row_stride,
    y_row_stride,
    n_rows,
    n_cols,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    STORE_RSTD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    row_mask = rows < n_rows
    col_mask = cols < n_cols
    mask = row_mask[:, None] & col_mask[None, :]

    x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        # On its way while the squares are summed: what follows the sum waits for every warp of the program.
        residual = tl.load(residual_ptr + rows[:, None] * residual_row_stride + cols[None, :], mask=mask, other=0.0)
    mean_square = tl.sum(x * x, axis=1) / n_cols
    rstd = 1.0 / tl.sqrt(mean_square + tl.cast(eps, tl.float32))
    if STORE_RSTD:
        tl.store(rstd_ptr + rows, rstd, mask=row_mask)
    y = x * rstd[:, None]
    if HAS_WEIGHT:
        y = y * tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        y = y + residual.to(tl.float32)
    if HAS_SCALE:
        y = y * tl.load(scale_ptr).to(tl.float32)
    tl.store(y_ptr + rows[:, None] * y_row_stride + cols[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@kernel
def _rms_norm_bwd_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    scale_ptr,
    rstd_ptr,
    addend_ptr,
    dx_ptr,
    dresidual_ptr,
    dweight_ptr,
    dy_row_stride,
    x_row_stride,
    addend_row_stride,
    dx_row_stride,
    n_rows,
    n_cols,
    HAS_WEIGHT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    NEEDS_DX: tl.constexpr,
    NEEDS_DRESIDUAL: tl.constexpr,
    NEEDS_DWEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_N)
    col_mask = cols < n_cols
    dweight = tl.zeros([BLOCK_N], tl.float32)
    for tile in range(0, TILES):
        # Consecutive programs take consecutive tiles, so that neighbours read neighbouring rows.
        rows = (program + tile * tl.num_programs(0).to(tl.int64)) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = rows < n_rows
        mask = row_mask[:, None] & col_mask[None, :]
        g = tl.load(dy_ptr + rows[:, None] * dy_row_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + rows[:, None] * x_row_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=row_mask, other=0.0)
        if HAS_SCALE:
            g = g * tl.load(scale_ptr).to(tl.float32)
        if NEEDS_DRESIDUAL:
            dresidual = dresidual_ptr + rows[:, None] * n_cols + cols[None, :]
            tl.store(dresidual, g.to(dresidual_ptr.dtype.element_ty), mask=mask)
        x_hat = x * rstd[:, None]
        if NEEDS_DWEIGHT:
            dweight += tl.sum(g * x_hat, axis=0)
        if NEEDS_DX:
            if HAS_WEIGHT:
                g = g * tl.load(weight_ptr + cols, mask=col_mask, other=0.0).to(tl.float32)[None, :]
            projection = tl.sum(g * x_hat, axis=1) / n_cols
            dx = (g - x_hat * projection[:, None]) * rstd[:, None]
            if HAS_ADDEND:
                addend = tl.load(addend_ptr + rows[:, None] * addend_row_stride + cols[None, :], mask=mask, other=0.0)
                dx += addend.to(tl.float32)
            out = dx_ptr + rows[:, None] * dx_row_stride + cols[None, :]
            tl.store(out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    if NEEDS_DWEIGHT:
        tl.store(dweight_ptr + program * n_cols + cols, dweight, mask=col_mask)


def _row_launch(n_cols: int, device: torch.device) -> tuple[Launch, int]:
    block_n = next_power_of_2(n_cols)
    return launch("rms_norm", str(block_n), device), block_n


def rms_norm_fwd(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    residual: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    rstd: torch.Tensor | None = None,
    shape: torch.Size | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """y of row matrices x and residual [rows, columns] with unit column stride; fills `rstd` [rows] float32 if given.

    y is `out`, a row matrix, if given; else new, of `shape` if given: a layer's output should own its memory rather
    than be a view. Launches the kernel, without autograd: for operations that contain a norm.
    """
    n_rows, n_cols = x.shape
    y = x.new_empty(x.shape if shape is None else shape) if out is None else out
    if n_rows == 0:
        return y
    config, block_n = _row_launch(n_cols, x.device)
    _rms_norm_fwd_kernel[(cdiv(n_rows, config.blocks["BLOCK_M"]),)](
        x_ptr=x,
        weight_ptr=x if weight is None else weight,
        residual_ptr=x if residual is None else residual,
        scale_ptr=x if scale is None else scale,
        y_ptr=y,
        rstd_ptr=x if rstd is None else rstd,
        x_row_stride=x.stride(0),
        residual_row_stride=0 if residual is None else residual.stride(0),
        y_row_stride=n_cols if out is None else out.stride(0),
        n_rows=n_rows,
        n_cols=n_cols,
        eps=eps,
        HAS_WEIGHT=weight is not None,
        HAS_RESIDUAL=residual is not None,
        HAS_SCALE=scale is not None,
        STORE_RSTD=rstd is not None,
        BLOCK_N=block_n,
        **config.kwargs(),
    )
    return y


@dataclass(frozen=True)
class RMSNormGrads:
    """What `rms_norm_bwd` was asked for; None elsewhere."""

    x: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    weight: torch.Tensor | None = None


def rms_norm_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    rstd: torch.Tensor,
    scale: torch.Tensor | None = None,
    addend: torch.Tensor | None = None,
    needs_dx: bool = True,
    needs_dresidual: bool = False,
    needs_dweight: bool = False,
    out: torch.Tensor | None = None,
) -> RMSNormGrads:
    """Gradients from row matrices with unit column stride, without autograd.

    `addend` [rows, columns] is added to dx before it is rounded. dx is `out`, a row matrix, if given. Without a scale
    dresidual is dy itself: do not ask.
    """
    n_rows, n_cols = x.shape
    dx = (x.new_empty(x.shape) if out is None else out) if needs_dx else None
    dresidual = dy.new_empty(x.shape) if needs_dresidual else None
    if n_rows == 0:
        return RMSNormGrads(dx, dresidual, torch.zeros_like(weight) if needs_dweight and weight is not None else None)
    config, block_n = _row_launch(n_cols, x.device)
    tiles = cdiv(n_rows, config.blocks["BLOCK_M"])
    # The weight's gradient is a sum over rows: few programs, each over many rows, then one sum over programs. A power
    # of two of tiles per program keeps the number of compiled variants small. No atomics: the order is fixed.
    tiles_per_program = next_power_of_2(cdiv(tiles, 512)) if needs_dweight else 1
    programs = cdiv(tiles, tiles_per_program)
    partial = torch.empty((programs, n_cols), dtype=torch.float32, device=x.device) if needs_dweight else None
    _rms_norm_bwd_kernel[(programs,)](
        dy_ptr=dy,
        x_ptr=x,
        weight_ptr=x if weight is None else weight,
        scale_ptr=x if scale is None else scale,
        rstd_ptr=rstd,
        addend_ptr=x if addend is None else addend,
        dx_ptr=x if dx is None else dx,
        dresidual_ptr=x if dresidual is None else dresidual,
        dweight_ptr=x if partial is None else partial,
        dy_row_stride=dy.stride(0),
        x_row_stride=x.stride(0),
        addend_row_stride=0 if addend is None else addend.stride(0),
        dx_row_stride=n_cols if out is None else out.stride(0),
        n_rows=n_rows,
        n_cols=n_cols,
        HAS_WEIGHT=weight is not None,
        HAS_SCALE=scale is not None,
        HAS_ADDEND=addend is not None,
        NEEDS_DX=needs_dx,
        NEEDS_DRESIDUAL=needs_dresidual,
        NEEDS_DWEIGHT=needs_dweight,
        BLOCK_N=block_n,
        TILES=tiles_per_program,
        **config.kwargs(),
    )
    dweight = None
    if partial is not None and weight is not None:
        dweight = partial.sum(dim=0).to(weight.dtype)
    return RMSNormGrads(dx, dresidual, dweight)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, residual, scale, eps):
        needs_grad = any(ctx.needs_input_grad[:3])
        rows = as_rows(x)
        residual_rows = None if residual is None else as_rows(residual)
        weight = None if weight is None else weight.contiguous()
        rstd = torch.empty(rows.shape[0], dtype=torch.float32, device=x.device) if needs_grad else None
        y = rms_norm_fwd(rows, weight, eps, residual_rows, scale, rstd, x.shape)
        if needs_grad:
            # What is frozen is persistent module state, not an activation: no hook needs to see it.
            trained = weight if weight is not None and ctx.needs_input_grad[1] else None
            ctx.frozen = (None if trained is not None else weight, scale)
            ctx.save_for_backward(x, trained, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, trained, rstd = ctx.saved_tensors
        frozen, scale = ctx.frozen
        weight = frozen if trained is None else trained
        needs_dx, needs_dweight, needs_dresidual = ctx.needs_input_grad[:3]
        grads = RMSNormGrads()
        if needs_dx or needs_dweight or (needs_dresidual and scale is not None):
            grads = rms_norm_bwd(
                as_rows(dy),
                as_rows(x),
                weight,
                rstd,
                scale,
                needs_dx=needs_dx,
                needs_dresidual=needs_dresidual and scale is not None,
                needs_dweight=needs_dweight and weight is not None,
            )
        dresidual = dy if needs_dresidual and scale is None else grads.residual
        return (
            None if grads.x is None else grads.x.view(x.shape),
            grads.weight,
            None if dresidual is None else dresidual.view(x.shape),
            None,
            None,
        )


def _check(x: torch.Tensor, weight: torch.Tensor | None) -> None:
    check_dtype("hidden_states", x)
    if x.dim() == 0:
        raise ValueError("fastgemma: rms_norm needs at least one dimension, got a scalar.")
    if x.shape[-1] > MAX_COLUMNS or x.shape[-1] == 0:
        raise ValueError(f"fastgemma: rms_norm normalises 1 to {MAX_COLUMNS} columns, got {x.shape[-1]}.")
    if weight is not None and weight.shape != x.shape[-1:]:
        raise ValueError(
            f"fastgemma: rms_norm got a weight of shape {tuple(weight.shape)} for rows of {x.shape[-1]} columns."
        )


def rms_norm(hidden_states: torch.Tensor, weight: torch.Tensor | None, eps: float = 1e-6) -> torch.Tensor:
    """RMSNorm over the last dimension: `hidden_states * rstd * weight`, computed in float32.

    Args:
        hidden_states: [..., hidden_size], float32, bfloat16 or float16, any strides; at most 8192 columns.
        weight: [hidden_size] of any floating dtype, or None for a norm without one.
        eps: added to the mean square.

    Returns:
        [..., hidden_size], contiguous, in the dtype of `hidden_states`.

    Raises:
        TypeError: unsupported dtype. ValueError: shapes that do not fit, or tensors on different devices.
    """
    _check(hidden_states, weight)
    if not runs_kernel(hidden_states, weight):
        return rms_norm_reference(hidden_states, weight, eps)
    return _RMSNorm.apply(hidden_states, weight, None, None, eps)


def rms_norm_residual(
    hidden_states: torch.Tensor,
    weight: torch.Tensor | None,
    residual: torch.Tensor,
    layer_scalar: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """`(residual + rms_norm(hidden_states)) * layer_scalar` in one pass, rounded once.

    Args:
        hidden_states: [..., hidden_size], as in `rms_norm`.
        weight: [hidden_size] or None.
        residual: same shape and dtype as `hidden_states`.
        layer_scalar: one element, a constant (its gradient is not computed), or None.
        eps: added to the mean square.

    Returns:
        [..., hidden_size], contiguous, in the dtype of `hidden_states`.

    Raises:
        TypeError: unsupported or unequal dtypes. ValueError: shapes that do not fit, tensors on different devices, or
            a `layer_scalar` that requires a gradient.
    """
    _check(hidden_states, weight)
    if residual.shape != hidden_states.shape:
        raise ValueError(
            f"fastgemma: rms_norm_residual got a residual of shape {tuple(residual.shape)} for hidden states of shape "
            f"{tuple(hidden_states.shape)}."
        )
    if residual.dtype != hidden_states.dtype:
        raise TypeError(f"fastgemma: residual is {residual.dtype}, hidden_states {hidden_states.dtype}; cast one.")
    if layer_scalar is not None and (layer_scalar.numel() != 1 or layer_scalar.requires_grad):
        raise ValueError("fastgemma: layer_scalar must be one element that requires no gradient.")
    if not runs_kernel(hidden_states, weight, residual, layer_scalar):
        return rms_norm_residual_reference(hidden_states, weight, residual, layer_scalar, eps)
    return _RMSNorm.apply(hidden_states, weight, residual, layer_scalar, eps)


def rms_norm_reference(hidden_states: torch.Tensor, weight: torch.Tensor | None, eps: float = 1e-6) -> torch.Tensor:
    """`rms_norm` in plain torch; float64 inputs stay float64, everything else is computed in float32."""
    x = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
    y = x * torch.pow(x.square().mean(-1, keepdim=True) + eps, -0.5)
    if weight is not None:
        y = y * weight.to(x.dtype)
    return y.to(hidden_states.dtype)


def rms_norm_residual_reference(
    hidden_states: torch.Tensor,
    weight: torch.Tensor | None,
    residual: torch.Tensor,
    layer_scalar: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """`rms_norm_residual` in plain torch."""
    high = torch.promote_types(hidden_states.dtype, torch.float32)
    y = residual.to(high) + rms_norm_reference(hidden_states.to(high), weight, eps)
    if layer_scalar is not None:
        y = y * layer_scalar.to(high)
    return y.to(hidden_states.dtype)
