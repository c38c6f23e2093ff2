"""The head in chunks: how many products, in which dtypes, and how much memory."""

from __future__ import annotations

import pytest
import torch
from cross_entropy_checks import NAMES, assert_close, grads, make
from kernel_checks import double, gpu, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

import fastgemma.kernels.chunked_head as module
from fastgemma.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_log_probs,
)

VOCAB = 515


class GemmCount(TorchDispatchMode):
    """Counts matrix products in which the vocabulary is a dimension."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.vocab, self.calls = vocab, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func._schema.name.removeprefix("aten::").rstrip("_") in ("mm", "addmm", "matmul", "bmm", "linear"):
            tensors = [*args, kwargs.get("out")]
            self.calls += any(isinstance(t, torch.Tensor) and self.vocab in t.shape for t in tensors)
        return func(*args, **kwargs)


def gemms(run):
    with GemmCount(VOCAB) as count:
        run()
    return count.calls


@pytest.mark.parametrize("chunks", [1, 3])
def test_gemm_budget(chunks, device, monkeypatch):
    monkeypatch.setattr(module, "MIN_CHUNK_ROWS", 2)
    n = 2 * chunks
    (hidden, weight, _), labels = make(n, 24, VOCAB, device, bias=False)
    frozen = weight.detach()
    bias = torch.randn(VOCAB, device=device, requires_grad=True)
    options = {"workspace_bytes": 2 * VOCAB * 4}

    def loss(w, **more):
        return linear_cross_entropy(hidden, w, labels, **options, **more)

    def stats(w):
        return linear_log_probs(hidden, w, labels, outputs=("log_probs", "entropy"), **options)

    def without_grad():
        with torch.no_grad():
            for w in (weight, frozen):
                loss(w)
                stats(w)

    assert gemms(without_grad) == 4 * chunks
    assert gemms(lambda: linear_cross_entropy(hidden.detach(), frozen, labels, **options)) == chunks
    for reduction in ("mean", "sum", "none"):
        assert gemms(lambda: loss(frozen, reduction=reduction).sum().backward()) == 2 * chunks  # noqa: B023
    assert gemms(lambda: loss(frozen, num_items_in_batch=5).backward()) == 2 * chunks
    assert gemms(lambda: stats(frozen).log_probs.sum().backward()) == 2 * chunks
    assert gemms(lambda: loss(weight).backward()) == 3 * chunks
    assert gemms(lambda: loss(frozen, bias=bias).backward()) == 2 * chunks
    assert gemms(lambda: loss(weight, reduction="none").sum().backward()) == 4 * chunks
    assert gemms(lambda: stats(weight).entropy.sum().backward()) == 4 * chunks
    assert gemms(lambda: stats(frozen).entropy.sum().backward()) == 4 * chunks
    # A head alone: no gradient of the hidden states.
    assert gemms(lambda: linear_cross_entropy(hidden.detach(), weight, labels, **options).backward()) == 2 * chunks


def test_ignored_rows_are_not_computed(device):
    (hidden, weight, _), labels = make(48, 24, VOCAB, device, bias=False, frozen=True)
    labels[5:] = -100
    assert gemms(lambda: linear_cross_entropy(hidden, weight, labels, workspace_bytes=1).backward()) == 2


@pytest.mark.parametrize(
    "rows,budget,expected", [(40, 17, [16, 16, 8]), (40, 39, [32, 8]), (40, 64, [40]), (20, 1, [16, 4])]
)
def test_rows_per_chunk(rows, budget, expected, device):
    """The largest power of two that fits `budget` rows of logits, at least 16, at most all."""
    (hidden, weight, _), labels = make(rows, 4, VOCAB, device, bias=False, frozen=True)
    seen = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.mm.out:
                seen.append(kwargs["out"].shape[0])
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Products():
        linear_cross_entropy(hidden, weight, labels, workspace_bytes=budget * VOCAB * 4)
    assert seen == expected


def test_weight_gradient_is_summed_in_float32(device, small_blocks):
    """One chunk adds 4 to every element and five add 0.0078 each, which a sum in bf16 would lose."""
    hidden = torch.full((24, 8), 0.125, device=device, dtype=torch.bfloat16)
    hidden[:4] = 64.0
    weight = torch.zeros(64, 8, device=device, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.full((24,), 7, device=device)
    for reduction in ("sum", "none"):
        loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction, workspace_bytes=1).sum()
        (gradient,) = torch.autograd.grad(loss, weight)
        assert (gradient[8] == 4.03125).all()  # 4.0390625 to the nearest bf16


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_float32_head_over_a_bf16_weight(per_token, frozen, device, small_blocks):
    tensors, labels = make(10, 32, 515, device, bias=False, frozen=frozen, ignored=0.3)
    weight = tensors[1].detach().bfloat16().requires_grad_(not frozen)
    tensors = (tensors[0], weight, None)
    options = {"softcap": 4.0, "reduction": "none" if per_token else "mean"}
    budget = 8 * 515 * 4  # the weight goes through float32 in slabs of 32 tokens
    loss = linear_cross_entropy(*tensors[:2], labels, workspace_bytes=budget, **options)
    exact = double(tensors)
    truth = linear_cross_entropy_reference(*exact[:2], labels, **options)
    assert_close(loss.detach(), truth.detach(), "loss")
    upstream = torch.randn_like(loss)
    ours = grads(loss, tensors, grad_outputs=upstream)
    theirs = grads(truth, exact, grad_outputs=upstream.double())
    assert ours[0].dtype == torch.float32
    assert_close(ours[0], theirs[0], "hidden")
    if not frozen:
        assert ours[1].dtype == torch.bfloat16
        assert relative_error(ours[1], theirs[1]) <= 2.0**-8


def test_float32_head_never_holds_the_whole_weight(device):
    hidden = torch.randn(4, 32, device=device, requires_grad=True)
    weight = torch.randn(512, 32, device=device).bfloat16()
    labels = torch.randint(0, 512, (4,), device=device)
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.dtype == torch.float32:
                largest = max(largest, out.numel())
            return out

    with Largest():
        linear_cross_entropy(hidden, weight, labels, workspace_bytes=16 * 512 * 4).backward()
    assert 0 < largest <= 4 * 512


@pytest.mark.parametrize("per_token", [False, True])
def test_autocast_decides_the_dtype_of_the_gemms(per_token, device):
    tensors, labels = make(10, 32, 515, device, ignored=0.3)
    options = {"softcap": 4.0, "reduction": "none" if per_token else "mean"}
    with torch.autocast(device.type, dtype=torch.bfloat16):
        loss = linear_cross_entropy(*tensors[:2], labels, bias=tensors[2], **options)
    low = [t.detach().bfloat16().requires_grad_() for t in tensors[:2]] + [tensors[2]]
    same = linear_cross_entropy(*low[:2], labels, bias=low[2], **options)
    assert torch.equal(loss, same)
    for name, x, y in zip(NAMES, grads(loss.sum(), tensors), grads(same.sum(), low)):
        assert x.dtype == torch.float32
        assert relative_error(x, y) <= 2.0**-8, name
        if name == "weight":
            assert relative_error(x, x.bfloat16()) > 0  # summed and returned in float32


class TestOnTheGPU:
    pytestmark = gpu

    def test_extra_memory_is_bounded(self, device):
        n, h, v, budget = 2048, 64, 32768, 8 << 20
        hidden = torch.randn(n, h, device=device, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(v, h, device=device, dtype=torch.bfloat16)
        labels = torch.randint(0, v, (n,), device=device)
        linear_cross_entropy(hidden, weight, labels, workspace_bytes=budget)  # cuBLAS takes its workspace
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_cross_entropy(hidden, weight, labels, workspace_bytes=budget)
        assert torch.cuda.max_memory_allocated() - before < budget + 4 * n * h * 2 + (1 << 20)
