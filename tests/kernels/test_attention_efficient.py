"""Attention through PyTorch's memory-efficient kernel: its calls against float64, and on a GPU the kernel itself.

Without a GPU the operators are `efficient_stand_in`'s.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from efficient_stand_in import StandIn, efficient, stand_in  # noqa: F401
from kernel_checks import (
    FLOAT32_BUDGET,
    LAYOUTS,
    assert_no_worse_over_seeds,
    assert_repeatable_and_read_only,
    double,
    evaluate,
    fresh,
    gpu,
    record_launches,
    relative_error,
    same_bits,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgemma.kernels import attention_efficient, attention_forward, attention_wide
from fastgemma.kernels.attention import attention, attention_reference
from fastgemma.kernels.attention_efficient import efficient_attention
from fastgemma.kernels.key_intervals import KeyIntervals, Runs, key_intervals

CPU = torch.device("cpu")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, its kernel is tested")
# Of one row each: of two entries, whose last and first documents are not one.
LENGTHS = ((9, 1, 22, 8), (1, 1, 38), (40,))


def make(batch: int, seq_len: int, heads: int, kv_heads: int, head_dim: int, **options: Any) -> dict[str, Any]:
    options = {"device": CPU, **options}
    return {
        name: fresh(batch, seq_len, count, head_dim, **options)
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
    }


def documents(*lengths: tuple[int, ...]) -> torch.Tensor:
    """Numbers of documents of so many tokens; each entry of the batch begins with 0."""
    return torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths])


def run(fn: Any, intervals: KeyIntervals, scale: float) -> Any:
    return lambda q, k, v: fn(q, k, v, intervals, scale)


def check(inputs: dict[str, Any], intervals: KeyIntervals, scale: float = 0.3, layout: str = "contiguous") -> None:
    dout = fresh(*inputs["q"].shape, device=CPU, layout=layout, grad=False)
    truth = evaluate(run(attention_reference, intervals, scale), double(inputs), [double(dout)])
    actual = evaluate(run(efficient_attention, intervals, scale), inputs, [dout])
    assert actual.keys() == truth.keys()
    for name, value in actual.items():
        assert value.shape == truth[name].shape and value.dtype == torch.float32, name
        # Gradients of rows with a single key, exact zeros, are roundings of the output, as they are in SDPA.
        assert relative_error(value, truth[name]) <= FLOAT32_BUDGET, name


# Without a GPU: what the operators are asked


@without_gpu
@pytest.mark.parametrize("seq_len", [1, 2, 31, 33, 65])
@pytest.mark.parametrize("window", [None, 1, 20, 33, 100])
def test_lengths_and_windows(seq_len: int, window: int | None, stand_in: StandIn) -> None:  # noqa: F811
    check(make(2, seq_len, 4, 1, 16), key_intervals(2, seq_len, CPU, window))
    forward, backward = stand_in.calls
    assert (forward.name, backward.name) == ("forward", "backward")
    # A window that hides nothing is none: the kernel would clear its workspace for it.
    expected = window if window is not None and window < seq_len else None
    assert forward.window_size == backward.window_size == expected


@without_gpu
@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (8, 1), (8, 2), (4, 4), (16, 8), (3, 1)])
def test_grouped_heads(heads: int, kv_heads: int, stand_in: StandIn) -> None:  # noqa: F811
    check(make(2, 19, heads, kv_heads, 16), key_intervals(2, 19, CPU, 7))
    for call in stand_in.calls:
        assert (call.keys[2] == 0) == (kv_heads == 1 and heads > 1), "a single head is not copied"


@without_gpu
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("window", [None, 1, 9, 39])
@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[:1], ((40,), (40,))], ids=str)
def test_documents(
    lengths: tuple[tuple[int, ...], ...],
    window: int | None,
    kv_heads: int,
    stand_in: StandIn,  # noqa: F811
) -> None:
    batch = len(lengths)
    check(make(batch, 40, 4, kv_heads, 16), key_intervals(batch, 40, CPU, window, documents=documents(*lengths)))
    forward, backward = stand_in.calls
    assert forward.sequences == backward.sequences == sum(map(len, lengths))
    assert forward.rows == 40 * batch and forward.max_seqlen == max(n for row in lengths for n in row)


@without_gpu
@pytest.mark.parametrize("rows", [1, 12, 40, 1000])
def test_documents_in_portions(rows: int, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """As many in one launch as its workspace allows, whose size is the longest's for each."""
    monkeypatch.setattr(attention_efficient, "workspace_bytes", lambda device: rows * 4 * 4 * 16)
    check(make(3, 40, 4, 2, 16), key_intervals(3, 40, CPU, 9, documents=documents(*LENGTHS)))
    forwards, backwards = ([call for call in stand_in.calls if call.name == name] for name in ("forward", "backward"))
    assert [(call.sequences, call.rows) for call in forwards] == [(call.sequences, call.rows) for call in backwards]
    assert sum(call.sequences for call in backwards) == 8 and sum(call.rows for call in backwards) == 120
    for call in backwards:
        assert call.max_seqlen is not None
        assert call.sequences == 1 or call.sequences * call.max_seqlen <= rows
    assert len(backwards) == {1: 8, 12: 7, 40: 5, 1000: 1}[rows]


