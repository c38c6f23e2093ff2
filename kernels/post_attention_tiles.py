"""`post_attention` over tiles of rows, for a layer that is checkpointed, where memory is short.

A checkpointed layer's forward runs twice, and its last operation the second time only for what it saves: gate and up of
all rows would be the largest block of a step. Rows do not know of each other, so this operation saves its inputs alone.

    forward:            out of one tile after the other, of which nothing is kept
    its recomputation:  nothing at all; nobody reads the output
    backward:           of each tile the forward, and at once its backward

The matrix products are those of `post_attention` and its recomputation; gate and up live for one tile at a time, which
has as many rows as a tile of `lora_mlp`. Gradients of what all rows share are summed in float32.
"""

from __future__ import annotations

from collections.abc import Sequence

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
from fastgemma.kernels._lora_products import without_autocast
from fastgemma.kernels._once_differentiable import once_differentiable
from fastgemma.kernels._post_attention_rows import Tail, keeps_gate_input, rows_bwd, rows_fwd
from fastgemma.kernels.backend import as_rows
from fastgemma.kernels.lora_mlp import mlp_tiles
from fastgemma.kernels.post_attention import Matrices, Norms

# Numbers in gradients that are added up as one tensor: of adapters, whose additions one by one would be as many
# launches again as the rest of a tile; not of whole weights, whose copy would take memory.
_MOST_TOGETHER = 1 << 23


def _tiles(rows: torch.Tensor, tail: Tail) -> list[slice]:
    return mlp_tiles(rows.shape[0], tail.projections[1].weight.shape[0], rows.dtype, rows.device)


def _all_rows(tensors: Sequence[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [None if tensor is None else as_rows(tensor) for tensor in tensors]


def _of(tensor: torch.Tensor | None, rows: slice) -> torch.Tensor | None:
    return None if tensor is None else tensor[rows]


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
            tail = Tail.of(static, trained, *ctx.rest)
            attended_rows, residual_rows, inputs = _all_rows((attended, residual, per_layer_input))
            out_rows = as_rows(out)
            with without_autocast(attended):
                for rows in _tiles(residual_rows, tail):
                    part = attended_rows[rows], residual_rows[rows], _of(inputs, rows)
                    rows_fwd(tail, *part, keeps_h2=False, out=out_rows[rows])
        keep(ctx, trained, (attended, residual, per_layer_input))
        return out

    @staticmethod
    @once_differentiable
    @backward_without_autocast
    def backward(ctx, d_out):
        trained, inputs = kept(ctx)
        tail, needs = Tail.of(ctx.static, trained, *ctx.rest), ctx.needs_input_grad
        flags = wanted_of(ctx.static, needs[9:])
        attended, residual, per_layer_input = _all_rows(inputs)
        d_out_rows = as_rows(d_out)
        d_attended, d_residual, d_input = map(_like, (attended, residual, per_layer_input), needs)
        wanted = [tensor for tensor, want in zip(trained, trained_only(ctx.static, flags)) if want]
        together = sum(tensor.numel() for tensor in wanted) <= _MOST_TOGETHER
        sums: list[torch.Tensor] = []
        for rows in _tiles(residual, tail):
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
                _of(d_residual, rows),
                _of(d_input, rows),
            )
            del made
            if d_attended is not None:
                d_attended[rows].copy_(grads.attended)
            parts = [grad for grad, want in zip(grads.trained, flags) if want]
            if together and parts:
                parts = [torch.cat([part.reshape(-1) for part in parts])]
            sums = [total.add_(part) for total, part in zip(sums, parts)] or [part.float() for part in parts]
            del parts, grads
        if together and wanted:
            sums = list(sums[0].split_with_sizes([tensor.numel() for tensor in wanted]))
        summed = iter(sums)
        return (
            *(None if d is None else d.view(x.shape) for d, x in zip((d_attended, d_residual, d_input), inputs)),
            *(None,) * 6,
            *(
                next(summed).view(tensor.shape).to(tensor.dtype) if want else None
                for tensor, want in zip(trained, trained_only(ctx.static, flags))
            ),
        )


def splits_rows(residual: torch.Tensor, matrices: Matrices) -> bool:
    """Whether gate and up of all rows exceed `workspace_bytes()`, and no masks are drawn, which are drawn for all rows
    at once."""
    if any(p.dropout for p in matrices if p is not None and p.adapter is not None):
        return False
    n_rows, intermediate = residual.shape[:-1].numel(), matrices.gate.weight.shape[0]
    return len(mlp_tiles(n_rows, intermediate, residual.dtype, residual.device, blocks=2)) > 1


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
