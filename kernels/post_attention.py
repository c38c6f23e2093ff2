"""What a decoder layer computes after its attention, as one operation.

    h1  = residual + rms_norm(attended W_o^T)
    h2  = h1 + rms_norm(mlp(rms_norm(h1)))
    out = (h2 + rms_norm((gelu_tanh(h2 W_g^T) * per_layer_input) W_p^T)) * layer_scalar

where a layer has no per-layer input, the last line is h2 * layer_scalar. Every matrix may be dense or NF4, with or
without LoRA; the formulas are in `rms_norm`, `lora`, `lora_mlp` and `geglu`. One launch norms, adds and scales.

Saved: attended, the three (two) outputs that are normed before they are added, h1, gate and up, the per-layer gate,
the columns that `lora_mlp` keeps, and 4 bytes a token for each norm; the MLP's input is normed again in the backward.
Gradients of h1 from its two uses meet in float32 and are rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastgemma.kernels._autograd import (
    backward_without_autocast,
    join_trained,
    keep,
    kept,
    masks_of,
    numbers_of,
    parts_of,
    projections_of,
    split_trained,
    trained_only,
    wanted_of,
    wants_of,
)
from fastgemma.kernels._lora_products import (
    Grads,
    Projection,
    Projections,
    Wanted,
    check_projections,
    with_room,
    without_autocast,
)
from fastgemma.kernels._once_differentiable import once_differentiable
from fastgemma.kernels.backend import as_rows, runs_kernel
from fastgemma.kernels.geglu import geglu_bwd, geglu_fwd, geglu_reference
from fastgemma.kernels.lora import lora_linear_reference
from fastgemma.kernels.lora_mlp import MLP, check_mlp, lora_mlp_reference, mlp_bwd, mlp_fwd
from fastgemma.kernels.rms_norm import rms_norm_bwd, rms_norm_fwd, rms_norm_reference, rms_norm_residual_reference


class Norms(NamedTuple):
    """Weights [hidden_size] of the layer's norms from the attention on; the last one with a per-layer input only."""

    post_attention: torch.Tensor
    pre_feedforward: torch.Tensor
    post_feedforward: torch.Tensor
    post_per_layer_input: torch.Tensor | None = None


class Matrices(NamedTuple):
    """The layer's projections from the attention on; the last two with a per-layer input only."""

    o: Projection
    gate: Projection
    up: Projection
    down: Projection
    per_layer_gate: Projection | None = None
    per_layer_projection: Projection | None = None


def _one(projection: Projection, x: torch.Tensor, autocast: torch.dtype | None) -> tuple[torch.Tensor, list]:
    """(y, masks drawn) of a single projection."""
    bundle = Projections((projection,), autocast)
    y, _ = bundle.forward(x)
    return y, bundle.drawn()


