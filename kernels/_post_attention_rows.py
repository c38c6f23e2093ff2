"""Forward and backward of `post_attention` on row matrices, without autograd, for the operations that are made of them.

The formulas are in `post_attention`. Rows do not know of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fastgemma.kernels._autograd import Static, join_trained, masks_of, projections_of, wants_of
from fastgemma.kernels._lora_parts import Grads, Projection, Wanted, with_room
from fastgemma.kernels._lora_products import Projections
from fastgemma.kernels.geglu import geglu_bwd, geglu_fwd
from fastgemma.kernels.lora_mlp import MLP, mlp_bwd, mlp_fwd
from fastgemma.kernels.rms_norm import rms_norm_bwd, rms_norm_fwd

# Of the adapter on the per-layer gate and its weight, among the four norms and three tensors of each projection.
_GATE = slice(16, 19)


class Tail(NamedTuple):
    """A layer from its attention's output on: four norms, and four or, with a per-layer input, six projections.

    `tile`: whether rows come one tile after another, whose gate and up belong to one pass alone: the MLP does not cut
    them again, and their gradients are written over them.
    """

    norms: Sequence[Any]
    projections: list[Projection]
    o: Projections
    mlp: MLP
    per_layer: tuple[Projections, ...]  # gate and projection, or none
    layer_scalar: torch.Tensor
    eps: float
    tile: bool

    @classmethod
    def of(
        cls,
        static: Static,
        trained: Sequence[Any],
        numbers: Sequence[tuple[float, float]],
        layer_scalar: torch.Tensor,
        eps: float,
        autocast: torch.dtype | None,
    ) -> Tail:
        """`static` and `trained`, apart, are the norms and the parts of the projections."""
        tensors = join_trained(static, trained)
        projections = projections_of(tensors[4:], numbers)
        o, *per_layer = (Projections((p,), autocast) for p in (projections[0], *projections[4:]))
        mlp = MLP.of(projections[1:4], autocast)
        return cls(tensors[:4], projections, o, mlp, tuple(per_layer), layer_scalar, eps, False)

    def holding_weights(self, most_bytes: int, dtype: torch.dtype) -> Tail:
        """The same, whose projections but those of its MLP are widened once for all tiles, where a weight takes
        `most_bytes` at most."""
        o, *per_layer = (bundle.holding_weights(most_bytes, dtype) for bundle in (self.o, *self.per_layer))
        return self._replace(o=o, per_layer=tuple(per_layer))


class Kept(NamedTuple):
    """What the backward needs of the forward beside its inputs; row matrices, and None where there is no such thing."""

    rstd: torch.Tensor  # [3 or 4, rows] float32
    o_out: torch.Tensor
    h1: torch.Tensor
    mlp_out: torch.Tensor
    products: torch.Tensor | None
    gated: torch.Tensor | None
    projected: torch.Tensor | None
    h2: torch.Tensor | None
    x: torch.Tensor | None  # of a tile alone: for longer it would take more than it takes to make again
    masks: Sequence[torch.Tensor]
    gate_ups: Sequence[torch.Tensor]


class RowGrads(NamedTuple):
    """Gradients; None where not asked for. `trained` has one for each of the tensors that `Tail.of` was given."""

    attended: torch.Tensor | None
    residual: torch.Tensor
    per_layer_input: torch.Tensor | None
    trained: list[torch.Tensor | None]


def keeps_gate_input(flags: Sequence[bool]) -> bool:
    """Whether gradients are asked for that need `Kept.h2`; `flags` for each of the tensors that `Tail.of` was given."""
    return any(flags[_GATE])


def _with_room(
    like: torch.Tensor, bundle: Projections, gradient: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A row matrix like the given one, and the buffer that it begins, with the room that `bundle` asks for."""
    return with_room(like.shape, bundle.room(like.dtype, gradient), like.dtype, like.device)


