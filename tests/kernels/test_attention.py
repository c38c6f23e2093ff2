"""Attention over intervals of keys: against float64, masks and layouts of all kinds, and what must not leak."""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_checks import (
    LAYOUTS,
    assert_float32,
    assert_no_worse_over_seeds,
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
from quick import slow_after

from fastgemma.kernels import attention as attention_module
from fastgemma.kernels import attention_backward, attention_forward, attention_wide, backend
from fastgemma.kernels import launch as launch_module
from fastgemma.kernels.attention import (
    attention,
    attention_problem,
    attention_reference,
    compile_attention_ahead,
)
from fastgemma.kernels.attention_tiles import in_bands
from fastgemma.kernels.backend import kernel, tl
from fastgemma.kernels.key_intervals import KeyIntervals, Reach, key_intervals
from fastgemma.kernels.launch import TABLE, Launch


def make(
    batch: int,
    seq_len: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    **options: Any,
) -> dict[str, Any]:
    """q, k and v; scores spread as those of trained heads, neither one-hot nor flat."""
    shapes = {"q": heads, "k": kv_heads, "v": kv_heads}
    return {
        name: fresh(batch, seq_len, count, head_dim, device=device, dtype=dtype, layout=layout, **options)
        for name, count in shapes.items()
    }


def run(fn: Any, intervals: KeyIntervals, scale: float) -> Any:
    return lambda q, k, v: fn(q, k, v, intervals, scale)


def check(inputs: dict[str, Any], intervals: KeyIntervals, scale: float = 0.3, layout: str = "contiguous") -> None:
    dout = fresh(*inputs["q"].shape, device=inputs["q"].device, layout=layout, grad=False)
    truth = evaluate(run(attention_reference, intervals, scale), double(inputs), [double(dout)])
    assert_float32(evaluate(run(attention, intervals, scale), inputs, [dout]), truth)


def check_half(inputs: dict[str, Any], intervals: KeyIntervals) -> None:
    dout = fresh(*inputs["q"].shape, device=inputs["q"].device, dtype=torch.float16, grad=False)
    truth = evaluate(run(attention_reference, intervals, 0.3), double(inputs), [double(dout)])
    for name, value in evaluate(run(attention, intervals, 0.3), inputs, [dout]).items():
        assert relative_error(value, truth[name]) <= 2e-3, name


SLOW = pytest.mark.slow
SMALL = {
    "fwd": {"BLOCK_M": 64, "BLOCK_N": 32},
    "scores": {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": 16},
    "output": {"BLOCK_M": 64, "BLOCK_K": 16, "DIMS": 16},
    "ds": {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_D": 16},
    "products": launch_module._products((64, 16, 16, 1), (32, 32, 16, 1)).blocks,
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles so small that short sequences take several, in every direction."""
    for name, blocks in SMALL.items():
        monkeypatch.setitem(launch_module.TABLE, (f"attention_{name}", "any", "interpreter"), Launch(blocks))
    launch_module.launch.cache_clear()
    yield
    launch_module.launch.cache_clear()


@pytest.fixture
def few_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A workspace so small that 130 positions go in chunks of 64."""
    monkeypatch.setattr(attention_wide, "_ENOUGH", 1)


@pytest.mark.parametrize("seq_len", [1, 2, 31, 32, 33, 65, pytest.param(130, marks=pytest.mark.slow)])
@pytest.mark.parametrize("window", [None, 1, 20])
def test_lengths_and_windows(seq_len: int, window: int | None, device: torch.device) -> None:
    check(make(1, seq_len, 4, 1, 16, device), key_intervals(1, seq_len, device, window))


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (8, 1), (8, 2), (4, 4), (16, 8), (3, 1)])
def test_grouped_heads(heads: int, kv_heads: int, device: torch.device) -> None:
    check(make(2, 19, heads, kv_heads, 16, device), key_intervals(2, 19, device, 7))


@pytest.mark.parametrize("head_dim", [16, 32, 64, pytest.param(256, marks=pytest.mark.slow), 512])
def test_head_dims(head_dim: int, device: torch.device) -> None:
    check(make(1, 37, 2, 1, head_dim, device), key_intervals(1, 37, device, 30), scale=head_dim**-0.5)


@pytest.mark.parametrize("window", slow_after(1, [20, None]))
@pytest.mark.parametrize("blocks", [False, True])
def test_chunks_of_positions(blocks: bool, window: int | None, few_positions: None, device: torch.device) -> None:
    lengths = torch.full((1, 150), -1)
    lengths[0, 50:90] = 1  # rows that attend beyond their chunk
    intervals = key_intervals(1, 150, device, window, blocks=lengths if blocks else None)
    check(make(1, 150, 3, 1, 16, device), intervals, scale=0.2)


@pytest.mark.parametrize("window", slow_after(1, [30, 1, 100]))
def test_windows_reuse_the_workspace(window: int, device: torch.device) -> None:
    """Longer than the tiles that a row can reach, so that tiles of keys take each other's places."""
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate((200, 3, 97, 200))])[None]
    for packed in (None, documents):
        check(make(1, 500, 2, 1, 16, device), key_intervals(1, 500, device, window, documents=packed), scale=0.2)


