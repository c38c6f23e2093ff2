"""lora_projections, lora_qkv and lora_mlp against float64, PEFT's own layer and transformers' MLP."""

from __future__ import annotations

import itertools

import peft
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import (
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
    nf4,
    record_launches,
    relative_error,
    same_bits,
    seeded,
    trained,
)
from quick import slow_after

import fastgemma.kernels.backend as backend
import fastgemma.kernels.geglu as geglu_module
import fastgemma.kernels.lora_mlp as lora_mlp_module
import fastgemma.kernels.nf4 as nf4_module
from fastgemma.kernels.lora import (
    Adapter,
    Projection,
    lora_linear,
    lora_linear_reference,
    lora_projections,
    lora_qkv,
)
from fastgemma.kernels.lora_mlp import lora_mlp, lora_mlp_reference
from fastgemma.kernels.nf4 import NF4Weight, dequantize_nf4_reference

FEATURES, INNER = 32, 48
SCALING = 0.75
# The interpreter truncates to bfloat16; matrix products do not run in it, so float16 speaks for both on the CPU.
HALF = [torch.float16, pytest.param(torch.bfloat16, marks=gpu)]


def make(
    device,
    dims=((FEATURES, 24),),
    dtype=torch.float32,
    adapter_dtype=None,
    rank=4,
    base="frozen",
    x_shape=(2, 13),
    **options,
):
    """x, and weight{i}, A{i}, B{i} of each (in_features, out_features) in `dims`; rank 0: no adapter.

    A and B have the sizes of a trained adapter, so that its part of the result weighs as much as the base's.
    """
    adapter_dtype = adapter_dtype or dtype
    inputs = {"x": fresh(*x_shape, dims[0][0], device=device, dtype=dtype, **options)}
    for i, (n_in, n_out) in enumerate(dims):
        if base == "nf4":
            inputs[f"weight{i}"] = nf4(n_out, n_in, device, dtype)
        else:
            inputs[f"weight{i}"] = fresh(n_out, n_in, device=device, dtype=dtype, grad=base == "trained")
        if rank:
            inputs[f"A{i}"] = fresh(rank, n_in, device=device, dtype=adapter_dtype)
            inputs[f"B{i}"] = fresh(n_out, rank, device=device, dtype=adapter_dtype)
    return inputs


def as_projections(tensors, dropout=0.0):
    count = sum(name.startswith("weight") for name in tensors)
    return [
        Projection(
            tensors[f"weight{i}"],
            Adapter(tensors[f"A{i}"], tensors[f"B{i}"], SCALING * (i + 1)) if f"A{i}" in tensors else None,
            dropout,
        )
        for i in range(count)
    ]


def ours(x, **tensors):
    return lora_projections(x, as_projections(tensors))


def reference(x, dropout=0.0, **tensors):
    return tuple(lora_linear_reference(x, p) for p in as_projections(tensors, dropout))


def ours_mlp(x, **tensors):
    return lora_mlp(x, *as_projections(tensors))


def reference_mlp(x, dropout=0.0, **tensors):
    return lora_mlp_reference(x, *as_projections(tensors, dropout))


def peft_layer(x, projection):
    """PEFT's own layer around a plain Linear holding these tensors."""
    weight, adapter = projection.weight, projection.adapter
    dense = dequantize_nf4_reference(weight) if isinstance(weight, NF4Weight) else weight
    module = torch.nn.Sequential(torch.nn.Linear(dense.shape[1], dense.shape[0], bias=False, device=x.device))
    rank = 1 if adapter is None else adapter.A.shape[0]
    peft.inject_adapter_in_model(peft.LoraConfig(r=rank, target_modules=["0"], init_lora_weights=False), module)
    layer = module[0]

    def put(linear, tensor):
        del linear.weight
        linear.weight = tensor

    put(layer.base_layer, dense)
    if adapter is None:
        return layer.base_layer(x)
    put(layer.lora_A["default"], adapter.A)
    put(layer.lora_B["default"], adapter.B)
    layer.scaling["default"] = adapter.scaling
    return layer(x)