@without_gpu
def test_another_budget_before_the_backward(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """What was saved is in the forward's portions."""
    inputs, intervals = make(3, 40, 4, 2, 16), key_intervals(3, 40, CPU, 9, documents=documents(*LENGTHS))
    expected = evaluate(run(efficient_attention, intervals, 1.0), inputs, [torch.ones(3, 40, 4, 16)])
    monkeypatch.setattr(attention_efficient, "workspace_bytes", lambda device: 12 * 4 * 4 * 16)
    out = efficient_attention(**inputs, intervals=intervals)
    monkeypatch.setattr(attention_efficient, "workspace_bytes", lambda device: 40 * 4 * 4 * 16)
    for name, grad in zip("qkv", torch.autograd.grad(out.sum(), list(inputs.values()))):
        assert relative_error(grad, expected[f"d{name}"]) <= 1e-6, name


@without_gpu
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, stand_in: StandIn) -> None:  # noqa: F811
    intervals = key_intervals(2, 21, CPU, 8)
    check(make(2, 21, 4, 2, 16, layout=layout), intervals)
    check(make(2, 21, 4, 2, 16), intervals, layout=layout)


@without_gpu
def test_tensors_that_begin_anywhere(stand_in: StandIn) -> None:  # noqa: F811
    """The stand-in asks for multiples of 16 bytes, as the kernel does."""
    shapes = {"q": (1, 21, 4, 16), "k": (1, 21, 1, 16), "v": (1, 21, 1, 16)}
    inputs = {
        name: torch.randn(1 + 21 * shape[2] * 16)[1:].view(shape).requires_grad_() for name, shape in shapes.items()
    }
    check(inputs, key_intervals(1, 21, CPU, 8))


@without_gpu
@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "kv"])
def test_some_gradients(wanted: str, stand_in: StandIn) -> None:  # noqa: F811
    inputs = make(1, 33, 2, 1, 16)
    dout = fresh(1, 33, 2, 16, device=CPU, grad=False)
    everything = evaluate(run(efficient_attention, key_intervals(1, 33, CPU), 1.0), inputs, [dout])
    for name, tensor in inputs.items():
        tensor.requires_grad_(name in wanted)
    some = evaluate(run(efficient_attention, key_intervals(1, 33, CPU), 1.0), inputs, [dout])
    assert some.keys() == {"output 0", *(f"d{name}" for name in wanted)}
    for name, value in some.items():
        assert same_bits(value, everything[name]), name


@without_gpu
@pytest.mark.parametrize("lengths", [None, (40, 30)])
def test_repeatable_and_read_only(lengths: tuple[int, ...] | None, stand_in: StandIn) -> None:  # noqa: F811
    packed = None if lengths is None else documents(lengths, lengths)
    intervals = key_intervals(2, 70, CPU, 40, documents=packed)
    dout = fresh(2, 70, 4, 16, device=CPU, grad=False)
    assert_repeatable_and_read_only(run(efficient_attention, intervals, 1.0), make(2, 70, 4, 2, 16), [dout])


