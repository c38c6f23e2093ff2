"""LoRA matmuls over dense or NF4 base weights: several projections of one input.

    y = x W^T + scaling * (d(x) A^T) B^T                      d: dropout on the input, a mask of its own per projection

    dx = dy W + d'(dxa A),   dxa = scaling * dy B
    dA = dxa^T d(x),  dB = scaling * dy^T (d(x) A^T),  dW = dy^T x   (only where asked for)

The big products are cuBLAS's; what is written here is what surrounds them: NF4 weights are dequantised into one
short-lived buffer, for all projections of an input together where their outputs lie side by side; so are the products
with their A's; LoRA's B part is accumulated into the base product's output, dx over projections; x A^T (rank columns)
and d(x) are recomputed rather than kept. Saved for the backward: x, and the masks that dropout drew (a byte each).

Adapters may have another dtype than x (float32 adapters on a bfloat16 model); their products then run in the
adapters' dtype, as PEFT's do. Under autocast everything runs in autocast's.

Source: Hu et al., "LoRA" (2021); Dettmers et al., "QLoRA" (2023); `peft.tuners.lora.layer.Linear`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from fastgemma.kernels.backend import check_dtype
from fastgemma.kernels.nf4 import NF4Weight, dequantize_nf4, dequantize_nf4_reference, dequantize_nf4_stack

Masks = list[torch.Tensor | None]


class Adapter(NamedTuple):
    """LoRA factors: A [rank, in_features], B [out_features, rank], same dtype, and alpha / rank or the like."""

    A: torch.Tensor
    B: torch.Tensor
    scaling: float


class Projection(NamedTuple):
    """One linear layer: base weight [out_features, in_features], dense or NF4, and its adapter, if any.

    `dropout` is the probability, below 1, with which the adapter's input elements are dropped in this call. The mask is
    drawn from torch's generator as `torch.nn.functional.dropout` draws it.
    """

    weight: torch.Tensor | NF4Weight
    adapter: Adapter | None = None
    dropout: float = 0.0


class Wanted(NamedTuple):
    """Which of a projection's gradients are asked for."""

    weight: bool = False
    A: bool = False
    B: bool = False


class Grads(NamedTuple):
    """A projection's gradients; None where not asked for."""

    weight: torch.Tensor | None = None
    A: torch.Tensor | None = None
    B: torch.Tensor | None = None


def _dense(weight: torch.Tensor | NF4Weight, dtype: torch.dtype) -> torch.Tensor:
    if isinstance(weight, NF4Weight):
        # A temporary of the caching allocator: the same block serves the next weight on the same stream.
        out = weight.absmax.new_empty(weight.shape, dtype=dtype) if dtype != weight.dtype else None
        return dequantize_nf4(weight, out)
    return weight if weight.dtype == dtype else weight.to(dtype)