def rows_fwd(
    tail: Tail,
    attended: torch.Tensor,
    residual: torch.Tensor,
    per_layer_input: torch.Tensor | None,
    keeps_h2: bool,
    shape: torch.Size | None = None,
    out: torch.Tensor | None = None,
    keeps: bool = True,
) -> tuple[torch.Tensor, Kept]:
    """(the layer's output, what its backward needs). The output is `out`, if given; else new, of `shape`, if given.

    With `keeps` False no backward follows, and `Kept.products` may be missing.
    """
    norm1, norm2, norm3, norm4 = tail.norms
    scalar, eps = tail.layer_scalar, tail.eps
    rstd = torch.empty((3 + bool(tail.per_layer), attended.shape[0]), dtype=torch.float32, device=attended.device)
    rstd1, rstd2, rstd3, *rstd4 = rstd.unbind()
    o, mlp = tail.o.again(), MLP(*(bundle.again() for bundle in tail.mlp))
    o_out, _ = o.forward(attended)
    masks = o.drawn()
    h1 = rms_norm_fwd(o_out, norm1, eps, residual, rstd=rstd1)
    x, room = _with_room(h1, mlp.inner)
    x = rms_norm_fwd(h1, norm2, eps, rstd=rstd2, out=x)
    mlp_out, gate_ups, products, drawn = mlp_fwd(x, mlp, room, tail.tile, keeps)
    kept_x = x if tail.tile else None
    del x, room
    masks += drawn
    if not tail.per_layer:
        y = rms_norm_fwd(mlp_out, norm3, eps, h1, scalar, rstd3, shape, out)
        return y, Kept(rstd, o_out, h1, mlp_out, products, None, None, None, kept_x, masks, gate_ups)
    assert per_layer_input is not None
    gate, projection = (bundle.again() for bundle in tail.per_layer)
    h2 = rms_norm_fwd(mlp_out, norm3, eps, h1, rstd=rstd3)
    gated, _ = gate.forward(h2)
    product, room = _with_room(gated, projection)
    projected, _ = projection.forward(geglu_fwd(gated, per_layer_input, product), room=room)
    masks += gate.drawn() + projection.drawn()
    y = rms_norm_fwd(projected, norm4, eps, h2, scalar, rstd4[0], shape, out)
    # Its factors' gradients alone need the gate's input.
    kept_h2 = h2 if keeps_h2 else None
    return y, Kept(rstd, o_out, h1, mlp_out, products, gated, projected, kept_h2, kept_x, masks, gate_ups)