@pytest.mark.parametrize("window", slow_after(1, [9, None]))
def test_padding_documents_and_blocks(window: int | None, device: torch.device) -> None:
    padding = torch.ones(4, 40)
    padding[0, 25:] = 0
    padding[1, :17] = 0
    padding[2] = 0  # all of a row is padding
    intervals = key_intervals(4, 40, device, window, padding_mask=padding)
    inputs = make(4, 40, 4, 2, 16, device)
    check(inputs, intervals)
    out = attention(**inputs, intervals=intervals)
    assert not out[2].any() and not out[1, :17].any()

    documents = torch.cat([torch.full((n,), i) for i, n in enumerate((9, 1, 1, 22, 7))])[None].expand(4, 40)
    check(inputs, key_intervals(4, 40, device, window, documents=documents))
    blocks = torch.full((4, 40), -1)
    blocks[0, 3:30], blocks[1, 35:], blocks[2, :] = 0, 5, 1
    check(inputs, key_intervals(4, 40, device, window, blocks=blocks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_of_a_batch_have_intervals_of_their_own(dtype: torch.dtype, device: torch.device) -> None:
    """Of several groups, of a size that does not divide a tile of rows; the first begins later than the second."""
    padding = torch.ones(2, 70)
    padding[0, :40] = 0
    intervals = key_intervals(2, 70, device, 25, padding_mask=padding)
    inputs = make(2, 70, 6, 2, 16, device, dtype)
    if dtype == torch.float32:
        check(inputs, intervals)
    else:
        check_half(inputs, intervals)


@pytest.mark.parametrize("heads, kv_heads", [(4, 1), (3, 1), (4, 2)])
@pytest.mark.parametrize("window", [None, 40, 100])
@pytest.mark.slow
def test_whole_heads_in_a_program(heads: int, kv_heads: int, window: int | None, device: torch.device) -> None:
    """The forward of 16 bits: windows of several tiles of keys, the first and last attended to in part."""
    padding = torch.ones(2, 200)
    padding[0, :50], padding[1, 170:] = 0, 0
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate((90, 1, 42, 67))])[None].expand(2, -1)
    blocks = torch.full((2, 200), -1)
    blocks[0, 30:110], blocks[1, 150:] = 1, 2
    inputs = make(2, 200, heads, kv_heads, 16, device, torch.float16)
    for known in ({}, {"padding_mask": padding}, {"documents": documents}, {"blocks": blocks}):
        check_half(inputs, key_intervals(2, 200, device, window, **known))


