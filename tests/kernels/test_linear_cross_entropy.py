"""linear_cross_entropy and linear_log_probs against float64, torch's own loss and stock in half precision."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_checks import ALL, NAMES, assert_close, grads, make, wanted
from kernel_checks import double, relative_error

import fastgemma.kernels.linear_cross_entropy as module
from fastgemma.kernels.kept_rows import KeptRows
from fastgemma.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_log_probs,
    linear_log_probs_reference,
    shift_labels,
)

CUDA = torch.cuda.is_available()
VOCAB = 515


def test_only_what_was_asked_for(device):
    (hidden, weight, _), targets = make(4, 8, 100, device)
    stats = linear_log_probs(hidden, weight, targets)
    assert stats.log_probs is not None and all(x is None for x in stats[1:])
    stats = linear_log_probs(hidden, weight, targets, outputs=("entropy",))
    assert stats.log_probs is None and stats.entropy.requires_grad
    with pytest.raises(ValueError, match="perplexity"):
        linear_log_probs(hidden, weight, targets, outputs=("perplexity",))


@pytest.mark.parametrize("frozen", [False, True])
def test_entropy_for_logging_only(frozen, device):
    """An entropy nobody differentiates changes no gradient."""
    tensors, targets = make(6, 16, 300, device, bias=False, frozen=frozen)
    plain = linear_log_probs(*tensors[:2], targets, softcap=4.0)
    logged = linear_log_probs(*tensors[:2], targets, softcap=4.0, outputs=("log_probs", "entropy"))
    for x, y in zip(grads(plain.log_probs.sum(), tensors), grads(logged.log_probs.sum(), tensors)):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "items", "items_tensor"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("ignored", [0.0, 0.5])
@pytest.mark.parametrize("bias", [False, True])
def test_loss_matches_float64(reduction, frozen, ignored, bias, device, small_blocks):
    tensors, labels = make(2 * 7, 24, 515, device, bias=bias, frozen=frozen, ignored=ignored)
    labels = labels.view(2, 7)
    hidden = tensors[0].detach().view(2, 7, 24).requires_grad_()
    tensors = (hidden, *tensors[1:])
    items = {"items": 11, "items_tensor": torch.tensor(11, device=device)}.get(reduction)
    options = {
        "softcap": 4.0,
        "logit_scale": 1.1,
        "temperature": 0.9,
        "reduction": "mean" if reduction.startswith("items") else reduction,
        "num_items_in_batch": items,
    }
    loss = linear_cross_entropy(hidden, tensors[1], labels, bias=tensors[2], workspace_bytes=4 * 515 * 4, **options)
    exact = double(tensors)
    truth = linear_cross_entropy_reference(*exact[:2], labels, exact[2], **options)
    assert loss.dtype == torch.float32
    assert_close(loss.detach(), truth.detach(), "loss")
    upstream = torch.randn_like(loss) if reduction == "none" else torch.tensor(3.0, device=device)
    for name, x, y, tensor in zip(
        NAMES,
        grads(loss, tensors, grad_outputs=upstream),
        grads(truth, exact, grad_outputs=upstream.double()),
        wanted(tensors),
    ):
        assert x.dtype == tensor.dtype and x.shape == tensor.shape
        assert_close(x, y, name)


def test_equals_torch_cross_entropy_on_an_identity_head(device):
    """An oracle outside this file: a head that passes the hidden states through as logits."""
    logits = (torch.randn(9, 300, device=device) * 3).requires_grad_()
    labels = torch.randint(0, 300, (9,), device=device)
    labels[4] = -100
    eye = torch.eye(300, device=device)
    for reduction in ("mean", "sum", "none"):
        ours = linear_cross_entropy(logits, eye, labels, reduction=reduction)
        theirs = F.cross_entropy(logits, labels, reduction=reduction)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        (x,), (y,) = (torch.autograd.grad(loss.sum(), logits) for loss in (ours, theirs))
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)
        assert (x[4] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none", "items"])
@pytest.mark.parametrize("empty", [False, True])
def test_no_row_has_a_loss(reduction, empty, device):
    tensors, labels = make(0 if empty else 5, 8, 100, device, ignored=1.1)
    options = {"num_items_in_batch": 4} if reduction == "items" else {"reduction": reduction}
    loss = linear_cross_entropy(*tensors[:2], labels, bias=tensors[2], **options)
    if reduction == "none":
        assert torch.equal(loss, torch.zeros(labels.shape, device=device))
    elif reduction == "mean":
        assert loss.isnan()
    else:
        assert loss == 0 and not torch.signbit(loss)
    for g in grads(loss.sum(), tensors):
        assert (g == 0).all()


def test_empty_batch_of_log_probs(device):
    tensors, targets = make(0, 8, 100, device)
    stats = linear_log_probs(*tensors[:2], targets, bias=tensors[2], outputs=ALL)
    assert all(x.shape == (0,) for x in stats)
    for g, t in zip(grads(stats.log_probs.sum() + stats.entropy.sum(), tensors), tensors):
        assert torch.equal(g, torch.zeros_like(t))


def test_non_contiguous_inputs(device):
    hidden = torch.randn(3, 9, 40, device=device)[:, :-1, ::2].requires_grad_()
    weight = torch.randn(20, 300, device=device).t().requires_grad_()
    bias = torch.randn(600, device=device)[::2].requires_grad_()
    labels = torch.randint(0, 300, (8, 3), device=device).t()
    tensors = (hidden, weight, bias)
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, softcap=3.0)
    exact = double(tensors)
    truth = linear_cross_entropy_reference(*exact[:2], labels, exact[2], softcap=3.0)
    assert_close(loss.detach(), truth.detach(), "loss")
    for name, x, y in zip(NAMES, grads(loss, tensors), grads(truth, exact)):
        assert_close(x, y, name)
    targets = labels.reshape(-1).repeat_interleave(2)[::2]
    stats = linear_log_probs(hidden.reshape(-1, 20), weight, targets, bias=bias)
    up = torch.randn(48, device=device)[::2]
    truth = linear_log_probs_reference(exact[0].reshape(-1, 20), exact[1], targets, exact[2])
    for name, x, y in zip(
        NAMES,
        grads(stats.log_probs, tensors, grad_outputs=up),
        grads(truth.log_probs, exact, grad_outputs=up.double()),
    ):
        assert_close(x, y, name)


@pytest.mark.parametrize("scalar", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_backward_twice_and_of_a_subset(scalar, frozen, device):
    tensors, labels = make(9, 16, 300, device, frozen=frozen, ignored=0.3)
    options = {"reduction": "sum" if scalar else "none"}
    loss = linear_cross_entropy(*tensors[:2], labels, bias=tensors[2], softcap=4.0, **options).square().sum()
    first = grads(loss, tensors, retain_graph=True)
    second = grads(loss, tensors, retain_graph=True)
    for x, y in zip(first, second):
        assert torch.equal(x, y) and x.data_ptr() != y.data_ptr()
    for x, tensor in zip(first, wanted(tensors)):
        assert torch.equal(torch.autograd.grad(loss, tensor, retain_graph=True)[0], x)
    loss.backward()
    for x, tensor in zip(first, wanted(tensors)):
        assert torch.equal(tensor.grad, x)


@pytest.mark.parametrize("power", [1, 2])  # the gradient that reaches the operation: a constant, or a function of it
def test_second_derivatives_are_refused(power, device):
    tensors, labels = make(3, 8, 50, device)
    loss = linear_cross_entropy(*tensors[:2], labels) ** power
    (gradient,) = torch.autograd.grad(loss, tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("softcap", [30.0, None])
@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_accurate_as_stock(dtype, softcap, trainable, per_token, device):
    """Stock: a GEMM and the softcap in the low precision, then log-softmax in float32."""
    errors: dict[str, list[tuple[float, float]]] = {}
    reduction = "none" if per_token else "mean"
    for seed in range(5):
        torch.manual_seed(seed)
        tensors, labels = make(13, 64, 1000, device, dtype, bias=False, spread=4.0, frozen=not trainable)
        upstream = torch.randn(13, device=device) if per_token else torch.ones((), device=device)
        hidden, weight, _ = tensors
        z = F.linear(hidden, weight)
        if softcap:
            z = torch.tanh(z / softcap) * softcap
        stock = F.cross_entropy(z.float(), labels, reduction=reduction)
        ours = linear_cross_entropy(hidden, weight, labels, softcap=softcap, reduction=reduction)
        exact = double(tensors)
        truth = linear_cross_entropy_reference(*exact[:2], labels, softcap=softcap, reduction=reduction)
        results = [
            (loss.detach(), *grads(loss, inputs, grad_outputs=upstream.to(loss.dtype)))
            for loss, inputs in ((ours, tensors), (stock, tensors), (truth, exact))
        ]
        for name, a, s, t in zip(("loss", *NAMES), *results):
            errors.setdefault(name, []).append((relative_error(a, t), relative_error(s, t)))
    # A fraction of an ulp, since a gradient computed ahead is rounded once more when it is scaled. Triton's interpreter
    # truncates float32 to bfloat16 where a GPU rounds to nearest, which doubles the error of every stored gradient.
    slack = torch.finfo(dtype).eps / 16 if CUDA or dtype == torch.float16 else torch.finfo(dtype).eps / 4
    for name, pairs in errors.items():
        ours, stock = (sum(side) / 5 for side in zip(*pairs))
        assert ours <= 1.1 * stock + slack, (name, ours, stock)


def test_rows_are_gathered_only_if_some_are_ignored(device, monkeypatch):
    (hidden, weight, _), labels = make(5, 24, VOCAB, device, bias=False, frozen=True)
    monkeypatch.setattr(KeptRows, "index", lambda _: pytest.fail("gathered all rows"))
    linear_cross_entropy(hidden, weight, labels).backward()


def test_inputs_are_left_alone(device):
    tensors, labels = make(9, 16, 300, device, ignored=0.3)
    before = [t.detach().clone() for t in (*tensors, labels)]
    linear_cross_entropy(*tensors[:2], labels, bias=tensors[2]).backward()
    linear_log_probs(*tensors[:2], labels.clamp(min=0), bias=tensors[2], outputs=ALL).entropy.sum().backward()
    for t, b in zip((*tensors, labels), before):
        assert torch.equal(t.detach(), b)


def test_without_a_kernel_the_reference_runs(device, monkeypatch):
    tensors, labels = make(9, 16, 300, device, ignored=0.3)
    options = {"softcap": 4.0, "logit_scale": 1.1, "temperature": 0.9, "bias": tensors[2]}
    results = []
    for _ in range(2):
        loss = linear_cross_entropy(*tensors[:2], labels, **options)
        stats = linear_log_probs(*tensors[:2], labels.clamp(min=0), outputs=ALL, **options)
        results.append((loss.detach(), *(x.detach().float() for x in stats), *grads(loss, tensors)))
        monkeypatch.setattr(module, "runs_kernel", lambda *_: False)
    for x, y in zip(*results):
        assert relative_error(x, y) <= 1e-5


def test_kept_rows_given_in_advance(device):
    tensors, labels = make(12, 16, 300, device, ignored=0.4)
    kept = KeptRows(labels)
    a = linear_cross_entropy(*tensors[:2], labels, kept_rows=kept)
    b = linear_cross_entropy(*tensors[:2], labels)
    assert torch.equal(a, b)
    for x, y in zip(grads(a, tensors[:2]), grads(b, tensors[:2])):
        assert torch.equal(x, y)
    with pytest.raises(ValueError, match="kept_rows"):
        linear_cross_entropy(tensors[0][:6], tensors[1], labels[:6], kept_rows=kept)
    with pytest.raises(ValueError, match="kept_rows"):
        linear_cross_entropy(*tensors[:2], labels, kept_rows=kept, ignore_index=-1)


def test_shift_labels(device):
    labels = torch.tensor([[5, 6, 7], [-100, 8, 9]], device=device)
    assert shift_labels(labels).tolist() == [[6, 7, -100], [8, 9, -100]]
    assert shift_labels(labels, -1).tolist() == [[6, 7, -1], [8, 9, -1]]
    assert labels[0, 0] == 5 and shift_labels(labels).dtype == torch.int64
    assert shift_labels(labels[:, :1]).tolist() == [[-100], [-100]]
    assert shift_labels(labels[:, :0]).shape == (2, 0)
    # The same loss as slicing the hidden states.
    hidden, weight = torch.randn(2, 3, 8, device=device), torch.randn(10, 8, device=device)
    labels = labels.clamp(max=9)
    shifted = linear_cross_entropy(hidden, weight, shift_labels(labels))
    sliced = linear_cross_entropy(hidden[:, :-1], weight, labels[:, 1:])
    assert torch.equal(shifted, sliced)


def test_wrong_arguments(device):
    (hidden, weight, bias), labels = make(4, 8, 50, device)
    with pytest.raises(TypeError, match="float64"):
        linear_cross_entropy(hidden.double(), weight, labels)
    with pytest.raises(TypeError, match="weight"):
        linear_cross_entropy(hidden, weight.to(torch.int8), labels)
    with pytest.raises(TypeError, match="int64"):
        linear_cross_entropy(hidden, weight, labels.int())
    with pytest.raises(TypeError, match="int64"):
        linear_log_probs(hidden, weight, labels.int())
    wrong = [
        {"hidden_states": hidden[:, :-1]},
        {"weight": weight[0]},
        {"labels": labels[:-1]},
        {"bias": bias[:-1]},
        {"softcap": 0.0},
        {"temperature": 0.0},
        {"workspace_bytes": 0},
        {"reduction": "median"},
        {"reduction": "none", "num_items_in_batch": 3},
        {"num_items_in_batch": torch.ones(2, device=device)},
    ]
    for change in wrong:
        with pytest.raises(ValueError, match="fastgemma"):
            linear_cross_entropy(**{"hidden_states": hidden, "weight": weight, "labels": labels, **change})
    with pytest.raises(ValueError, match=r"\[N, hidden\]"):
        linear_log_probs(hidden[None], weight, labels[None])
    with pytest.raises(ValueError, match="meta"):
        linear_cross_entropy(hidden, weight.to("meta"), labels)