def _with_room(
    like: torch.Tensor, bundle: Projections, gradient: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A row matrix like the given one, and the buffer that it begins, with the room that `bundle` asks for."""
    return with_room(like.shape, bundle.room(like.dtype, gradient), like.dtype, like.device)


class _PostAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attended, residual, per_layer_input, layer_scalar, static, numbers, eps, autocast, *trained):
        norm1, norm2, norm3, norm4, *parts = join_trained(static, trained)
        o, *mlp_and_gate = projections_of(parts, numbers)
        mlp, gate = mlp_and_gate[:3], mlp_and_gate[3:]
        rows = as_rows(attended)
        rstd = torch.empty((4 if gate else 3, rows.shape[0]), dtype=torch.float32, device=rows.device)
        rstd1, rstd2, rstd3, *rstd4 = rstd.unbind()
        with without_autocast(attended):
            o_out, masks = _one(o, rows, autocast)
            h1 = rms_norm_fwd(o_out, norm1, eps, as_rows(residual), rstd=rstd1)
            bundles = MLP.of(mlp, autocast)
            x, room = _with_room(h1, bundles.inner)
            x = rms_norm_fwd(h1, norm2, eps, rstd=rstd2, out=x)
            mlp_out, gate_ups, products, drawn = mlp_fwd(x, bundles, room)
            del x, room
            masks += drawn
            out = rms_norm_fwd(
                mlp_out, norm3, eps, h1, None if gate else layer_scalar, rstd3, None if gate else residual.shape
            )
            saved = [attended, rstd, o_out, h1, mlp_out, products]
            if gate:
                h2, inputs = out, as_rows(per_layer_input)
                gated, drawn = _one(gate[0], h2, autocast)
                projection = Projections(gate[1:], autocast)
                product, room = _with_room(gated, projection)
                projected, _ = projection.forward(geglu_fwd(gated, inputs, product), room=room)
                masks += drawn + projection.drawn()
                out = rms_norm_fwd(projected, norm4, eps, h2, layer_scalar, rstd4[0], residual.shape)
                saved += [per_layer_input, gated, projected]
                # Its factors' gradients alone need the gate's input.
                saved.append(h2 if any(wanted_of(static, (True,) * len(trained))[16:19]) else None)
        ctx.static, ctx.numbers, ctx.eps, ctx.autocast = static, numbers, eps, autocast
        ctx.layer_scalar, ctx.n_saved, ctx.n_masks = layer_scalar, len(saved), len(masks)
        keep(ctx, trained, (*saved, *masks, *gate_ups))
        return out

    @staticmethod
    @once_differentiable
    @backward_without_autocast
    def backward(ctx, d_out):
        trained, activations = kept(ctx)
        attended, rstd, o_out, h1, mlp_out, products, *per_layer = activations[: ctx.n_saved]
        drawn, gate_ups = activations[ctx.n_saved :][: ctx.n_masks], activations[ctx.n_saved + ctx.n_masks :]
        norm1, norm2, norm3, norm4, *parts = join_trained(ctx.static, trained)
        o, *mlp_and_gate = projections = projections_of(parts, ctx.numbers)
        mlp = mlp_and_gate[:3]
        o_mask, *masks = masks_of(projections, drawn)
        needs = ctx.needs_input_grad
        wants1, wants2, wants3, wants4, *flags = wanted_of(ctx.static, needs[8:])
        wanted = wants_of(flags)
        rstd1, rstd2, rstd3, *rstd4 = rstd.unbind()
        scalar, autocast = ctx.layer_scalar, ctx.autocast
        bundles = MLP.of(mlp, autocast, masks[:3], products)

        d_input, d_norm4, gate_grads = None, None, []
        if per_layer:
            per_layer_input, gated, projected, h2 = per_layer
            gate, projection = (Projections((p,), autocast, [mask]) for p, mask in zip(mlp_and_gate[3:], masks[3:]))
            d_projected, room = _with_room(projected, projection, gradient=True)
            grads = rms_norm_bwd(
                as_rows(d_out),
                projected,
                norm4,
                rstd4[0],
                scalar,
                needs_dresidual=True,
                needs_dweight=wants4,
                out=d_projected,
            )
            d_norm4 = grads.weight
            d_h2, d_input, gate_grads = _per_layer_bwd(
                d_projected,
                room,
                grads.residual,
                h2,
                gated,
                as_rows(per_layer_input),
                (gate, projection),
                wanted[4:],
                needs[2],
            )
            d_mlp_out, room = _with_room(mlp_out, bundles.outer, gradient=True)
            grads = rms_norm_bwd(d_h2, mlp_out, norm3, rstd3, needs_dweight=wants3, out=d_mlp_out)
            d_h1 = d_h2
        else:
            d_mlp_out, room = _with_room(mlp_out, bundles.outer, gradient=True)
            grads = rms_norm_bwd(
                as_rows(d_out),
                mlp_out,
                norm3,
                rstd3,
                scalar,
                needs_dresidual=True,
                needs_dweight=wants3,
                out=d_mlp_out,
            )
            d_h1 = grads.residual
        d_norm3 = grads.weight

        x = rms_norm_fwd(h1, norm2, ctx.eps) if any(wanted[1]) or any(wanted[2]) else h1
        dx, mlp_grads = mlp_bwd(d_mlp_out, x, gate_ups, bundles, True, wanted[1:4], room)
        del x, d_mlp_out, room
        grads = rms_norm_bwd(dx, h1, norm2, rstd2, addend=d_h1, needs_dweight=wants2)
        d_h1, d_norm2 = grads.x, grads.weight

        bundle = Projections((o,), autocast, [o_mask])
        d_o_out, room = _with_room(o_out, bundle, gradient=True)
        grads = rms_norm_bwd(d_h1, o_out, norm1, rstd1, needs_dweight=wants1, out=d_o_out)
        d_attended, dxas = None, []
        if needs[0]:
            d_attended, dxas = bundle.input_gradient((d_o_out,), room=room)
            d_attended = d_attended.view(attended.shape)
        o_grads = bundle.factor_gradients((d_o_out,), as_rows(attended), wanted[:1], dxas)
        factors = [gradient for grad in (*o_grads, *mlp_grads, *gate_grads) for gradient in grad]
        flat = [grads.weight, d_norm2, d_norm3, d_norm4, *factors]
        return (
            d_attended,
            d_h1.view(d_out.shape) if needs[1] else None,
            None if d_input is None else d_input.view(per_layer_input.shape),
            *(None,) * 5,
            *trained_only(ctx.static, flat),
        )


def _per_layer_bwd(
    d_projected: torch.Tensor,
    room: torch.Tensor | None,
    d_h2: torch.Tensor,
    h2: torch.Tensor | None,
    gated: torch.Tensor,
    inputs: torch.Tensor,
    bundles: Sequence[Projections],
    wanted: Sequence[Wanted],
    needs_input: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, list[Grads]]:
    """(d_h2, accumulated into; the gradient of the per-layer input; those of gate and projection).

    `room` is the buffer that d_projected begins, if it has room.
    """
    gate, projection = bundles
    d_product, dxas = projection.input_gradient((d_projected,), room=room)
    d_gated, room = _with_room(gated, gate, gradient=True)
    d_input = torch.empty(inputs.shape, dtype=inputs.dtype, device=inputs.device) if needs_input else None
    # The product takes the place of its gradient.
    geglu_bwd(d_product, gated, inputs, d_gated, d_input, d_product if any(wanted[1]) else None)
    projection_grads = projection.factor_gradients((d_projected,), d_product, wanted[1:], dxas)
    d_h2, dxas = gate.input_gradient((d_gated,), dx=d_h2, room=room)
    gate_grads = gate.factor_gradients((d_gated,), gated if h2 is None else h2, wanted[:1], dxas)
    return d_h2, d_input, gate_grads + projection_grads


def _check(
    attended: torch.Tensor,
    residual: torch.Tensor,
    norms: Norms,
    matrices: Matrices,
    layer_scalar: torch.Tensor,
    per_layer_input: torch.Tensor | None,
    autocast: torch.dtype | None,
) -> None:
    check_projections(attended, (matrices.o,), autocast)
    check_mlp(residual, matrices[1:4], autocast)
    hidden_size = residual.shape[-1]
    if attended.shape[:-1] != residual.shape[:-1] or matrices.o.weight.shape[0] != hidden_size:
        raise ValueError(
            f"fastgemma: post_attention got attended {tuple(attended.shape)}, a residual {tuple(residual.shape)} and "
            f"an output projection {tuple(matrices.o.weight.shape)}, which do not fit."
        )
    if attended.dtype != residual.dtype or autocast not in (None, residual.dtype):
        raise TypeError(f"fastgemma: attended is {attended.dtype}, the residual {residual.dtype}; cast one.")
    if any(norm is not None and norm.shape != (hidden_size,) for norm in norms):
        raise ValueError(f"fastgemma: norm weights must have shape [{hidden_size}].")
    if layer_scalar.numel() != 1 or layer_scalar.requires_grad:
        raise ValueError("fastgemma: layer_scalar must be one element that requires no gradient.")
    given = (per_layer_input, norms.post_per_layer_input, matrices.per_layer_gate, matrices.per_layer_projection)
    if any(item is None for item in given) and any(item is not None for item in given):
        raise ValueError("fastgemma: a per-layer input comes with a gate, a projection and a norm.")
    if per_layer_input is None or matrices.per_layer_gate is None or matrices.per_layer_projection is None:
        return
    if per_layer_input.shape[:-1] != residual.shape[:-1] or per_layer_input.dtype != residual.dtype:
        raise ValueError(
            f"fastgemma: the per-layer input is {tuple(per_layer_input.shape)} {per_layer_input.dtype} beside a "
            f"residual {tuple(residual.shape)} {residual.dtype}."
        )
    check_projections(residual, (matrices.per_layer_gate,), autocast)
    check_projections(per_layer_input, (matrices.per_layer_projection,), autocast)
    columns, rows = matrices.per_layer_gate.weight.shape[0], matrices.per_layer_projection.weight.shape[0]
    if columns != per_layer_input.shape[-1] or rows != hidden_size:
        raise ValueError("fastgemma: the per-layer gate and projection do not fit the per-layer input.")


def post_attention(
    attended: torch.Tensor,
    residual: torch.Tensor,
    norms: Norms,
    matrices: Matrices,
    layer_scalar: torch.Tensor,
    per_layer_input: torch.Tensor | None = None,
    eps: float = 1e-6,
    autocast: torch.dtype | None = None,
) -> torch.Tensor:
    """A layer's output from what its attention gathered.

    Args:
        attended: [batch, seq_len, num_heads * head_dim], float32, bfloat16 or float16.
        residual: [batch, seq_len, hidden_size] in the same dtype.
        norms, matrices: the layer's weights; with a per-layer input all of them.
        layer_scalar: one element, a constant.
        per_layer_input: [batch, seq_len, columns] in the same dtype, or None.
        eps: of every norm.
        autocast: the dtype of an enclosing autocast region, which must be the residual's; else None.

    Returns:
        [batch, seq_len, hidden_size], contiguous, in the residual's dtype.

    Raises:
        TypeError: dtypes that do not fit. ValueError: shapes that do not fit, tensors on different devices, or a
            `layer_scalar` that requires a gradient.
    """
    _check(attended, residual, norms, matrices, layer_scalar, per_layer_input, autocast)
    if not runs_kernel(attended, residual, layer_scalar, per_layer_input, *norms):
        return post_attention_reference(attended, residual, norms, matrices, layer_scalar, per_layer_input, eps)
    return post_attention_unchecked(attended, residual, norms, matrices, layer_scalar, per_layer_input, eps, autocast)


def post_attention_unchecked(
    attended: torch.Tensor,
    residual: torch.Tensor,
    norms: Norms,
    matrices: Matrices,
    layer_scalar: torch.Tensor,
    per_layer_input: torch.Tensor | None,
    eps: float,
    autocast: torch.dtype | None,
) -> torch.Tensor:
    """`post_attention` where its kernels run, of arguments known to fit: checks cost as much host time as launches."""
    projections = [p for p in matrices if p is not None]
    static, trained = split_trained([*norms, *parts_of(projections)])
    return _PostAttention.apply(
        attended, residual, per_layer_input, layer_scalar, static, numbers_of(projections), eps, autocast, *trained
    )


def post_attention_reference(
    attended: torch.Tensor,
    residual: torch.Tensor,
    norms: Norms,
    matrices: Matrices,
    layer_scalar: torch.Tensor,
    per_layer_input: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """`post_attention` in plain torch; float64 inputs stay float64."""
    h1 = rms_norm_residual_reference(
        lora_linear_reference(attended, matrices.o), norms.post_attention, residual, None, eps
    )
    x = rms_norm_reference(h1, norms.pre_feedforward, eps)
    mlp_out = lora_mlp_reference(x, matrices.gate, matrices.up, matrices.down)
    if per_layer_input is None or matrices.per_layer_gate is None or matrices.per_layer_projection is None:
        return rms_norm_residual_reference(mlp_out, norms.post_feedforward, h1, layer_scalar, eps)
    h2 = rms_norm_residual_reference(mlp_out, norms.post_feedforward, h1, None, eps)
    product = geglu_reference(lora_linear_reference(h2, matrices.per_layer_gate), per_layer_input)
    projected = lora_linear_reference(product, matrices.per_layer_projection)
    return rms_norm_residual_reference(projected, norms.post_per_layer_input, h2, layer_scalar, eps)
