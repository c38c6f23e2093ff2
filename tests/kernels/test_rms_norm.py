"""rms_norm and rms_norm_residual against float64 and against transformers' Gemma4RMSNorm."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import (
    HALF_DTYPES,
    LAYOUTS,
    Dispatched,
    assert_float32,
    assert_no_worse_than_stock,
    assert_repeatable_and_read_only,
    double,
    evaluate,
    few_examples,
    fresh,
    gpu,
    record_launches,
    relative_error,
    same_bits,
)
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm

import fastgemma.kernels.backend as backend
import fastgemma.kernels.rms_norm as module
from fastgemma.kernels.launch import Launch
from fastgemma.kernels.rms_norm import (
    rms_norm,
    rms_norm_bwd,
    rms_norm_fwd,
    rms_norm_reference,
    rms_norm_residual,
    rms_norm_residual_reference,
)

SHAPES = [(1, 64), (1, 7), (13, 7), (101, 33), (2, 67, 96), (3, 1, 5, 256), (5, 1537), (48,)]
VARIANTS = list(itertools.product(["trained", "frozen", None], [False, True], [False, True]))  # weight, residual, scale


def make(shape, device, dtype=torch.float32, weight="trained", residual=False, scale=False, **options):
    """Inputs of rms_norm, or of rms_norm_residual where a residual is asked for."""
    inputs = {"hidden_states": fresh(*shape, device=device, dtype=dtype, **options)}
    inputs["weight"] = (
        None if weight is None else fresh(shape[-1], device=device, dtype=dtype, grad=weight == "trained")
    )
    if residual:
        inputs["residual"] = fresh(*shape, device=device, dtype=dtype, **options)
        inputs["layer_scalar"] = torch.full((1,), -0.37, device=device, dtype=dtype) if scale else None
    return inputs


def op(inputs):
    return rms_norm_residual if "residual" in inputs else rms_norm


def reference(inputs):
    return rms_norm_residual_reference if "residual" in inputs else rms_norm_reference


def stock(hidden_states, weight, residual=None, layer_scalar=None, eps=1e-6):
    """transformers' own class, residual add and layer scalar, in the inputs' dtype."""
    norm = Gemma4RMSNorm(hidden_states.shape[-1], eps=eps, with_scale=weight is not None)
    if weight is not None:
        del norm.weight
        norm.weight = weight
    y = norm(hidden_states)
    if residual is not None:
        y = residual + y
    return y if layer_scalar is None else y * layer_scalar


def check(inputs, dy):
    truth = evaluate(reference(inputs), double(inputs), [double(dy)])
    assert_float32(evaluate(op(inputs), inputs, [dy]), truth)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_shapes(shape, residual, device):
    check(make(shape, device, residual=residual, scale=residual), fresh(*shape, device=device, grad=False))


@pytest.mark.parametrize("weight, residual, scale", [v for v in VARIANTS if v[1] or not v[2]])
def test_weight_residual_and_scale(weight, residual, scale, device):
    inputs = make((2, 67, 40), device, weight=weight, residual=residual, scale=scale)
    check(inputs, fresh(2, 67, 40, device=device, grad=False))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_inputs_and_of_the_output_gradient(layout, device):
    inputs = make((3, 23, 20), device, residual=True, scale=True, layout=layout)
    check(inputs, fresh(3, 23, 20, device=device, layout=layout, grad=False))


@pytest.mark.parametrize("layout", ["sliced columns", "every third row", "expanded"])
def test_every_tensor_has_its_own_strides(layout, device):
    inputs = make((3, 23, 20), device, residual=True, scale=True)
    inputs["residual"] = fresh(3, 23, 20, device=device, layout=layout)
    check(inputs, fresh(3, 23, 20, device=device, layout="picked from a stack", grad=False))


def test_weight_of_any_stride_and_dtype(device):
    inputs = make((11, 24), device)
    inputs["weight"] = fresh(24, device=device, layout="every other column")
    check(inputs, fresh(11, 24, device=device, grad=False))
    bf16 = torch.randn(24, device=device).bfloat16()
    inputs["weight"] = bf16
    assert_float32(evaluate(rms_norm, inputs), evaluate(rms_norm_reference, double(inputs)))


def test_many_rows_per_program(device, monkeypatch):
    """The weight's gradient: several tiles per program, the last of them past the end."""
    monkeypatch.setattr(module, "launch", lambda *_: Launch({"BLOCK_M": 1}))
    log = record_launches(monkeypatch, module)
    check(make((521, 6), device), fresh(521, 6, device=device, grad=False))
    assert log[-1].kwargs["TILES"] == 2 and log[-1].grid == (261,)


