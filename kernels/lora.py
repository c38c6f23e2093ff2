"""LoRA matmuls over dense or NF4 base weights: several projections of one input, and the whole GeGLU MLP.

    y = x W^T + scaling * (d(x) A^T) B^T                      d: dropout on the input, drawn by the caller

    dx = dy W + d'(dxa A),   dxa = scaling * dy B
    dA = dxa^T d(x),  dB = scaling * dy^T (d(x) A^T),  dW = dy^T x   (only where asked for)

The big products are cuBLAS's; what is written here is what surrounds them: the base weight is dequantised into one
short-lived buffer, LoRA's B part is accumulated into the base product's output, dx is accumulated over projections,
and x A^T (rank columns) is recomputed rather than kept. Saved for the backward: x (and d(x) where dropout drew one);
for the MLP x, gate and up, with h = gelu(gate) * up rebuilt.

Adapters may have another dtype than x (float32 adapters on a bfloat16 model); their products then run in the
adapters' dtype, as PEFT's do.

Source: Hu et al., "LoRA" (2021); Dettmers et al., "QLoRA" (2023); `peft.tuners.lora.layer.Linear`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fastgemma.kernels.backend import check_dtype, runs_kernel
from fastgemma.kernels.geglu import geglu_bwd, geglu_fwd, geglu_reference
from fastgemma.kernels.nf4 import NF4Weight, dequantize_nf4, dequantize_nf4_reference


@dataclass(frozen=True)
class Adapter:
    """LoRA factors: A [rank, in_features], B [out_features, rank], same dtype, and alpha / rank or the like."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


@dataclass(frozen=True)
class Projection:
    """One linear layer: base weight [out_features, in_features], dense or NF4, and its adapter, if any.

    `dropped` is d(x) in the adapter's dtype where dropout is on, else None.
    """

    weight: torch.Tensor | NF4Weight
    adapter: Adapter | None = None
    dropped: torch.Tensor | None = None