def stock(x, **tensors):
    return tuple(peft_layer(x, p) for p in as_projections(tensors))


def stock_mlp(x, **tensors):
    gate, up, down = as_projections(tensors)
    return peft_layer(F.gelu(peft_layer(x, gate), approximate="tanh") * peft_layer(x, up), down)


def make_grads(inputs, layout="contiguous"):
    x, count = inputs["x"], sum(name.startswith("weight") for name in inputs)
    widths = [inputs[f"weight{i}"].shape[0] for i in range(count)]
    return [fresh(*x.shape[:-1], n, device=x.device, dtype=x.dtype, layout=layout, grad=False) for n in widths]


def check(fn, oracles, inputs, grads):
    actual = evaluate(fn, inputs, grads)
    for oracle in oracles:
        assert_float32(actual, evaluate(oracle, double(inputs), double(grads)))


THREE = ((FEATURES, 24), (FEATURES, 7), (FEATURES, 40))
MLP = ((FEATURES, INNER), (FEATURES, INNER), (INNER, FEATURES))
DROPPING = [
    (lambda x, **tensors: lora_projections(x, as_projections(tensors, 0.3)), reference, THREE),
    (lambda x, **tensors: lora_mlp(x, *as_projections(tensors, 0.3)), reference_mlp, MLP),
]


def mlp_grad(inputs, layout="contiguous"):
    x = inputs["x"]
    return [fresh(*x.shape, device=x.device, dtype=x.dtype, layout=layout, grad=False)]


# Projections


@pytest.mark.parametrize("base", ["frozen", "trained", "nf4"])
@pytest.mark.parametrize("rank", [0, 1, 4, 8])
@pytest.mark.parametrize("dims", [THREE[:1], THREE], ids=["one", "three"])
def test_projections(base, rank, dims, device):
    inputs = make(device, dims, rank=rank, base=base)
    check(ours, (reference, stock), inputs, make_grads(inputs))


@pytest.mark.parametrize("x_shape", [(1,), (101,), (2, 3, 5)], ids=str)
@pytest.mark.parametrize("dims", [((7, 11),), ((67, 1),)], ids=str)
def test_shapes(x_shape, dims, device):
    inputs = make(device, dims, rank=2, base="trained", x_shape=x_shape)
    check(ours, (reference, stock), inputs, make_grads(inputs))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_x_and_of_the_output_gradients(layout, device):
    inputs = make(device, THREE, base="trained", layout=layout)
    check(ours, (reference, stock), inputs, make_grads(inputs, layout))


@pytest.mark.parametrize("adapter_dtype", [None, torch.float16], ids=["same", "float16 adapters"])
@pytest.mark.parametrize("base", ["trained", "nf4"])
@pytest.mark.parametrize("fn, ref, dims", DROPPING, ids=["projections", "mlp"])
def test_dropout_draws_torchs_masks(fn, ref, dims, base, adapter_dtype, device):
    """Seed for seed what torch's own dropout draws, projection by projection, in PEFT's order."""
    inputs = make(device, dims, base=base, adapter_dtype=adapter_dtype)
    grads = make_grads(inputs) if ref is reference else mlp_grad(inputs)
    with torch.no_grad():  # small enough for float16 to hold what comes of it
        for grad in grads:
            grad *= 0.01
    actual = evaluate(seeded(fn), inputs, grads)
    expected = evaluate(seeded(lambda x, **t: ref(x, dropout=0.3, **t)), inputs, grads)
    budget = 1e-5 if adapter_dtype is None else 5e-3
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= budget, name
    assert_repeatable_and_read_only(seeded(fn), inputs, grads)


