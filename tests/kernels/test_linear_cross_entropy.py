"""linear_cross_entropy against float64, against stock bf16, and against TRL's fused head."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastgemma.kernels.launch as launch_module
import fastgemma.kernels.linear_cross_entropy as module
from fastgemma.kernels.kept_rows import KeptRows
from fastgemma.kernels.launch import Launch
from fastgemma.kernels.linear_cross_entropy import (
    TokenStatistics,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_log_probs,
    linear_log_probs_reference,
    shift_labels,
)

ALL = TokenStatistics._fields
NAMES = ("hidden", "weight", "bias")
CUDA = torch.cuda.is_available()
gpu = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]


@pytest.fixture
def small_blocks(monkeypatch):
    """256 columns and 4 rows at a time, so that small shapes take several blocks and chunks, the last ones partial."""
    monkeypatch.setattr(module, "MIN_CHUNK_ROWS", 4)
    for arch in ("any", "interpreter"):
        monkeypatch.setitem(
            launch_module.TABLE, ("linear_cross_entropy", "any", arch), Launch({"BLOCK_V": 256}, num_warps=4)
        )
    launch_module.launch.cache_clear()
    yield
    launch_module.launch.cache_clear()


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


def make(n, h, v, device, dtype=torch.float32, bias=True, spread=3.0, frozen=False, ignored=0.0):
    """Logits of standard deviation `spread`; returns ((hidden, weight, bias), labels)."""
    hidden = torch.randn(n, h, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(v, h, device=device) * spread / math.sqrt(h)).to(dtype).requires_grad_(not frozen)
    b = torch.randn(v, device=device).to(dtype).requires_grad_(not frozen) if bias else None
    labels = torch.randint(0, v, (n,), device=device)
    labels[torch.rand(n, device=device) < ignored] = -100
    return (hidden, weight, b), labels


def double(tensors):
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def wanted(tensors):
    return [t for t in tensors if t is not None and t.requires_grad]


def relative(actual, truth):
    norm = truth.double().norm()
    error = (actual.double() - truth.double()).norm()
    return (error / norm if norm > 0 else error).item()


def assert_close(actual, truth, name, tolerance=1e-5):
    assert actual.shape == truth.shape, name
    assert torch.isfinite(actual).all(), name
    assert relative(actual, truth) <= tolerance, (name, relative(actual, truth))
    assert (actual[truth == 0] == 0).all(), f"{name}: an exact zero was lost"


def grads(value, tensors, **kwargs):
    return torch.autograd.grad(value, wanted(tensors), **kwargs)


# --- per-token statistics --------------------------------------------------------------------------------------------

SHAPES = [
    # n, h, v, bias, softcap, logit_scale, temperature, workspace
    (1, 16, 515, False, 30.0, 1.0, 1.0, None),
    (7, 31, 1000, True, 5.0, 1.3, 0.7, None),
    (13, 41, 521, True, None, 0.5, 2.0, 5 * 521 * 4),  # chunks of 4 rows, the last of 1
    (9, 64, 1024, False, 2.0, 1.0, 1.0, 1),  # a workspace too small for one row
    (5, 8, 3, False, 1.5, 1.0, 1.0, None),
    (4, 8, 1, False, None, 1.0, 1.0, None),
]


@pytest.mark.parametrize("n,h,v,bias,softcap,scale,temperature,workspace", SHAPES)
@pytest.mark.parametrize("frozen", [False, True])
def test_statistics_and_gradients_match_float64(
    n, h, v, bias, softcap, scale, temperature, workspace, frozen, device, small_blocks
):
    tensors, targets = make(n, h, v, device, bias=bias, frozen=frozen)
    hidden, weight, b = tensors
    options = {"softcap": softcap, "logit_scale": scale, "temperature": temperature}
    ours = linear_log_probs(hidden, weight, targets, bias=b, outputs=ALL, workspace_bytes=workspace, **options)
    exact = double(tensors)
    truth = linear_log_probs_reference(*exact[:2], targets, exact[2], outputs=ALL, **options)
    for name, a, t in zip(ALL[:4], ours, truth):
        assert a.dtype == torch.float32
        assert_close(a.detach(), t.detach(), name)
    assert ours.is_top1.dtype == torch.bool and torch.equal(ours.is_top1, truth.is_top1)
    assert [x.requires_grad for x in ours] == [True, True, False, False, False]
    # Upstream gradients for either output, and for both.
    up, up_entropy = torch.randn(2, n, device=device)
    for a, e in ((1, 0), (0, 1), (1, 1)):
        value = lambda s: a * (s.log_probs * up).sum() + e * (s.entropy * up_entropy).sum()  # noqa: E731, B023
        for name, x, y in zip(
            NAMES, grads(value(ours), tensors, retain_graph=True), grads(value(truth), exact, retain_graph=True)
        ):
            assert_close(x, y, f"{name} from {a} log_probs + {e} entropy")


def test_only_what_was_asked_for(device):
    (hidden, weight, _), targets = make(4, 8, 100, device)
    stats = linear_log_probs(hidden, weight, targets)
    assert stats.log_probs is not None and all(x is None for x in stats[1:])
    stats = linear_log_probs(hidden, weight, targets, outputs=("entropy",))
    assert stats.log_probs is None and stats.entropy.requires_grad
    with pytest.raises(ValueError, match="perplexity"):
        linear_log_probs(hidden, weight, targets, outputs=("perplexity",))


def test_first_of_equal_maxima_is_top1(device, small_blocks):
    weight = torch.zeros(700, 4, device=device)
    weight[[3, 300, 600]] = 1.0
    hidden = torch.ones(4, 4, device=device)
    targets = torch.tensor([3, 300, 600, 5], device=device)
    assert linear_log_probs(hidden, weight, targets, outputs=("is_top1",)).is_top1.tolist() == [True] + [False] * 3
    # All equal: the first token of all.
    stats = linear_log_probs(hidden * 0, weight, targets * 0, outputs=("is_top1", "entropy"))
    assert stats.is_top1.all()
    torch.testing.assert_close(stats.entropy, torch.full((4,), math.log(700), device=device))


@pytest.mark.parametrize("frozen", [False, True])
def test_entropy_for_logging_only(frozen, device):
    """An entropy nobody differentiates changes no gradient."""
    tensors, targets = make(6, 16, 300, device, bias=False, frozen=frozen)
    plain = linear_log_probs(*tensors[:2], targets, softcap=4.0)
    logged = linear_log_probs(*tensors[:2], targets, softcap=4.0, outputs=("log_probs", "entropy"))
    for x, y in zip(grads(plain.log_probs.sum(), tensors), grads(logged.log_probs.sum(), tensors)):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("bias", [False, True])
def test_agrees_with_trl(softcap, bias, device):
    trl = pytest.importorskip("trl.kernels.chunked_logprob")
    tensors, targets = make(11, 24, 515, device, bias=bias)
    ours = linear_log_probs(
        *tensors[:2], targets, bias=tensors[2], softcap=softcap, logit_scale=1.2, temperature=0.8, outputs=ALL
    )
    theirs = trl.ChunkedLogProbFunction.apply(*tensors, targets, 0.8, 128, softcap, 1.2, ALL)
    for name, a, t in zip(ALL[:4], ours, theirs):
        assert_close(a.detach(), t.detach(), name)
    assert torch.equal(ours.is_top1, theirs[4])
    up, up_entropy = torch.randn(2, 11, device=device)
    value = lambda s: (s[0] * up).sum() + (s[1] * up_entropy).sum()  # noqa: E731
    for name, x, y in zip(NAMES, grads(value(ours), tensors), grads(value(theirs), tensors)):
        assert_close(x, y, name)


# --- the loss --------------------------------------------------------------------------------------------------------


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


def test_second_derivatives_are_refused(device):
    tensors, labels = make(3, 8, 50, device)
    loss = linear_cross_entropy(*tensors[:2], labels).square()
    (gradient,) = torch.autograd.grad(loss, tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# --- hostile values --------------------------------------------------------------------------------------------------


def test_padding_lanes_stay_out_of_a_small_softcap(device, small_blocks):
    """With every logit at -softcap, a lane beyond the vocabulary that was capped too would weigh as much as a token."""
    hidden = torch.full((3, 4), -100.0, device=device, requires_grad=True)
    weight = torch.ones(515, 4, device=device)
    targets = torch.tensor([0, 256, 514], device=device)
    stats = linear_log_probs(hidden, weight, targets, softcap=0.5, outputs=ALL)
    torch.testing.assert_close(stats.log_probs, torch.full((3,), -math.log(515), device=device))
    torch.testing.assert_close(stats.entropy, torch.full((3,), math.log(515), device=device))
    torch.testing.assert_close(stats.mean_logits, torch.full((3,), -0.5, device=device))


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_outliers(softcap, device, small_blocks):
    tensors, labels = make(8, 16, 515, device, bias=False)
    hidden = tensors[0].detach().clone()
    hidden[::2, 3] = 1e4
    tensors = (hidden.requires_grad_(), tensors[1], None)
    losses = linear_cross_entropy(*tensors[:2], labels, softcap=softcap, reduction="none")
    exact = double(tensors)
    truth = linear_cross_entropy_reference(*exact[:2], labels, softcap=softcap, reduction="none")
    assert_close(losses.detach(), truth.detach(), "losses")
    # A logit of 1e4 is itself known to 1e-3 only, and with it the softmax.
    tolerance = 1e-5 if softcap else 1e-3
    for name, x, y in zip(NAMES, grads(losses.sum(), tensors), grads(truth.sum(), exact)):
        assert torch.isfinite(x).all()
        assert relative(x, y) <= tolerance, (name, relative(x, y))


def test_gradient_near_saturation_of_the_softcap(device):
    """1 - tanh^2 keeps its relative accuracy where tanh rounds to 1."""
    logits = torch.linspace(-40, 40, 101, device=device).repeat(2, 1).requires_grad_()
    eye = torch.eye(101, device=device)
    labels = torch.tensor([0, 100], device=device)
    (ours,) = torch.autograd.grad(linear_cross_entropy(logits, eye, labels, softcap=4.0), logits)
    exact = logits.detach().double().requires_grad_()
    (truth,) = torch.autograd.grad(linear_cross_entropy_reference(exact, eye, labels, softcap=4.0), exact)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=0)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_bad_row_stays_alone(poison, per_token, device, small_blocks):
    """NaN is not hidden, and does not reach other rows. Without a softcap an infinite logit is NaN too, as in torch."""
    tensors, labels = make(9, 8, 515, device, bias=False, frozen=not per_token)
    hidden, weight = tensors[0].detach().clone(), tensors[1].detach().abs().requires_grad_(per_token)
    clean = hidden.clone().requires_grad_()
    hidden[5, 2] = poison
    hidden.requires_grad_()
    got = linear_cross_entropy(hidden, weight, labels, reduction="none", workspace_bytes=1)
    want = linear_cross_entropy(clean, weight, labels, reduction="none", workspace_bytes=1)
    others = torch.arange(9, device=device) != 5
    assert got[5].isnan() and torch.equal(got[others], want[others])
    d_got, d_want = (torch.autograd.grad(x.sum(), y)[0] for x, y in ((got, hidden), (want, clean)))
    assert d_got[5].isnan().all() and torch.equal(d_got[others], d_want[others])
    assert linear_cross_entropy(hidden, weight, labels).isnan()


def test_infinite_logits_under_a_softcap_are_finite(device):
    bias = torch.tensor([math.inf, 1.0, -math.inf, 2.0], device=device)
    hidden = torch.randn(4, 2, device=device, requires_grad=True)
    weight = torch.randn(4, 2, device=device)
    targets = torch.arange(4, device=device)
    ours = linear_log_probs(hidden, weight, targets, bias=bias, softcap=3.0)
    truth = linear_log_probs_reference(hidden.double(), weight.double(), targets, bias.double(), softcap=3.0)
    assert_close(ours.log_probs.detach(), truth.log_probs.detach(), "log_probs")
    assert torch.isfinite(torch.autograd.grad(ours.log_probs.sum(), hidden)[0]).all()


def test_forbidden_tokens(device, small_blocks):
    """A bias of -inf forbids a token, even a whole block of them; its probability is an exact zero."""
    tensors, _ = make(4, 8, 700, device, bias=False)
    bias = torch.zeros(700, device=device)
    bias[:300] = -math.inf
    targets = torch.tensor([300, 450, 699, 512], device=device)
    exact = double(tensors)
    ours = linear_log_probs(*tensors[:2], targets, bias=bias, outputs=ALL)
    truth = linear_log_probs_reference(*exact[:2], targets, bias.double(), outputs=ALL)
    for name in ("log_probs", "entropy", "log_sum_sq_probs"):
        assert_close(getattr(ours, name).detach(), getattr(truth, name).detach(), name)
    assert torch.equal(ours.is_top1, truth.is_top1)
    x = grads(ours.log_probs.sum() + ours.entropy.sum(), tensors)
    kept = [e[300:] if i else e for i, e in enumerate(exact[:2])]
    allowed = linear_log_probs_reference(*kept, targets - 300, outputs=ALL)
    for name, a, b in zip(NAMES, x, grads(allowed.log_probs.sum() + allowed.entropy.sum(), exact)):
        assert_close(a, b, name)
    assert (x[1][:300] == 0).all()
    forbidden = linear_log_probs(*tensors[:2], targets * 0, bias=bias).log_probs
    assert (forbidden == -math.inf).all()
    assert linear_log_probs(*tensors[:2], targets, bias=bias - math.inf).log_probs.isnan().all()


@pytest.mark.parametrize("bad", [-1, 515, 1 << 40, -(1 << 40)])
def test_label_out_of_range(bad, device, monkeypatch):
    tensors, labels = make(5, 8, 515, device)
    labels[2] = bad
    if not CUDA:
        with pytest.raises(IndexError, match="515"):
            linear_cross_entropy(*tensors[:2], labels)
        with pytest.raises(IndexError, match="515"):
            linear_log_probs(*tensors[:2], labels)
        monkeypatch.setattr(module, "_check_range", lambda *_: None)  # what a GPU does, on the kernel
    losses = linear_cross_entropy(*tensors[:2], labels, reduction="none")
    assert losses.isnan().tolist() == [False, False, True, False, False]
    (d_hidden,) = torch.autograd.grad(losses.sum(), tensors[0])
    assert d_hidden.isnan().all(1).tolist() == losses.isnan().tolist()
    frozen = linear_cross_entropy(tensors[0], tensors[1].detach(), labels)
    assert frozen.isnan()
    assert torch.autograd.grad(frozen, tensors[0])[0].isnan().all(1).tolist() == losses.isnan().tolist()


# --- precision -------------------------------------------------------------------------------------------------------


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
            errors.setdefault(name, []).append((relative(a, t), relative(s, t)))
    # A fraction of an ulp, since a gradient computed ahead is rounded once more when it is scaled. Triton's interpreter
    # truncates float32 to bfloat16 where a GPU rounds to nearest, which doubles the error of every stored gradient.
    slack = torch.finfo(dtype).eps / 16 if CUDA or dtype == torch.float16 else torch.finfo(dtype).eps / 4
    for name, pairs in errors.items():
        ours, stock = (sum(side) / 5 for side in zip(*pairs))
        assert ours <= 1.1 * stock + slack, (name, ours, stock)


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
        assert relative(ours[1], theirs[1]) <= 2.0**-8


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
        assert relative(x, y) <= 2.0**-8, name
        if name == "weight":
            assert relative(x, x.bfloat16()) > 0  # summed and returned in float32


# --- what is computed, and what is not -------------------------------------------------------------------------------

VOCAB = 515


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


def test_rows_are_gathered_only_if_some_are_ignored(device, monkeypatch):
    (hidden, weight, _), labels = make(5, 24, VOCAB, device, bias=False, frozen=True)
    monkeypatch.setattr(KeptRows, "index", lambda _: pytest.fail("gathered all rows"))
    linear_cross_entropy(hidden, weight, labels).backward()


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
        assert relative(x, y) <= 1e-5


# --- helpers ---------------------------------------------------------------------------------------------------------


def test_kept_rows(device):
    labels = torch.tensor([[-100, 4, -100], [-100, 0, 9]], device=device)
    kept = KeptRows(labels)
    assert kept.count == 3 and kept.total == 6
    assert kept.index().dtype == torch.int64 and kept.index().tolist() == [1, 4, 5]
    assert KeptRows(labels, ignore_index=0).index().tolist() == [0, 1, 2, 3, 5]
    assert KeptRows(labels[:0]).index().tolist() == [] and KeptRows(labels[:0]).count == 0
    many = torch.where(torch.rand(5000, device=device) < 0.4, -100, 1)
    assert torch.equal(KeptRows(many).index(), (many != -100).nonzero().squeeze(1))
    with pytest.raises(TypeError):
        KeptRows(labels.int())


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


# --- on the GPU only -------------------------------------------------------------------------------------------------


class TestOnTheGPU:
    pytestmark = gpu

    def test_kept_rows_do_not_wait(self, device):
        labels = torch.where(torch.rand(4096, device=device) < 0.4, -100, 1)
        KeptRows(labels).count  # noqa: B018  warm up
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            kept = KeptRows(labels)
            torch.cuda._sleep(int(2e9))  # about a second of later work
            index = kept.index()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert not torch.cuda.current_stream().query(), "waited for work enqueued after it"
        assert torch.equal(index, (labels != -100).nonzero().squeeze(1))

    def test_rows_beyond_two_to_the_31(self, device):
        """The last rows of one chunk of more than 2^31 logits."""
        n, v = 8320, 262144
        hidden = torch.randn(n, 16, device=device, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(v, 16, device=device, dtype=torch.bfloat16)
        labels = torch.randint(0, v, (n,), device=device)
        losses = linear_cross_entropy(hidden, weight, labels, reduction="none", workspace_bytes=1 << 34)
        tail = hidden.detach()[-8:].requires_grad_()
        expected = linear_cross_entropy(tail, weight, labels[-8:], reduction="none")
        torch.testing.assert_close(losses[-8:], expected, rtol=1e-2, atol=1e-2)
        (a,), (b,) = torch.autograd.grad(losses.sum(), hidden), torch.autograd.grad(expected.sum(), tail)
        assert relative(a[-8:], b) < 2e-2

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
