"""post_attention against float64: everything behind a layer's attention as one operation, with and without PLE."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_checks import (
    FLOAT32_BUDGET,
    LAYOUTS,
    Dispatched,
    Inputs,
    assert_float32,
    assert_no_worse_over_seeds,
    assert_repeatable_and_read_only,
    double,
    evaluate,
    gpu,
    record_launches,
    relative_error,
    seeded,
    trained,
)
from post_attention_checks import ATTENDED, HIDDEN, INNER, INPUT, both, call, make, make_grads

from fastgemma.kernels import backend, geglu, lora_mlp, rms_norm
from fastgemma.kernels import nf4 as nf4_module
from fastgemma.kernels import post_attention as module
from fastgemma.kernels.lora import lora_linear_reference
from fastgemma.kernels.post_attention import Matrices, Norms, post_attention, post_attention_reference
from fastgemma.kernels.rms_norm import rms_norm_reference


def check(inputs: Inputs, grads: list[torch.Tensor]) -> None:
    truth = evaluate(call(post_attention_reference), double(inputs), double(grads))
    assert_float32(evaluate(call(post_attention), inputs, grads), truth)


def rounding_as_stock(
    attended: Any, residual: Any, norms: Norms, matrices: Matrices, layer_scalar: Any, per_layer_input: Any = None
) -> torch.Tensor:
    """The expressions of `Gemma4TextDecoderLayer` and `Gemma4TextMLP`, each of which rounds."""

    def gelu(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x, approximate="tanh")

    h = residual + rms_norm_reference(lora_linear_reference(attended, matrices.o), norms.post_attention)
    x = rms_norm_reference(h, norms.pre_feedforward)
    inner = gelu(lora_linear_reference(x, matrices.gate)) * lora_linear_reference(x, matrices.up)
    h = h + rms_norm_reference(lora_linear_reference(inner, matrices.down), norms.post_feedforward)
    if per_layer_input is not None and matrices.per_layer_gate and matrices.per_layer_projection:
        product = gelu(lora_linear_reference(h, matrices.per_layer_gate)) * per_layer_input
        projected = lora_linear_reference(product, matrices.per_layer_projection)
        h = h + rms_norm_reference(projected, norms.post_per_layer_input)
    return h * layer_scalar


@both
@pytest.mark.parametrize("base, norms", [("nf4", False), ("frozen", False), ("trained", True)])
def test_output_and_gradients(per_layer, base, norms, device):
    inputs = make(device, per_layer, base=base, norms=norms)
    check(inputs, make_grads(inputs))


@both
@pytest.mark.parametrize("rank", [2, 8, 24])
@pytest.mark.parametrize("adapted", [(), (0,), (1, 3), (2,)], ids=str)
def test_adapters_on_some_projections(per_layer, adapted, rank, device):
    inputs = make(device, per_layer, adapted=adapted, rank=rank)
    check(inputs, make_grads(inputs))


@both
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_adapters_within_the_base_products(per_layer, dropout, device):
    """Ranks that let adapters be columns of the base products, forward and, without dropout, backward."""
    inputs = make(device, per_layer, rank=8)
    grads = make_grads(inputs)
    truth = evaluate(seeded(call(post_attention_reference, dropout)), inputs, grads)
    with Dispatched() as seen:
        actual = evaluate(seeded(call(post_attention, dropout)), inputs, grads)
    assert_float32(actual, truth)
    count = 6 if per_layer else 4
    # o and the per-layer gate read what others made, which has no room: base, x A^T and B apart.
    apart = 2 if per_layer else 1
    if dropout:  # which down's wide input would have to be copied for
        apart += 1
    bases = count - 1  # gate and up are one
    groups = count if dropout else count - 1
    forward = bases + groups + apart
    through = (count if dropout else 0) + bases + count  # d(x) A apart, dx, dy B
    kept = 0 if dropout else 1  # down's x A^T, which the backward need not make again
    assert seen.matmuls == forward + through + 2 * groups + count - kept


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_mlp_in_tiles_of_rows(dropout, device, monkeypatch):
    monkeypatch.setattr(lora_mlp, "workspace_bytes", lambda device: 256 * 3 * INNER * 4)
    inputs = make(device, rank=8, shape=(2, 300))
    grads = make_grads(inputs)
    truth = evaluate(seeded(call(post_attention_reference, dropout)), inputs, grads)
    assert_float32(evaluate(seeded(call(post_attention, dropout)), inputs, grads), truth)


@both
@pytest.mark.parametrize("shape", [(1, 1), (1, 101), (3, 2)], ids=str)
def test_shapes(per_layer, shape, device):
    inputs = make(device, per_layer, shape=shape)
    check(inputs, make_grads(inputs))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_inputs_and_of_the_gradient(layout, device):
    inputs = make(device, layout=layout)
    check(inputs, make_grads(inputs, layout))


@pytest.mark.slow
@both
def test_every_gradient_alone(per_layer, device):
    inputs = make(device, per_layer, base="trained", norms=True)
    grads = make_grads(inputs)
    everything = evaluate(call(post_attention), inputs, grads)
    names = trained(inputs)
    for wanted in names:
        for name in names:
            inputs[name].requires_grad_(name == wanted)
        actual = evaluate(call(post_attention), inputs, grads)
        assert relative_error(actual[f"d{wanted}"], everything[f"d{wanted}"]) < 1e-6, wanted


@both
def test_dropout(per_layer, device):
    inputs = make(device, per_layer, base="trained")
    grads = make_grads(inputs)
    expected = evaluate(seeded(call(post_attention_reference, dropout=0.3)), inputs, grads)
    assert_float32(evaluate(seeded(call(post_attention, dropout=0.3)), inputs, grads), expected)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=gpu)], ids=str)
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["same", "float32 adapters"])
@both
def test_half_precision_is_no_worse_than_stock(per_layer, dtype, adapter_dtype, device):
    actual, stock, truth = [], [], []
    for _ in range(10 if device.type == "cuda" else 5):
        inputs = make(device, per_layer, dtype, base="frozen", shape=(2, 96), adapter_dtype=adapter_dtype, rank=16)
        grads = make_grads(inputs)
        actual.append(evaluate(call(post_attention), inputs, grads))
        stock.append(evaluate(call(rounding_as_stock), inputs, grads))
        truth.append(evaluate(call(post_attention_reference), double(inputs), double(grads)))
    assert_no_worse_over_seeds(actual, stock, truth)


def test_float32_adapters_under_autocast_run_in_its_dtype(device):
    inputs = make(device, dtype=torch.float16, base="frozen", adapter_dtype=torch.float32)
    rounded = {n: t.detach().half().requires_grad_() if n[0] in "AB" else t for n, t in inputs.items()}
    rounded["attended"] = inputs["attended"]
    grads = make_grads(inputs)
    expected = evaluate(call(post_attention), rounded, grads)
    actual = evaluate(call(post_attention, autocast=torch.float16), inputs, grads)
    for name, value in actual.items():
        assert relative_error(value, expected[name]) < 1e-3, name
        assert value.dtype == (torch.float32 if name[:2] in ("dA", "dB") else torch.float16), name


@both
def test_launches(per_layer, device, monkeypatch):
    log = record_launches(monkeypatch, rms_norm, geglu, nf4_module)
    inputs = make(device, per_layer)
    evaluate(call(post_attention), inputs, make_grads(inputs))
    counts: dict[str, int] = {}
    for launched in log:
        name = launched.name.strip("_").removesuffix("_kernel")
        counts[name] = counts.get(name, 0) + 1
    assert counts == {
        "dequantize_nf4": 8 if per_layer else 4,  # o and down, and the per-layer gate and projection
        "dequantize_nf4_stack": 2,  # gate and up
        "rms_norm_fwd": 5 if per_layer else 4,  # one of them in the backward
        "rms_norm_bwd": 4 if per_layer else 3,
        "geglu_fwd": 2 if per_layer else 1,
        "geglu_bwd": 2 if per_layer else 1,
    }


@both
@pytest.mark.parametrize("gate", [False, True], ids=["", "adapter on the gate"])
def test_what_is_kept(per_layer, gate, device):
    inputs = make(device, per_layer, adapted=(0, 1, 2, 3, *((4,) if gate else ())))
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(post_attention)(**inputs)
    own = {t.untyped_storage().data_ptr() for t in inputs.values() if isinstance(t, torch.Tensor)}
    kept = sorted(t.numel() // 26 for t in saved if t.untyped_storage().data_ptr() not in own)
    expected = [3, HIDDEN, HIDDEN, HIDDEN, 2 * INNER]
    if per_layer:
        expected = [4, INPUT, *[HIDDEN] * (5 if gate else 4), 2 * INNER]
    assert kept == sorted(expected)


@both
def test_repeatable_and_read_only(per_layer, device):
    inputs = make(device, per_layer, base="trained", norms=True)
    assert_repeatable_and_read_only(call(post_attention), inputs, make_grads(inputs))


@both
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_stays_in_its_row(per_layer, value, device):
    inputs = make(device, per_layer)
    with torch.no_grad():
        inputs["attended"][0, 4, 3] = value
    results = evaluate(call(post_attention), inputs, make_grads(inputs))
    for name in ("output 0", "dattended", "dresidual"):
        rows = results[name].isfinite().all(-1)
        assert not rows[0, 4] and rows.sum() == rows.numel() - 1, name


@both
def test_outliers(per_layer, device):
    """Sums that mix 1e4 with 1 lose digits in any float32 code: plain torch's own error is the yardstick."""
    inputs = make(device, per_layer, outliers=1e4)
    grads = make_grads(inputs)
    truth = evaluate(call(post_attention_reference), double(inputs), double(grads))
    plain = evaluate(call(post_attention_reference), inputs, grads)
    actual = evaluate(call(post_attention), inputs, grads)
    for name, expected in truth.items():
        allowed = max(FLOAT32_BUDGET, 1.5 * relative_error(plain[name], expected))
        assert relative_error(actual[name], expected) <= allowed, name