@pytest.mark.parametrize("fn, ref, dims", DROPPING, ids=["projections", "mlp"])
def test_dropout_keeps_masks_only(fn, ref, dims, device):
    inputs = make(device, dims, base="nf4")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fn(**inputs)
    masks = [t for t in saved if t.dtype == torch.bool]
    assert sum(mask.numel() for mask in masks) == 26 * sum(n_in for n_in, _ in dims)


def test_projections_of_different_kinds(device):
    """A dense trained base beside an NF4 one, ranks that differ, and one projection without an adapter."""
    inputs = make(device, THREE, base="trained")
    inputs["weight1"] = nf4(7 * 2, FEATURES, device, torch.float32, nested=False)
    del inputs["A1"], inputs["B1"]
    inputs["A2"], inputs["B2"] = fresh(1, FEATURES, device=device), fresh(40, 1, device=device)
    check(ours, (reference, stock), inputs, make_grads(inputs))


@pytest.mark.parametrize("missing", [(0,), (1, 2), (0, 2)], ids=str)
def test_outputs_without_a_gradient(missing, device):
    inputs = make(device, THREE, base="trained")
    grads = [None if i in missing else grad for i, grad in enumerate(make_grads(inputs))]
    check(ours, (reference, stock), inputs, grads)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["same", "float32 adapters"])
@pytest.mark.parametrize("base", ["trained", "nf4"])
def test_half_precision_is_no_worse_than_stock(dtype, adapter_dtype, base, device):
    inputs = make(device, ((256, 192), (256, 64)), dtype, adapter_dtype, base=base, x_shape=(2, 64))
    grads = make_grads(inputs)
    truth = evaluate(reference, double(inputs), double(grads))
    actual = evaluate(ours, inputs, grads)
    assert_no_worse_than_stock(actual, evaluate(stock, inputs, grads), truth)
    assert actual["dA0"].dtype == (adapter_dtype or dtype)


def test_nf4_is_the_dense_weight_it_stands_for(device):
    inputs = make(device, THREE, torch.float16, base="nf4")
    dense = {n: dequantize_nf4_reference(t) if isinstance(t, NF4Weight) else t for n, t in inputs.items()}
    grads = make_grads(inputs)
    for name, value in evaluate(ours, inputs, grads).items():
        assert same_bits(value, evaluate(ours, dense, grads)[name]), name


def test_nf4_of_another_dtype_than_x(device):
    inputs = make(device, base="nf4", dtype=torch.float16)
    inputs = {n: t.detach().float().requires_grad_() if isinstance(t, torch.Tensor) else t for n, t in inputs.items()}
    weight = inputs["weight0"]
    # In x's dtype, not rounded to the weight's own first.
    exact = NF4Weight(
        weight.packed, weight.absmax, weight.code, weight.shape, torch.float32, weight.blocksize, weight.nested
    )
    grads = make_grads(inputs)
    truth = evaluate(reference, double(inputs | {"weight0": exact}), double(grads))
    assert_float32(evaluate(ours, inputs, grads), truth)


def test_qkv_is_its_projections(device):
    inputs = make(device, THREE)
    x, (q, k, v) = inputs["x"], as_projections(inputs)
    everything = lora_projections(x, (q, k, v))
    for given_projections in ((q, k, v), (q, k), (q,), (q, None, v)):
        outs = lora_qkv(x, *given_projections)
        padded = (*given_projections, None, None)[:3]
        for out, projection, expected in zip(outs, padded, everything):
            assert (out is None) == (projection is None)
            # One product with all A's may sum in another order than one for each.
            assert out is None or relative_error(out, expected) < 1e-6
    assert relative_error(lora_linear(x, k), everything[1]) < 1e-6