@without_gpu
def test_saves_its_inputs_its_output_and_a_number_a_row(stand_in: StandIn) -> None:  # noqa: F811
    saved: list[torch.Tensor] = []
    inputs = make(1, 33, 4, 2, 16)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = efficient_attention(**inputs, intervals=key_intervals(1, 33, CPU))
    held = {t.data_ptr() for t in (*inputs.values(), out)}
    (lse,) = (t for t in saved if t.data_ptr() not in held)
    assert len(saved) == 5 and lse.shape == (1, 4, 64) and lse.dtype == torch.float32


@without_gpu
def test_second_derivatives_raise(stand_in: StandIn) -> None:  # noqa: F811
    inputs = make(1, 5, 2, 1, 16)
    out = efficient_attention(**inputs, intervals=key_intervals(1, 5, CPU))
    (dq,) = torch.autograd.grad(out.sum(), inputs["q"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)], ids=str)
def test_empty(shape: tuple[int, int], device: torch.device) -> None:
    """Nothing is launched, so that no stand-in is needed."""
    inputs = make(*shape, 4, 2, 16, device=device)
    for packed in (None, torch.zeros(shape)):
        intervals = key_intervals(*shape, device, documents=packed)
        dout = torch.zeros(*shape, 4, 16, device=device)
        results = evaluate(run(efficient_attention, intervals, 1.0), inputs, [dout])
        assert results["output 0"].shape == (*shape, 4, 16) and results["dk"].shape == (*shape, 2, 16)


def test_errors(device: torch.device) -> None:
    inputs = make(1, 9, 4, 2, 16, device=device)
    padded = key_intervals(1, 9, device, padding_mask=torch.ones(1, 9))
    with pytest.raises(ValueError, match="causal and windowed rows only"):
        efficient_attention(**inputs, intervals=padded)
    with pytest.raises(TypeError, match="q in torch.float16"):
        efficient_attention(inputs["q"].half(), inputs["k"], inputs["v"], key_intervals(1, 9, device))
    with pytest.raises(ValueError, match="do not fit q"):
        efficient_attention(**inputs, intervals=key_intervals(1, 8, device))
    with pytest.raises(ValueError, match="give one above 0"):
        efficient_attention(**inputs, intervals=key_intervals(1, 9, device), scale=0.0)