def rows_bwd(
    tail: Tail,
    d_out: torch.Tensor,
    attended: torch.Tensor,
    per_layer_input: torch.Tensor | None,
    kept: Kept,
    needs_attended: bool,
    needs_input: bool,
    flags: Sequence[bool],
    d_attended: torch.Tensor | None = None,
    d_residual: torch.Tensor | None = None,
    d_input: torch.Tensor | None = None,
) -> RowGrads:
    """Gradients from `attended` and `per_layer_input` as the forward had them.

    `flags` say for each of the tensors that `Tail.of` was given whether its gradient is asked for; the last three are
    filled, if given.
    """
    norm1, norm2, norm3, norm4 = tail.norms
    scalar = tail.layer_scalar
    rstd1, rstd2, rstd3, *rstd4 = kept.rstd.unbind()
    wants1, wants2, wants3, wants4, *rest = flags
    wanted = wants_of(rest)
    o_mask, *masks = masks_of(tail.projections, kept.masks)
    o, mlp = (
        tail.o.again([o_mask]),
        MLP(tail.mlp.inner.again(masks[:2]), tail.mlp.outer.again(masks[2:3], kept.products)),
    )

    d_norm4: torch.Tensor | None = None
    gate_grads: list[Grads] = []
    if per_layer_input is not None:
        assert kept.gated is not None and kept.projected is not None
        gate, projection = (bundle.again([mask]) for bundle, mask in zip(tail.per_layer, masks[3:]))
        d_projected, room = _with_room(kept.projected, projection, gradient=True)
        grads = rms_norm_bwd(
            d_out,
            kept.projected,
            norm4,
            rstd4[0],
            scalar,
            needs_dresidual=True,
            needs_dweight=wants4,
            out=d_projected,
        )
        d_norm4 = grads.weight
        if needs_input and d_input is None:
            d_input = torch.empty(per_layer_input.shape, dtype=per_layer_input.dtype, device=per_layer_input.device)
        assert grads.residual is not None
        d_h1, gate_grads = _per_layer_bwd(
            d_projected,
            room,
            grads.residual,
            kept.h2,
            kept.gated,
            per_layer_input,
            (gate, projection),
            wanted[4:],
            d_input,
        )
        d_mlp_out, room = _with_room(kept.mlp_out, mlp.outer, gradient=True)
        grads = rms_norm_bwd(d_h1, kept.mlp_out, norm3, rstd3, needs_dweight=wants3, out=d_mlp_out)
    else:
        d_mlp_out, room = _with_room(kept.mlp_out, mlp.outer, gradient=True)
        grads = rms_norm_bwd(
            d_out,
            kept.mlp_out,
            norm3,
            rstd3,
            scalar,
            needs_dresidual=True,
            needs_dweight=wants3,
            out=d_mlp_out,
        )
        assert grads.residual is not None
        d_h1 = grads.residual
    d_norm3 = grads.weight

    h1 = kept.h1
    x = kept.x
    if x is None:
        x = rms_norm_fwd(h1, norm2, tail.eps) if any(wanted[1]) or any(wanted[2]) else h1
    dx, mlp_grads = mlp_bwd(d_mlp_out, x, kept.gate_ups, mlp, True, wanted[1:4], room, tail.tile)
    del x, d_mlp_out, room
    assert dx is not None
    grads = rms_norm_bwd(dx, h1, norm2, rstd2, addend=d_h1, needs_dweight=wants2, out=d_residual)
    assert grads.x is not None
    d_h1, d_norm2 = grads.x, grads.weight

    d_o_out, room = _with_room(kept.o_out, o, gradient=True)
    grads = rms_norm_bwd(d_h1, kept.o_out, norm1, rstd1, needs_dweight=wants1, out=d_o_out)
    dxas: list[torch.Tensor] = []
    if needs_attended:
        d_attended, dxas = o.input_gradient((d_o_out,), room=room, out=d_attended)
    o_grads = o.factor_gradients((d_o_out,), attended, wanted[:1], dxas)
    factors = [gradient for grad in (*o_grads, *mlp_grads, *gate_grads) for gradient in grad]
    return RowGrads(d_attended, d_h1, d_input, [grads.weight, d_norm2, d_norm3, d_norm4, *factors])


def _per_layer_bwd(
    d_projected: torch.Tensor,
    room: torch.Tensor | None,
    d_h2: torch.Tensor,
    h2: torch.Tensor | None,
    gated: torch.Tensor,
    inputs: torch.Tensor,
    bundles: Sequence[Projections],
    wanted: Sequence[Wanted],
    d_input: torch.Tensor | None,
) -> tuple[torch.Tensor, list[Grads]]:
    """(d_h2, accumulated into; the gradients of gate and projection). The per-layer input's fills `d_input`, if given.

    `room` is the buffer that d_projected begins, if it has room.
    """
    gate, projection = bundles
    d_product, dxas = projection.input_gradient((d_projected,), room=room)
    d_gated, room = _with_room(gated, gate, gradient=True)
    # The product takes the place of its gradient.
    geglu_bwd(d_product, gated, inputs, d_gated, d_input, d_product if any(wanted[1]) else None)
    projection_grads = projection.factor_gradients((d_projected,), d_product, wanted[1:], dxas)
    d_h2, dxas = gate.input_gradient((d_gated,), dx=d_h2, room=room)
    gate_grads = gate.factor_gradients((d_gated,), gated if h2 is None else h2, wanted[:1], dxas)
    return d_h2, gate_grads + projection_grads