@pytest.mark.parametrize("x_shape", [(0,), (0, 5), (2, 0)], ids=str)
def test_empty_batch(x_shape, device):
    inputs = make(device, THREE, base="trained", x_shape=x_shape)
    result = evaluate(ours, inputs, make_grads(inputs))
    assert [result[f"output {i}"].shape for i in range(3)] == [(*x_shape, n) for _, n in THREE]
    assert all(not grad.any() for grad in result.values())
    inputs = make(device, MLP, base="trained", x_shape=x_shape)
    result = evaluate(ours_mlp, inputs, mlp_grad(inputs))
    assert result["output 0"].shape == result["dx"].shape == (*x_shape, FEATURES)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("fn, dims", [(ours, THREE[:1]), (ours_mlp, MLP)], ids=["linear", "mlp"])
def test_not_finite_stays_in_its_row(value, fn, dims, device):
    inputs = make(device, dims, x_shape=(9,))
    with torch.no_grad():
        inputs["x"][4, 3] = value
    width = dims[-1][1]
    result = evaluate(fn, inputs, [fresh(9, width, device=device, grad=False)])
    others = [row for row in range(9) if row != 4]
    assert result["output 0"][others].isfinite().all() and not result["output 0"][4].isfinite().all()
    assert result["dx"][others].isfinite().all()


# The MLP


@pytest.mark.parametrize("base", ["frozen", "trained", "nf4"])
@pytest.mark.parametrize("rank", [0, 1, 8])
def test_mlp(base, rank, device):
    inputs = make(device, MLP, rank=rank, base=base)
    check(ours_mlp, (reference_mlp, stock_mlp), inputs, mlp_grad(inputs))


@pytest.fixture
def small_workspace(monkeypatch):
    """Makes 600 rows three tiles, the last of them shorter."""
    monkeypatch.setattr(lora_mlp_module, "workspace_bytes", lambda device: 256 * 3 * INNER * 4)


@pytest.mark.parametrize("base", ["frozen", "trained", "nf4"])
@pytest.mark.parametrize("rank", [0, 8])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_mlp_in_tiles_of_rows(base, rank, dropout, device, small_workspace):
    inputs = make(device, MLP, rank=rank, base=base, x_shape=(2, 300))
    grads = mlp_grad(inputs)
    dropped = {"dropout": dropout}
    ours, theirs = (
        seeded(lambda x, **tensors: lora_mlp(x, *as_projections(tensors, dropout))),
        seeded(lambda x, **tensors: reference_mlp(x, **dropped, **tensors)),
    )
    with Dispatched() as seen:
        actual = evaluate(ours, inputs, grads)
    assert_float32(actual, evaluate(theirs, inputs, grads))
    if not (dropout and rank):  # whose mask is drawn for all of h
        # Neither h nor gate and up, nor the gradient of any, for all rows.
        assert not {(600, INNER), (600, 2 * INNER)} & set(seen.allocated)


def test_mlp_tiles_change_no_row(device, monkeypatch):
    """And the sums over rows of adapters' gradients by their rounding alone."""
    inputs = make(device, MLP, torch.float16, rank=8, base="nf4", x_shape=(600,))
    with torch.no_grad():
        for name, tensor in inputs.items():
            if name[0] in "AB":
                tensor *= 0.1
    grads = mlp_grad(inputs)
    whole = evaluate(ours_mlp, inputs, grads)
    monkeypatch.setattr(lora_mlp_module, "workspace_bytes", lambda device: 256 * 3 * INNER * 2)
    tiled = evaluate(ours_mlp, inputs, grads)
    for name, value in whole.items():
        assert tiled[name].dtype == value.dtype, name
        assert relative_error(tiled[name], value) < 2e-3, name