def _dense(weight: torch.Tensor | NF4Weight, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(weight, NF4Weight):
        # A temporary of the caching allocator: the same block serves the next weight on the same stream.
        out = torch.empty(weight.shape, dtype=dtype, device=weight.device) if dtype != weight.dtype else None
        return dequantize_nf4(weight, out)
    return weight


def _scaled_mm(a: torch.Tensor, b: torch.Tensor, scaling: float) -> torch.Tensor:
    """scaling * a b, rounded once; with beta 0, addmm does not read its first argument."""
    unread = b[0] if b.shape[0] else b.new_empty(1)
    return torch.addmm(unread, a, b, beta=0, alpha=scaling)


def _project(x: torch.Tensor, projection: Projection) -> torch.Tensor:
    """y of one projection; x [rows, in_features]."""
    y = torch.mm(x, _dense(projection.weight, x.dtype).t())
    adapter = projection.adapter
    if adapter is None:
        return y
    source = x if projection.dropped is None else projection.dropped
    xa = torch.mm(source.to(adapter.A.dtype), adapter.A.t())
    if adapter.A.dtype == y.dtype:
        return torch.addmm(y, xa, adapter.B.t(), alpha=adapter.scaling, out=y)
    return y.add_(_scaled_mm(xa, adapter.B.t(), adapter.scaling))


@dataclass(frozen=True)
class _Wanted:
    x: bool
    weight: bool
    A: bool
    B: bool
    dropped: bool


@dataclass
class _Grads:
    weight: torch.Tensor | None = None
    A: torch.Tensor | None = None
    B: torch.Tensor | None = None
    dropped: torch.Tensor | None = None


def _project_bwd(
    dy: torch.Tensor,
    x: torch.Tensor,
    projection: Projection,
    dx: torch.Tensor | None,
    wanted: _Wanted,
) -> tuple[torch.Tensor | None, _Grads]:
    """Gradients of one projection; dx [rows, in_features] is this function's to accumulate into, or None."""
    grads = _Grads()
    if wanted.x:
        weight = _dense(projection.weight, dy.dtype)
        dx = torch.mm(dy, weight) if dx is None else torch.addmm(dx, dy, weight, out=dx)
        del weight
    if wanted.weight:
        grads.weight = torch.mm(dy.t(), x)
    adapter = projection.adapter
    if adapter is None or not (wanted.x or wanted.A or wanted.B or wanted.dropped):
        return dx, grads
    dtype = adapter.A.dtype
    dy_lora = dy.to(dtype)
    source = (x if projection.dropped is None else projection.dropped).to(dtype)
    if wanted.B:
        grads.B = _scaled_mm(dy_lora.t(), torch.mm(source, adapter.A.t()), adapter.scaling)
    if not (wanted.x or wanted.A or wanted.dropped):
        return dx, grads
    dxa = _scaled_mm(dy_lora, adapter.B, adapter.scaling)
    if wanted.A:
        grads.A = torch.mm(dxa.t(), source)
    if projection.dropped is not None:
        if wanted.dropped:
            grads.dropped = torch.mm(dxa, adapter.A)
    elif dx is not None and wanted.x:
        if dtype == dx.dtype:
            torch.addmm(dx, dxa, adapter.A, out=dx)
        else:
            dx.add_(torch.mm(dxa, adapter.A))
    return dx, grads


def _no_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Products here run in the dtypes they were given; entering torch.autocast costs as much as a launch."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


# Tensors of a projection that autograd must see, in this order; None where absent.
_TENSORS_PER_PROJECTION = 4


# Of each projection, what autograd need not see: an NF4 weight and the adapter's scaling.
_Static = tuple[tuple[NF4Weight | None, float | None], ...]


def _flatten(projections: Sequence[Projection]) -> tuple[_Static, list[torch.Tensor | None]]:
    """(what autograd need not see, what it must) of projections."""
    static: list[tuple[NF4Weight | None, float | None]] = []
    tensors: list[torch.Tensor | None] = []
    for p in projections:
        frozen = p.weight if isinstance(p.weight, NF4Weight) else None
        static.append((frozen, None if p.adapter is None else p.adapter.scaling))
        tensors += [
            None if isinstance(p.weight, NF4Weight) else p.weight,
            None if p.adapter is None else p.adapter.A,
            None if p.adapter is None else p.adapter.B,
            p.dropped,
        ]
    return tuple(static), tensors


def _unflatten(static: tuple[Any, ...], tensors: Sequence[Any]) -> list[Projection]:
    """The projections that `_flatten` took apart."""
    projections = []
    for index, (frozen, scaling) in enumerate(static):
        weight, A, B, dropped = tensors[index * _TENSORS_PER_PROJECTION : (index + 1) * _TENSORS_PER_PROJECTION]
        adapter = None if A is None else Adapter(A, B, scaling)
        projections.append(Projection(weight if frozen is None else frozen, adapter, dropped))
    return projections


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def _without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward in its tensors' own dtypes, as its forward, also where the caller runs it inside autocast."""

    @functools.wraps(backward)
    def run(ctx: Any, *dys: torch.Tensor | None) -> Any:
        first = next((dy for dy in dys if dy is not None), None)
        with contextlib.nullcontext() if first is None else _no_autocast(first):
            return backward(ctx, *dys)

    return run


class _Projections(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, static, *tensors):
        # NF4 weights are persistent module state, not activations: they ride along outside save_for_backward.
        ctx.static = static
        ctx.save_for_backward(x, *tensors)
        ctx.set_materialize_grads(False)
        rows, outs = _rows(x), []
        with _no_autocast(x):
            for projection in _unflatten(static, tensors):
                if projection.dropped is not None:
                    projection = Projection(projection.weight, projection.adapter, _rows(projection.dropped))
                outs.append(_project(rows, projection).view(*x.shape[:-1], projection.weight.shape[0]))
        return tuple(outs)

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx, *dys):
        x, *tensors = ctx.saved_tensors
        rows = _rows(x)
        dx, grads = None, []
        for index, (dy, projection) in enumerate(zip(dys, _unflatten(ctx.static, tensors))):
            base = 2 + index * _TENSORS_PER_PROJECTION
            need_weight, need_A, need_B, need_dropped = ctx.needs_input_grad[base : base + _TENSORS_PER_PROJECTION]
            if dy is None:
                grads += [None] * _TENSORS_PER_PROJECTION
                continue
            dropped = projection.dropped
            if dropped is not None:
                projection = Projection(projection.weight, projection.adapter, _rows(dropped))
            wanted = _Wanted(ctx.needs_input_grad[0], need_weight, need_A, need_B, need_dropped)
            dx, g = _project_bwd(_rows(dy), rows, projection, dx, wanted)
            grads += [g.weight, g.A, g.B, None if g.dropped is None else g.dropped.view(dropped.shape)]
        return None if dx is None else dx.view(x.shape), None, *grads


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, static, *tensors):
        gate_projection, up_projection, down_projection = _unflatten(static, tensors)
        rows = _rows(x)
        with _no_autocast(x):
            gate = _project(rows, gate_projection)
            up = _project(rows, up_projection)
            y = _project(_geglu(gate, up), down_projection)
        ctx.static = static
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(x, gate, up, *tensors)
        return y.view(x.shape)

    @staticmethod
    @once_differentiable
    @_without_autocast
    def backward(ctx, dy):
        x, gate, up, *tensors = ctx.saved_tensors
        projections = _unflatten(ctx.static, tensors)
        needs_x, need = ctx.needs_input_grad[0], ctx.needs_input_grad[2:]
        wants = [need[i * _TENSORS_PER_PROJECTION : (i + 1) * _TENSORS_PER_PROJECTION] for i in range(3)]
        needs_gate = needs_x or any(wants[0])
        needs_up = needs_x or any(wants[1])
        rows, dy = _rows(x), _rows(dy)
        gate_projection, up_projection, down_projection = projections

        # Down first, and its input h rebuilt only where A, B or W of it want a gradient.
        needs_h = any(wants[2])
        dh, dgate, dup, h = None, None, None, None
        down_grads = _Grads()
        if needs_gate or needs_up:
            dh, _ = _project_bwd(dy, rows, down_projection, None, _Wanted(True, False, False, False, False))
            dgate, dup, h = _geglu_bwd(dh, gate, up, needs_h)
            del dh
        if needs_h:
            h = _geglu(gate, up) if h is None else h
            _, down_grads = _project_bwd(dy, h, down_projection, None, _Wanted(False, *wants[2]))
            del h
        dx, up_grads, gate_grads = None, _Grads(), _Grads()
        if needs_up:
            dx, up_grads = _project_bwd(dup, rows, up_projection, dx, _Wanted(needs_x, *wants[1]))
            del dup
        if needs_gate:
            dx, gate_grads = _project_bwd(dgate, rows, gate_projection, dx, _Wanted(needs_x, *wants[0]))
        grads = []
        for g in (gate_grads, up_grads, down_grads):
            grads += [g.weight, g.A, g.B, None]
        return None if dx is None else dx.view(x.shape), None, *grads


