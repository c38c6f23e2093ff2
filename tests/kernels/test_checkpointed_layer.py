"""A whole layer as one operation: to the bit what torch's checkpointing makes of its three operations."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from kernel_checks import (
    Inputs,
    Results,
    assert_float32,
    attends_in_float32,
    double,
    evaluate,
    fresh,
    nf4,
    record_launches,
    same_bits,
)
from live_memory import live_memory
from quick import slow_after
from torch.utils.checkpoint import checkpoint

from fastgemma.kernels import attention as attention_module
from fastgemma.kernels import (
    attention_backward,
    attention_forward,
    attention_products,
    geglu,
    lora_mlp,
    qk_norm_rope_launch,
    rms_norm,
)
from fastgemma.kernels import checkpointed_layer as module
from fastgemma.kernels import nf4 as nf4_module
from fastgemma.kernels.attention import attention_reference
from fastgemma.kernels.backend import interpreting
from fastgemma.kernels.checkpointed_layer import After, Before, CheckpointedLayer
from fastgemma.kernels.key_intervals import KeyIntervals, key_intervals
from fastgemma.kernels.lora import Adapter, Projection
from fastgemma.kernels.post_attention import (
    Matrices,
    Norms,
    post_attention_reference,
    post_attention_unchecked,
)
from fastgemma.kernels.post_attention_tiles import post_attention_in_tiles, splits_rows
from fastgemma.kernels.pre_attention import pre_attention_reference, pre_attention_unchecked
from fastgemma.kernels.qk_norm_rope_launch import Heads

HIDDEN, INNER, INPUT, HEAD = 32, 64, 16, 16
EPS = 1e-6
DTYPE = torch.float32 if interpreting() else torch.bfloat16  # float32 attention is the interpreter's alone
# Numbers of heads of the projections, and whose keys a layer attends to.
LAYERS: dict[str, tuple[tuple[int, ...], bool]] = {
    "own keys": ((3, 1, 1), False),
    "handed on": ((4, 2, 2), True),
    "values from keys": ((2, 1), False),
    "of another layer": ((3,), False),
}
MODULES = (attention_backward, attention_forward, attention_products, geglu, nf4_module, qk_norm_rope_launch, rms_norm)


def make(
    kind: str,
    device: torch.device,
    dtype: torch.dtype = DTYPE,
    shape: tuple[int, int] = (2, 13),
    per_layer: bool = True,
    norms: bool = False,
    adapted: Sequence[int] = range(9),
    base: str = "nf4",
    layout: str = "contiguous",
) -> Inputs:
    """Activations, angles and what a layer holds: projections W{i}, A{i}, B{i}, those before the attention first."""
    counts, _ = LAYERS[kind]
    batch, seq_len = shape
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    inputs: Inputs = {"hidden_states": fresh(batch, seq_len, HIDDEN, layout=layout, **options)}
    if per_layer:
        inputs["per_layer_input"] = fresh(batch, seq_len, INPUT, layout=layout, **options)
    if len(counts) == 1:
        inputs |= {name: fresh(batch, seq_len, 1, HEAD, **options) for name in ("key", "value")}
    angle = torch.rand(1, seq_len, HEAD, device=device) * 6
    inputs |= {"cos": angle.cos().to(dtype), "sin": angle.sin().to(dtype)}
    inputs["layer_scalar"] = torch.tensor([0.7], device=device, dtype=dtype)
    widths = {"norm": HIDDEN, "q_norm": HEAD, "k_norm": HEAD} | {f"norm{i}": HIDDEN for i in range(3 + per_layer)}
    for name, width in widths.items():
        inputs[name] = (1 + 0.3 * torch.randn(width, device=device)).to(dtype).requires_grad_(norms)
    attended = counts[0] * HEAD
    sizes = [(count * HEAD, HIDDEN) for count in counts]
    sizes += [(HIDDEN, attended), (INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER)]
    sizes += [(INPUT, HIDDEN), (HIDDEN, INPUT)] if per_layer else []
    for i, (n_out, n_in) in enumerate(sizes):
        if base == "nf4":
            inputs[f"W{i}"] = nf4(n_out, n_in, device, dtype)
        else:
            inputs[f"W{i}"] = (fresh(n_out, n_in, grad=False, **options) / n_in**0.5).requires_grad_(base == "trained")
        if i in adapted:
            inputs[f"A{i}"] = (fresh(8, n_in, grad=False, **options) / n_in**0.5).requires_grad_()
            inputs[f"B{i}"] = fresh(n_out, 8, **options)
    return inputs


def intervals_of(inputs: Inputs) -> KeyIntervals:
    """A window of seven keys, and a last row that is padded on the left."""
    batch, seq_len = inputs["hidden_states"].shape[:2]
    device = inputs["hidden_states"].device
    padding_mask = torch.ones(batch, seq_len, dtype=torch.int64, device=device)
    padding_mask[batch - 1 :, : seq_len // 3] = 0
    return key_intervals(batch, seq_len, device, window=7, padding_mask=padding_mask)


def parts(kind: str, dropout: float, tensors: Inputs) -> tuple[Before, After]:
    counts, _ = LAYERS[kind]
    projections = []
    for i in range(sum(name.startswith("W") for name in tensors)):
        adapter = Adapter(tensors[f"A{i}"], tensors[f"B{i}"], 0.5) if f"A{i}" in tensors else None
        projections.append(Projection(tensors[f"W{i}"], adapter, dropout if adapter else 0.0))
    n = len(counts)
    heads = Heads(HEAD, HEAD, n == 2, EPS)
    k_norm = None if n == 1 else tensors["k_norm"]
    before = Before(tensors["norm"], projections[:n], tensors["q_norm"], k_norm, heads, EPS, None)
    norms = Norms(*(tensors[f"norm{i}"] for i in range(4) if f"norm{i}" in tensors))
    return before, After(norms, Matrices(*projections[n:]), tensors["layer_scalar"], EPS, None)


def one_operation(kind: str, intervals: KeyIntervals, dropout: float = 0.0) -> Callable[..., Any]:
    def run(hidden_states, cos, sin, per_layer_input=None, key=None, value=None, **tensors: Any) -> Any:
        layer = CheckpointedLayer(*parts(kind, dropout, tensors), 0.9, LAYERS[kind][1])
        return layer(hidden_states, per_layer_input, key, value, cos, sin, intervals)

    return run


def three_operations(kind: str, intervals: KeyIntervals, dropout: float = 0.0) -> Callable[..., Any]:
    """The same, checkpointed by torch."""

    def run(hidden_states, cos, sin, per_layer_input=None, key=None, value=None, **tensors: Any) -> Any:
        before, after = parts(kind, dropout, tensors)

        def operations(hidden_states, per_layer_input, key, value) -> Any:
            norm, projections, q_norm, k_norm, *rest = before
            residual, q, k, v = pre_attention_unchecked(
                hidden_states, norm, projections, cos, sin, q_norm, k_norm, *rest
            )
            k, v = (k, v) if key is None else (key, value)
            attended = attention_module._Attention.apply(q, k, v, intervals, 0.9).flatten(2)
            behind = post_attention_in_tiles if splits_rows(residual, after.matrices) else post_attention_unchecked
            out = behind(
                attended, residual, after.norms, after.matrices, after.layer_scalar, per_layer_input, EPS, None
            )
            return (out, k, v) if LAYERS[kind][1] else out

        return checkpoint(operations, hidden_states, per_layer_input, key, value, use_reentrant=False)

    return run


def in_plain_torch(kind: str, intervals: KeyIntervals) -> Callable[..., Any]:
    def run(hidden_states, cos, sin, per_layer_input=None, key=None, value=None, **tensors: Any) -> Any:
        before, after = parts(kind, 0.0, tensors)
        norm, projections, q_norm, k_norm, heads, *_ = before
        q, k, v = pre_attention_reference(hidden_states, norm, projections, cos, sin, q_norm, k_norm, heads, EPS)
        k, v = (k, v) if key is None else (key, value)
        attended = attention_reference(q, k, v, intervals, 0.9).flatten(2)
        out = post_attention_reference(
            attended, hidden_states, after.norms, after.matrices, after.layer_scalar, per_layer_input, EPS
        )
        return (out, k, v) if LAYERS[kind][1] else out

    return run


def make_grads(kind: str, inputs: Inputs) -> list[torch.Tensor | None]:
    x, (counts, handed_on) = inputs["hidden_states"], LAYERS[kind]
    shapes = [x.shape, *2 * [(*x.shape[:2], counts[-1], HEAD)]]
    grads = [fresh(*shape, device=x.device, dtype=x.dtype, grad=False) for shape in shapes]
    return list(grads) if handed_on else [*grads[:1]]


def results(run: Callable[..., Any], inputs: Inputs, grads: Sequence[torch.Tensor | None]) -> Results:
    """Of a run that draws the same dropout as others, with the random state that it leaves."""
    torch.manual_seed(5)
    found = evaluate(run, inputs, grads)
    return found | {"random": torch.rand(4, device=inputs["hidden_states"].device)}


def assert_same(kind: str, inputs: Inputs, grads: Sequence[torch.Tensor | None], dropout: float = 0.0) -> None:
    intervals = intervals_of(inputs)
    actual = results(one_operation(kind, intervals, dropout), inputs, grads)
    expected = results(three_operations(kind, intervals, dropout), inputs, grads)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert same_bits(actual[name], value), name


@attends_in_float32
@pytest.mark.parametrize("kind", slow_after(1, LAYERS))
def test_outputs_and_gradients(kind: str, device: torch.device) -> None:
    inputs = make(kind, device, norms=True)
    grads, intervals = make_grads(kind, inputs), intervals_of(inputs)
    truth = evaluate(in_plain_torch(kind, intervals), double(inputs), double(grads))
    assert_float32(evaluate(one_operation(kind, intervals), inputs, grads), truth)


@pytest.mark.parametrize("dropout", [0.0, pytest.param(0.3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("tiled", slow_after(1, [True, False]), ids=["tiles", "whole"])
@pytest.mark.parametrize("kind", slow_after(1, LAYERS))
def test_bits(kind: str, tiled: bool, dropout: float, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if tiled:
        monkeypatch.setattr(lora_mlp, "workspace_bytes", lambda device: 256 * 2 * INNER * 4)
    inputs = make(kind, device, shape=(2, 150) if tiled else (2, 13))
    assert_same(kind, inputs, make_grads(kind, inputs), dropout)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"per_layer": False},
        {"base": "trained", "norms": True},
        {"base": "frozen", "adapted": ()},
        {"adapted": (0, 5)},
        {"layout": "picked from a stack"},
        {"shape": (1, 1)},
        {"shape": (3, 1)},
        {"dtype": torch.float16},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", LAYERS)
def test_bits_of_unlike_layers(kind: str, options: dict[str, Any], device: torch.device) -> None:
    inputs = make(kind, device, **options)
    assert_same(kind, inputs, make_grads(kind, inputs))


def _tuple(outputs: Any) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _freeze(inputs: Inputs, *names: str) -> None:
    for name in names:
        inputs[name].requires_grad_(False)


@pytest.mark.parametrize("frozen", slow_after(1, ["hidden_states", "before", "all before", "keys", "per_layer_input"]))
@pytest.mark.parametrize("kind", slow_after(1, ["of another layer", "handed on"]))
def test_gradients_of_some(kind: str, frozen: str, device: torch.device) -> None:
    n = len(LAYERS[kind][0])
    of_before = [f"{factor}{i}" for factor in "AB" for i in range(n)]
    names = {
        "hidden_states": ["hidden_states"],
        "before": of_before,
        "all before": ["hidden_states", *of_before],
        "keys": ["key", "value"],
        "per_layer_input": ["per_layer_input"],
    }[frozen]
    inputs = make(kind, device)
    _freeze(inputs, *(name for name in names if name in inputs))
    runs = [make_run(kind, intervals_of(inputs)) for make_run in (one_operation, three_operations)]
    mine, checkpointed = ([x.requires_grad for x in _tuple(run(**inputs))] for run in runs)
    assert mine == checkpointed
    grads = [grad if needed else None for grad, needed in zip(make_grads(kind, inputs), mine)]
    assert_same(kind, inputs, grads)


@pytest.mark.parametrize("used", slow_after(1, [(1, 2), (0, 2), (1,), (0,)]))
def test_outputs_that_nobody_uses(used: tuple[int, ...], device: torch.device) -> None:
    inputs = make("handed on", device)
    grads = [grad if i in used else None for i, grad in enumerate(make_grads("handed on", inputs))]
    assert_same("handed on", inputs, grads)


@pytest.mark.slow
def test_no_rows(device: torch.device) -> None:
    for shape in ((0, 13), (2, 0)):
        inputs = make("handed on", device, shape=shape)
        assert_same("handed on", inputs, make_grads("handed on", inputs))


def test_kernels_run_as_often(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make("handed on", device)
    grads, intervals = make_grads("handed on", inputs), intervals_of(inputs)
    launched = record_launches(monkeypatch, *MODULES)
    found = []
    for make_run in (one_operation, three_operations):
        launched.clear()
        evaluate(make_run("handed on", intervals), inputs, grads)
        found.append([(launch.name, launch.grid) for launch in launched])
    assert found[0] == found[1]
    assert {name for name, _ in found[0]} >= {"_rms_norm_bwd_kernel", "_geglu_bwd_kernel", "_qk_norm_rope_bwd_kernel"}


def test_saves_its_inputs_alone(device: torch.device) -> None:
    inputs = make("of another layer", device)
    saved: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        one_operation("of another layer", intervals_of(inputs))(**inputs)
    names = ("hidden_states", "per_layer_input")
    assert [t.data_ptr() for t in saved] == [inputs[name].data_ptr() for name in names]


@pytest.mark.slow
@pytest.mark.parametrize("tiled", [False, True], ids=["whole", "tiles"])
@pytest.mark.parametrize("kind", ["values from keys"])
def test_takes_no_more_memory(kind: str, tiled: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    if tiled:
        monkeypatch.setattr(lora_mlp, "workspace_bytes", lambda device: 256 * 2 * INNER * 4)

    def columns(make_run: Callable[..., Any], backward: bool) -> float:
        """How many numbers for each row are there at the most moments, whatever the number of rows."""
        peaks = []
        for rows in (256, 512):
            inputs = make(kind, device, shape=(1, rows))
            grads, run = make_grads(kind, inputs), make_run(kind, intervals_of(inputs))
            with live_memory(monkeypatch) as seen:
                evaluate(run, inputs, grads if backward else ())
            peaks.append(seen.peak / 4)
        return (peaks[1] - peaks[0]) / 256

    for backward in (False, True):
        assert columns(one_operation, backward) <= columns(three_operations, backward) + 0.2


def test_queries_are_gone_behind_the_attention(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no backward of theirs follows: under torch's checkpointing nobody holds what is saved."""
    queries: list[weakref.ref[torch.Tensor]] = []
    alive: list[bool] = []
    attend, behind = attention_module._Attention.forward, module._PostAttention.forward

    def attention(ctx: Any, q: torch.Tensor, *rest: Any) -> Any:
        queries.append(weakref.ref(q))
        return attend(ctx, q, *rest)

    def post_attention(*arguments: Any) -> Any:
        gc.collect(0)  # the interpreter leaves cycles that hold a launch's tensors
        alive.append(queries[-1]() is not None)
        return behind(*arguments)

    monkeypatch.setattr(attention_module._Attention, "forward", staticmethod(attention))
    monkeypatch.setattr(module._PostAttention, "forward", staticmethod(post_attention))
    inputs = make("own keys", device)
    evaluate(one_operation("own keys", intervals_of(inputs)), inputs, make_grads("own keys", inputs))
    assert alive == [False, True]


