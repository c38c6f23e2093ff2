"""post_attention over tiles of rows: what post_attention makes of each tile, from nothing but the inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from kernel_checks import (
    LAYOUTS,
    Dispatched,
    Inputs,
    Results,
    assert_float32,
    assert_repeatable_and_read_only,
    double,
    evaluate,
    record_launches,
    relative_error,
    same_bits,
    trained,
)
from live_memory import live_memory
from post_attention_checks import ATTENDED, HIDDEN, INNER, INPUT, both, call, make, make_grads
from quick import slow_after

from fastgemma.kernels import adapter_columns, geglu, lora_mlp, post_attention_tiles, rms_norm
from fastgemma.kernels import nf4 as nf4_module
from fastgemma.kernels.post_attention import post_attention, post_attention_reference
from fastgemma.kernels.post_attention_tiles import post_attention_in_tiles, splits_rows

SHAPE = (2, 300)
TILES = (slice(0, 256), slice(256, 512), slice(512, 600))
BY_ROW = ("attended", "residual", "per_layer_input")
KINDS: list[dict[str, Any]] = [
    {"rank": 8},
    {"base": "frozen"},
    {"base": "trained", "norms": True, "rank": 8},
    {"base": "frozen", "norms": True, "adapted": ()},
    {"adapted": (0, 4)},
]


@pytest.fixture(autouse=True)
def tight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 256 rows in float32."""
    budget(monkeypatch, 256 * 2 * INNER * 4)