@pytest.mark.parametrize("rows, cols", [(1, 7), (13, 24), (101, 33)])
def test_rows_of_wider_matrices_and_an_addend(rows, cols, device):
    """As operations call it that contain a norm: outputs lie apart, and x has a gradient from elsewhere too."""
    inputs = make((rows, cols), device)
    x, weight = inputs["hidden_states"].detach(), inputs["weight"].detach()
    dy, addend = (fresh(rows, cols, device=device, layout="sliced columns", grad=False) for _ in range(2))
    truth = evaluate(rms_norm_reference, double(inputs), [double(dy)])
    truth["dhidden_states"] = truth["dhidden_states"] + addend.double()
    wide = torch.full((2, rows, cols + 5), 7.0, device=device)
    rstd = torch.empty(rows, device=device)
    y = rms_norm_fwd(x, weight, 1e-6, rstd=rstd, out=wide[0, :, 2:-3])
    grads = rms_norm_bwd(dy, x, weight, rstd, addend=addend, needs_dweight=True, out=wide[1, :, 2:-3])
    assert_float32({"output 0": y, "dhidden_states": grads.x, "dweight": grads.weight}, truth)
    assert (wide[:, :, :2] == 7).all() and (wide[:, :, -3:] == 7).all()


@pytest.mark.parametrize("with_scale", [True, False])
def test_live_transformers_class(with_scale, device):
    norm = Gemma4RMSNorm(96, eps=1e-5, with_scale=with_scale).to(device)
    weight = None
    if with_scale:
        torch.nn.init.normal_(norm.weight)
        weight = norm.weight
    x = fresh(5, 17, 96, device=device)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), norm(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("weight, residual, scale", [("trained", False, False), (None, False, False)] + VARIANTS[2:4])
def test_half_precision_is_no_worse_than_stock(dtype, weight, residual, scale, device):
    inputs = make((4, 64, 96), device, dtype, weight, residual, scale)
    dy = fresh(4, 64, 96, device=device, dtype=dtype, grad=False)
    truth = evaluate(reference(inputs), double(inputs), [double(dy)])
    assert_no_worse_than_stock(evaluate(op(inputs), inputs, [dy]), evaluate(stock, inputs, [dy]), truth)


def test_outliers(device):
    inputs = make((19, 96), device, residual=True, scale=True, outliers=1e4)
    check(inputs, fresh(19, 96, device=device, grad=False, outliers=-1e4))


def test_all_zero_rows_are_saved_by_eps(device):
    inputs = make((6, 20), device)
    with torch.no_grad():
        inputs["hidden_states"][2:4] = 0.0
    check(inputs, fresh(6, 20, device=device, grad=False))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_stays_in_its_row(value, device):
    inputs = make((9, 20), device, residual=True)
    with torch.no_grad():
        inputs["hidden_states"][4, 3] = value
    dy = fresh(9, 20, device=device, grad=False)
    actual = evaluate(rms_norm_residual, inputs, [dy])
    expected = evaluate(rms_norm_residual_reference, inputs, [dy])
    others = [row for row in range(9) if row != 4]
    for name in ("output 0", "dhidden_states", "dresidual"):
        assert actual[name][others].isfinite().all()
        torch.testing.assert_close(actual[name], expected[name], equal_nan=True, rtol=1e-4, atol=1e-5)
    assert actual["output 0"][4, 3].isnan()


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)], ids=str)
def test_empty_batch(shape, device):
    inputs = make(shape, device, residual=True, scale=True)
    result = evaluate(rms_norm_residual, inputs, [fresh(*shape, device=device, grad=False)])
    assert result["output 0"].shape == result["dresidual"].shape == shape
    assert same_bits(result["dweight"], torch.zeros(16, device=device))