def test_tiles_of_rows_before_the_first_that_attends(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over rows begin at a multiple of 64 positions, in the middle of a tile that nothing is written for else."""
    blocks = {**launch_module.launch("attention_ds", "any", device).blocks, "BLOCK_M": 128, "BLOCK_D": 16}
    row = "attention_ds", "any", launch_module.architecture(device)
    monkeypatch.setitem(launch_module.TABLE, row, Launch(blocks, num_warps=8))
    launch_module.launch.cache_clear()
    lo, hi = torch.zeros(1, 150, dtype=torch.int32), torch.ones(1, 150, dtype=torch.int32)
    lo[0, 109:], hi[0, 109:] = 32, 64
    check(make(1, 150, 3, 1, 16, device), KeyIntervals(lo.to(device), hi.to(device), causal=False))


@few_examples
@given(data=st.data())
def test_any_intervals(data: st.DataObject) -> None:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    seq_len = data.draw(st.integers(1, 70))
    bounds = st.lists(st.integers(0, seq_len), min_size=seq_len, max_size=seq_len)
    lo, hi = (torch.tensor([data.draw(bounds)], dtype=torch.int32, device=device) for _ in range(2))
    check(make(1, seq_len, 2, 1, 16, device), KeyIntervals(lo, hi, causal=False))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, device: torch.device) -> None:
    intervals = key_intervals(2, 21, device, 8)
    check(make(2, 21, 4, 2, 16, device, layout=layout), intervals)
    check(make(2, 21, 4, 2, 16, device), intervals, layout=layout)


def test_transposed_heads_and_positions_are_read_in_place(device: torch.device) -> None:
    """As the model holds them: transposed views of contiguous [batch, seq_len, heads, head_dim]."""
    inputs = make(2, 21, 4, 2, 16, device)
    rows = attention_forward.attention_fwd(**inputs, intervals=key_intervals(2, 21, device), scale=1.0)[0]
    views = {name: x.transpose(1, 2).transpose(1, 2) for name, x in inputs.items()}
    assert same_bits(attention(**views, intervals=key_intervals(2, 21, device)).detach(), rows.detach())


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "kv"])
def test_some_gradients(wanted: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(1, 33, 2, 1, 16, device)
    intervals = key_intervals(1, 33, device)
    dout = fresh(1, 33, 2, 16, device=device, grad=False)
    everything = evaluate(run(attention, intervals, 1.0), inputs, [dout])
    launched = record_launches(monkeypatch, attention_wide, attention_backward)
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in wanted)
    some = evaluate(run(attention, intervals, 1.0), inputs, [dout])
    for name, value in some.items():
        assert same_bits(value, everything[name]), name
    assert [entry.name for entry in launched] == [
        "_attention_scores_kernel",
        "_attention_output_kernel",
        "_attention_delta_kernel",
        "_attention_ds_kernel",
        "_attention_products_kernel",
        *(["_attention_sum_kernel"] if set(wanted) & {"k", "v"} else []),
    ]


@pytest.mark.parametrize("parts", slow_after(1, [3, 1]))
@pytest.mark.parametrize("window", slow_after(1, [20, None]))
def test_either_order_of_programs_computes_the_same(
    window: int | None, parts: int, few_positions: None, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Programs of dq before those of dk and dv, or behind them, over several chunks, entries and key/value heads."""
    inputs = make(2, 75, 6, 2, 16, device)
    intervals = key_intervals(2, 75, device, window)
    dout = fresh(2, 75, 6, 16, device=device, grad=False)
    truth = evaluate(run(attention_reference, intervals, 1.0), double(inputs), [double(dout)])
    monkeypatch.setattr(attention_backward, "_parts", lambda *_: parts)
    results = []
    for q_first in (True, False):
        attention_backward._plan.cache_clear()
        monkeypatch.setattr(attention_backward, "_q_first", lambda *_, q_first=q_first: q_first)
        results.append(evaluate(run(attention, intervals, 1.0), inputs, [dout]))
    attention_backward._plan.cache_clear()
    assert_float32(results[0], truth)
    assert all(same_bits(results[0][name], value) for name, value in results[1].items())


def test_rows_are_shared_where_programs_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """By as many programs as it takes to keep a card of 132 multiprocessors busy, and none where there are enough."""
    monkeypatch.setattr(attention_backward, "multiprocessors", lambda device: 132)
    blocks = (
        TABLE["attention_delta", "any", "any"],
        TABLE["attention_ds", "512", "sm_90"],
        TABLE["attention_products", "512", "sm_90"],
    )

    def parts(seq_len: int, head_dim: int, window: int | None, kv_heads: int, causal: bool = True) -> int:
        plan = attention_backward._plan.__wrapped__(
            torch.Size((1, seq_len, 8, head_dim)), kv_heads, torch.bfloat16, torch.device("cpu"), *blocks,
            Reach(seq_len, causal, window), 1.0, 1 << 30, (True, True),
        )  # fmt: skip
        # Whole in q's dtype, where neither parts nor chunks have to be added up.
        whole = plan.sums.parts == len(plan.chunks) == 1
        assert plan.sums.dtype == (torch.bfloat16 if whole else torch.float32)
        return plan.sums.parts

    assert [parts(n, 512, None, 1) for n in (256, 1024, 2048, 8192)] == [4, 3, 1, 1]
    assert [parts(n, 512, None, 2) for n in (256, 1024, 2048, 8192)] == [4, 1, 1, 1]
    assert [parts(n, 256, 512, 1) for n in (256, 1024, 2048, 8192)] == [4, 4, 1, 1]
    assert parts(2048, 256, 512, 1, causal=False) == 1


@pytest.mark.parametrize("dtype", slow_after(1, [torch.float16, torch.float32]), ids=str)
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("seq_len", slow_after(2, [1, 130, 40]))
def test_what_is_compiled_ahead_is_what_is_launched(
    seq_len: int,
    parts: int,
    dtype: torch.dtype,
    few_positions: None,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of one chunk and of several, whole or in parts; and where keys and values want no gradient, nothing else."""
    seen: dict[str, set[Any]] = {"ahead": set(), "launched": set()}

    def note(where: str, of: Any, values: dict[str, Any]) -> None:
        ordered, n = of._in_order(values), of._n_pointers
        seen[where].add((of.__name__, of._variant(ordered[n:], tuple(x.dtype for x in ordered[:n]))))

    def launched(self: Any, grid: Any, **values: Any) -> None:
        note("launched", self, values)
        self.function[grid](**values)

    monkeypatch.setattr(backend.Kernel, "_compile_ahead", lambda self, grid, **values: note("ahead", self, values))
    monkeypatch.setattr(backend.Kernel, "_launch", launched)
    monkeypatch.setattr(attention_backward, "_parts", lambda *_: parts)
    attention_backward._plan.cache_clear()
    inputs = make(1, seq_len, 4, 2, 16, device, dtype)
    intervals = key_intervals(1, seq_len, device)
    dout = torch.ones_like(inputs["q"])
    evaluate(run(attention, intervals, 1.0), inputs, [dout])
    torch.autograd.grad(
        attention(inputs["q"], inputs["k"].detach(), inputs["v"].detach(), intervals), inputs["q"], dout
    )
    sums = attention_backward.sums_of(inputs["q"].shape, 2, dtype, device, intervals.reach)
    attention_backward._plan.cache_clear()
    compile_attention_ahead.__wrapped__(dtype, device, 4, 2, 16, sums)
    assert {name for name, _ in seen["launched"]} >= {"_attention_ds_kernel", "_attention_products_kernel"}
    assert seen["launched"] == seen["ahead"]


def test_tiles_outside_are_not_visited(device: torch.device) -> None:
    """Keys that no row attends to are never read: they may hold anything."""
    inputs = make(1, 96, 2, 1, 16, device)
    intervals = key_intervals(1, 96, device, padding_mask=(torch.arange(96) >= 64)[None])
    clean = attention(**inputs, intervals=intervals)
    with torch.no_grad():
        inputs["k"][:, :64] = float("nan")
        inputs["v"][:, :64] = float("nan")
    assert torch.equal(attention(**inputs, intervals=intervals), clean)


@pytest.mark.parametrize("value", slow_after(1, [float("nan"), float("inf")]))
@pytest.mark.parametrize("name", ["q", "k", "v", "output gradient"])
@pytest.mark.parametrize("place, dtype, whole", [(25, torch.float32, True), (20, torch.float16, False)], ids=str)
def test_not_finite_stays_in_its_document(
    place: int, dtype: torch.dtype, whole: bool, name: str, value: float, device: torch.device
) -> None:
    """And reaches, of its document, neither rows before it nor, through its own row, keys behind it."""
    documents = torch.cat([torch.full((n,), i) for i, n in enumerate((20, 13, 17))])[None]
    intervals = key_intervals(1, 50, device, documents=documents)
    inputs = make(1, 50, 4, 2, 16, device, dtype)
    dout = fresh(1, 50, 4, 16, device=device, dtype=dtype, grad=False)
    clean = evaluate(run(attention, intervals, 0.5), inputs, [dout])
    with torch.no_grad():
        (dout if name == "output gradient" else inputs[name])[0, place, :, slice(None) if whole else 5] = value
    dirty = evaluate(run(attention, intervals, 0.5), inputs, [dout])
    numbers = torch.arange(50, device=device)
    inside = (documents[0] == 1).to(device)
    rows = inside & (numbers >= place) if name in ("k", "v") else numbers == place
    keys = inside if name in ("k", "v") else inside & (numbers <= place)
    for key, tensor in dirty.items():
        others = ~(keys if key in ("dk", "dv") else rows)
        assert same_bits(tensor[:, others], clean[key][:, others]), key
    reached = {"q": "dq" if whole else "output 0", "k": "output 0", "v": "output 0", "output gradient": "dv"}[name]
    assert not dirty[reached].isfinite().all()
    if value != value:
        for key in {"q": ["output 0"], "k": ["output 0", "dq"], "v": ["output 0"], "output gradient": []}[name]:
            assert not dirty[key][0, rows].flatten(1).isfinite().all(1).any(), key


MASKS = {
    "causal": lambda n, device: key_intervals(1, n, device),
    "window": lambda n, device: key_intervals(1, n, device, 20),
    "documents": lambda n, device: key_intervals(1, n, device, documents=(torch.arange(n) // 9)[None]),
    "padding": lambda n, device: key_intervals(1, n, device, padding_mask=(torch.arange(n) % (n - 1) > 2)[None]),
    "all from the second": lambda n, device: rectangle(n, 1, n, device),
    "a tile and one": lambda n, device: rectangle(n, 0, 33, device),
    "two tiles of rows without keys": lambda n, device: rectangle(n, 33, 33, device),
}


def rectangle(seq_len: int, lo: int, hi: int, device: torch.device) -> KeyIntervals:
    """The same keys for every row."""
    bounds = [torch.full((1, seq_len), bound, dtype=torch.int32, device=device) for bound in (lo, hi)]
    return KeyIntervals(*bounds, causal=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("heads, kv_heads", [(2, 1), (3, 1), (4, 2)])
@pytest.mark.parametrize("mask", MASKS)
def test_sums_and_outputs_of_either_kernel(
    mask: str, heads: int, kv_heads: int, dtype: torch.dtype, device: torch.device
) -> None:
    """Half precision takes another kernel, whose sums are as exact, and whose outputs are rounded products."""
    intervals = MASKS[mask](70, device)
    inputs = make(1, 70, heads, kv_heads, 16, device, dtype, grad=False)
    out, lse = attention_forward.attention_fwd(**inputs, intervals=intervals, scale=0.3)
    truth = attention_reference(**double(inputs), intervals=intervals, scale=0.3)
    keys = double(inputs)["k"].repeat_interleave(heads // kv_heads, 2)
    scores = 0.3 * torch.einsum("bihd,bjhd->bihj", double(inputs)["q"], keys)
    sums = scores.masked_fill(~intervals.dense()[:, :, None], -torch.inf).logsumexp(-1) / math.log(2.0)
    torch.testing.assert_close(lse.double(), sums.masked_fill(sums.isinf(), 0.0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.double(), truth, rtol=0.0, atol=1e-5 if dtype == torch.float32 else 4e-3)


@kernel
def _bands_kernel(out_ptr, n_rows, n_columns):
    program = tl.program_id(0)
    row, column = in_bands(program, n_rows, n_columns, 8)
    tl.store(out_ptr + 2 * program, row)
    tl.store(out_ptr + 2 * program + 1, column)


@pytest.mark.parametrize("n_rows", [1, 7, 8, 9, 20])
@pytest.mark.parametrize("n_columns", [1, 3])
def test_bands_hold_every_tile_once(n_rows: int, n_columns: int, device: torch.device) -> None:
    """Eight rows of tiles at most before the next column: what programs side by side read stays in the cache."""
    out = torch.full((n_rows * n_columns, 2), -1, device=device)
    _bands_kernel[(n_rows * n_columns,)](out_ptr=out, n_rows=n_rows, n_columns=n_columns)
    bands = [range(first, min(first + 8, n_rows)) for first in range(0, n_rows, 8)]
    assert out.tolist() == [[row, column] for band in bands for column in range(n_columns) for row in band]


def test_outliers(device: torch.device) -> None:
    """Scores of 1e4 and more: one-hot rows, whose gradients are exact zeros or nearly so."""
    inputs = make(1, 40, 2, 1, 16, device)
    with torch.no_grad():
        inputs["q"][0, ::7] = 1e4
    intervals = key_intervals(1, 40, device)
    dout = fresh(1, 40, 2, 16, device=device, grad=False)
    truth = evaluate(run(attention_reference, intervals, 1.0), double(inputs), [double(dout)])
    actual = evaluate(run(attention, intervals, 1.0), inputs, [dout])
    for name, value in actual.items():
        assert value.isfinite().all()
        # A score of 1e5 has an ulp of 0.008 in float32: what is not one-hot is off by as much, in any implementation.
        assert (value.double() - truth[name]).norm() <= 2e-2 * truth[name].norm(), name


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=gpu)], ids=str)
@pytest.mark.parametrize("window", slow_after(1, [12, None]))
def test_half_precision_is_no_worse_than_sdpa(dtype: torch.dtype, window: int | None, device: torch.device) -> None:
    intervals = key_intervals(1, 45, device, window)
    mask = intervals.dense()[:, None]

    def stock(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        group = q.shape[2] // k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.25)
        return out.transpose(1, 2)

    ours, theirs, truth = [], [], []
    for seed in range(5):
        torch.manual_seed(seed)
        inputs = make(1, 45, 8, 2, 32, device, dtype)
        dout = fresh(1, 45, 8, 32, device=device, dtype=dtype, grad=False)
        ours.append(evaluate(run(attention, intervals, 0.25), inputs, [dout]))
        theirs.append(evaluate(stock, inputs, [dout]))
        truth.append(evaluate(run(attention_reference, intervals, 0.25), double(inputs), [double(dout)]))
    assert_no_worse_over_seeds(ours, theirs, truth)


def test_repeatable_and_read_only(device: torch.device) -> None:
    intervals = key_intervals(2, 70, device, 40)
    dout = fresh(2, 70, 4, 16, device=device, grad=False)
    assert_repeatable_and_read_only(run(attention, intervals, 1.0), make(2, 70, 4, 2, 16, device), [dout])


def test_saves_its_inputs_its_output_and_a_number_a_row(device: torch.device) -> None:
    saved: list[torch.Tensor] = []
    inputs = make(1, 33, 4, 2, 16, device)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = attention(**inputs, intervals=key_intervals(1, 33, device))
    held = {t.data_ptr() for t in (*inputs.values(), out)}
    (lse,) = (t for t in saved if t.data_ptr() not in held)
    assert len(saved) == 5 and lse.shape == (1, 33, 4) and lse.dtype == torch.float32


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=str)
def test_empty(shape: tuple[int, int], device: torch.device) -> None:
    inputs = make(*shape, 4, 2, 16, device)
    results = evaluate(
        run(attention, key_intervals(*shape, device), 1.0), inputs, [torch.zeros(*shape, 4, 16, device=device)]
    )
    assert results["output 0"].shape == (*shape, 4, 16) and results["dk"].shape == (*shape, 2, 16)


def test_runs_the_reference_without_triton(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = make(1, 9, 2, 1, 16, device)
    intervals = key_intervals(1, 9, device)
    monkeypatch.setattr(backend, "HAS_TRITON", False)
    assert torch.equal(attention(**inputs, intervals=intervals), attention_reference(**inputs, intervals=intervals))


def test_errors(device: torch.device) -> None:
    intervals = key_intervals(1, 9, device)
    inputs = make(1, 9, 4, 2, 16, device)
    with pytest.raises(TypeError, match="q in torch.float16"):
        attention(inputs["q"].half(), inputs["k"], inputs["v"], intervals)
    with pytest.raises(TypeError, match="kernels take"):
        attention(*(x.double() for x in inputs.values()), intervals)
    with pytest.raises(ValueError, match="agree in all but"):
        attention(inputs["q"], inputs["k"][:, :4], inputs["v"], intervals)
    with pytest.raises(ValueError, match="a multiple of the 2 key/value heads"):
        attention(inputs["q"][:, :, :3], inputs["k"], inputs["v"], intervals)
    with pytest.raises(ValueError, match="power of two"):
        attention(*make(1, 9, 2, 1, 24, device).values(), intervals)
    with pytest.raises(ValueError, match="do not fit q"):
        attention(**inputs, intervals=key_intervals(1, 8, device))


def test_rows_of_a_tile_whose_windows_begin_one_key_apart(device: torch.device) -> None:
    """The later ones do not attend to the first key of the first tile."""
    inputs = {name: x.detach() for name, x in make(1, 100, 32, 1, 16, device, torch.float16).items()}
    intervals = key_intervals(1, 100, device, 40)
    out, _ = attention_forward.attention_fwd(**inputs, intervals=intervals, scale=0.3)
    truth = attention_reference(**double(inputs), intervals=intervals, scale=0.3)
    assert relative_error(out, truth) <= 2e-3


@pytest.mark.parametrize("seq_len, kv_heads", [(1, 1), (37, 1), (64, 2), (70, 4)])
def test_through_descriptors(
    seq_len: int, kv_heads: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as through pointers; past the end of an entry lies the next one, here with a NaN in its keys."""
    inputs = make(2, seq_len, 4, kv_heads, 16, device, torch.float16)
    for name in ("k", "v"):
        inputs[name].detach()[1, 0] = float("nan")
    documents = torch.arange(seq_len).expand(2, -1) // 30
    for intervals in (key_intervals(2, seq_len, device, 20), key_intervals(2, seq_len, device, documents=documents)):
        expected = attention(**inputs, intervals=intervals)
        architecture = launch_module.architecture(device)
        row = Launch({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, descriptors=True)
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
            pytest.skip("needs a GPU with a copy engine")
        with monkeypatch.context() as patch:
            patch.setitem(launch_module.TABLE, ("attention_fwd", "16", architecture), row)
            launch_module.launch.cache_clear()
            log = record_launches(patch, attention_forward)
            out = attention(**inputs, intervals=intervals)
        launch_module.launch.cache_clear()
        assert len(log) == 1
        assert same_bits(out[0], expected[0]) and out[0].isfinite().all()
        assert torch.equal(out[1].isnan(), expected[1].isnan()) and out[1, :1].isnan().all()
        torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "capability, version, dtype, why, problem",
    [
        ((6, 1), "3.9.0", torch.float16, None, "before Volta"),
        ((7, 0), "3.9.0", torch.float16, "before Ampere", None),
        ((7, 5), "3.9.0", torch.float32, "before Ampere", None),
        ((7, 5), "3.9.0", torch.bfloat16, "before Ampere", "bfloat16 on a GPU before Ampere"),
        ((8, 0), "3.4.0", torch.bfloat16, None, None),
        ((8, 0), "3.4.0", torch.float32, None, "float32"),
        ((10, 0), "3.5.1", torch.bfloat16, None, None),
        ((10, 0), "3.6.0", torch.bfloat16, "3.8 can", None),
        ((10, 3), "3.7.1", torch.bfloat16, "3.8 can", None),
        ((10, 0), "3.8.0", torch.bfloat16, None, None),
        ((12, 0), "3.6.0", torch.bfloat16, None, None),
    ],
)
def test_where_it_runs(
    capability: tuple[int, int],
    version: str,
    dtype: torch.dtype,
    why: str | None,
    problem: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Through which kernel, and in which dtypes not at all."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(launch_module, "architecture", lambda device: "sm_{}{}".format(*capability))
    monkeypatch.setattr(launch_module, "triton", SimpleNamespace(__version__=version))
    found = launch_module.why_efficient_attention.__wrapped__(device)
    assert found is None if why is None else why in found
    monkeypatch.setattr(attention_module, "why_efficient_attention", lambda device: found)
    monkeypatch.setattr(attention_module, "efficient_problem", lambda device, dtype: None)
    found = attention_problem.__wrapped__(device, dtype)
    assert found is None if problem is None else problem in found


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_a_scale_must_be_positive(scale: float, device: torch.device) -> None:
    with pytest.raises(ValueError, match="give one above 0"):
        attention(**make(1, 3, 1, 1, 16, device), intervals=key_intervals(1, 3, device), scale=scale)