@without_gpu
@pytest.mark.parametrize(
    "message, known",
    [("cutlassB: no kernel found to launch!", True), ("... was not enabled for build.", True), ("out of order", False)],
)
def test_builds_of_torch_without_the_kernel(
    message: str,
    known: bool,
    stand_in: StandIn,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = attention_efficient.efficient_problem.__wrapped__
    assert asked(CPU, torch.float16) is None and len(stand_in.calls) == 2

    def missing(*args: Any) -> Any:
        raise RuntimeError(message)

    monkeypatch.setattr(attention_efficient, "_bwd", missing)
    if known:
        assert "no memory-efficient kernel for torch.float16" in asked(CPU, torch.float16)
    else:
        with pytest.raises(RuntimeError, match=message):
            asked(CPU, torch.float16)


@without_gpu
def test_attention_goes_where_its_row_says(
    efficient: StandIn,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Or is the reference, where intervals are more than runs: our kernels may not compile there."""
    launched = record_launches(monkeypatch, attention_forward, attention_wide)
    inputs = make(1, 9, 4, 2, 16)
    by_runs = key_intervals(1, 9, CPU, 4)
    out = attention(**inputs, intervals=by_runs)
    assert len(efficient.calls) == 1 and not launched
    assert relative_error(out, attention_reference(**double(inputs), intervals=by_runs)) <= 1e-6
    padded = key_intervals(1, 9, CPU, 4, padding_mask=torch.ones(1, 9))
    assert same_bits(attention(**inputs, intervals=padded), attention_reference(**inputs, intervals=padded))
    assert len(efficient.calls) == 1 and not launched


def test_runs_say_what_the_intervals_say() -> None:
    plain = key_intervals(2, 5, CPU, 3)
    assert plain.runs == Runs()
    packed = key_intervals(2, 5, CPU, documents=documents((2, 3), (4, 1)))
    assert packed.runs is not None and packed.runs.bounds == (0, 2, 5, 9, 10)
    assert packed.runs.offsets is not None
    assert packed.runs.offsets.dtype == torch.int32 and packed.runs.offsets.tolist() == [0, 2, 5, 9, 10]
    for mask in ({"padding_mask": torch.ones(2, 5)}, {"blocks": torch.full((2, 5), -1)}):
        assert key_intervals(2, 5, CPU, **mask).runs is None
        assert key_intervals(2, 5, CPU, documents=documents((2, 3), (4, 1)), **mask).runs is None
    on_meta = packed.to(torch.device("meta"))
    assert on_meta.runs is not None and on_meta.runs.bounds == packed.runs.bounds
    assert on_meta.runs.offsets is not None and on_meta.runs.offsets.device.type == "meta"
    kept = KeyIntervals.from_tensors(plain.tensors((16,)), plain.causal, plain.window, (16,), one_run=True)
    assert kept.runs == Runs() and torch.equal(kept.dense(), plain.dense())
    assert KeyIntervals.from_tensors(plain.tensors(()), True, 3, ()).runs is None


def test_documents_on_the_gpu_are_not_waited_for() -> None:
    """The meta device has nothing to wait for: asking it would raise."""
    meta = torch.device("meta")
    assert key_intervals(1, 5, meta, documents=documents((2, 3)).to(meta)).runs is None


# On a GPU: the kernel


GPU = torch.device("cuda", 0)
HALVES = (torch.float16, torch.bfloat16)
# head_dim and window of Gemma 4's layers.
LAYERS = ((256, 512), (512, None))
PACKED = (700, 1, 63, 513, 772)


def on_gpu(test: Any) -> Any:
    for mark in gpu:
        test = mark(test)
    return test


@on_gpu
def test_the_kernel_is_there() -> None:
    assert attention_efficient.efficient_problem.__wrapped__(GPU, torch.float16) is None


def skip_without(dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability(GPU) < (8, 0):
        pytest.skip("bfloat16 needs Ampere")


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """As the models call it, through what SDPA has for masks where it has no cuDNN: before Ampere."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale).transpose(1, 2)


def assert_as_good_as_sdpa(
    seq_len: int,
    kv_heads: int,
    head_dim: int,
    intervals: KeyIntervals,
    dtype: torch.dtype,
    seeds: int = 5,
) -> None:
    scale = head_dim**-0.5
    stock = functools.partial(sdpa, mask=intervals.dense()[:, None], scale=scale)
    ours, theirs, truth = [], [], []
    for seed in range(seeds):
        torch.manual_seed(seed)
        inputs = make(1, seq_len, 8, kv_heads, head_dim, device=GPU, dtype=dtype)
        dout = fresh(1, seq_len, 8, head_dim, device=GPU, dtype=dtype, grad=False)
        ours.append(evaluate(run(efficient_attention, intervals, scale), inputs, [dout]))
        theirs.append(evaluate(stock, inputs, [dout]))
        truth.append(evaluate(run(attention_reference, intervals, scale), double(inputs), [double(dout)]))
    assert_no_worse_over_seeds(ours, theirs, truth)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("seq_len", [63, 513, 2049])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("head_dim, window", LAYERS)
@on_gpu
def test_no_worse_than_sdpa(head_dim: int, window: int | None, kv_heads: int, seq_len: int, dtype: torch.dtype) -> None:
    skip_without(dtype)
    assert_as_good_as_sdpa(seq_len, kv_heads, head_dim, key_intervals(1, seq_len, GPU, window), dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("head_dim, window", LAYERS)
@pytest.mark.parametrize("batch", [1, 3])
@on_gpu
def test_a_single_token(batch: int, head_dim: int, window: int | None, kv_heads: int, dtype: torch.dtype) -> None:
    """Its output is its value, and no score has a gradient; nor does the kernel take heads for rows without one."""
    skip_without(dtype)
    inputs = make(batch, 1, 8, kv_heads, head_dim, device=GPU, dtype=dtype)
    dout = fresh(batch, 1, 8, head_dim, device=GPU, dtype=dtype, grad=False)
    for intervals in (key_intervals(batch, 1, GPU, window), key_intervals(batch, 1, GPU, 1)):
        results = evaluate(run(efficient_attention, intervals, 1.0), inputs, [dout])
        values = inputs["v"].detach().repeat_interleave(8 // kv_heads, 2)
        assert same_bits(results["output 0"], values)
        dv = dout.double().unflatten(2, (kv_heads, -1)).sum(3)
        assert relative_error(results["dv"], dv) <= torch.finfo(dtype).eps
        assert results["dq"].abs().max() <= 1e-3 and results["dk"].abs().max() <= 1e-3
        with torch.no_grad():
            assert same_bits(efficient_attention(**inputs, intervals=intervals), values)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("head_dim, window", LAYERS)
@pytest.mark.parametrize("portions", [False, True])
@on_gpu
def test_packed_documents(
    portions: bool,
    head_dim: int,
    window: int | None,
    kv_heads: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    skip_without(dtype)
    if portions:
        monkeypatch.setattr(attention_efficient, "workspace_bytes", lambda device: 1400 * 4 * 8 * head_dim)
    seq_len = sum(PACKED)
    intervals = key_intervals(1, seq_len, GPU, window, documents=documents(PACKED))
    assert intervals.runs is not None
    assert_as_good_as_sdpa(seq_len, kv_heads, head_dim, intervals, dtype)


@pytest.mark.parametrize("head_dim, window", LAYERS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@on_gpu
def test_documents_of_several_entries_are_those_alone(dtype: torch.dtype, head_dim: int, window: int | None) -> None:
    skip_without(dtype)
    lengths = ((700, 1, 299), (1000,), (3, 500, 497))
    intervals = key_intervals(3, 1000, GPU, window, documents=documents(*lengths))
    inputs = make(3, 1000, 8, 1, head_dim, device=GPU, dtype=dtype, grad=False)
    out = efficient_attention(**inputs, intervals=intervals, scale=0.05)
    for entry, row in enumerate(lengths):
        start = 0
        for n in row:
            alone = {name: x[entry : entry + 1, start : start + n] for name, x in inputs.items()}
            expected = efficient_attention(**alone, intervals=key_intervals(1, n, GPU, window), scale=0.05)
            assert relative_error(out[entry, start : start + n], expected[0]) <= torch.finfo(dtype).eps
            start += n


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@on_gpu
def test_repeats_to_the_bit_where_torch_is_deterministic(dtype: torch.dtype) -> None:
    skip_without(dtype)
    torch.use_deterministic_algorithms(True)
    for head_dim, window in LAYERS:
        inputs = make(1, 2049, 8, 2, head_dim, device=GPU, dtype=dtype)
        dout = fresh(1, 2049, 8, head_dim, device=GPU, dtype=dtype, grad=False)
        intervals = key_intervals(1, 2049, GPU, window)
        assert_repeatable_and_read_only(run(efficient_attention, intervals, head_dim**-0.5), inputs, [dout])


@pytest.mark.parametrize("head_dim, window", LAYERS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@on_gpu
def test_in_a_cuda_graph(dtype: torch.dtype, head_dim: int, window: int | None) -> None:
    """Nothing in it asks the GPU, and its random state, which no dropout needs, is not captured."""
    skip_without(dtype)
    torch.use_deterministic_algorithms(True)
    inputs = make(1, 513, 8, 2, head_dim, device=GPU, dtype=dtype)
    dout = fresh(1, 513, 8, head_dim, device=GPU, dtype=dtype, grad=False)
    intervals = key_intervals(1, 513, GPU, window)

    def step() -> dict[str, torch.Tensor]:
        return evaluate(run(efficient_attention, intervals, head_dim**-0.5), inputs, [dout])

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    with torch.no_grad():
        for tensor in inputs.values():
            tensor.normal_()
    graph.replay()
    torch.cuda.synchronize()
    for name, value in step().items():
        assert same_bits(recorded[name], value), name
