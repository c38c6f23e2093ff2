"""Gemma 4's GeGLU MLP over dense or NF4 weights with LoRA, as one operation.

    y = down(h),   h = gelu_tanh(gate(x)) * up(x)

with the projections of `lora`. gate and up lie side by side in one buffer, so that one dequantised weight and one
product make both, forward and backward. Saved: x, gate and up, and of h the few columns of its product with down's A,
where that was part of a widened base product; h is rebuilt in the backward, in the kernel that makes their gradients,
over the gradient of h that it has just read. Rows do not know of each other: where h and the gradients of gate and up
would exceed `workspace_bytes()`, all are made for some rows at a time. gate and up then are as many buffers, each of
the size of its gradient: a large one would take a segment of the allocator's for itself, beside those of the rest.

Source: Shazeer, "GLU Variants Improve Transformer" (2020); `Gemma4TextMLP` in transformers.
"""

from __future__ import annotations

import itertools
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
from fastgemma.kernels._lora_parts import (
    Grads,
    Masks,
    Projection,
    Wanted,
    check_projections,
    rows_of,
    with_room,
    without_autocast,
)
from fastgemma.kernels._lora_products import Projections
from fastgemma.kernels._once_differentiable import once_differentiable
from fastgemma.kernels.backend import cdiv
from fastgemma.kernels.geglu import geglu_bwd, geglu_fwd, geglu_reference
from fastgemma.kernels.lora import lora_linear_reference
from fastgemma.kernels.workspace import workspace_bytes


class MLP(NamedTuple):
    """gate and up, and down."""

    inner: Projections
    outer: Projections

    def rows(self, rows: slice) -> MLP:
        """The same with the masks and products of these rows alone."""
        return MLP(*(bundle.of_rows(rows) for bundle in self))

    @classmethod
    def of(
        cls,
        projections: Sequence[Projection],
        autocast: torch.dtype | None,
        masks: Masks | None = None,
        products: torch.Tensor | None = None,
    ) -> MLP:
        """`masks` and `products` are those of the forward, in a backward."""
        inner, outer = (None, None) if masks is None else (masks[:2], masks[2:])
        return cls(
            Projections(projections[:2], autocast, inner), Projections(projections[2:], autocast, outer, products)
        )


def mlp_tiles(n_rows: int, intermediate: int, dtype: torch.dtype, device: torch.device, blocks: int = 3) -> list[slice]:
    """Rows of which `blocks` blocks of [rows, intermediate] fit the budget together.

    By default those that a forward or backward makes: h, and the gradients of gate and up.
    """
    size = n_rows * blocks * intermediate * dtype.itemsize
    # Of about the same size, and aligned for the matrix products.
    height = 256 * cdiv(n_rows, 256 * max(1, cdiv(size, workspace_bytes(device))))
    return [slice(start, min(start + height, n_rows)) for start in range(0, max(n_rows, 1), max(height, 1))]


def _tiles(x: torch.Tensor, mlp: MLP) -> list[slice]:
    return mlp_tiles(x.shape[0], mlp.inner.projections[0].weight.shape[0], mlp.inner.autocast or x.dtype, x.device)


def mlp_fwd(
    x: torch.Tensor, mlp: MLP, room: torch.Tensor | None = None, tile: bool = False, keep_products: bool = True
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor | None, list[torch.Tensor]]:
    """(y [rows, hidden_size], gate beside up [some rows, 2 * intermediate_size] for all rows, down's `products`, masks
    drawn) of x [rows, hidden_size].

    `room` is the buffer that x begins, if it has the room that `mlp.inner` asked for. With `tile`, x is a tile of the
    caller's, whose gate and up are nobody else's, so that their gradients may take their place. Without
    `keep_products` down's may be missing: they are for a backward.
    """
    tiles = [slice(0, x.shape[0])] if tile else _tiles(x, mlp)
    if len(tiles) == 1 or mlp.inner.drops or mlp.outer.drops:  # a mask is drawn for all rows at once
        y, gate_up = _mlp_fwd(x, mlp, room, tile, keep_products)
        return y, [gate_up], mlp.outer.products, mlp.inner.drawn() + mlp.outer.drawn()
    y, gate_ups, products = torch.empty_like(x, dtype=mlp.inner.autocast), [], []
    for rows in tiles:
        part = mlp.rows(rows)
        own_room = None if room is None else room[rows]
        y_part, gate_up = _mlp_fwd(x[rows], part, own_room, keep_products=keep_products)
        y[rows].copy_(y_part)
        gate_ups.append(gate_up)
        if part.outer.products is not None:
            products.append(part.outer.products)
    return y, gate_ups, torch.cat(products) if products else None, []