@pytest.mark.parametrize("rank", slow_after(1, [8, 0]))
@pytest.mark.parametrize("forward, backward", [(1, 3), (3, 1), (2, 1)])
def test_mlp_with_another_budget_before_the_backward(forward, backward, rank, device, monkeypatch):
    """In tiles of 256 rows: the backward's are those of what the forward saved, or smaller."""
    inputs = make(device, MLP, rank=rank, base="nf4", x_shape=(600,))
    expected = evaluate(ours_mlp, inputs, mlp_grad(inputs))
    grads = [torch.autograd.grad(ours_mlp(**inputs).sum(), [inputs["x"]])[0]]
    for tiles in (forward, backward):
        size = 256 * tiles * 3 * INNER * 4
        monkeypatch.setattr(lora_mlp_module, "workspace_bytes", lambda device, size=size: size)
        if tiles == forward:
            y = ours_mlp(**inputs)
    grads += torch.autograd.grad(y.sum(), [inputs["x"]])
    assert relative_error(y, expected["output 0"]) <= 1e-6 and relative_error(grads[1], grads[0]) <= 1e-6


@pytest.mark.parametrize("layout", ["transposed", "every other column", "expanded"])
def test_mlp_layouts(layout, device):
    inputs = make(device, MLP, layout=layout)
    check(ours_mlp, (reference_mlp, stock_mlp), inputs, mlp_grad(inputs, layout))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=["same", "float32 adapters"])
def test_mlp_in_half_precision_is_no_worse_than_stock(dtype, adapter_dtype, device):
    dims = ((128, 192), (128, 192), (192, 128))
    inputs = make(device, dims, dtype, adapter_dtype, base="trained", x_shape=(2, 64))
    with torch.no_grad():  # the sizes of a real layer: activations of order one
        for name, tensor in inputs.items():
            if name != "x":
                tensor *= 0.1
    grads = mlp_grad(inputs)
    truth = evaluate(reference_mlp, double(inputs), double(grads))
    assert_no_worse_than_stock(evaluate(ours_mlp, inputs, grads), evaluate(stock_mlp, inputs, grads), truth)


