"""Stands in for torch's memory-efficient attention, which has no CPU kernel: the same operators, exact.

Registered as the CPU's implementation of the two operators, so that calls pass torch's dispatcher with the arguments
that a GPU would get. What arguments mean is what `aten/src/ATen/native/transformers/cuda` says: `attention.cu` and
`attention_backward.cu` for checks, layouts and alignment, `mem_eff_attention/kernel_backward.h` for masks (a key is
masked if `key > query`, and if `key <= query - window_size`, both counted from the start of a sequence).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fastgemma.kernels import launch

_NO_MASK, _CAUSAL_FROM_TOP_LEFT = 0, 1


@dataclass
class Call:
    """One call of the forward or the backward."""

    name: str
    keys: tuple[int, ...]  # strides
    window_size: int | None
    max_seqlen: int | None
    sequences: int
    rows: int


def _check(tensors: tuple[torch.Tensor, ...], mask_type: int, window_size: int | None, dropout_p: float) -> None:
    for x in tensors:
        assert x.dim() == 4 and x.stride(3) == 1
        assert x.data_ptr() % 16 == 0 and x.numel() > 0
        assert all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
    query, key, value = tensors[:3]
    assert query.shape[0] == key.shape[0] and query.shape[2:] == key.shape[2:] and key.shape == value.shape
    assert query.dtype == key.dtype == value.dtype
    assert mask_type in (_NO_MASK, _CAUSAL_FROM_TOP_LEFT) and dropout_p == 0.0
    assert not window_size or (window_size > 0 and mask_type != _NO_MASK)


def _sequences(query: torch.Tensor, offsets: torch.Tensor | None, longest: int | None) -> list[tuple[int, slice]]:
    """(entry of the batch, rows) of each."""
    if offsets is None:
        return [(entry, slice(0, query.shape[1])) for entry in range(query.shape[0])]
    assert offsets.dtype == torch.int32 and offsets.dim() == 1 and offsets.is_contiguous() and query.shape[0] == 1
    bounds = offsets.tolist()
    assert bounds[0] == 0 and bounds[-1] == query.shape[1] and longest is not None
    assert all(0 < stop - start <= longest <= query.shape[1] for start, stop in zip(bounds, bounds[1:]))
    return [(0, slice(start, stop)) for start, stop in zip(bounds, bounds[1:])]


def _scores(query: Any, key: Any, mask_type: int, window_size: int | None, scale: float | None) -> torch.Tensor:
    """Of one sequence, [heads, queries, keys] in float64."""
    scores = (query.shape[-1] ** -0.5 if scale is None else scale) * torch.einsum("ihd,jhd->hij", query, key)
    distance = torch.arange(query.shape[0])[:, None] - torch.arange(key.shape[0])
    hidden = (distance < 0) & (mask_type != _NO_MASK)
    if window_size:
        hidden |= distance >= window_size
    return scores.masked_fill(hidden, -torch.inf)


class StandIn:
    def __init__(self) -> None:
        self.calls: list[Call] = []

    def _note(self, name: str, query: Any, key: Any, offsets: Any, longest: Any, window_size: int | None) -> None:
        n_sequences = query.shape[0] if offsets is None else len(offsets) - 1
        self.calls.append(Call(name, key.stride(), window_size, longest, n_sequences, query.shape[1]))

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        cu_seqlens_q: torch.Tensor | None,
        cu_seqlens_k: torch.Tensor | None,
        max_seqlen_q: int | None,
        max_seqlen_k: int | None,
        dropout_p: float,
        custom_mask_type: int,
        compute_log_sumexp: bool = False,
        *,
        scale: float | None = None,
        seqlen_k: torch.Tensor | None = None,
        window_size: int | None = None,
    ) -> tuple[Any, ...]:
        assert bias is None and seqlen_k is None and (cu_seqlens_q is None) == (cu_seqlens_k is None)
        _check((query, key, value), custom_mask_type, window_size, dropout_p)
        self._note("forward", query, key, cu_seqlens_q, max_seqlen_q, window_size)
        sequences = _sequences(query, cu_seqlens_q, max_seqlen_q)
        longest = query.shape[1] if cu_seqlens_q is None else max_seqlen_q
        out = torch.empty(query.shape, dtype=query.dtype)
        rows_of_lse = -(-longest // 32) * 32 if compute_log_sumexp else 0
        lse = torch.full((len(sequences), query.shape[2], rows_of_lse), torch.inf)
        for number, (entry, rows) in enumerate(sequences):
            q, k, v = (x[entry, rows].double() for x in (query, key, value))
            scores = _scores(q, k, custom_mask_type, window_size, scale)
            out[entry, rows] = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).to(out.dtype)
            if compute_log_sumexp:
                lse[number, :, : q.shape[0]] = scores.logsumexp(-1).float()
        nothing = torch.empty((), dtype=torch.int64)
        return out, lse, nothing, nothing.clone(), longest, longest

    def backward(
        self,
        grad_out_: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        cu_seqlens_q: torch.Tensor | None,
        cu_seqlens_k: torch.Tensor | None,
        max_seqlen_q: int,
        max_seqlen_k: int,
        logsumexp: torch.Tensor,
        dropout_p: float,
        philox_seed: torch.Tensor,
        philox_offset: torch.Tensor,
        custom_mask_type: int,
        bias_requires_grad: bool,
        *,
        scale: float | None = None,
        num_splits_key: int | None = None,
        window_size: int | None = None,
        shared_storage_dqdkdv: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        assert bias is None and not bias_requires_grad and not shared_storage_dqdkdv
        _check((query, key, value, grad_out_, out), custom_mask_type, window_size, dropout_p)
        self._note("backward", query, key, cu_seqlens_q, max_seqlen_q, window_size)
        sequences = _sequences(query, cu_seqlens_q, max_seqlen_q)
        assert logsumexp.shape[:2] == (len(sequences), query.shape[2]) and logsumexp.stride(1) % 8 == 0
        grads = [torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value)]
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        for number, (entry, rows) in enumerate(sequences):
            dout, q, k, v, o = (x[entry, rows].double() for x in (grad_out_, query, key, value, out))
            lse = logsumexp[number, :, : q.shape[0], None].double()
            p = (_scores(q, k, custom_mask_type, window_size, scale) - lse).exp()
            delta = (dout * o).sum(-1).T[:, :, None]
            ds = factor * p * (torch.einsum("ihd,jhd->hij", dout, v) - delta)
            results = (
                torch.einsum("hij,jhd->ihd", ds, k),
                torch.einsum("hij,ihd->jhd", ds, q),
                torch.einsum("hij,ihd->jhd", p, dout),
            )
            for grad, result in zip(grads, results):
                grad[entry, rows] = result.to(grad.dtype)
        return *grads, torch.empty(())


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    """The calls that torch's operators get on the CPU."""
    library = torch.library.Library("aten", "IMPL", "CPU")
    made = StandIn()
    library.impl("_efficient_attention_forward", made.forward)
    library.impl("_efficient_attention_backward", made.backward)
    yield made
    library._destroy()


@pytest.fixture
def efficient(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    """The same, on a machine whose row says that attention is that kernel."""
    launch.why_efficient_attention.cache_clear()
    monkeypatch.setitem(launch.EFFICIENT_ATTENTION, "interpreter", launch.Instead("for a test"))
    yield stand_in
    launch.why_efficient_attention.cache_clear()