def _mlp_fwd(
    x: torch.Tensor, mlp: MLP, room: torch.Tensor | None, tile: bool = False, keep_products: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """y, and gate beside up, of all rows at once; with `tile` the buffer that these begin, with room for a gradient."""
    inner, outer = mlp
    place, buffer = None, None
    if tile:
        dtype = inner.autocast or x.dtype
        shape = (x.shape[0], sum(p.weight.shape[0] for p in inner.projections))
        place, buffer = with_room(shape, inner.room(dtype, gradient=True), dtype, x.device)
    gate_up, (gate, up) = inner.forward(x, joint=True, room=room, out=place)
    h, room = with_room(gate.shape, outer.room(gate.dtype), gate.dtype, gate.device)
    y, _ = outer.forward(geglu_fwd(gate, up, h), room=room, keep_products=keep_products)
    return y, gate_up if buffer is None else buffer


def mlp_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    gate_ups: Sequence[torch.Tensor],
    mlp: MLP,
    needs_dx: bool,
    wanted: Sequence[Wanted],
    room: torch.Tensor | None = None,
    tile: bool = False,
) -> tuple[torch.Tensor | None, list[Grads]]:
    """dx [rows, hidden_size], and the gradients of the three projections; `gate_ups` as `mlp_fwd` gave them.

    `room` is the buffer that dy begins, if it has the room that `mlp.outer` asked for. With `tile`, as `mlp_fwd` had
    it, gradients are written over gate and up.
    """
    if tile:
        return _mlp_bwd(dy, x, gate_ups[0], mlp, needs_dx, wanted, room, tile)
    if len(gate_ups) == 1:
        tiles = _tiles(x, mlp)
        gate_ups = [gate_ups[0][rows] for rows in tiles]
    else:  # the forward's tiles, whatever the budget is by now
        ends = list(itertools.accumulate(len(gate_up) for gate_up in gate_ups))
        tiles = [slice(start, end) for start, end in zip([0, *ends], ends)]
    if len(tiles) == 1:
        return _mlp_bwd(dy, x, gate_ups[0], mlp, needs_dx, wanted, room)
    dx = torch.empty(x.shape, dtype=gate_ups[0].dtype, device=x.device) if needs_dx else None
    sums: list[list[torch.Tensor | None]] = [[None, None, None] for _ in wanted]
    for rows, gate_up in zip(tiles, gate_ups):
        own_room = None if room is None else room[rows]
        part, grads = _mlp_bwd(dy[rows], x[rows], gate_up, mlp.rows(rows), needs_dx, wanted, own_room)
        if dx is not None and part is not None:
            dx[rows].copy_(part)
        for total, grad in zip(sums, grads):
            for index, tensor in enumerate(grad):
                if tensor is not None:
                    previous = total[index]
                    # In float32, so that only the parts and their sum are rounded.
                    total[index] = tensor.float() if previous is None else previous.add_(tensor)
    return dx, [
        Grads(*(None if t is None else t.to(like) for t, like in zip(total, _dtypes(p))))
        for total, p in zip(sums, (*mlp.inner.projections, *mlp.outer.projections))
    ]


def _dtypes(projection: Projection) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Of the gradients of a projection's weight, A and B."""
    weight, adapter, _ = projection
    return (weight.dtype,) + (2 * (weight.dtype,) if adapter is None else (adapter.A.dtype, adapter.B.dtype))