@pytest.mark.parametrize("base", ["frozen", "trained", "nf4"])
def test_mlp_keeps_x_gate_and_up_only(base, device):
    inputs = make(device, MLP, base=base)
    saved = []

    def keep(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        ours_mlp(**inputs)
    own = {t.untyped_storage().data_ptr() for t in inputs.values() if isinstance(t, torch.Tensor)}
    activations = {t.untyped_storage().data_ptr(): t.numel() for t in saved}
    assert inputs["x"].untyped_storage().data_ptr() in activations
    kept = [numel for pointer, numel in activations.items() if pointer not in own]
    assert kept == [26 * 2 * INNER]


def test_mlp_backward_reuses_the_gradient_it_made(device):
    inputs = make(device, MLP)
    freeze_all_but(inputs, ("x",))
    y = ours_mlp(**inputs)
    with Dispatched() as seen:
        torch.autograd.grad(y, inputs["x"], mlp_grad(inputs)[0])
    # dgate beside dup; dh is a product's own output, and h would lie over it.
    assert seen.allocated.count((26, 2 * INNER)) == 1 and (26, INNER) not in seen.allocated


def test_projections_keep_x_only(device):
    inputs = make(device, THREE)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ours(**inputs)
    own = {t.untyped_storage().data_ptr() for t in inputs.values()}
    assert {t.untyped_storage().data_ptr() for t in saved} <= own


def freeze_all_but(inputs, wanted):
    for name in trained(inputs):
        inputs[name].requires_grad_(name in wanted)


def wanted_sets(dims):
    names = ["x"] + [f"{kind}{i}" for kind in ("weight", "A", "B") for i in range(len(dims))]
    alone = [(name,) for name in names]
    pairs = list(itertools.combinations(names, 2))
    return alone + pairs[::5] + [tuple(n for n in names if n != "x")]


@pytest.mark.parametrize("fn, dims", [(ours, THREE[:2]), (ours_mlp, MLP)], ids=["projections", "mlp"])
def test_every_combination_of_wanted_gradients(fn, dims, device):
    everything = make(device, dims, base="trained", x_shape=(11,))
    grads = make_grads(everything) if fn is ours else mlp_grad(everything)
    truth = evaluate(fn, everything, grads)
    for wanted in wanted_sets(dims):
        freeze_all_but(everything, wanted)
        actual = evaluate(fn, everything, grads)
        for name in wanted:
            assert relative_error(actual[f"d{name}"], truth[f"d{name}"]) < 1e-6, (wanted, name)
        for name in truth:
            if name.startswith("d"):
                everything[name[1:]].requires_grad_()


@pytest.mark.parametrize(
    "wanted, rank, matmuls",
    [("x", 0, 1), ("weight0", 0, 1), ("x", 4, 3), ("weight0", 4, 1), ("A0", 4, 2), ("B0", 4, 2)],
)
def test_matrix_products_of_a_backward(wanted, rank, matmuls, device):
    inputs = make(device, rank=rank, base="trained")
    freeze_all_but(inputs, (wanted,))
    outputs = ours(**inputs)
    with Dispatched() as seen:
        torch.autograd.grad(outputs, inputs[wanted], make_grads(inputs))
    assert seen.matmuls == matmuls


def test_base_weights_are_dequantised_only_for_the_input_gradient(device, monkeypatch):
    log = record_launches(monkeypatch, nf4_module)
    inputs = make(device, THREE, base="nf4")
    evaluate(ours, inputs, make_grads(inputs))
    assert len(log) == 3 + 3
    log.clear()
    inputs["x"].requires_grad_(False)
    evaluate(ours, inputs, make_grads(inputs))
    assert len(log) == 3


@pytest.mark.parametrize("wanted, launches", [(("x",), 2), (("A0",), 2), (("B1",), 2), (("A2",), 2), (("A0", "B2"), 2)])
def test_geglu_launches_of_the_mlp(wanted, launches, device, monkeypatch):
    log = record_launches(monkeypatch, geglu_module)
    inputs = make(device, MLP)
    freeze_all_but(inputs, wanted)
    evaluate(ours_mlp, inputs, mlp_grad(inputs))
    assert len(log) == launches
    if wanted != ("A2",):  # then h alone is rebuilt, by the forward kernel
        assert log[-1].kwargs["NEEDS_H"] == ("B2" in wanted)


@pytest.mark.parametrize("fn, dims", [(ours, THREE), (ours_mlp, MLP)], ids=["projections", "mlp"])
@pytest.mark.parametrize("base, adapter_dtype", [("trained", None), ("nf4", None), ("frozen", torch.float16)])
def test_repeatable_and_read_only(fn, dims, base, adapter_dtype, device):
    inputs = make(device, dims, base=base, adapter_dtype=adapter_dtype)
    assert_repeatable_and_read_only(fn, inputs, make_grads(inputs) if fn is ours else mlp_grad(inputs))


@pytest.mark.parametrize("fn, dims", [(ours, THREE), (ours_mlp, MLP)], ids=["projections", "mlp"])
@pytest.mark.parametrize("base", ["trained", "nf4"])
@pytest.mark.parametrize("inside", [False, True])
def test_autocast_changes_nothing(fn, dims, base, inside, device):
    """Neither around the forward alone nor, as some loops have it, around the backward too."""
    inputs = make(device, dims, base=base)
    grads = make_grads(inputs) if fn is ours else mlp_grad(inputs)
    expected = evaluate(fn, inputs, grads)
    names = trained(inputs)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        if inside:
            actual = evaluate(fn, inputs, grads)
        else:
            outputs = fn(**inputs)
    if not inside:
        gradients = torch.autograd.grad(outputs, [inputs[n] for n in names], grads)
        actual = {f"d{name}": grad for name, grad in zip(names, gradients)}
    for name, value in actual.items():
        assert same_bits(value, expected[name]), name


def test_second_derivatives_are_refused(device):
    """They would silently lack terms."""
    inputs = make(device, MLP)
    grad = torch.autograd.grad(ours_mlp(**inputs).square().sum(), inputs["x"], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


# Errors


def projection(n_in=8, n_out=6, rank=2, dtype=torch.float32, device="cpu", **changes):
    parts = {
        "weight": torch.zeros(n_out, n_in, dtype=dtype, device=device),
        "A": torch.zeros(rank, n_in, dtype=dtype, device=device),
        "B": torch.zeros(n_out, rank, dtype=dtype, device=device),
        "dropout": 0.0,
    } | changes
    return Projection(parts["weight"], Adapter(parts["A"], parts["B"], 1.0), parts["dropout"])


@pytest.mark.parametrize(
    "x, changes, error, message",
    [
        (torch.zeros(3, 8, dtype=torch.float64), {}, TypeError, "float64"),
        (torch.zeros(3, 8, dtype=torch.float16), {}, TypeError, "a base weight torch.float32"),
        (torch.zeros(3, 7), {}, ValueError, "input of 7 features"),
        (torch.zeros(3, 8), {"A": torch.zeros(2, 7)}, ValueError, "do not fit"),
        (torch.zeros(3, 8), {"B": torch.zeros(6, 3)}, ValueError, "do not fit"),
        (torch.zeros(3, 8), {"B": torch.zeros(7, 2)}, ValueError, "do not fit"),
        (torch.zeros(3, 8), {"B": torch.zeros(6, 2).half()}, TypeError, "LoRA factors are"),
        (torch.zeros(3, 8), {"weight": torch.zeros(6, 8, device="meta")}, ValueError, "meta"),
        (torch.zeros(3, 8), {"A": torch.zeros(2, 8, device="meta")}, ValueError, "meta"),
        (torch.zeros(3, 8), {"dropout": 1.0}, ValueError, "probability below 1"),
    ],
)
def test_errors(x, changes, error, message):
    with pytest.raises(error, match=message):
        lora_projections(x, [projection(**changes)])


@pytest.mark.parametrize(
    "gate, up, down, message",
    [
        (projection(), projection(n_out=7), projection(n_in=6, n_out=8), "do not form one"),
        (projection(), projection(), projection(n_in=7, n_out=8), "do not form one"),
        (projection(), projection(), projection(n_in=6, n_out=9), "do not form one"),
        (projection(n_in=9), projection(), projection(n_in=6, n_out=8), "does not fit an input of 8"),
    ],
)
def test_mlp_errors(gate, up, down, message):
    with pytest.raises(ValueError, match=message):
        lora_mlp(torch.zeros(3, 8), gate, up, down)


@pytest.mark.parametrize("base", ["trained", "nf4"])
def test_runs_the_reference_without_triton(base, device, monkeypatch):
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    log = record_launches(monkeypatch, geglu_module, nf4_module)
    inputs = make(device, MLP, base=base)
    check(ours_mlp, (reference_mlp, stock_mlp), inputs, mlp_grad(inputs))
    inputs = make(device, THREE, base=base)
    check(ours, (reference, stock), inputs, make_grads(inputs))
    assert log == []


# Properties


@few_examples
@given(
    rows=st.integers(1, 40),
    n_in=st.integers(1, 40),
    n_out=st.integers(1, 40),
    rank=st.integers(1, 9),
    a=st.floats(-3, 3),
    b=st.floats(-3, 3),
    seed=st.integers(0, 2**31),
)
def test_gradients_are_linear_in_the_output_gradient(rows, n_in, n_out, rank, a, b, seed, device):
    torch.manual_seed(seed)
    inputs = make(device, ((n_in, n_out),), rank=rank, base="trained", x_shape=(rows,))
    (first,), (second,) = make_grads(inputs), make_grads(inputs)
    combined, one, two = (evaluate(ours, inputs, [dy]) for dy in (a * first + b * second, first, second))
    for name in ("dx", "dweight0", "dA0", "dB0"):
        torch.testing.assert_close(combined[name], a * one[name] + b * two[name], rtol=1e-4, atol=2e-3)