def _geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return geglu_fwd(gate, up) if runs_kernel(gate, up) else geglu_reference(gate, up)


def _geglu_bwd(dh: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, needs_h: bool):
    if runs_kernel(gate, up):
        return geglu_bwd(dh, gate, up, needs_h=needs_h, overwrite_dh=True)
    with torch.enable_grad():
        g, u = gate.detach().requires_grad_(), up.detach().requires_grad_()
        h = geglu_reference(g, u)
        dgate, dup = torch.autograd.grad(h, (g, u), dh)
    return dgate, dup, h.detach()


def _check(x: torch.Tensor, projections: Sequence[Projection]) -> None:
    check_dtype("x", x)
    for p in projections:
        if p.weight.shape[1] != x.shape[-1]:
            raise ValueError(
                f"fastgemma: a weight of shape {tuple(p.weight.shape)} does not fit an input of {x.shape[-1]} features."
            )
        if not isinstance(p.weight, NF4Weight) and p.weight.dtype != x.dtype:
            raise TypeError(f"fastgemma: x is {x.dtype}, a base weight {p.weight.dtype}; cast one.")
        if p.weight.device != x.device:
            raise ValueError(f"fastgemma: x is on {x.device}, a base weight on {p.weight.device}; move one.")
        if p.adapter is not None:
            rank = p.adapter.A.shape[0]
            if p.adapter.A.shape != (rank, p.weight.shape[1]) or p.adapter.B.shape != (p.weight.shape[0], rank):
                raise ValueError(
                    f"fastgemma: LoRA factors {tuple(p.adapter.A.shape)} and {tuple(p.adapter.B.shape)} do not fit a "
                    f"weight of shape {tuple(p.weight.shape)}."
                )
            if p.adapter.A.device != x.device or p.adapter.B.device != x.device:
                raise ValueError(
                    f"fastgemma: x is on {x.device}, LoRA factors on {p.adapter.A.device} and {p.adapter.B.device}; "
                    "move one."
                )
            if p.adapter.A.dtype != p.adapter.B.dtype:
                raise TypeError(f"fastgemma: LoRA factors are {p.adapter.A.dtype} and {p.adapter.B.dtype}; cast one.")
        if p.dropped is not None and p.dropped.shape != x.shape:
            raise ValueError(f"fastgemma: dropped input {tuple(p.dropped.shape)} for an input {tuple(x.shape)}.")


