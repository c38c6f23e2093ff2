"""The one sweep over softcapped logits, alone and through the operations that take it, against float64."""

from __future__ import annotations

import math

import pytest
import torch
from cross_entropy_checks import assert_close, make
from kernel_checks import double, relative_error

import fastgemma.kernels.chunked_head as chunked_head
from fastgemma.kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_reference,
    linear_log_probs,
    linear_log_probs_reference,
)
from fastgemma.kernels.logits import Readout
from fastgemma.kernels.softcapped_logits import MAX_BOUND, OUTPUTS, one_sweep_suffices, softcapped_logits

FIELDS = ("log_probs", "entropy", "mean_logits", "is_top1")


def swept(raw, bias, targets, readout, fields=FIELDS):
    """(results, gradient of each row's loss); whatever is written starts as NaN."""
    names = {*fields, "log_probs", "peak", "log_sum", "scale", "of_target"}
    results = {name: torch.full((len(raw),), math.nan, device=raw.device) for name in names}
    if "is_top1" in results:
        results["is_top1"] = torch.full((len(raw),), 77, dtype=torch.uint8, device=raw.device)
    logits = raw.clone()
    softcapped_logits(logits, bias, targets, readout, results)
    rows, inside = torch.arange(len(raw), device=raw.device), (targets >= 0) & (targets < raw.shape[1])
    assert (logits[rows[inside], targets[inside]] == 0).all()
    gradient = logits.double() * results["scale"].double()[:, None]
    gradient[rows[inside], targets[inside]] = results["of_target"].double()[inside]
    return results, gradient


def exactly(raw, bias, targets, readout):
    """The same in float64, by plain torch."""
    u = raw.double().requires_grad_()
    s = (u if bias is None else u + bias.double()) * readout.logit_scale
    z = readout.softcap * torch.tanh(s / readout.softcap) / readout.temperature
    log_p = torch.log_softmax(z, -1)
    log_probs = log_p.gather(1, targets[:, None])[:, 0]
    (gradient,) = torch.autograd.grad(-log_probs.sum(), u)
    results = {
        "log_probs": log_probs.detach(),
        "entropy": -(log_p.exp() * log_p).sum(-1).detach(),
        "mean_logits": z.detach().mean(-1),
        "is_top1": z.detach().argmax(-1) == targets,
        "logsumexp": torch.logsumexp(z.detach(), -1),
    }
    return results, gradient