@both
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=str)
def test_empty_batch(per_layer, shape, device):
    inputs = make(device, per_layer, base="trained", norms=True, shape=shape)
    results = evaluate(call(post_attention), inputs, make_grads(inputs))
    assert results["output 0"].shape == (*shape, HIDDEN)
    assert all(not value.any() for name, value in results.items() if name.startswith("d"))


@both
def test_runs_the_reference_without_triton(per_layer, device, monkeypatch):
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    monkeypatch.setattr(module, "_PostAttention", None)
    inputs = make(device, per_layer)
    check(inputs, make_grads(inputs))


def test_errors(device):
    inputs = make(device, base="frozen")
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"attended": torch.zeros(2, 13, ATTENDED).half()}, TypeError, "base weight"),
        ({"attended": torch.zeros(2, 12, ATTENDED)}, ValueError, "do not fit"),
        ({"residual": torch.zeros(2, 13, HIDDEN + 1)}, ValueError, "does not fit an input"),
        ({"norm1": torch.ones(HIDDEN + 1)}, ValueError, "norm weights"),
        ({"layer_scalar": torch.ones(2)}, ValueError, "layer_scalar"),
        ({"layer_scalar": torch.ones(1, requires_grad=True)}, ValueError, "layer_scalar"),
        ({"per_layer_input": None}, ValueError, "comes with a gate"),
        ({"per_layer_input": torch.zeros(2, 13, INPUT).half()}, ValueError, "per-layer input is"),
        ({"per_layer_input": torch.zeros(2, 13, INPUT + 1)}, ValueError, "does not fit an input"),
        ({"norm0": torch.ones(HIDDEN, device="meta")}, ValueError, "meta"),
    ]
    for changes, error, message in bad:
        changes = {
            n: t if t is None or t.device.type == "meta" else t.detach().to(device).requires_grad_(t.requires_grad)
            for n, t in changes.items()
        }
        with pytest.raises(error, match=message):
            call(post_attention)(**{**inputs, **changes})
    with pytest.raises(TypeError, match="cast one"):
        call(post_attention, autocast=torch.bfloat16)(**inputs)