def lora_projections(x: torch.Tensor, projections: Sequence[Projection]) -> tuple[torch.Tensor, ...]:
    """Several projections of one input, with one accumulated input gradient.

    Args:
        x: [..., in_features], float32, bfloat16 or float16.
        projections: dense weights in x's dtype, or NF4 ones; adapters of any rank, in x's dtype or another.

    Returns:
        One [..., out_features] per projection, in x's dtype.

    Raises:
        TypeError: dtypes that do not fit. ValueError: shapes that do not fit, or different devices.
    """
    _check(x, projections)
    static, tensors = _flatten(projections)
    return _Projections.apply(x, static, *tensors)


def lora_linear(x: torch.Tensor, projection: Projection) -> torch.Tensor:
    """One projection: [..., in_features] -> [..., out_features]. See `lora_projections`."""
    return lora_projections(x, (projection,))[0]


def lora_qkv(
    x: torch.Tensor, q: Projection, k: Projection | None = None, v: Projection | None = None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The attention projections of one layer: q alone (shared keys and values), q and k (values from keys), or all.

    Returns:
        q, k, v as [..., out_features]; None where no projection was given. See `lora_projections` for the rest.
    """
    given = [p for p in (q, k, v) if p is not None]
    outs = iter(lora_projections(x, given))
    return next(outs), None if k is None else next(outs), None if v is None else next(outs)


def lora_mlp(x: torch.Tensor, gate: Projection, up: Projection, down: Projection) -> torch.Tensor:
    """`down(gelu_tanh(gate(x)) * up(x))`, saving x, gate and up.

    Args:
        x: [..., hidden_size], float32, bfloat16 or float16.
        gate, up: hidden_size -> intermediate_size; down: intermediate_size -> hidden_size. None may carry a `dropped`
            input: with dropout on, compose `lora_projections`, `geglu` and `lora_linear`, as dropout on h needs h.

    Returns:
        [..., hidden_size] in x's dtype.

    Raises:
        TypeError: dtypes that do not fit. ValueError: shapes that do not fit, a dropped input, or different devices.
    """
    _check(x, (gate, up))
    if any(p.dropped is not None for p in (gate, up, down)):
        raise ValueError("fastgemma: lora_mlp runs without dropout; compose lora_projections and geglu instead.")
    intermediate = gate.weight.shape[0]
    if up.weight.shape[0] != intermediate or tuple(down.weight.shape) != (x.shape[-1], intermediate):
        raise ValueError(
            f"fastgemma: MLP weights {tuple(gate.weight.shape)}, {tuple(up.weight.shape)}, {tuple(down.weight.shape)} "
            "do not form one."
        )
    _check(x.new_empty((0, intermediate)), (down,))
    static, tensors = _flatten((gate, up, down))
    return _MLP.apply(x, static, *tensors)


def lora_linear_reference(x: torch.Tensor, projection: Projection) -> torch.Tensor:
    """`lora_linear` in plain torch; float64 inputs stay float64."""
    weight = projection.weight
    dense = dequantize_nf4_reference(weight) if isinstance(weight, NF4Weight) else weight
    y = torch.nn.functional.linear(x, dense.to(x.dtype))
    if projection.adapter is not None:
        A, B = projection.adapter.A, projection.adapter.B
        source = (x if projection.dropped is None else projection.dropped).to(A.dtype)
        delta = torch.nn.functional.linear(torch.nn.functional.linear(source, A), B) * projection.adapter.scaling
        y = y + delta.to(y.dtype)
    return y


def lora_mlp_reference(x: torch.Tensor, gate: Projection, up: Projection, down: Projection) -> torch.Tensor:
    """`lora_mlp` in plain torch."""
    h = geglu_reference(lora_linear_reference(x, gate), lora_linear_reference(x, up))
    return lora_linear_reference(h, down)