def _mlp_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    gate_up: torch.Tensor,
    mlp: MLP,
    needs_dx: bool,
    wanted: Sequence[Wanted],
    room: torch.Tensor | None,
    tile: bool = False,
) -> tuple[torch.Tensor | None, list[Grads]]:
    """`mlp_bwd` of all rows at once."""
    inner, outer = mlp
    intermediate = inner.projections[0].weight.shape[0]
    buffer, gate_up = gate_up, gate_up[:, : 2 * intermediate]
    gate, up = gate_up.split_with_sizes((intermediate, intermediate), 1)
    needs_gate, needs_up, needs_h = (needs_dx or any(wanted[0])), (needs_dx or any(wanted[1])), any(wanted[2])

    dxas: list[torch.Tensor] = []
    dh, dgate_up, down_grads = None, None, [Grads()]
    if needs_gate or needs_up:
        dh, dxas = outer.input_gradient((dy,), room=room)
        if tile:
            dgate_up, inner_room = gate_up, buffer if buffer.shape != gate_up.shape else None
        else:
            behind = inner.room(gate_up.dtype, gradient=True) if needs_dx else 0
            dgate_up, inner_room = with_room(gate_up.shape, behind, gate_up.dtype, gate_up.device)
        dgate, dup = dgate_up.split_with_sizes((intermediate, intermediate), 1)
        # h takes the place of its gradient.
        geglu_bwd(dh, gate, up, dgate if needs_gate else None, dup if needs_up else None, dh if needs_h else None)
    if needs_h:
        h = geglu_fwd(gate, up) if dh is None else dh
        down_grads = outer.factor_gradients((dy,), h, wanted[2:], dxas)
        del h
    del dh
    dx, inner_grads, dxas = None, [Grads(), Grads()], []
    if dgate_up is not None:
        if needs_dx:
            dx, dxas = inner.input_gradient((dgate, dup), dgate_up, room=inner_room)
        inner_grads = inner.factor_gradients((dgate, dup), x, wanted[:2], dxas)
    return dx, inner_grads + down_grads


class _LoraMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, static, numbers, autocast, *trained):
        ctx.static, ctx.numbers, ctx.autocast = static, numbers, autocast
        projections = projections_of(join_trained(static, trained), numbers)
        with without_autocast(x):
            y, gate_ups, products, masks = mlp_fwd(rows_of(x), MLP.of(projections, autocast))
        ctx.n_masks = len(masks)
        keep(ctx, trained, (x, products, *masks, *gate_ups))
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    @once_differentiable
    @backward_without_autocast
    def backward(ctx, dy):
        trained, (x, products, *rest) = kept(ctx)
        drawn, gate_ups = rest[: ctx.n_masks], rest[ctx.n_masks :]
        projections = projections_of(join_trained(ctx.static, trained), ctx.numbers)
        masks = masks_of(projections, drawn)
        flags = wanted_of(ctx.static, ctx.needs_input_grad[4:])
        dx, grads = mlp_bwd(
            rows_of(dy),
            rows_of(x),
            gate_ups,
            MLP.of(projections, ctx.autocast, masks, products),
            ctx.needs_input_grad[0],
            wants_of(flags),
        )
        flat = [gradient for grad in grads for gradient in grad]
        dx = None if dx is None else dx.view(x.shape).to(x.dtype)
        return dx, None, None, None, *trained_only(ctx.static, flat)


def check_mlp(x: torch.Tensor, projections: Sequence[Projection], autocast: torch.dtype | None) -> None:
    """Raises TypeError or ValueError where gate, up and down do not fit x [..., hidden_size], or each other."""
    gate, up, down = projections
    check_projections(x, (gate, up), autocast)
    intermediate = gate.weight.shape[0]
    if up.weight.shape[0] != intermediate or tuple(down.weight.shape) != (x.shape[-1], intermediate):
        raise ValueError(
            f"fastgemma: MLP weights {tuple(gate.weight.shape)}, {tuple(up.weight.shape)}, {tuple(down.weight.shape)} "
            "do not form one."
        )
    check_projections(x.new_empty((0, intermediate)), (down,), autocast)


def lora_mlp(
    x: torch.Tensor, gate: Projection, up: Projection, down: Projection, autocast: torch.dtype | None = None
) -> torch.Tensor:
    """`down(gelu_tanh(gate(x)) * up(x))`, saving x, gate and up, and a few columns.

    Args:
        x: [..., hidden_size], float32, bfloat16 or float16.
        gate, up: hidden_size -> intermediate_size; down: intermediate_size -> hidden_size.
        autocast: as in `lora.lora_projections`.

    Returns:
        [..., hidden_size] in x's dtype, or in autocast's.

    Raises:
        TypeError: dtypes that do not fit. ValueError: shapes that do not fit, different devices, or a dropout of 1.
    """
    projections = (gate, up, down)
    check_mlp(x, projections, autocast)
    static, trained = split_trained(parts_of(projections))
    return _LoraMLP.apply(x, static, numbers_of(projections), autocast, *trained)


def lora_mlp_reference(x: torch.Tensor, gate: Projection, up: Projection, down: Projection) -> torch.Tensor:
    """`lora_mlp` in plain torch."""
    h = geglu_reference(lora_linear_reference(x, gate), lora_linear_reference(x, up))
    return lora_linear_reference(h, down)