# Autograd


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_repeatable_and_read_only(residual, layout, device):
    inputs = make((7, 5, 24), device, residual=residual, scale=residual)
    assert_repeatable_and_read_only(op(inputs), inputs, [fresh(7, 5, 24, device=device, layout=layout, grad=False)])


@pytest.mark.parametrize("residual, scale", [(False, False), (True, False), (True, True)])
def test_one_launch_each_way(residual, scale, device, monkeypatch):
    log = record_launches(monkeypatch, module)
    inputs = make((70, 24), device, residual=residual, scale=scale)
    evaluate(op(inputs), inputs, [fresh(70, 24, device=device, grad=False)])
    assert [launched.name for launched in log] == ["_rms_norm_fwd_kernel", "_rms_norm_bwd_kernel"]


def test_nothing_is_kept_without_gradients(device, monkeypatch):
    log = record_launches(monkeypatch, module)
    inputs = make((7, 24), device, weight="frozen", grad=False)
    with Dispatched() as seen:
        rms_norm(**inputs)
    assert seen.allocated == [(7, 24)] and not log[0].kwargs["STORE_RSTD"]


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("wanted", [("hidden_states",), ("weight",), ("residual",), ("weight", "residual")], ids=str)
def test_only_wanted_gradients_are_computed(wanted, scale, device, monkeypatch):
    inputs = make((7, 24), device, residual=True, scale=scale)
    dy = fresh(7, 24, device=device, grad=False)
    everything = evaluate(rms_norm_residual, inputs, [dy])
    for name in ("hidden_states", "weight", "residual"):
        inputs[name].requires_grad_(name in wanted)
    log = record_launches(monkeypatch, module)
    with Dispatched() as seen:
        actual = evaluate(rms_norm_residual, inputs, [dy])
    for name in wanted:
        assert same_bits(actual[f"d{name}"], everything[f"d{name}"])
    by_kernel = {
        "NEEDS_DX": "hidden_states" in wanted,
        "NEEDS_DWEIGHT": "weight" in wanted,
        "NEEDS_DRESIDUAL": "residual" in wanted and scale,
    }
    backward = log[1:]
    assert len(backward) == any(by_kernel.values())
    for launched in backward:
        assert {flag: launched.kwargs[flag] for flag in by_kernel} == by_kernel
    gradients = by_kernel["NEEDS_DX"] + by_kernel["NEEDS_DRESIDUAL"]
    # On a GPU a program takes one row, so the weight's partial sums have the rows' shape.
    partials = by_kernel["NEEDS_DWEIGHT"] and device.type == "cuda"
    assert seen.allocated.count((7, 24)) == 1 + gradients + partials


# Errors


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda i: i | {"hidden_states": i["hidden_states"].double()}, TypeError, "float64"),
        (lambda i: i | {"hidden_states": torch.zeros(3, 8, dtype=torch.int32)}, TypeError, "int32"),
        (lambda i: i | {"hidden_states": torch.tensor(1.0)}, ValueError, "scalar"),
        (lambda i: i | {"hidden_states": torch.zeros(3, 8193)}, ValueError, "8193"),
        (lambda i: i | {"hidden_states": torch.zeros(3, 0)}, ValueError, "got 0"),
        (lambda i: i | {"weight": torch.ones(7)}, ValueError, r"weight of shape \(7,\)"),
        (lambda i: i | {"weight": torch.ones(8, device="meta")}, ValueError, "meta"),
        (lambda i: i | {"residual": torch.ones(4, 8), "layer_scalar": None}, ValueError, r"residual of shape \(4, 8\)"),
        (lambda i: i | {"residual": torch.ones(3, 8).half(), "layer_scalar": None}, TypeError, "residual is"),
        (lambda i: i | {"residual": i["hidden_states"], "layer_scalar": torch.ones(2)}, ValueError, "layer_scalar"),
        (
            lambda i: i | {"residual": i["hidden_states"], "layer_scalar": torch.ones(1, requires_grad=True)},
            ValueError,
            "layer_scalar",
        ),
    ],
)
def test_errors(change, error, message, device):
    inputs = change(make((3, 8), device))
    with pytest.raises(error, match=message):
        op(inputs)(**inputs)