@pytest.mark.parametrize("columns", [1, 3, 255, 256, 515, 1024])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap, scale, temperature", [(30.0, 1.0, 1.0), (5.0, -1.3, 0.7), (MAX_BOUND, 2.0, 1.0)])
def test_matches_float64(columns, bias, softcap, scale, temperature, device, small_blocks):
    readout = Readout(softcap, scale, temperature)
    raw = 3 * torch.randn(7, columns, device=device)
    bias = torch.randn(columns, device=device) if bias else None
    targets = torch.randint(0, columns, (7,), device=device)
    targets[0], targets[1] = 0, columns - 1
    results, gradient = swept(raw, bias, targets, readout)
    truth, expected = exactly(raw, bias, targets, readout)
    # Logits near 30 are rounded to 2e-6, and a small loss or entropy is a difference between them.
    torch.testing.assert_close(results["log_probs"].double(), truth["log_probs"], rtol=1e-6, atol=8e-6)
    torch.testing.assert_close(results["entropy"].double(), truth["entropy"], rtol=1e-6, atol=1.6e-5)
    assert_close(results["mean_logits"], truth["mean_logits"], "mean_logits")
    assert torch.equal(results["is_top1"].bool(), truth["is_top1"])
    assert_close(results["peak"] + results["log_sum"], truth["logsumexp"], "logsumexp")
    assert relative_error(gradient, expected) <= 1e-5
    assert (results["log_probs"] <= 0).all()
    _, alone = swept(raw, bias, targets, readout, fields=())
    assert torch.equal(alone, gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("target_is", ["highest", "lowest", "a middle one"])
def test_as_far_apart_as_a_softcap_allows(dtype, target_is, device, small_blocks):
    """The largest exponentials there can be are finite, and so is what a head makes of them."""
    columns, sign = 1027, 1.0 if target_is != "lowest" else -1.0
    raw = torch.full((2, columns), -1e4 * sign, device=device, dtype=dtype)
    raw[:, 5] = 1e4 * sign if target_is != "a middle one" else 0.0
    if target_is == "a middle one":
        raw[:, 600:] = 1e4
    targets = torch.full((2,), 5, device=device)
    results, gradient = swept(raw, None, targets, Readout(MAX_BOUND, 1.0, 1.0))
    truth, expected = exactly(raw, None, targets, Readout(MAX_BOUND, 1.0, 1.0))
    assert_close(results["log_probs"], truth["log_probs"], "log_probs")
    assert all(torch.isfinite(values).all() for values in results.values())
    assert torch.isfinite(gradient).all()
    if target_is == "a middle one":  # the others are saturated, and have no slope in float64 either
        assert relative_error(gradient[:, 5], expected[:, 5]) <= (1e-5 if dtype == torch.float32 else 4e-3)


def test_equal_maxima_and_the_first_of_them(device, small_blocks):
    raw = torch.zeros(4, 700, device=device)
    raw[:, [3, 300, 600]] = 1.0
    results, _ = swept(raw, None, torch.tensor([3, 300, 600, 5], device=device), Readout(30.0, 1.0, 1.0))
    assert results["is_top1"].tolist() == [1, 0, 0, 0]


def test_a_bad_row_stays_alone(device, small_blocks):
    raw, targets = torch.randn(5, 515, device=device), torch.tensor([1, 2, 515, -7, 1 << 40], device=device)
    clean = raw.clone()
    raw[1, 300] = math.nan
    readout = Readout(30.0, 1.0, 1.0)
    results, gradient = swept(raw, None, targets, readout)
    want, expected = swept(clean, None, targets.clamp(0, 514), readout)
    assert results["log_probs"].isnan().tolist() == [False, True, True, True, True]
    assert gradient.isnan().all(1).tolist() == [False, True, True, True, True]
    assert torch.equal(gradient[0], expected[0]) and results["log_probs"][0] == want["log_probs"][0]
    assert results["is_top1"][2:].tolist() == [0, 0, 0]


def test_where_one_sweep_suffices():
    readout = Readout(30.0, 1.0, 1.0)
    assert one_sweep_suffices(readout, torch.bfloat16, ()) and one_sweep_suffices(readout, torch.float32, FIELDS)
    assert not one_sweep_suffices(readout, torch.float16, ())
    assert not one_sweep_suffices(Readout(None, 1.0, 1.0), torch.bfloat16, ())
    assert not one_sweep_suffices(Readout(30.0, 1.0, 0.9), torch.bfloat16, ())  # 33.3 of 32
    assert not one_sweep_suffices(readout, torch.bfloat16, ("log_sum_sq_probs",))
    assert "log_sum_sq_probs" not in OUTPUTS


@pytest.fixture
def sweeps(monkeypatch):
    """The names of the kernels that took a chunk of logits."""
    seen = []
    for name in ("softcapped_logits", "logits_fwd"):
        original = getattr(chunked_head, name)
        monkeypatch.setattr(
            chunked_head, name, lambda *a, name=name, original=original, **k: (seen.append(name), original(*a, **k))
        )
    return seen


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("trainable", [False, True])
def test_a_frozen_head_takes_it(softcap, trainable, device, small_blocks, sweeps):
    tensors, labels = make(19, 32, 515, device, bias=False, frozen=not trainable, ignored=0.3)
    ours = linear_cross_entropy(*tensors[:2], labels, softcap=softcap, workspace_bytes=4 * 515 * 4)
    exact = double(tensors)
    truth = linear_cross_entropy_reference(*exact[:2], labels, softcap=softcap)
    assert_close(ours.detach(), truth.detach(), "loss")
    (gradient,), (expected,) = (torch.autograd.grad(x, y) for x, y in ((ours, tensors[:1]), (truth, exact[:1])))
    assert_close(gradient, expected, "gradient")
    assert set(sweeps) == {"softcapped_logits" if softcap and not trainable else "logits_fwd"} and len(sweeps) > 1


def test_the_entropy_has_its_gradient_from_logits_made_again(device, small_blocks, sweeps):
    """From this sweep's statistics, whose peak is the target's logit."""
    tensors, targets = make(7, 16, 515, device, bias=False, frozen=True)
    exact = double(tensors)
    options = {"softcap": 20.0, "temperature": 0.9, "outputs": FIELDS}
    ours = linear_log_probs(*tensors[:2], targets, **options)
    truth = linear_log_probs_reference(*exact[:2], targets, **options)
    up, up_entropy = torch.randn(2, 7, device=device)
    for a, e in ((1, 0), (0, 1), (1, 1)):
        x, y = (
            torch.autograd.grad(
                a * (s.log_probs * up).sum() + e * (s.entropy * up_entropy).sum(), leaf, retain_graph=True
            )[0]
            for s, leaf in ((ours, tensors[0]), (truth, exact[0]))
        )
        assert_close(x, y, f"gradient from {a} log_probs + {e} entropy")
    assert set(sweeps) == {"softcapped_logits"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_gradient_is_rounded_once(dtype, device, small_blocks):
    """float16 hidden states over a float32 head, too: nothing out of their range is kept in between."""
    tensors, labels = make(6, 64, 515, device, bias=False, frozen=True)
    hidden = tensors[0].detach().to(dtype).requires_grad_()
    weight = tensors[1].detach()
    with torch.autocast(device.type, enabled=False):
        ours = linear_cross_entropy(hidden.float(), weight, labels, softcap=30.0, reduction="sum")
    (gradient,) = torch.autograd.grad(ours, hidden)
    exact = hidden.detach().double().requires_grad_()
    truth = linear_cross_entropy_reference(exact, weight.double(), labels, softcap=30.0, reduction="sum")
    (expected,) = torch.autograd.grad(truth, exact)
    half_unit = torch.finfo(dtype).eps / 2
    assert ((gradient.double() - expected).abs() <= 1.02 * half_unit * expected.abs() + 1e-6).all()
