"""`post_attention` over tiles of rows, for a layer that is checkpointed, where memory is short.

A checkpointed layer's forward runs twice, and its last operation the second time only for what it saves: gate and up of
all rows would be the largest block of a step. Rows do not know of each other, so this operation saves its inputs alone.

    forward:            out of one tile after the other, of which nothing is kept
    its recomputation:  nothing at all; nobody reads the output
    backward:           of each tile the forward, and at once its backward

The matrix products are those of `post_attention` and its recomputation; gate and up live for one tile at a time, of as
many rows as the budget allows, and their gradients take their place. Gradients of what all rows share are summed in
float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastgemma.kernels._autograd import (
    backward_without_autocast,
    keep,
    kept,
    numbers_of,
    parts_of,
    split_trained,
    trained_only,
    wanted_of,
)
from fastgemma.kernels._lora_parts import without_autocast
from fastgemma.kernels._once_differentiable import once_differentiable
from fastgemma.kernels._post_attention_rows import Tail, keeps_gate_input, rows_bwd, rows_fwd
from fastgemma.kernels.backend import as_rows
from fastgemma.kernels.lora_mlp import mlp_tiles
from fastgemma.kernels.post_attention import Matrices, Norms
from fastgemma.kernels.workspace import workspace_bytes

# Numbers in gradients that are added up as one tensor: of adapters, whose additions one by one would be as many
# launches again as the rest of a tile; not of whole weights, whose copy would take memory.
_MOST_TOGETHER = 1 << 23
# What part of the budget for temporaries a dense weight may take that all tiles share; there are up to four of them.
_HELD_SHARE = 8


def _tail(rows: torch.Tensor, *parts: Any) -> tuple[Tail, list[slice]]:
    """`Tail.of` these parts for these rows, and their tiles, of which gate and up about fit the budget."""
    tail = Tail.of(*parts)._replace(tile=True)
    intermediate = tail.projections[1].weight.shape[0]
    tiles = mlp_tiles(rows.shape[0], intermediate, rows.dtype, rows.device, blocks=2)
    if len(tiles) > 1:
        tail = tail.holding_weights(workspace_bytes(rows.device) // _HELD_SHARE, rows.dtype)
    return tail, tiles


def _all_rows(tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [None if tensor is None else as_rows(tensor) for tensor in tensors]


def _of(tensor: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if tensor is None else tensor[rows]


def _add(sums: list[torch.Tensor], parts: list[torch.Tensor], together: bool) -> list[torch.Tensor]:
    """Sums in float32, of which there is one if they are made `together`."""
    if together and parts:
        parts = [torch.cat([part.reshape(-1) for part in parts])]
    return [total.add_(part) for total, part in zip(sums, parts)] or [part.float() for part in parts]


def _apart(total: torch.Tensor, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """What `_add` put together, one for each of these tensors."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) == 1:
        total = total.to(dtypes.pop())
    return total.split_with_sizes([tensor.numel() for tensor in tensors])


def _like(tensor: torch.Tensor | None, needed: bool) -> torch.Tensor | None:
    """A gradient to be filled."""
    return (
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) if needed and tensor is not None else None
    )


class _PostAttentionTiles(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, attended, residual, per_layer_input, layer_scalar, static, numbers, eps, autocast, computes, *trained
    ):
        ctx.static, ctx.rest = static, (numbers, layer_scalar, eps, autocast)
        out = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device)
        if computes:
            attended_rows, residual_rows, inputs = _all_rows((attended, residual, per_layer_input))
            out_rows = as_rows(out)
            with without_autocast(attended):
                tail, tiles = _tail(residual_rows, static, trained, *ctx.rest)
                for rows in tiles:
                    part = attended_rows[rows], residual_rows[rows], _of(inputs, rows)
                    rows_fwd(tail, *part, keeps_h2=False, out=out_rows[rows], keeps=False)
        keep(ctx, trained, (attended, residual, per_layer_input))
        return out

    @staticmethod
    @once_differentiable
    @backward_without_autocast
    def backward(ctx, d_out):
        trained, inputs = kept(ctx)
        needs = ctx.needs_input_grad
        flags = wanted_of(ctx.static, needs[9:])
        attended, residual, per_layer_input = _all_rows(inputs)
        tail, tiles = _tail(residual, ctx.static, trained, *ctx.rest)
        d_out_rows = as_rows(d_out)
        d_attended, d_residual, d_input = map(_like, (attended, residual, per_layer_input), needs)
        wanted = [tensor for tensor, want in zip(trained, trained_only(ctx.static, flags)) if want]
        together = sum(tensor.numel() for tensor in wanted) <= _MOST_TOGETHER
        sums: list[torch.Tensor] = []
        for rows in tiles:
            own = attended[rows], _of(per_layer_input, rows)
            _, made = rows_fwd(tail, own[0], residual[rows], own[1], keeps_gate_input(flags))
            grads = rows_bwd(
                tail,
                d_out_rows[rows],
                *own,
                made,
                needs[0],
                needs[2],
                flags,
                _of(d_attended, rows),
                _of(d_residual, rows),
                _of(d_input, rows),
            )
            del made
            parts = [grad for grad, want in zip(grads.trained, flags) if want]
            sums = _add(sums, parts, together) if len(tiles) > 1 else parts
            del parts, grads
        summed = iter(_apart(sums[0], wanted) if len(tiles) > 1 and together and wanted else sums)
        return (
            *(None if d is None else d.view(x.shape) for d, x in zip((d_attended, d_residual, d_input), inputs)),
            *(None,) * 6,
            *(
                next(summed).view(tensor.shape).to(tensor.dtype) if want else None
                for tensor, want in zip(trained, trained_only(ctx.static, flags))
            ),
        )


def splits_rows(residual: torch.Tensor, matrices: Matrices) -> bool:
    """Whether a backward of all rows makes more than `workspace_bytes()` in the MLP, and no masks are drawn, which are
    drawn for all rows at once.

    Where gate and up alone fit, there is one tile, whose gradients take their place.
    """
    if any(p.dropout for p in matrices if p is not None and p.adapter is not None):
        return False
    n_rows, intermediate = residual.shape[:-1].numel(), matrices.gate.weight.shape[0]
    return len(mlp_tiles(n_rows, intermediate, residual.dtype, residual.device)) > 1


def post_attention_in_tiles(
    attended: torch.Tensor,
    residual: torch.Tensor,
    norms: Norms,
    matrices: Matrices,
    layer_scalar: torch.Tensor,
    per_layer_input: torch.Tensor | None,
    eps: float,
    autocast: torch.dtype | None,
    computes: bool = True,
) -> torch.Tensor:
    """`post_attention` where its kernels run and no masks are drawn, of arguments known to fit, saving only its inputs.

    With `computes` False only gradients come of it: the output [batch, seq_len, hidden_size] is not written.
    """
    projections = [p for p in matrices if p is not None]
    static, trained = split_trained([*norms, *parts_of(projections)])
    return _PostAttentionTiles.apply(
        attended,
        residual,
        per_layer_input,
        layer_scalar,
        static,
        numbers_of(projections),
        eps,
        autocast,
        computes,
        *trained,
    )
