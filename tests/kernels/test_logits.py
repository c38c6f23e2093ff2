"""The kernels over rows of logits, alone and through linear_cross_entropy, against float64 and TRL's fused head."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from cross_entropy_checks import ALL, NAMES, assert_close, grads, make
from kernel_checks import double, gpu, relative_error

import fastgemma.kernels.linear_cross_entropy as module
from fastgemma.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_log_probs,
    linear_log_probs_reference,
)
from fastgemma.kernels.logits import Readout, logits_bwd, logits_fwd

CUDA = torch.cuda.is_available()


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_logits_are_written_only_where_asked(softcap, device, small_blocks):
    """The launches themselves: the gradient in place equals the one made from saved statistics, negated."""
    raw, targets = torch.randn(5, 515, device=device), torch.randint(0, 515, (5,), device=device)
    bias, readout = torch.randn(515, device=device), Readout(softcap, 1.2, 0.8)
    logits = raw.clone()
    results = {name: torch.empty(5, device=device) for name in ("log_probs", "peak", "log_sum", "entropy")}
    logits_fwd(logits, bias, targets, readout, results, overwrite_logits=False)
    assert torch.equal(logits, raw)
    exact = raw.double().requires_grad_()
    z = 1.2 * (exact + bias)
    z = (z if softcap is None else softcap * torch.tanh(z / softcap)) / 0.8
    loss = F.cross_entropy(z, targets, reduction="none")
    assert_close(results["log_probs"], -loss.detach(), "log_probs")
    assert_close(results["peak"] + results["log_sum"], torch.logsumexp(z.detach(), -1), "logsumexp")
    (truth,) = torch.autograd.grad(loss.sum(), exact)
    logits_fwd(logits, bias, targets, readout, results, overwrite_logits=True)
    assert_close(logits, truth, "gradient in place")
    again, statistics = raw.clone(), (results["peak"], results["log_sum"])
    logits_bwd(again, bias, targets, readout, *statistics, None, -torch.ones(5, device=device), None)
    assert_close(again, truth, "gradient from statistics")


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
        assert relative_error(x, y) <= tolerance, (name, relative_error(x, y))


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


class TestOnTheGPU:
    pytestmark = gpu

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
        assert relative_error(a[-8:], b) < 2e-2