def budget(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(lora_mlp, "workspace_bytes", lambda device: size)


def in_tiles(*arguments: Any, eps: float = 1e-6, autocast: Any = None, **options: Any) -> torch.Tensor:
    return post_attention_in_tiles(*arguments, eps, autocast, **options)


def each_tile(inputs: Inputs, grads: list[torch.Tensor], tiles: tuple[slice, ...] = TILES, **options: Any) -> Results:
    """`post_attention` of one tile's rows after the other: their outputs and gradients, and the sums of the rest's."""
    parts = []
    for rows in tiles:
        own = {n: t.detach().flatten(0, 1)[rows].requires_grad_() for n, t in inputs.items() if n in BY_ROW}
        parts.append(evaluate(call(post_attention, **options), {**inputs, **own}, [grads[0].flatten(0, 1)[rows]]))
    results = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if name == "output 0" or name[1:] in BY_ROW:
            results[name] = torch.cat(values).unflatten(0, SHAPE)
        else:
            results[name] = sum(value.float() for value in values).to(values[0].dtype)
    return results


def assert_same(actual: Results, expected: Results) -> None:
    """The same bits; but cuBLAS has other kernels in float32 for rows that lie apart, as a tile's do in its buffers."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        if value.is_cuda and value.dtype == torch.float32:
            assert actual[name].dtype == value.dtype and relative_error(actual[name], value) < 1e-6, name
        else:
            assert same_bits(actual[name], value), name


@both
@pytest.mark.parametrize("kind", slow_after(2, KINDS), ids=str)
def test_is_post_attention_of_each_tile(per_layer: bool, kind: dict[str, Any], device: torch.device) -> None:
    inputs = make(device, per_layer, shape=SHAPE, **kind)
    grads = make_grads(inputs)
    actual = evaluate(call(in_tiles), inputs, grads)
    assert_same(actual, each_tile(inputs, grads))
    assert_float32(actual, evaluate(call(post_attention_reference), double(inputs), double(grads)))


@both
def test_one_tile(per_layer: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up fit, but not beside their gradients: these take their place."""
    budget(monkeypatch, 600 * 2 * INNER * 4)
    inputs = make(device, per_layer, base="trained", norms=True, shape=SHAPE)
    grads = make_grads(inputs)

    def wide() -> int:
        return sum(shape[-1] == 2 * INNER for shape in seen.allocated)

    def ask(attended: Any, residual: Any, norms: Any, matrices: Any, *_: Any) -> bool:
        return splits_rows(residual, matrices)

    assert call(ask)(**inputs)
    with Dispatched() as seen:
        actual = evaluate(call(in_tiles), inputs, grads)
    assert wide() == 2  # gate beside up, of the forward and in the backward
    with Dispatched() as seen:
        expected = evaluate(call(post_attention), inputs, grads)
    assert wide() > 2
    for name, value in expected.items():
        assert relative_error(actual[name], value) < 1e-6, name


@both
@pytest.mark.parametrize("adapter_dtype", slow_after(1, [None, torch.float32]), ids=["same", "float32 adapters"])
def test_half_precision(per_layer: bool, adapter_dtype: Any, device: torch.device) -> None:
    """Where the tiles are as high as in float32: the budget is that of half as many bytes."""
    inputs = make(device, per_layer, torch.float16, "trained", norms=True, shape=SHAPE, adapter_dtype=adapter_dtype)
    grads = make_grads(inputs)
    with pytest.MonkeyPatch.context() as patch:
        budget(patch, 256 * 2 * INNER * 2)
        actual = evaluate(call(in_tiles), inputs, grads)
    assert_same(actual, each_tile(inputs, grads))


@pytest.mark.parametrize("adapter_dtype", slow_after(1, [torch.float32, torch.bfloat16]), ids=str)
def test_adapters_of_another_dtype_under_autocast(
    adapter_dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make(device, dtype=torch.float16, base="frozen", adapter_dtype=adapter_dtype, shape=SHAPE)
    grads = make_grads(inputs)
    budget(monkeypatch, 256 * 2 * INNER * 2)
    with torch.autocast(device.type, torch.float16):
        actual = evaluate(call(in_tiles, autocast=torch.float16), inputs, grads)
    assert actual["dA0"].dtype == adapter_dtype and actual["output 0"].dtype == torch.float16
    assert_same(actual, each_tile(inputs, grads, autocast=torch.float16))


@pytest.mark.parametrize("layout", slow_after(2, LAYOUTS))
def test_layouts_of_inputs_and_of_the_gradient(layout: str, device: torch.device) -> None:
    inputs = make(device, shape=SHAPE, layout=layout)
    grads = make_grads(inputs, layout)
    assert_same(evaluate(call(in_tiles), inputs, grads), each_tile(inputs, grads))


@both
@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=str)
def test_empty_batch(per_layer: bool, shape: tuple[int, int], device: torch.device) -> None:
    inputs = make(device, per_layer, base="trained", norms=True, shape=shape)
    results = evaluate(call(in_tiles), inputs, make_grads(inputs))
    assert_same(results, evaluate(call(post_attention), inputs, make_grads(inputs)))


@pytest.mark.slow
@both
def test_every_gradient_alone(per_layer: bool, device: torch.device) -> None:
    inputs = make(device, per_layer, base="trained", norms=True, shape=(1, 300))
    grads = make_grads(inputs)
    everything = evaluate(call(in_tiles), inputs, grads)
    names = trained(inputs)
    for wanted in names:
        for name in names:
            inputs[name].requires_grad_(name == wanted)
        actual = evaluate(call(in_tiles), inputs, grads)
        assert relative_error(actual[f"d{wanted}"], everything[f"d{wanted}"]) < 1e-6, wanted


@both
def test_repeatable_and_read_only(per_layer: bool, device: torch.device) -> None:
    inputs = make(device, per_layer, base="trained", norms=True, shape=SHAPE)
    assert_repeatable_and_read_only(call(in_tiles), inputs, make_grads(inputs))


@both
def test_a_second_derivative_raises(per_layer: bool, device: torch.device) -> None:
    inputs = make(device, per_layer)
    (first,) = torch.autograd.grad(call(in_tiles)(**inputs).sum(), inputs["residual"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@both
def test_only_inputs_are_kept(per_layer: bool, device: torch.device) -> None:
    inputs = make(device, per_layer, shape=SHAPE)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        call(in_tiles)(**inputs)
    kept = [inputs[name].data_ptr() for name in BY_ROW if name in inputs]
    assert sorted(t.data_ptr() for t in saved) == sorted(kept)


@pytest.mark.slow
@both
@pytest.mark.parametrize("base", ["nf4", "trained"])
def test_nothing_of_the_mlp_is_there_for_all_rows(
    per_layer: bool, base: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def columns(fn: Callable[..., Any]) -> float:
        """How many for each row are alive at the most moments beside the inputs, whatever the number of rows."""
        peaks = []
        for rows in (768, 1536):
            inputs = make(device, per_layer, base=base, shape=(1, rows), rank=8)
            grads = make_grads(inputs)
            with live_memory(monkeypatch) as seen:
                evaluate(call(fn), inputs, grads)
            peaks.append(seen.peak / 4)
        return (peaks[1] - peaks[0]) / 768

    # The output, and the gradients of what came in.
    expected = HIDDEN + ATTENDED + HIDDEN + (INPUT if per_layer else 0)
    assert columns(in_tiles) == pytest.approx(expected, abs=0.1)
    assert columns(post_attention) > 2 * INNER + 4 * HIDDEN


@both
def test_a_recomputation_makes_nothing(per_layer: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(device, per_layer, shape=SHAPE, rank=8)
    grads = make_grads(inputs)
    expected = evaluate(call(in_tiles), inputs, grads)
    log = record_launches(monkeypatch, rms_norm, geglu, nf4_module, adapter_columns)
    with Dispatched() as seen:
        out = call(in_tiles, computes=False)(**inputs)
    assert not log and not seen.matmuls and seen.allocated == [(*SHAPE, out.shape[-1])]
    like = expected["output 0"]
    assert (out.shape, out.dtype, out.device, out.stride()) == (like.shape, like.dtype, like.device, like.stride())
    names = trained(inputs)
    # Whatever stands in the output, no gradient has to do with it.
    assert out.isnan().all()
    for name, grad in zip(names, torch.autograd.grad(out, [inputs[n] for n in names], grads)):
        assert same_bits(grad, expected[f"d{name}"]), name
    assert log


@both
def test_products_and_launches_are_those_of_the_operation_and_its_recomputation(
    per_layer: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each tile: one forward, and then another one with its backward; but what tiles share is made once."""
    inputs = make(device, per_layer, shape=SHAPE, rank=8)
    grads = make_grads(inputs)
    log = record_launches(monkeypatch, rms_norm, geglu, nf4_module, adapter_columns)

    def count(run: Callable[[], Any]) -> tuple[int, Counter[str]]:
        del log[:]
        with Dispatched() as seen:
            run()
        return seen.matmuls, Counter(launched.name for launched in log)

    own = {n: t.detach().flatten(0, 1)[TILES[0]].requires_grad_() for n, t in inputs.items() if n in BY_ROW}
    tile = {**inputs, **own}
    forward = count(lambda: call(post_attention)(**tile))
    whole = count(lambda: evaluate(call(post_attention), tile, [grads[0].flatten(0, 1)[TILES[0]]]))
    actual = count(lambda: evaluate(call(in_tiles), inputs, grads))
    n = len(TILES)
    assert actual[0] == n * (forward[0] + whole[0])
    spared = {
        "_rms_norm_fwd_kernel": n,  # a tile's x is kept
        # Of the output projection, the gate and the projection: for all tiles, and both ways but for the projection.
        "_dequantize_nf4_kernel": (n - 1) + (2 * n - 1) + per_layer * (2 * (n - 1) + (2 * n - 1) + (2 * n - 2)),
    }
    for name in forward[1] | whole[1]:
        assert actual[1][name] == n * (forward[1][name] + whole[1][name]) - spared.get(name, 0), name


@both
def test_weights_that_would_take_much_are_made_for_each_tile(
    per_layer: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = make(device, per_layer, shape=SHAPE, rank=8)
    grads = make_grads(inputs)
    log = record_launches(monkeypatch, nf4_module)
    seen = []
    for share in (1, 1 << 40):
        monkeypatch.setattr(post_attention_tiles, "_HELD_SHARE", share)
        del log[:]
        seen.append((evaluate(call(in_tiles), inputs, grads), len(log)))
    assert seen[0][1] < seen[1][1]
    assert_same(seen[0][0], seen[1][0])


def test_a_trained_weight_written_before_the_backward_is_noticed(device: torch.device) -> None:
    inputs = make(device, shape=SHAPE)
    out = call(in_tiles)(**inputs)
    with torch.no_grad():
        inputs["A3"].mul_(2)
    with pytest.raises(RuntimeError, match="modified in place"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("rows", "dropout", "adapted", "expected"),
    [
        (256, 0.0, (0, 3), False),  # of which 3 * INNER columns fit
        (257, 0.0, (0, 3), True),
        (257, 0.1, (0, 3), False),
        (257, 0.1, (), True),  # nothing to drop
    ],
)
def test_when_rows_are_split(
    rows: int, dropout: float, adapted: tuple[int, ...], expected: bool, device: torch.device
) -> None:
    inputs = make(device, shape=(1, rows), adapted=adapted)

    def ask(attended: Any, residual: Any, norms: Any, matrices: Any, *_: Any) -> bool:
        if not adapted:
            matrices = type(matrices)(*(p._replace(dropout=dropout) for p in matrices))
        return splits_rows(residual, matrices)

    assert call(ask, dropout)(**inputs) is expected
