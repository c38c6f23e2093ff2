"""qk_norm_rope against float64 and against transformers' Gemma4RMSNorm and apply_rotary_pos_emb."""

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
    record_launches,
    relative_error,
    same_bits,
)
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm, apply_rotary_pos_emb

import fastgemma.kernels.backend as backend
import fastgemma.kernels.qk_norm_rope_launch as module
from fastgemma.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference

MODES = ("q alone", "q and k", "q, k and v")  # "q and k": values from keys


def angles(device, batch, seq_len, head_dim, rotary_dim, dtype=torch.float32):
    """cos and sin as the model makes them: both halves alike, 1 and 0 where nothing turns."""
    theta = 6.3 * torch.rand(batch, seq_len, head_dim // 2, device=device)
    theta[..., rotary_dim // 2 :] = 0.0
    theta = torch.cat((theta, theta), dim=-1)
    return theta.cos().to(dtype), theta.sin().to(dtype)


def make(
    device,
    dtype=torch.float32,
    mode="q, k and v",
    batch=2,
    seq_len=13,
    heads=2,
    kv_heads=1,
    head_dim=16,
    rotary_dim=None,
    cos_batch=1,
    weights="trained",
    **options,
):
    def projection(n):
        return fresh(batch, seq_len, n * head_dim, device=device, dtype=dtype, **options)

    def weight():
        return fresh(head_dim, device=device, dtype=dtype, grad=weights == "trained")

    has_k = mode != "q alone"
    cos, sin = angles(device, cos_batch, seq_len, head_dim, head_dim if rotary_dim is None else rotary_dim, dtype)
    return {
        "q": projection(heads),
        "k": projection(kv_heads) if has_k else None,
        "v": projection(kv_heads) if mode == "q, k and v" else None,
        "cos": cos,
        "sin": sin,
        "q_weight": weight(),
        "k_weight": weight() if has_k else None,
        "head_dim": head_dim,
        "rotary_dim": rotary_dim,
        "values_from_keys": mode == "q and k",
        "eps": 1e-6,
    }


def make_grads(inputs, layout="contiguous"):
    """One random gradient per output, [batch, seq_len, heads, head_dim]."""
    q, head_dim = inputs["q"], inputs["head_dim"]

    def grad(projection):
        if projection is None:
            return None
        heads = projection.shape[-1] // head_dim
        if layout == "heads first":  # what attention hands back: [batch, heads, seq_len, head_dim], transposed
            shape = (q.shape[0], heads, q.shape[1], head_dim)
            return fresh(*shape, device=q.device, dtype=q.dtype, grad=False).transpose(1, 2)
        shape = (*q.shape[:2], heads, head_dim)
        return fresh(*shape, device=q.device, dtype=q.dtype, layout=layout, grad=False)

    return [grad(inputs["q"]), grad(inputs["k"]), grad(inputs["k"])]


def stock(q, k, v, cos, sin, q_weight, k_weight, head_dim, rotary_dim, values_from_keys, eps):
    """The steps of transformers' Gemma4TextAttention between its projections and its attention."""

    def norm(x, weight):
        layer = Gemma4RMSNorm(head_dim, eps=eps, with_scale=weight is not None)
        if weight is not None:
            del layer.weight
            layer.weight = weight
        return layer(x.unflatten(-1, (-1, head_dim)))

    q_out = apply_rotary_pos_emb(norm(q, q_weight), cos, sin, unsqueeze_dim=2)
    if k is None:
        return q_out, None, None
    k_out = apply_rotary_pos_emb(norm(k, k_weight), cos, sin, unsqueeze_dim=2)
    return q_out, k_out, norm(k if values_from_keys else v, None)


def check(inputs, grads):
    """Against the reference, and, where the angles are a model's, against transformers; both in float64."""
    actual = evaluate(qk_norm_rope, inputs, grads)
    for oracle in (qk_norm_rope_reference, stock):
        assert_float32(actual, evaluate(oracle, double(inputs), double(grads)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kv_heads, head_dim, rotary_dim", [(1, 16, None), (2, 6, 6), (4, 24, 10), (2, 16, 0)])
def test_modes_heads_and_dims(mode, kv_heads, head_dim, rotary_dim, device):
    inputs = make(device, mode=mode, heads=4, kv_heads=kv_heads, head_dim=head_dim, rotary_dim=rotary_dim)
    check(inputs, make_grads(inputs))


@pytest.mark.parametrize("head_dim, rotary_dim, mode", [(256, 256, "q, k and v"), (512, 128, "q and k")])
def test_head_sizes_of_gemma(head_dim, rotary_dim, mode, device):
    inputs = make(device, mode=mode, seq_len=7, head_dim=head_dim, rotary_dim=rotary_dim, heads=4)
    check(inputs, make_grads(inputs))


@pytest.mark.parametrize("batch, seq_len", [(1, 1), (1, 71), (3, 1), (3, 43)])
@pytest.mark.parametrize("own_angles", [False, True])
def test_batches_and_positions(batch, seq_len, own_angles, device):
    inputs = make(device, batch=batch, seq_len=seq_len, cos_batch=batch if own_angles else 1)
    check(inputs, make_grads(inputs))


def test_cos_and_sin_are_read_one_by_one(device):
    """Arbitrary tables, whose halves differ: each of the four numbers of a pair has its own place."""
    inputs = make(device, batch=3)
    inputs["cos"], inputs["sin"] = torch.randn(3, 13, 16, device=device), torch.randn(3, 13, 16, device=device)
    check(inputs, make_grads(inputs))


@pytest.mark.parametrize("cos_layout, sin_layout", [("transposed", "transposed"), ("contiguous", "sliced columns")])
def test_cos_and_sin_of_any_strides(cos_layout, sin_layout, device):
    inputs = make(device, batch=3)
    inputs["cos"] = fresh(3, 13, 16, device=device, layout=cos_layout, grad=False)
    inputs["sin"] = fresh(3, 13, 16, device=device, layout=sin_layout, grad=False)
    check(inputs, make_grads(inputs))
    for name in ("cos", "sin"):
        inputs[name] = fresh(1, 13, 16, device=device, grad=False).expand(3, 13, 16)
    check(inputs, make_grads(inputs))


def test_dimensions_that_do_not_turn_load_no_angle(device):
    inputs = make(device, head_dim=16, rotary_dim=6)
    still = (torch.arange(16, device=device) % 8) >= 3
    for name in ("cos", "sin"):
        inputs[name] = torch.where(still, torch.nan, inputs[name])
    grads = make_grads(inputs)
    actual = evaluate(qk_norm_rope, inputs, grads)
    assert_float32(actual, evaluate(qk_norm_rope_reference, double(inputs), double(grads)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_projections(layout, device):
    inputs = make(device, layout=layout)
    check(inputs, make_grads(inputs))


@pytest.mark.parametrize("layout", ["heads first", *LAYOUTS])
@pytest.mark.parametrize("mode", MODES)
def test_layouts_of_the_output_gradients(layout, mode, device):
    inputs = make(device, mode=mode)
    check(inputs, make_grads(inputs, layout))


@pytest.mark.parametrize(
    "layouts", list(itertools.permutations(["contiguous", "heads first", "sliced columns"])), ids=str
)
def test_every_tensor_has_its_own_strides(layouts, device):
    inputs = make(device, heads=4, kv_heads=2)
    for name, layout in zip("qkv", layouts):
        if layout != "heads first":
            inputs[name] = fresh(*inputs[name].shape, device=device, layout=layout)
    check(inputs, [make_grads(inputs, layout)[number] for number, layout in enumerate(layouts)])


@pytest.mark.parametrize("mode", MODES[1:])
@pytest.mark.parametrize("missing", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 2)], ids=str)
def test_outputs_without_a_gradient(mode, missing, device):
    inputs = make(device, mode=mode)
    check(inputs, [None if i in missing else grad for i, grad in enumerate(make_grads(inputs))])


def test_weights_of_any_stride(device):
    inputs = make(device)
    for name in ("q_weight", "k_weight"):
        inputs[name] = fresh(16, device=device, layout="every other column")
    check(inputs, make_grads(inputs))


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("mode, rotary_dim", [("q, k and v", 64), ("q and k", 16)])
def test_half_precision_is_no_worse_than_stock(dtype, mode, rotary_dim, device):
    inputs = make(device, dtype, mode, seq_len=48, head_dim=64, rotary_dim=rotary_dim)
    grads = make_grads(inputs)
    truth = evaluate(stock, double(inputs), double(grads))
    assert_no_worse_than_stock(evaluate(qk_norm_rope, inputs, grads), evaluate(stock, inputs, grads), truth)


def test_half_precision_takes_float32_angles(device):
    inputs = make(device, torch.float16, seq_len=48, head_dim=64)
    inputs["cos"], inputs["sin"] = angles(device, 1, 48, 64, 64)
    truth = evaluate(qk_norm_rope_reference, double(inputs))
    for name, value in evaluate(qk_norm_rope, inputs).items():
        assert value.dtype == torch.float16 and relative_error(value, truth[name]) < 4e-4, name


@pytest.mark.parametrize("mode", MODES)
def test_outliers(mode, device):
    inputs = make(device, mode=mode, outliers=1e4)
    check(inputs, make_grads(inputs))


def test_all_zero_heads_are_saved_by_eps(device):
    inputs = make(device)
    with torch.no_grad():
        for name in ("q", "k", "v"):
            inputs[name][1, 4] = 0.0
    check(inputs, make_grads(inputs))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name, output", [("q", 0), ("k", 1), ("v", 2)])
def test_not_finite_stays_in_its_head(value, name, output, device):
    inputs = make(device, kv_heads=2)
    with torch.no_grad():
        inputs[name][1, 4, 16 + 3] = value  # head 1
    grads = make_grads(inputs)
    actual = evaluate(qk_norm_rope, inputs, grads)
    expected = evaluate(qk_norm_rope_reference, inputs, grads)
    for result, tensor in actual.items():
        if result not in ("dq_weight", "dk_weight"):
            torch.testing.assert_close(tensor, expected[result], equal_nan=True, rtol=1e-4, atol=1e-5)
        touched = not tensor.isfinite().all()
        assert touched == (result in (f"output {output}", f"d{name}", f"d{name}_weight"))
    assert actual[f"output {output}"][1, 4, 1].isnan().any()


@pytest.mark.parametrize("batch, seq_len", [(0, 13), (2, 0)])
@pytest.mark.parametrize("mode", MODES)
def test_empty_batch(batch, seq_len, mode, device):
    inputs = make(device, mode=mode, batch=batch, seq_len=seq_len)
    outputs = [o for o in qk_norm_rope(**inputs) if o is not None]
    assert all(o.shape[:2] == (batch, seq_len) for o in outputs)
    weights = [w for w in (inputs["q_weight"], inputs["k_weight"]) if w is not None]
    for grad in torch.autograd.grad(sum(o.sum() for o in outputs), weights):
        assert same_bits(grad, torch.zeros(16, device=device))


# Autograd


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["contiguous", "heads first"])
def test_repeatable_and_read_only(mode, layout, device):
    inputs = make(device, mode=mode)
    assert_repeatable_and_read_only(qk_norm_rope, inputs, make_grads(inputs, layout))


@pytest.mark.parametrize("mode", MODES)
def test_one_launch_each_way(mode, device, monkeypatch):
    log = record_launches(monkeypatch, module)
    inputs = make(device, mode=mode)
    evaluate(qk_norm_rope, inputs, make_grads(inputs))
    assert [launched.name for launched in log] == ["_qk_norm_rope_fwd_kernel", "_qk_norm_rope_bwd_kernel"]
    heads = {"q alone": 2, "q and k": 3, "q, k and v": 4}[mode]
    assert [launched.grid[1] for launched in log] == [heads, heads]


def test_output_gradients_are_read_where_they_lie(device):
    inputs = make(device)
    grads = make_grads(inputs, "heads first")
    outputs = qk_norm_rope(**inputs)
    with Dispatched() as seen:
        torch.autograd.grad(outputs, [inputs["q"], inputs["k"], inputs["v"]], grads)
    four_dimensional = [shape for shape in seen.allocated if len(shape) == 4]
    assert four_dimensional == []


@pytest.mark.parametrize("mode", MODES)
def test_frozen_weights_cost_nothing(mode, device, monkeypatch):
    log = record_launches(monkeypatch, module)
    inputs = make(device, mode=mode, weights="frozen")
    grads = make_grads(inputs)
    actual = evaluate(qk_norm_rope, inputs, grads)
    assert_float32(actual, evaluate(stock, double(inputs), double(grads)))
    assert not log[1].kwargs["NEEDS_DWEIGHT"]


@pytest.mark.parametrize("wanted", [("q",), ("k",), ("v",), ("q_weight",), ("k_weight",), ("q", "v")], ids=str)
def test_each_gradient_alone(wanted, device, monkeypatch):
    inputs = make(device)
    grads = make_grads(inputs)
    everything = evaluate(qk_norm_rope, inputs, grads)
    for name in ("q", "k", "v", "q_weight", "k_weight"):
        inputs[name].requires_grad_(name in wanted)
    log = record_launches(monkeypatch, module)
    actual = evaluate(qk_norm_rope, inputs, grads)
    for name in wanted:
        assert same_bits(actual[f"d{name}"], everything[f"d{name}"])
    assert len(log) == 2 and log[1].kwargs["NEEDS_DWEIGHT"] == any("weight" in name for name in wanted)


# Errors


def replaced(**changes):
    def change(inputs):
        return inputs | {name: new(inputs[name]) if callable(new) else new for name, new in changes.items()}

    return change


@pytest.mark.parametrize(
    "change, error, message",
    [
        (replaced(q=lambda q: q.double()), TypeError, "float64"),
        (replaced(k=lambda k: k.half()), TypeError, "k is torch.float16"),
        (replaced(head_dim=15), ValueError, "even"),
        (replaced(rotary_dim=18), ValueError, "rotary_dim 18"),
        (replaced(rotary_dim=5), ValueError, "even"),
        (replaced(v=None), ValueError, "values_from_keys"),
        (replaced(values_from_keys=True), ValueError, "values_from_keys"),
        (replaced(k=None), ValueError, "q alone"),
        (replaced(k=lambda k: k[:, :-1]), ValueError, "k has shape"),
        (replaced(q=lambda q: q[..., :-1]), ValueError, "q has shape"),
        (replaced(q=lambda q: q[0]), ValueError, "q has shape"),
        (replaced(cos=lambda c: c[:, :-1]), ValueError, "cos has shape"),
        (replaced(sin=lambda s: s.expand(3, -1, -1)), ValueError, "sin has shape"),
        (replaced(q_weight=lambda w: w[:-1]), ValueError, "norm weights"),
        (replaced(k_weight=lambda w: w.new_ones(17)), ValueError, "norm weights"),
        (replaced(cos=lambda c: c.to("meta")), ValueError, "meta"),
        (replaced(v=lambda v: v.to("meta")), ValueError, "meta"),
    ],
)
def test_errors(change, error, message, device):
    with pytest.raises(error, match=message):
        qk_norm_rope(**change(make(device)))


@pytest.mark.parametrize("mode", MODES)
def test_runs_the_reference_without_triton(mode, device, monkeypatch):
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    log = record_launches(monkeypatch, module)
    inputs = make(device, mode=mode)
    check(inputs, make_grads(inputs))
    assert log == []


# Properties


def rotated(x, cos, sin, head_dim):
    return qk_norm_rope(x, None, None, cos, sin, torch.ones(head_dim, device=x.device), None, head_dim, eps=1e-12)[0]


@few_examples
@given(half=st.integers(1, 40), seq_len=st.integers(1, 30), heads=st.integers(1, 5), seed=st.integers(0, 2**31))
def test_rope_keeps_the_norm_and_turning_back_inverts_it(half, seq_len, heads, seed, device):
    torch.manual_seed(seed)
    head_dim = 2 * half
    x = torch.randn(2, seq_len, heads * head_dim, device=device)
    cos, sin = angles(device, 1, seq_len, head_dim, head_dim)
    turned = rotated(x, cos, sin, head_dim)
    lengths = turned.square().mean(-1)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-4, atol=1e-4)
    back = rotated(turned.flatten(2), cos, -sin, head_dim)
    plain = rotated(x, torch.ones_like(cos), torch.zeros_like(sin), head_dim)
    assert relative_error(back, plain) < 1e-5
