"""pre_attention against float64: norm, projections with LoRA and rotation as one operation, in every head layout."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from kernel_checks import (
    LAYOUTS,
    Dispatched,
    Inputs,
    assert_float32,
    assert_no_worse_over_seeds,
    assert_repeatable_and_read_only,
    double,
    evaluate,
    fresh,
    gpu,
    nf4,
    record_launches,
    relative_error,
    seeded,
    trained,
)

from fastgemma.kernels import backend, qk_norm_rope_launch, rms_norm
from fastgemma.kernels import nf4 as nf4_module
from fastgemma.kernels import pre_attention as module
from fastgemma.kernels._lora_products import Projections
from fastgemma.kernels.lora import Adapter, Projection, lora_linear_reference
from fastgemma.kernels.pre_attention import pre_attention, pre_attention_reference
from fastgemma.kernels.qk_norm_rope_launch import Heads
from fastgemma.kernels.rms_norm import rms_norm_reference

HIDDEN, HEADS = 32, 3
KINDS: dict[str, tuple[Heads, tuple[int, ...]]] = {
    "q, k and v": (Heads(16, 16), (HEADS, 1, 1)),
    "values from keys": (Heads(32, 8, values_from_keys=True), (HEADS, 2)),
    "q alone": (Heads(16, 4), (HEADS,)),
}


def make(
    kind: str,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    base: str = "nf4",
    norms: bool = False,
    shape: tuple[int, int] = (2, 13),
    adapter_dtype: torch.dtype | None = None,
    rank: int | None = None,
    **options: Any,
) -> Inputs:
    """hidden_states, angles, norm weights, and W{i}, A{i}, B{i} of each projection; by default of unlike ranks."""
    heads, counts = KINDS[kind]
    inputs: Inputs = {"hidden_states": fresh(*shape, HIDDEN, device=device, dtype=dtype, **options)}
    angle = torch.rand(1, shape[1], heads.head_dim, device=device) * 6
    inputs |= {"cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype)}
    for name, width in {"norm": HIDDEN, "q_norm": heads.head_dim, "k_norm": heads.head_dim}.items():
        if name != "k_norm" or len(counts) > 1:
            inputs[name] = (1 + 0.3 * torch.randn(width, device=device)).to(dtype).requires_grad_(norms)
    for i, count in enumerate(counts):
        width = count * heads.head_dim
        if base == "nf4":
            inputs[f"W{i}"] = nf4(width, HIDDEN, device, dtype)
        else:
            inputs[f"W{i}"] = fresh(width, HIDDEN, device=device, dtype=dtype, grad=base == "trained")
        inputs[f"A{i}"] = fresh(rank or 2 + i, HIDDEN, device=device, dtype=adapter_dtype or dtype)
        inputs[f"B{i}"] = fresh(width, rank or 2 + i, device=device, dtype=adapter_dtype or dtype)
    return inputs


def call(fn: Any, kind: str, dropout: float = 0.0, scalings: Any = (0.5, 1.5, 2.5), **options: Any) -> Any:
    """`fn` over the inputs that `make` gives, as a function of them."""

    def run(hidden_states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, **tensors: Any) -> Any:
        projections = [
            Projection(tensors[f"W{i}"], Adapter(tensors[f"A{i}"], tensors[f"B{i}"], scalings[i]), dropout)
            for i in range(len(KINDS[kind][1]))
        ]
        norms = tensors["norm"], tensors["q_norm"], tensors.get("k_norm")
        return fn(hidden_states, norms[0], projections, cos, sin, *norms[1:], KINDS[kind][0], **options)

    return run


def reference(*args: Any) -> Any:
    return args[0], *pre_attention_reference(*args)


def make_grads(inputs: Inputs, kind: str, layout: str = "contiguous") -> list[torch.Tensor]:
    x, (heads, counts) = inputs["hidden_states"], KINDS[kind]
    counts = (*counts, counts[-1]) if heads.values_from_keys else counts
    shapes = [x.shape, *((*x.shape[:2], count, heads.head_dim) for count in counts)]
    return [fresh(*s, device=x.device, dtype=x.dtype, layout=layout, grad=False) for s in shapes]


@pytest.mark.parametrize("base, norms", [("nf4", False), ("frozen", False), ("trained", True)])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients(kind, base, norms, device):
    inputs = make(kind, device, base=base, norms=norms)
    grads = make_grads(inputs, kind)
    truth = evaluate(call(reference, kind), double(inputs), double(grads))
    assert_float32(evaluate(call(pre_attention, kind), inputs, grads), truth)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("scalings", [(0.5, 1.5, 2.5), (2.0, 2.0, 2.0)], ids=["unlike", "alike"])
@pytest.mark.parametrize("kind", KINDS)
def test_adapters_within_the_base_product(kind, scalings, dropout, device):
    """Ranks that let the B's be columns beside the weights: no product of theirs is added to an output, and without
    dropout none of the A's to dx."""
    inputs = make(kind, device, rank=8)
    grads = make_grads(inputs, kind)
    ours, theirs = (seeded(call(fn, kind, dropout, scalings)) for fn in (pre_attention, reference))
    with Dispatched() as seen:
        actual = evaluate(ours, inputs, grads)
    assert_float32(actual, evaluate(theirs, inputs, grads))
    count = len(KINDS[kind][1])
    # x A^T of all, or of each where scalings or masks are its own; B's are written beside the weights.
    xa = 1 if scalings[0] == scalings[1] and not dropout else count
    dropped = count if dropout else 1  # groups that the backward computes x A^T and d(x) A for
    expected = (xa + 1) + (count + 1 + (count if dropout else 0)) + (dropped + count + dropped)
    assert seen.matmuls == expected