@functools.cache
def _unread(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.zeros(1, dtype=dtype, device=device)


def _scaled_mm(a: torch.Tensor, b: torch.Tensor, scaling: float, out: torch.Tensor | None = None) -> torch.Tensor:
    """scaling * a b, rounded once; with beta 0, addmm does not read its first argument."""
    return torch.addmm(_unread(a.dtype, a.device) if out is None else out, a, b, beta=0, alpha=scaling, out=out)


def _parts(x: torch.Tensor, sizes: list[int], dim: int) -> Sequence[torch.Tensor]:
    """torch.split without its detour through Python."""
    return (x,) if len(sizes) == 1 else x.split_with_sizes(sizes, dim)


class _Group(NamedTuple):
    """Adapters that read the same input, so that one product with their A's, stacked, serves them all."""

    members: list[int]
    A: torch.Tensor  # [sum of ranks, in_features], in the dtype of the adapters' products
    ranks: list[int]


class Projections:
    """Projections of one input, on row matrices and without autograd: for the operations of this file, and for larger
    ones that contain them. `autocast` is the dtype of an enclosing autocast region, else None."""

    def __init__(self, projections: Sequence[Projection], autocast: torch.dtype | None, masks: Masks | None = None):
        self.projections = projections
        self.autocast = autocast
        self.masks: Masks = [None] * len(projections) if masks is None else masks
        together: list[int] = []
        members: list[list[int]] = []
        for index, (_, adapter, dropout) in enumerate(projections):
            if adapter is None:
                continue
            if dropout or (together and adapter.A.dtype != projections[together[0]][1].A.dtype):  # type: ignore[union-attr]
                members.append([index])
            elif together:
                together.append(index)
            else:
                members.append(together)
                together.append(index)
        self._groups = [self._group(m) for m in members]
        # The weights that are dequantised together, if all are NF4.
        weights = [p.weight for p in projections]
        self._stack = [weight for weight in weights if isinstance(weight, NF4Weight)]
        self._all_nf4 = len(self._stack) == len(projections) > 1

    def _group(self, members: list[int]) -> _Group:
        factors = [self._adapter(index).A for index in members]
        A = factors[0] if len(factors) == 1 else torch.cat(factors)
        return _Group(members, self._cast(A), [factor.shape[0] for factor in factors])

    def _adapter(self, index: int) -> Adapter:
        adapter = self.projections[index].adapter
        assert adapter is not None
        return adapter

    def _cast(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self.autocast is None or tensor.dtype == self.autocast else tensor.to(self.autocast)

    def _source(self, x: torch.Tensor, group: _Group) -> torch.Tensor:
        """What a group's A's are multiplied with; drops by a mask that was drawn before, or draws it."""
        index = group.members[0]
        rate, mask = self.projections[index].dropout, self.masks[index]
        if rate:
            # A GPU draws another mask for another dtype. PEFT draws after its own cast to the adapter's dtype, which it
            # leaves out for 4-bit weights under autocast, and before autocast's.
            if self.autocast is None or isinstance(self.projections[index].weight, torch.Tensor):
                x = x.to(self._adapter(index).A.dtype)
            if mask is None:
                x, self.masks[index] = torch.native_dropout(x, rate, True)
            else:
                x = torch.ops.aten.native_dropout_backward(x, mask, 1.0 / (1.0 - rate))
        return x if x.dtype == group.A.dtype else x.to(group.A.dtype)

    def forward(self, x: torch.Tensor, joint: bool = False) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """(all outputs side by side, each of them) from x [rows, in_features]; `masks` then holds the masks drawn.

        The outputs are views of the first, [rows, sum of out_features], with `joint`; else the first means nothing.
        """
        cast = self._cast(x)
        widths = [p.weight.shape[0] for p in self.projections]
        if joint and self._all_nf4:
            whole = torch.mm(cast, dequantize_nf4_stack(self._stack, cast.dtype).t())
            outs = _parts(whole, widths, 1)
        elif joint and len(widths) > 1:
            whole = torch.empty((x.shape[0], sum(widths)), dtype=cast.dtype, device=x.device)
            outs = _parts(whole, widths, 1)
            for projection, out in zip(self.projections, outs):
                torch.mm(cast, _dense(projection.weight, cast.dtype).t(), out=out)
        else:
            outs = [torch.mm(cast, _dense(p.weight, cast.dtype).t()) for p in self.projections]
            whole = outs[0]
        for group in self._groups:
            xa = torch.mm(self._source(x, group), group.A.t())
            for index, xa_part in zip(group.members, _parts(xa, group.ranks, 1)):
                adapter, out = self._adapter(index), outs[index]
                B = self._cast(adapter.B).t()
                if xa.dtype == out.dtype:
                    torch.addmm(out, xa_part, B, alpha=adapter.scaling, out=out)
                else:
                    out.add_(_scaled_mm(xa_part, B, adapter.scaling))
        return whole, outs

    def drawn(self) -> list[torch.Tensor]:
        """The masks that the forward drew, to be saved."""
        return [mask for mask in self.masks if mask is not None]

    def _dxa(self, dys: Sequence[torch.Tensor], group: _Group) -> torch.Tensor:
        """scaling * dy B of a group's members, side by side."""
        dtype = group.A.dtype

        def one(index: int, out: torch.Tensor | None) -> torch.Tensor:
            adapter, dy = self._adapter(index), dys[index]
            return _scaled_mm(dy if dy.dtype == dtype else dy.to(dtype), self._cast(adapter.B), adapter.scaling, out)

        if len(group.members) == 1:
            return one(group.members[0], None)
        dxa = torch.empty((dys[0].shape[0], group.A.shape[0]), dtype=dtype, device=dys[0].device)
        for index, part in zip(group.members, _parts(dxa, group.ranks, 1)):
            one(index, part)
        return dxa

    def input_gradient(
        self, dys: Sequence[torch.Tensor], joint: torch.Tensor | None = None, dx: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """dx [rows, in_features], and what `factor_gradients` can use again.

        `joint` is the buffer in which the `dys` lie side by side, if they do; `dx` is accumulated into, if given: the
        caller's own.
        """
        dtype = dys[0].dtype
        if joint is not None and self._all_nf4:
            weight = dequantize_nf4_stack(self._stack, dtype)
            dx = torch.mm(joint, weight) if dx is None else torch.addmm(dx, joint, weight, out=dx)
        else:
            for projection, dy in zip(self.projections, dys):
                weight = _dense(projection.weight, dtype)
                dx = torch.mm(dy, weight) if dx is None else torch.addmm(dx, dy, weight, out=dx)
        assert dx is not None
        del weight
        dxas = []
        for group in self._groups:
            dxa = self._dxa(dys, group)
            dxas.append(dxa)
            rate, mask = self.projections[group.members[0]].dropout, self.masks[group.members[0]]
            if mask is None and dxa.dtype == dx.dtype:
                torch.addmm(dx, dxa, group.A, out=dx)
            else:
                through = torch.mm(dxa, group.A)
                if mask is not None:
                    through = torch.ops.aten.native_dropout_backward(through, mask, 1.0 / (1.0 - rate))
                dx.add_(through)
        return dx, dxas

    def factor_gradients(
        self,
        dys: Sequence[torch.Tensor],
        x: torch.Tensor,
        wanted: Sequence[Wanted],
        dxas: Sequence[torch.Tensor] = (),
    ) -> list[Grads]:
        """Gradients of weights, A's and B's, in their dtypes, from x as the forward had it."""
        weights: Masks = [None] * len(self.projections)
        As: Masks = [None] * len(self.projections)
        Bs: Masks = [None] * len(self.projections)
        for index, (projection, want) in enumerate(zip(self.projections, wanted)):
            if want.weight and isinstance(projection.weight, torch.Tensor):
                weights[index] = torch.mm(dys[index].t(), self._cast(x)).to(projection.weight.dtype)
        for number, group in enumerate(self._groups):
            wants_a = any(wanted[index].A for index in group.members)
            wants_b = any(wanted[index].B for index in group.members)
            if not (wants_a or wants_b):
                continue
            source = self._source(x, group)
            if wants_b:
                xa = torch.mm(source, group.A.t())
                for index, part in zip(group.members, _parts(xa, group.ranks, 1)):
                    if wanted[index].B:
                        adapter, dy = self._adapter(index), dys[index]
                        dy = dy if dy.dtype == xa.dtype else dy.to(xa.dtype)
                        Bs[index] = _scaled_mm(dy.t(), part, adapter.scaling).to(adapter.B.dtype)
            if wants_a:
                dxa = dxas[number] if dxas else self._dxa(dys, group)
                dA = torch.mm(dxa.t(), source)
                for index, part in zip(group.members, _parts(dA, group.ranks, 0)):
                    if wanted[index].A:
                        As[index] = part.to(self._adapter(index).A.dtype)
        return [Grads(*grads) for grads in zip(weights, As, Bs)]


def without_autocast(x: torch.Tensor) -> contextlib.AbstractContextManager[None]:
    """Products here run in the dtypes they were given; entering torch.autocast costs as much as a launch."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def backward_without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward in its tensors' own dtypes, as its forward, also where the caller runs it inside autocast."""

    @functools.wraps(backward)
    def run(ctx: Any, *dys: torch.Tensor | None) -> Any:
        first = next((dy for dy in dys if dy is not None), None)
        if first is None or not torch.is_autocast_enabled(first.device.type):
            return backward(ctx, *dys)
        with torch.autocast(first.device.type, enabled=False):
            return backward(ctx, *dys)

    return run


# What autograd need not see of tensors and projections: frozen tensors and NF4 weights; a mark where it must.
Static = tuple[Any, ...]
_TRAINED = object()


def split_trained(tensors: Sequence[torch.Tensor | NF4Weight | None]) -> tuple[Static, list[torch.Tensor]]:
    """(frozen ones in their places, trained ones): what is frozen is persistent module state, not an activation, and
    rides along outside `save_for_backward`."""
    static, trained = [], []
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
            trained.append(tensor)
            static.append(_TRAINED)
        else:
            static.append(tensor)
    return tuple(static), trained


def join_trained(static: Static, trained: Sequence[Any]) -> list[Any]:
    """The sequence that `split_trained` took apart; `trained` may hold anything in place of the trained tensors."""
    rest = iter(trained)
    return [next(rest) if item is _TRAINED else item for item in static]


def wanted_of(static: Static, needed: Sequence[bool]) -> list[bool]:
    """For each place whether its gradient is asked for, from `needed` of the trained ones."""
    rest = iter(needed)
    return [item is _TRAINED and next(rest) for item in static]


def trained_only(static: Static, items: Sequence[Any]) -> list[Any]:
    """Of one item for each place, those of the trained ones."""
    return [item for place, item in zip(static, items) if place is _TRAINED]


def keep(ctx: Any, trained: Sequence[torch.Tensor], activations: Sequence[torch.Tensor | None]) -> None:
    """Keeps what a backward needs.

    Activations go through `save_for_backward`, where checkpointing and offloading see them. Trained parameters live in
    their modules anyway and would be no gain to drop or to offload: they are only watched for being written to.
    """
    if all(tensor.is_leaf for tensor in trained):
        ctx.trained = [(tensor, tensor._version) for tensor in trained]
        ctx.save_for_backward(*activations)
    else:
        ctx.trained = len(trained)
        ctx.save_for_backward(*trained, *activations)


def kept(ctx: Any) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """(trained, activations) as `keep` was given them.

    Raises:
        RuntimeError: a trained parameter was written to since, as torch raises it for saved tensors.
    """
    saved = ctx.saved_tensors
    if isinstance(ctx.trained, int):
        return saved[: ctx.trained], saved[ctx.trained :]
    if any(tensor._version != version for tensor, version in ctx.trained):
        raise RuntimeError(
            "fastgemma: a trained parameter was modified in place between a forward and its backward, so that its "
            "gradient would be that of other weights. No gradient was produced. Step the optimizer after backward()."
        )
    return [tensor for tensor, _ in ctx.trained], saved


def parts_of(projections: Sequence[Projection]) -> list[torch.Tensor | NF4Weight | None]:
    """weight, A and B of each projection."""
    parts: list[torch.Tensor | NF4Weight | None] = []
    for weight, adapter, _ in projections:
        parts += (weight, None, None) if adapter is None else (weight, adapter.A, adapter.B)
    return parts


def numbers_of(projections: Sequence[Projection]) -> tuple[tuple[float, float], ...]:
    """scaling and dropout of each projection."""
    return tuple((0.0 if adapter is None else adapter.scaling, dropout) for _, adapter, dropout in projections)


def projections_of(parts: Sequence[Any], numbers: Sequence[tuple[float, float]]) -> list[Projection]:
    """The projections that `parts_of` and `numbers_of` took apart."""
    projections = []
    for index, (scaling, dropout) in enumerate(numbers):
        weight, A, B = parts[3 * index : 3 * index + 3]
        projections.append(Projection(weight, None if A is None else Adapter(A, B, scaling), dropout))
    return projections


def masks_of(projections: Sequence[Projection], drawn: Sequence[torch.Tensor]) -> Masks:
    """The masks that a forward drew, in the places of the projections that they belong to."""
    rest = iter(drawn)
    return [next(rest) if adapter is not None and dropout else None for _, adapter, dropout in projections]


def wants_of(flags: Sequence[bool]) -> list[Wanted]:
    """`flags` for weight, A and B of each projection, projection by projection."""
    return [Wanted(*flags[i : i + 3]) for i in range(0, len(flags), 3)]


def rows_of(x: torch.Tensor) -> torch.Tensor:
    """x as [rows, columns], for a matrix product."""
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


class _LoraProjections(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, static, numbers, autocast, *trained):
        ctx.set_materialize_grads(False)
        ctx.static, ctx.numbers, ctx.autocast = static, numbers, autocast
        rows = rows_of(x)
        projections = projections_of(join_trained(static, trained), numbers)
        bundle = Projections(projections, autocast)
        with without_autocast(x):
            _, outs = bundle.forward(rows)
        keep(ctx, trained, (x, *bundle.drawn()))
        return tuple(out.view(*x.shape[:-1], out.shape[1]) for out in outs)

    @staticmethod
    @once_differentiable
    @backward_without_autocast
    def backward(ctx, *dys):
        trained, (x, *drawn) = kept(ctx)
        projections = projections_of(join_trained(ctx.static, trained), ctx.numbers)
        masks = masks_of(projections, drawn)
        wanted = wants_of(wanted_of(ctx.static, ctx.needs_input_grad[4:]))
        used = [index for index, dy in enumerate(dys) if dy is not None]
        if not used:
            return (None,) * (4 + len(trained))
        bundle = Projections([projections[i] for i in used], ctx.autocast, [masks[i] for i in used])
        used_dys, rows = [rows_of(dys[i]) for i in used], rows_of(x)
        dx, dxas = None, []
        if ctx.needs_input_grad[0]:
            dx, dxas = bundle.input_gradient(used_dys)
            dx = dx.view(x.shape).to(x.dtype)
        grads = [Grads()] * len(projections)
        for index, grad in zip(used, bundle.factor_gradients(used_dys, rows, [wanted[i] for i in used], dxas)):
            grads[index] = grad
        flat = [gradient for grad in grads for gradient in grad]
        return dx, None, None, None, *trained_only(ctx.static, flat)


def check_projections(x: torch.Tensor, projections: Sequence[Projection], autocast: torch.dtype | None) -> None:
    """Raises TypeError or ValueError where the projections do not fit x [..., in_features]."""
    check_dtype("x", x)
    device, features = x.device, x.shape[-1]
    for weight, adapter, dropout in projections:
        if weight.shape[1] != features:
            raise ValueError(
                f"fastgemma: a weight of shape {tuple(weight.shape)} does not fit an input of {features} features."
            )
        if autocast is None and not isinstance(weight, NF4Weight) and weight.dtype != x.dtype:
            raise TypeError(f"fastgemma: x is {x.dtype}, a base weight {weight.dtype}; cast one.")
        if weight.device != device:
            raise ValueError(f"fastgemma: x is on {device}, a base weight on {weight.device}; move one.")
        if not 0 <= dropout < 1:
            raise ValueError(f"fastgemma: dropout is {dropout}; give a probability below 1.")
        if adapter is None:
            continue
        A, B, _ = adapter
        if A.shape != (B.shape[1], features) or B.shape[0] != weight.shape[0]:
            raise ValueError(
                f"fastgemma: LoRA factors {tuple(A.shape)} and {tuple(B.shape)} do not fit a weight of shape "
                f"{tuple(weight.shape)}."
            )
        if A.device != device or B.device != device:
            raise ValueError(f"fastgemma: x is on {device}, LoRA factors on {A.device} and {B.device}; move one.")
        if A.dtype != B.dtype:
            raise TypeError(f"fastgemma: LoRA factors are {A.dtype} and {B.dtype}; cast one.")


def lora_projections(
    x: torch.Tensor, projections: Sequence[Projection], autocast: torch.dtype | None = None
) -> tuple[torch.Tensor, ...]:
    """Several projections of one input, with one accumulated input gradient.

    Args:
        x: [..., in_features], float32, bfloat16 or float16.
        projections: dense weights in x's dtype, or NF4 ones; adapters of any rank, in x's dtype or another.
        autocast: run every product in this dtype, whatever the tensors have, as torch.autocast would; None: as above.

    Returns:
        One [..., out_features] per projection, in x's dtype, or in autocast's.

    Raises:
        TypeError: dtypes that do not fit. ValueError: shapes that do not fit, different devices, or a dropout of 1.
    """
    check_projections(x, projections, autocast)
    static, trained = split_trained(parts_of(projections))
    return _LoraProjections.apply(x, static, numbers_of(projections), autocast, *trained)


def lora_linear(x: torch.Tensor, projection: Projection, autocast: torch.dtype | None = None) -> torch.Tensor:
    """One projection: [..., in_features] -> [..., out_features]. See `lora_projections`."""
    return lora_projections(x, (projection,), autocast)[0]


def lora_qkv(
    x: torch.Tensor,
    q: Projection,
    k: Projection | None = None,
    v: Projection | None = None,
    autocast: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """The attention projections of one layer: q alone (shared keys and values), q and k (values from keys), or all.

    Returns:
        q, k, v as [..., out_features]; None where no projection was given. See `lora_projections` for the rest.
    """
    outs = iter(lora_projections(x, [p for p in (q, k, v) if p is not None], autocast))
    return next(outs), None if k is None else next(outs), None if v is None else next(outs)


def lora_linear_reference(x: torch.Tensor, projection: Projection) -> torch.Tensor:
    """`lora_linear` in plain torch; float64 inputs stay float64."""
    weight, adapter, dropout = projection
    dense = dequantize_nf4_reference(weight) if isinstance(weight, NF4Weight) else weight
    y = torch.nn.functional.linear(x, dense.to(x.dtype))
    if adapter is not None:
        dropped = torch.nn.functional.dropout(x.to(adapter.A.dtype), dropout)
        delta = torch.nn.functional.linear(torch.nn.functional.linear(dropped, adapter.A), adapter.B)
        y = y + (delta * adapter.scaling).to(y.dtype)
    return y
