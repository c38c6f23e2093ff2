"""The products of LoRA projections on row matrices, without autograd, for all operations that contain them.

The formulas are in `lora`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from fastgemma.kernels._lora_parts import Adapter, Grads, Masks, Projection, Wanted
from fastgemma.kernels.adapter_columns import Block, block_diagonal
from fastgemma.kernels.nf4 import NF4Weight, dequantize_nf4, dequantize_nf4_stack


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
    """Projections of one input: their outputs, and what their forward and backward share.

    `autocast` is the dtype of an enclosing autocast region, else None; `masks` are those that the forward drew, and
    `products` those with the A's that it kept: scaling * x A^T, side by side, [rows, sum of ranks].
    """

    def __init__(
        self,
        projections: Sequence[Projection],
        autocast: torch.dtype | None,
        masks: Masks | None = None,
        products: torch.Tensor | None = None,
    ):
        self.projections = projections
        self.autocast = autocast
        self.products = products
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
        self._rank = sum(group.A.shape[0] for group in self._groups)
        # The weights that are dequantised together, if all are NF4.
        weights = [p.weight for p in projections]
        self._stack = [weight for weight in weights if isinstance(weight, NF4Weight)]
        self._all_nf4 = len(self._stack) == len(projections)
        self._held: dict[str, torch.Tensor] | None = None

    @property
    def drops(self) -> bool:
        """Whether masks are drawn."""
        return any(p.dropout for p in self.projections if p.adapter is not None)

    def again(self, masks: Masks | None = None, products: torch.Tensor | None = None) -> Projections:
        """The same for another pass, or for other rows, with the masks and products of these."""
        other = object.__new__(Projections)
        other.__dict__.update(self.__dict__)
        other.masks = [None] * len(self.projections) if masks is None else masks
        other.products = products
        return other

    def of_rows(self, rows: slice) -> Projections:
        """The same with the masks and products of these rows alone."""
        masks = [None if mask is None else mask[rows] for mask in self.masks]
        return self.again(masks, None if self.products is None else self.products[rows])

    def holding_weights(self, most_bytes: int, dtype: torch.dtype) -> Projections:
        """The same, and it and what is made `again` of it build dense weights once, if these take `most_bytes` at most
        and the adapters can be part of them (see `room`)."""
        other = self.again(self.masks, self.products)
        if sum(weight.shape.numel() for weight in self._stack) * dtype.itemsize <= most_bytes:
            other._held = {}
        return other

    def _weights(self, dtype: torch.dtype) -> Iterable[torch.Tensor]:
        """Each base weight, dense, one after the other unless they are held."""
        if self._held is None or not self.room(dtype, gradient=True):
            return (_dense(projection.weight, dtype) for projection in self.projections)
        whole = self._widened("rows", self._weight_above_As)
        return whole.split_with_sizes([*(weight.shape[0] for weight in self._stack), self._rank])[:-1]

    def _widened(self, side: str, make: Callable[[], torch.Tensor]) -> torch.Tensor:
        if self._held is None:
            return make()
        if side not in self._held:
            self._held[side] = make()
        return self._held[side]

    def room(self, dtype: torch.dtype, gradient: bool = False) -> int:
        """How many columns behind an input of this dtype, or behind the gradient of all outputs side by side, let the
        adapters be part of the base product: see `adapter_columns`. 0 where they cannot be.

        A base weight that is dense would have to be copied; drawn masks lie between an adapter and dx; cuBLAS wants
        multiples of 8, and the launches rows of 16. Masks are those of a contiguous x, which is a copy where there is
        room behind it: that pays where the outputs are wider. float16 may not hold scaling * x A^T where it holds the
        factors.
        """
        if dtype == torch.float16 or not self._all_nf4 or self._rank % 8 or self._stack[0].shape[1] % 16:
            return 0
        if any(group.A.dtype != dtype for group in self._groups):
            return 0
        if self.drops:
            n_rows = sum(weight.shape[0] for weight in self._stack)
            if gradient or n_rows < self._stack[0].shape[1]:
                return 0
        return self._rank

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
            x = x.contiguous()  # a GPU draws other masks for other strides
            if mask is None:
                x, self.masks[index] = torch.native_dropout(x, rate, True)
            else:
                x = torch.ops.aten.native_dropout_backward(x, mask, 1.0 / (1.0 - rate))
        return x if x.dtype == group.A.dtype else x.to(group.A.dtype)

    def forward(
        self,
        x: torch.Tensor,
        joint: bool = False,
        room: torch.Tensor | None = None,
        keep_products: bool = False,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor]]:
        """(all outputs side by side, each of them) from x [rows, in_features]; `masks` then holds the masks drawn.

        The outputs are views of the first, [rows, sum of out_features], with `joint`; else the first means nothing.
        `room` is the buffer that x begins, if it has room behind it; the outputs are then joint, and `products` are
        there if they are to be kept: of a wide x a second product would read more than they take. Joint outputs fill
        `out`, if given.
        """
        cast = self._cast(x)
        widths = [p.weight.shape[0] for p in self.projections]
        if room is not None:
            whole = self._widened_product(x, room, widths, out)
            if keep_products:
                self.products = room[:, x.shape[1] : x.shape[1] + self._rank].contiguous()
            return whole, _parts(whole, widths, 1)
        if joint and self._all_nf4:
            whole = torch.mm(cast, dequantize_nf4_stack(self._stack, cast.dtype).t(), out=out)
            outs = _parts(whole, widths, 1)
        elif joint and len(widths) > 1:
            whole = torch.empty((x.shape[0], sum(widths)), dtype=cast.dtype, device=x.device) if out is None else out
            outs = _parts(whole, widths, 1)
            for projection, part in zip(self.projections, outs):
                torch.mm(cast, _dense(projection.weight, cast.dtype).t(), out=part)
        else:

            def product(weight: torch.Tensor) -> torch.Tensor:
                return torch.mm(cast, weight.t())

            # A loop's variable would keep a dense weight while the next one is made.
            outs = list(map(product, self._weights(cast.dtype)))
            whole = outs[0]
        for group in self._groups:
            xa = torch.mm(self._source(x, group), group.A.t())
            for index, xa_part in zip(group.members, _parts(xa, group.ranks, 1)):
                adapter, y = self._adapter(index), outs[index]
                B = self._cast(adapter.B).t()
                if xa.dtype == y.dtype:
                    torch.addmm(y, xa_part, B, alpha=adapter.scaling, out=y)
                else:
                    y.add_(_scaled_mm(xa_part, B, adapter.scaling))
        return whole, outs

    def _scaled_xa(self, x: torch.Tensor, group: _Group, out: torch.Tensor) -> None:
        """scaling * d(x) A^T of a group's members, side by side: one product where their scalings agree."""
        source, scalings = self._source(x, group), [self._adapter(index).scaling for index in group.members]
        if len(set(scalings)) == 1:
            _scaled_mm(source, group.A.t(), scalings[0], out)
            return
        for scaling, A, part in zip(scalings, _parts(group.A, group.ranks, 0), _parts(out, group.ranks, 1)):
            _scaled_mm(source, A.t(), scaling, part)

    def _widened_product(
        self, x: torch.Tensor, room: torch.Tensor, widths: Sequence[int], out: torch.Tensor | None
    ) -> torch.Tensor:
        """[x | xa] [W | B]^T, rounded once."""
        columns = x.shape[1]
        end = columns + self._rank
        column = columns
        for group in self._groups:
            self._scaled_xa(x, group, room[:, column : column + group.A.shape[0]])
            column += group.A.shape[0]
        weight = self._widened("columns", lambda: self._weight_beside_Bs(room.shape[1], widths))
        return torch.mm(room[:, :end], weight[:, :end].t(), out=out)

    def _weight_beside_Bs(self, width: int, widths: Sequence[int]) -> torch.Tensor:
        """[W | B], with rows of `width`."""
        dtype, columns = self._groups[0].A.dtype, self._stack[0].shape[1]
        weight = torch.empty((sum(widths), width), dtype=dtype, device=self._stack[0].device)
        dequantize_nf4_stack(self._stack, dtype, weight[:, :columns])
        blocks = [Block(None, sum(widths[:index]), width, 0) for index, width in enumerate(widths)]
        column = 0
        for group in self._groups:
            for index, rank in zip(group.members, group.ranks):
                blocks[index] = blocks[index]._replace(factor=self._adapter(index).B, first_column=column)
                column += rank
        block_diagonal(blocks, weight[:, columns : columns + self._rank])
        return weight

    def drawn(self) -> list[torch.Tensor]:
        """The masks that the forward drew, to be saved."""
        return [mask for mask in self.masks if mask is not None]

    def _dxa(self, dys: Sequence[torch.Tensor], group: _Group, dxa: torch.Tensor | None = None) -> torch.Tensor:
        """scaling * dy B of a group's members, side by side; fills `dxa` if given."""
        dtype = group.A.dtype

        def one(index: int, out: torch.Tensor | None) -> torch.Tensor:
            adapter, dy = self._adapter(index), dys[index]
            return _scaled_mm(dy if dy.dtype == dtype else dy.to(dtype), self._cast(adapter.B), adapter.scaling, out)

        if len(group.members) == 1:
            return one(group.members[0], dxa)
        if dxa is None:
            dxa = torch.empty((dys[0].shape[0], group.A.shape[0]), dtype=dtype, device=dys[0].device)
        for index, part in zip(group.members, _parts(dxa, group.ranks, 1)):
            one(index, part)
        return dxa

    def input_gradient(
        self,
        dys: Sequence[torch.Tensor],
        joint: torch.Tensor | None = None,
        dx: torch.Tensor | None = None,
        room: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """dx [rows, in_features], and what `factor_gradients` can use again.

        `joint` is the buffer in which the `dys` lie side by side, if they do; `room` the buffer that they begin side by
        side, if it has room behind them; `dx` is accumulated into, if given: the caller's own. Without it, dx fills
        `out`, if given.
        """
        dtype = dys[0].dtype
        if room is not None:
            return self._widened_gradient(dys, room, dx, out)
        if joint is not None and self._all_nf4:
            weight = dequantize_nf4_stack(self._stack, dtype)
            dx = torch.mm(joint, weight, out=out) if dx is None else torch.addmm(dx, joint, weight, out=dx)
        else:
            for projection, dy in zip(self.projections, dys):
                weight = _dense(projection.weight, dtype)
                dx = torch.mm(dy, weight, out=out) if dx is None else torch.addmm(dx, dy, weight, out=dx)
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

    def _widened_gradient(
        self, dys: Sequence[torch.Tensor], room: torch.Tensor, dx: torch.Tensor | None, out: torch.Tensor | None
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """[dy | dxa] [W; A]."""
        start = sum(weight.shape[0] for weight in self._stack)
        whole = room[:, : start + self._rank]
        dxas = []
        for group in self._groups:
            stop = start + group.A.shape[0]
            dxas.append(self._dxa(dys, group, room[:, start:stop]))
            start = stop
        weight = self._widened("rows", self._weight_above_As)
        return torch.mm(whole, weight, out=out) if dx is None else torch.addmm(dx, whole, weight, out=dx), dxas

    def _weight_above_As(self) -> torch.Tensor:
        """[W; A]."""
        dtype, start = self._groups[0].A.dtype, sum(weight.shape[0] for weight in self._stack)
        weight = torch.empty((start + self._rank, self._stack[0].shape[1]), dtype=dtype, device=self._stack[0].device)
        dequantize_nf4_stack(self._stack, dtype, weight[:start])
        torch.cat([group.A for group in self._groups], out=weight[start:])
        return weight

    def _products_of_groups(self, products: torch.Tensor) -> Sequence[torch.Tensor]:
        return _parts(products, [group.A.shape[0] for group in self._groups], 1)

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
        products = [None] * len(self._groups) if self.products is None else self._products_of_groups(self.products)
        for index, (projection, want) in enumerate(zip(self.projections, wanted)):
            if want.weight and isinstance(projection.weight, torch.Tensor):
                weights[index] = torch.mm(dys[index].t(), self._cast(x)).to(projection.weight.dtype)
        for number, group in enumerate(self._groups):
            wants_a = any(wanted[index].A for index in group.members)
            wants_b = any(wanted[index].B for index in group.members)
            if not (wants_a or wants_b):
                continue
            scaled_xa = products[number]
            source = self._source(x, group) if wants_a or scaled_xa is None else x
            if wants_b:
                xa = torch.mm(source, group.A.t()) if scaled_xa is None else scaled_xa
                for index, part in zip(group.members, _parts(xa, group.ranks, 1)):
                    if wanted[index].B:
                        adapter, dy = self._adapter(index), dys[index]
                        dy = dy if dy.dtype == xa.dtype else dy.to(xa.dtype)
                        scaling = adapter.scaling if scaled_xa is None else 1.0
                        Bs[index] = _scaled_mm(dy.t(), part, scaling).to(adapter.B.dtype)
            if wants_a:
                dxa = dxas[number] if dxas else self._dxa(dys, group)
                dA = torch.mm(dxa.t(), source)
                for index, part in zip(group.members, _parts(dA, group.ranks, 0)):
                    if wanted[index].A:
                        As[index] = part.to(self._adapter(index).A.dtype)
        return [Grads(*grads) for grads in zip(weights, As, Bs)]