@pytest.mark.parametrize("shape", [(1, 1), (1, 101), (3, 2)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_shapes(kind, shape, device):
    inputs = make(kind, device, shape=shape)
    grads = make_grads(inputs, kind)
    truth = evaluate(call(reference, kind), double(inputs), double(grads))
    assert_float32(evaluate(call(pre_attention, kind), inputs, grads), truth)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_hidden_states_and_of_gradients(layout, device):
    inputs = make("q, k and v", device, layout=layout)
    grads = make_grads(inputs, "q, k and v", layout)
    truth = evaluate(call(reference, "q, k and v"), double(inputs), double(grads))
    assert_float32(evaluate(call(pre_attention, "q, k and v"), inputs, grads), truth)


@pytest.mark.parametrize("missing", [(0,), (1, 2, 3), (2,), (0, 1, 3), (0, 1, 2, 3)], ids=str)
def test_outputs_without_a_gradient(missing, device):
    inputs = make("q, k and v", device, base="trained", norms=True)
    grads = [None if i in missing else grad for i, grad in enumerate(make_grads(inputs, "q, k and v"))]
    if len(missing) == 4:
        outputs = call(pre_attention, "q, k and v")(**inputs)
        assert all(output.requires_grad for output in outputs)
        return
    truth = evaluate(call(reference, "q, k and v"), double(inputs), double(grads))
    assert_float32(evaluate(call(pre_attention, "q, k and v"), inputs, grads), truth)


@pytest.mark.parametrize("wanted", ["hidden_states", "norm", "q_norm", "W1", "A0", "B2"])
def test_one_gradient_alone(wanted, device):
    inputs = make("q, k and v", device, base="trained", norms=True)
    grads = make_grads(inputs, "q, k and v")
    expected = evaluate(call(pre_attention, "q, k and v"), inputs, grads)[f"d{wanted}"]
    for name in trained(inputs):
        inputs[name].requires_grad_(name == wanted)
    actual = evaluate(call(pre_attention, "q, k and v"), inputs, grads)[f"d{wanted}"]
    assert relative_error(actual, expected) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_dropout(kind, device):
    inputs = make(kind, device, base="trained")
    grads = make_grads(inputs, kind)
    expected = evaluate(seeded(call(reference, kind, dropout=0.3)), inputs, grads)
    assert_float32(evaluate(seeded(call(pre_attention, kind, dropout=0.3)), inputs, grads), expected)


def rounding_as_stock(
    hidden_states: Any, norm: Any, projections: Any, cos: Any, sin: Any, q_norm: Any, k_norm: Any, heads: Heads
) -> Any:
    """The expressions of `Gemma4TextAttention` and `apply_rotary_pos_emb`, each of which rounds."""

    def rotate(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        x = rms_norm_reference(x.unflatten(-1, (-1, heads.head_dim)), weight)
        halves = torch.cat((-x[..., heads.head_dim // 2 :], x[..., : heads.head_dim // 2]), dim=-1)
        return x * cos.unsqueeze(2) + halves * sin.unsqueeze(2)

    x = rms_norm_reference(hidden_states, norm)
    q, k, v = (lora_linear_reference(x, p) for p in projections)
    values = rms_norm_reference(v.unflatten(-1, (-1, heads.head_dim)), None)
    return hidden_states, rotate(q, q_norm), rotate(k, k_norm), values


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=gpu)], ids=str)
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["same", "float32 adapters"])
def test_half_precision_is_no_worse_than_stock(dtype, adapter_dtype, device):
    kind = "q, k and v"
    actual, stock, truth = [], [], []
    for _ in range(10 if device.type == "cuda" else 5):
        inputs = make(kind, device, dtype, shape=(2, 64), adapter_dtype=adapter_dtype)
        grads = make_grads(inputs, kind)
        actual.append(evaluate(call(pre_attention, kind), inputs, grads))
        stock.append(evaluate(call(rounding_as_stock, kind), inputs, grads))
        truth.append(evaluate(call(reference, kind), double(inputs), double(grads)))
    assert_no_worse_over_seeds(actual, stock, truth)


@pytest.mark.parametrize("adapter_dtype, budget", [(torch.float32, 1e-3), (torch.bfloat16, 4e-3)], ids=str)
def test_adapters_of_another_dtype_under_autocast_run_in_its_dtype(adapter_dtype, budget, device):
    kind = "q, k and v"
    inputs = make(kind, device, torch.float16, adapter_dtype=adapter_dtype)
    rounded = {n: t.detach().half().requires_grad_() if n[0] in "AB" else t for n, t in inputs.items()}
    grads = make_grads(inputs, kind)
    expected = evaluate(call(pre_attention, kind), rounded, grads)
    with torch.autocast(device.type, torch.float16):
        actual = evaluate(call(pre_attention, kind, autocast=torch.float16), inputs, grads)
    for name, value in actual.items():
        is_factor = name[:2] in ("dA", "dB")
        assert relative_error(value, expected[name]) < (budget if is_factor else 1e-3), name
        assert value.dtype == (adapter_dtype if is_factor else torch.float16), name


@pytest.mark.parametrize("kind", KINDS)
def test_launches(kind, device, monkeypatch):
    log = record_launches(monkeypatch, rms_norm, qk_norm_rope_launch, nf4_module)
    inputs = make(kind, device)
    evaluate(call(pre_attention, kind), inputs, make_grads(inputs, kind))
    count = len(KINDS[kind][1])
    names = [launched.name.strip("_") for launched in log]
    dequantize = "dequantize_nf4_kernel" if count == 1 else "dequantize_nf4_stack_kernel"
    forward = ["rms_norm_fwd_kernel", dequantize, "qk_norm_rope_fwd_kernel"]
    backward = ["qk_norm_rope_bwd_kernel", dequantize]
    assert names == [*forward, *backward, "rms_norm_bwd_kernel", "rms_norm_fwd_kernel"]


def test_keeps_hidden_states_and_projections_only(device):
    inputs = make("q, k and v", device)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(pre_attention, "q, k and v")(**inputs)
    own = {t.untyped_storage().data_ptr() for t in inputs.values() if isinstance(t, torch.Tensor)}
    kept = sorted(t.numel() for t in saved if t.untyped_storage().data_ptr() not in own)
    assert kept == [26, 26 * 5 * 16]  # rstd; q, k and v side by side


@pytest.mark.parametrize("kind", KINDS)
def test_repeatable_and_read_only(kind, device):
    inputs = make(kind, device, base="trained", norms=True)
    assert_repeatable_and_read_only(call(pre_attention, kind), inputs, make_grads(inputs, kind))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite_stays_in_its_row(value, device):
    inputs = make("q, k and v", device)
    with torch.no_grad():
        inputs["hidden_states"][0, 4, 3] = value
    results = evaluate(call(pre_attention, "q, k and v"), inputs, make_grads(inputs, "q, k and v"))
    for name in ("output 1", "output 2", "output 3", "dhidden_states"):
        rows = results[name].flatten(2).isfinite().all(-1)
        assert not rows[0, 4] and rows.sum() == rows.numel() - 1, name


def test_outliers(device):
    inputs = make("q, k and v", device, outliers=1e4)
    grads = make_grads(inputs, "q, k and v")
    truth = evaluate(call(reference, "q, k and v"), double(inputs), double(grads))
    assert_float32(evaluate(call(pre_attention, "q, k and v"), inputs, grads), truth)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=str)
def test_empty_batch(shape, device):
    inputs = make("q, k and v", device, base="trained", norms=True, shape=shape)
    results = evaluate(call(pre_attention, "q, k and v"), inputs, make_grads(inputs, "q, k and v"))
    assert results["output 1"].shape == (*shape, HEADS, 16)
    assert all(not value.any() for name, value in results.items() if name.startswith("d"))


def test_runs_the_reference_without_triton(device, monkeypatch):
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    monkeypatch.setattr(module, "_PreAttention", None)
    inputs = make("q, k and v", device)
    grads = make_grads(inputs, "q, k and v")
    truth = evaluate(call(reference, "q, k and v"), double(inputs), double(grads))
    assert_float32(evaluate(call(pre_attention, "q, k and v"), inputs, grads), truth)


def test_errors(device):
    inputs = make("q, k and v", device, base="frozen")
    bad: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"hidden_states": torch.zeros(2, 13, HIDDEN).double()}, TypeError, "float64"),
        ({"hidden_states": torch.zeros(26, HIDDEN)}, ValueError, "give .batch, seq_len"),
        ({"norm": torch.ones(HIDDEN + 1)}, ValueError, "norm weight"),
        ({"k_norm": None}, ValueError, "keys' norm"),
        ({"q_norm": torch.ones(8)}, ValueError, "norm weights of heads"),
        ({"cos": torch.ones(1, 12, 16)}, ValueError, "angle"),
        ({"W1": torch.zeros(17, HIDDEN), "B1": torch.zeros(17, 3)}, ValueError, "divide into heads"),
        ({"norm": torch.ones(HIDDEN, device="meta")}, ValueError, "meta"),
    ]
    for changes, error, message in bad:
        changes = {n: t if t is None or t.device.type == "meta" else t.to(device) for n, t in changes.items()}
        with pytest.raises(error, match=message):
            call(pre_attention, "q, k and v")(**{**inputs, **changes})
    with pytest.raises(TypeError, match="under autocast"):
        call(pre_attention, "q, k and v", autocast=torch.bfloat16)(**inputs)
    wrong = dataclasses.replace(KINDS["q, k and v"][0], values_from_keys=True)
    projections = [Projection(torch.zeros(16, HIDDEN, device=device))] * 3
    with pytest.raises(ValueError, match="takes q alone"):
        pre_attention(
            inputs["hidden_states"], inputs["norm"], projections, inputs["cos"], inputs["sin"], inputs["q_norm"],
            inputs["k_norm"], wrong,
        )  # fmt: skip


def test_several_products_are_one(device, monkeypatch):
    """q, k and v share one product with their A's."""
    seen: list[int] = []
    monkeypatch.setattr(Projections, "_source", _counting(Projections._source, seen))
    call(pre_attention, "q, k and v")(**make("q, k and v", device))
    assert len(seen) == 1


def _counting(method: Any, seen: list[int]) -> Any:
    def counted(self: Any, *args: Any) -> Any:
        seen.append(1)
        return method(self, *args)

    return counted
