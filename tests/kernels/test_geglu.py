"""geglu against float64 and against torch's gelu."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
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

import fastgemma.kernels.backend as backend
import fastgemma.kernels.geglu as module
from fastgemma.kernels.geglu import geglu, geglu_bwd, geglu_fwd, geglu_reference

SHAPES = [(1, 64), (1, 1), (13, 7), (101, 33), (2, 67, 96), (3, 1, 5, 256), (3, 2063), (48,)]


def stock(gate, up):
    return F.gelu(gate, approximate="tanh") * up


def make(shape, device, dtype=torch.float32, gate_layout="contiguous", up_layout="contiguous", **options):
    return {
        "gate": fresh(*shape, device=device, dtype=dtype, layout=gate_layout, **options),
        "up": fresh(*shape, device=device, dtype=dtype, layout=up_layout, **options),
    }


def check(inputs, dh):
    truth = evaluate(stock, double(inputs), [double(dh)])
    assert_float32(evaluate(geglu, inputs, [dh]), truth)
    assert_float32(evaluate(geglu_reference, inputs, [dh]), truth)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, device):
    check(make(shape, device), fresh(*shape, device=device, grad=False))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", ["gate", "up", "output gradient"])
def test_layouts(layout, which, device):
    layouts = {f"{which}_layout": layout} if which in ("gate", "up") else {}
    dh = fresh(3, 23, 20, device=device, layout="contiguous" if layouts else layout, grad=False)
    check(make((3, 23, 20), device, **layouts), dh)


def test_one_layer_of_the_per_layer_embeddings(device):
    """`up` as the model passes it: [batch, seq, layer, columns] at one layer, read where it lies."""
    stack = torch.randn(2, 19, 5, 32, device=device)
    for layer in (0, 2, 4):
        inputs = {"gate": fresh(2, 19, 32, device=device), "up": stack[:, :, layer, :].detach().requires_grad_()}
        check(inputs, fresh(2, 19, 32, device=device, grad=False))


def test_a_slice_is_not_copied(device):
    stack = torch.randn(2, 19, 5, 32, device=device)
    gate = fresh(2, 19, 32, device=device)
    with torch.no_grad(), Dispatched() as seen:
        geglu(gate, stack[:, :, 3, :])
    assert seen.allocated == [(38, 32)]  # h alone


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_half_precision_is_no_worse_than_stock(dtype, device):
    inputs, dh = make((4, 64, 96), device, dtype), fresh(4, 64, 96, device=device, dtype=dtype, grad=False)
    truth = evaluate(stock, double(inputs), [double(dh)])
    assert_no_worse_than_stock(evaluate(geglu, inputs, [dh]), evaluate(stock, inputs, [dh]), truth)


def test_whole_range_of_gates(device):
    """Both tails, the bend, and zero; values against float64 one by one."""
    gate = torch.cat(
        [torch.linspace(-30, 30, 401), torch.tensor([0.0, -0.0, 1e-8, -1e-8, 1e4, -1e4, 1e15, -1e15, 1e25, -1e25])]
    )
    inputs = {"gate": gate.to(device).requires_grad_(), "up": torch.ones(411, device=device, requires_grad=True)}
    ones = torch.ones(411, device=device)
    actual, truth = evaluate(geglu, inputs, [ones]), evaluate(stock, double(inputs), [double(ones)])
    for name, value in actual.items():
        torch.testing.assert_close(value.double(), truth[name], rtol=1e-5, atol=2e-6, msg=name)


def test_outliers(device):
    check(make((19, 96), device, outliers=1e4), fresh(19, 96, device=device, grad=False, outliers=-1e4))


@pytest.mark.parametrize("which", ["gate", "up"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_stays_in_its_element(value, which, device):
    inputs = make((9, 20), device)
    with torch.no_grad():
        inputs["gate"][4, 3], inputs["up"][4, 3] = 0.5, 0.5
        inputs[which][4, 3] = value
    dh = fresh(9, 20, device=device, grad=False)
    actual, expected = evaluate(geglu, inputs, [dh]), evaluate(stock, inputs, [dh])
    for name, result in actual.items():
        rest = torch.ones(9, 20, dtype=torch.bool, device=device)
        rest[4, 3] = False
        torch.testing.assert_close(result[rest], expected[name][rest], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(actual["output 0"], expected["output 0"], equal_nan=True, rtol=1e-4, atol=1e-6)
    assert not actual["output 0"][4, 3].isfinite()


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)], ids=str)
def test_empty_batch(shape, device):
    result = evaluate(geglu, make(shape, device), [fresh(*shape, device=device, grad=False)])
    assert {tuple(t.shape) for t in result.values()} == {shape}


# Autograd


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_repeatable_and_read_only(layout, device):
    dh = fresh(7, 5, 24, device=device, layout=layout, grad=False)
    assert_repeatable_and_read_only(geglu, make((7, 5, 24), device), [dh])


def test_one_launch_each_way(device, monkeypatch):
    log = record_launches(monkeypatch, module)
    evaluate(geglu, make((70, 24), device), [fresh(70, 24, device=device, grad=False)])
    assert [launched.name for launched in log] == ["_geglu_fwd_kernel", "_geglu_bwd_kernel"]


@pytest.mark.parametrize("wanted", ["gate", "up"])
def test_only_the_wanted_gradient_is_computed(wanted, device, monkeypatch):
    inputs, dh = make((7, 24), device), fresh(7, 24, device=device, grad=False)
    everything = evaluate(geglu, inputs, [dh])
    for name, tensor in inputs.items():
        tensor.requires_grad_(name == wanted)
    log = record_launches(monkeypatch, module)
    with Dispatched() as seen:
        actual = evaluate(geglu, inputs, [dh])
    assert same_bits(actual[f"d{wanted}"], everything[f"d{wanted}"])
    flags = {flag: log[1].kwargs[flag] for flag in ("NEEDS_DGATE", "NEEDS_DUP", "NEEDS_H")}
    assert flags == {"NEEDS_DGATE": wanted == "gate", "NEEDS_DUP": wanted == "up", "NEEDS_H": False}
    assert seen.allocated == [(7, 24)] * 2  # h and one gradient


@pytest.mark.parametrize("overwrite", [False, True])
def test_backward_fills_parts_of_a_buffer_and_may_rebuild_h_over_dh(overwrite, device):
    gate, up, dh = (fresh(9, 24, device=device, grad=False) for _ in range(3))
    expected = evaluate(geglu, {"gate": gate.clone().requires_grad_(), "up": up.clone().requires_grad_()}, [dh])
    given_dh = dh.clone()
    both = torch.empty(9, 48, device=device)
    dgate, dup = both[:, :24], both[:, 24:]
    h = given_dh if overwrite else torch.empty(9, 24, device=device)
    geglu_bwd(given_dh, gate, up, dgate, dup, h)
    assert relative_error(dgate, expected["dgate"]) < 1e-6 and relative_error(dup, expected["dup"]) < 1e-6
    assert relative_error(h, geglu_fwd(gate, up)) < 1e-6
    assert overwrite or same_bits(given_dh, dh)


# Errors


@pytest.mark.parametrize(
    "gate, up, error, message",
    [
        (torch.zeros(2, 3).double(), torch.zeros(2, 3).double(), TypeError, "float64"),
        (torch.zeros(2, 3), torch.zeros(2, 3).half(), TypeError, "gate in torch.float32 and up in torch.float16"),
        (torch.zeros(2, 3), torch.zeros(3, 2), ValueError, r"\(2, 3\) and up \(3, 2\)"),
        (torch.zeros(2, 3), torch.zeros(1, 3), ValueError, "shapes must agree"),
        (torch.zeros(()), torch.zeros(()), ValueError, "shapes must agree"),
        (torch.zeros(2, 3), torch.zeros(2, 3, device="meta"), ValueError, "meta"),
    ],
)
def test_errors(gate, up, error, message):
    with pytest.raises(error, match=message):
        geglu(gate, up)


def test_runs_the_reference_without_triton(device, monkeypatch):
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    log = record_launches(monkeypatch, module)
    check(make((5, 12), device), fresh(5, 12, device=device, grad=False))
    assert log == []


# Properties


@few_examples
@given(
    rows=st.integers(1, 90), cols=st.integers(1, 70), a=st.floats(-3, 3), b=st.floats(-3, 3), seed=st.integers(0, 99)
)
def test_linear_in_up(rows, cols, a, b, seed, device):
    torch.manual_seed(seed)
    gate, first, second = (fresh(rows, cols, device=device, grad=False) for _ in range(3))
    combined = geglu(gate, a * first + b * second)
    apart = a * geglu(gate, first) + b * geglu(gate, second)
    torch.testing.assert_close(combined, apart, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("cols", [pytest.param(1024, marks=gpu)])
def test_more_than_two_to_the_31_elements(cols):
    device, rows = torch.device("cuda"), (2**31 // cols) + 5
    if torch.cuda.get_device_properties(device).total_memory < 16 * 2**30:
        pytest.skip("needs 16 GB")
    gate = torch.empty(rows, cols, dtype=torch.float16, device=device).normal_().requires_grad_()
    up, dh = (torch.randn(cols, device=device, dtype=torch.float16).expand(rows, cols) for _ in range(2))
    h = geglu(gate, up)
    dgate = torch.autograd.grad(h, gate, dh)[0]
    for part in (slice(0, 3), slice(rows // 2 - 2, rows // 2 + 2), slice(rows - 7, rows)):
        few = gate.detach()[part].requires_grad_()
        expected = geglu_reference(few, up[part])
        torch.testing.assert_close(h[part], expected, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(dgate[part], torch.autograd.grad(expected, few, dh[part])[0], rtol=2e-3, atol=2e-3)