def test_runs_the_reference_without_triton(device, monkeypatch):
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    log = record_launches(monkeypatch, module)
    for residual in (False, True):
        check(make((5, 12), device, residual=residual, scale=residual), fresh(5, 12, device=device, grad=False))
    assert log == []


# Properties


@few_examples
@given(rows=st.integers(1, 20), cols=st.integers(2, 70), factor=st.floats(1e-3, 1e3), seed=st.integers(0, 2**31))
def test_scale_of_a_row_does_not_matter(rows, cols, factor, seed, device):
    torch.manual_seed(seed)
    x, weight = fresh(rows, cols, device=device, grad=False), fresh(cols, device=device, grad=False)
    assert relative_error(rms_norm(factor * x, weight, 1e-30), rms_norm(x, weight, 1e-30)) < 1e-5


@few_examples
@given(rows=st.integers(1, 90), cols=st.integers(3, 70), seed=st.integers(0, 2**31))
def test_any_shape(rows, cols, seed, device):
    torch.manual_seed(seed)
    check(make((rows, cols), device, residual=True, scale=True), fresh(rows, cols, device=device, grad=False))


# The budgets themselves


@pytest.mark.parametrize(
    "spoil",
    [
        lambda t: -t,
        lambda t: t * (1 + 3e-5),
        lambda t: t + 1e-3,
        lambda t: t.roll(1, -1),
        lambda t: torch.where(torch.arange(t.shape[-1], device=t.device) == 3, 0.0, t),
        lambda t: torch.where(torch.arange(t.shape[-1], device=t.device) == 3, torch.nan, t),
    ],
)
@pytest.mark.parametrize("name", ["output 0", "dhidden_states", "dweight"])
def test_budgets_catch_wrong_results(spoil, name, device):
    inputs, dy = make((13, 24), device), fresh(13, 24, device=device, grad=False)
    truth = evaluate(rms_norm_reference, double(inputs), [double(dy)])
    actual = evaluate(rms_norm, inputs, [dy])
    assert_float32(actual, truth)
    with pytest.raises(AssertionError):
        assert_float32(actual | {name: spoil(actual[name])}, truth)


@pytest.mark.parametrize("spoil", [lambda t: -t, lambda t: t * 1.01, lambda t: t.roll(1, -1)])
def test_half_budgets_catch_wrong_results(spoil, device):
    inputs, dy = make((13, 24), device, torch.float16), fresh(13, 24, device=device, dtype=torch.float16, grad=False)
    truth = evaluate(rms_norm_reference, double(inputs), [double(dy)])
    right, actual = evaluate(stock, inputs, [dy]), evaluate(rms_norm, inputs, [dy])
    with pytest.raises(AssertionError):
        assert_no_worse_than_stock(actual | {"dweight": spoil(actual["dweight"])}, right, truth)


# Large tensors


@pytest.mark.parametrize("cols", [pytest.param(1024, marks=gpu)])
def test_more_than_two_to_the_31_elements(cols):
    device, rows = torch.device("cuda"), (2**31 // cols) + 5
    if torch.cuda.get_device_properties(device).total_memory < 16 * 2**30:
        pytest.skip("needs 16 GB")
    x = torch.empty(rows, cols, dtype=torch.float16, device=device).normal_().requires_grad_()
    y = rms_norm(x, None)
    dy = torch.randn(cols, device=device, dtype=torch.float16).expand(rows, cols)
    dx = torch.autograd.grad(y, x, dy)[0]
    for part in (slice(0, 3), slice(rows // 2 - 2, rows // 2 + 2), slice(rows - 7, rows)):
        few = x.detach()[part].requires_grad_()
        expected = rms_norm_reference(few, None)
        torch.testing.assert_close(y[part], expected, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(dx[part], torch.autograd.grad(expected, few, dy[part])[0], rtol=2e-3, atol=2e-3)