def test_what_a_backward_read_goes_with_it(device: torch.device) -> None:
    inputs = make("of another layer", device)
    (out,) = one_operation("of another layer", intervals_of(inputs))(**inputs)
    angles = weakref.ref(inputs.pop("cos"))
    out.sum().backward(retain_graph=True)
    assert angles() is not None
    out.sum().backward()
    gc.collect()  # the interpreter leaves cycles that hold a launch's tensors
    assert angles() is None
    with pytest.raises(RuntimeError, match="second time"):
        out.sum().backward()


def test_several_backwards(device: torch.device) -> None:
    inputs = make("handed on", device)
    grads = make_grads("handed on", inputs)
    torch.manual_seed(5)
    outputs = one_operation("handed on", intervals_of(inputs), dropout=0.3)(**inputs)
    leaves = [tensor for tensor in inputs.values() if isinstance(tensor, torch.Tensor) and tensor.requires_grad]
    again = functools.partial(torch.autograd.grad, outputs, leaves, grads, retain_graph=True, allow_unused=True)
    for first, second in zip(again(), again()):
        assert (first is None and second is None) or same_bits(first, second)


def test_a_weight_that_was_stepped_is_an_error(device: torch.device) -> None:
    inputs = make("own keys", device)
    (out,) = one_operation("own keys", intervals_of(inputs))(**inputs)
    with torch.no_grad():
        inputs["A0"].add_(1)
    with pytest.raises(RuntimeError, match="modified in place"):
        out.sum().backward()


def test_inputs_that_were_written_to_are_an_error(device: torch.device) -> None:
    inputs = make("own keys", device)
    (out,) = one_operation("own keys", intervals_of(inputs))(**inputs)
    with torch.no_grad():
        inputs["hidden_states"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_second_derivatives_are_an_error(device: torch.device) -> None:
    inputs = make("own keys", device)
    (out,) = one_operation("own keys", intervals_of(inputs))(**inputs)
    (grad,) = torch.autograd.grad(out.sum(), inputs["hidden_states"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
