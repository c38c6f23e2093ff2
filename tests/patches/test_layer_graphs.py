"""Decoder layers replayed from recordings: bit-equal to plain calls, and left alone where they could not be."""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import structures
import torch
from graph_stand_in import DEVICE, graphs  # noqa: F401
from layer_changes import CHANGES, checkpointed, layers
from quick import slow_after
from torch import nn
from transformers.models.gemma4 import modeling_gemma4

import fastgemma
from fastgemma.kernels import graph_replay, lora_mlp
from fastgemma.patches import layer_graphs, layer_readings, layer_recordings
from fastgemma.patches.table import ENGINE

# How attention runs is no question of most tests here, and over intervals of keys it takes the interpreter long.
OVER_MASKS: dict[str, Any] = {"cuda_graphs": "always", "attention": False}
OVER_INTERVALS: dict[str, Any] = {"cuda_graphs": "always"}
Results = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def recording(graphs: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    monkeypatch.setattr(layer_graphs, "_not_worth", lambda mode, hidden_states: None)


@pytest.fixture(autouse=True)
def no_counts_of_before() -> Iterator[None]:
    for op in ENGINE.ops:
        op.fast_calls, op.fallbacks = 0, type(op.fallbacks)()
    yield


def build(
    name: str = "e2b",
    dtype: torch.dtype = torch.float32,
    quantized: bool = False,
    changes: dict[str, Any] | None = None,
    **options: Any,
) -> nn.Module:
    model = structures.build(name, **changes or {}).to(dtype)
    if quantized:
        structures.quantize(model)
    return checkpointed(model.to(DEVICE), **options)


def one_layer() -> nn.Module:
    """For questions of when to record, which a layer answers for itself."""
    return build("31b", changes={"layer_types": ["full_attention"]})


def of_length(length: int) -> dict[str, Any]:
    """What makes a batch of one row of so many tokens."""
    ids = torch.arange(3, 3 + length, device=DEVICE)[None]
    return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


def gradients(model: nn.Module) -> Results:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, seed: int = 0, kind: str = "padding", **changes: Any) -> Results:
    """Loss, gradients, and what the random state became."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss = model(**{**structures.batch(kind, device=DEVICE), **changes}).loss
    loss.backward()
    return {"loss": loss.detach(), "random": torch.rand(3, device=DEVICE), **gradients(model)}


def plainly(run: Callable[[], Any], attention: bool = False) -> Any:
    with fastgemma.patched(cuda_graphs=False, attention=attention):
        return run()


def assert_same(actual: Results, expected: Results) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def counts() -> tuple[int, dict[str, int]]:
    report = fastgemma.status()["cuda_graphs"]
    return report.fast_calls, report.fallbacks


# Each kind of layer, one of which shares another's keys and values.
FEW_LAYERS: dict[str, dict[str, Any]] = {
    name: {"layer_types": ["sliding_attention", "full_attention", "full_attention"], "num_kv_shared_layers": 1}
    for name in ("e2b", "e4b")
}


@pytest.fixture
def warm() -> Iterator[nn.Module]:
    """A patched model whose layers are recorded for the padded batch."""
    model = build(changes={"layer_types": ["full_attention"] * 2, "num_kv_shared_layers": 1})
    with fastgemma.patched(**OVER_MASKS):
        for _ in range(3):
            step(model)
        fast, reasons = counts()
        assert fast == len(layers(model)) and reasons == {"first calls of a shape": 2 * fast}
        yield model


@pytest.mark.slow
@pytest.mark.parametrize("name, kind", [("e2b", "packing"), *((name, "padding") for name in structures.STRUCTURES)])
def test_steps_are_bit_equal(name: str, kind: str) -> None:
    check_steps(build(name, lora_dropout=0.3, changes=FEW_LAYERS.get(name)), name, kind)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["padding", "packing"])
def test_steps_over_intervals_are_bit_equal(kind: str) -> None:
    check_steps(build("e2b", lora_dropout=0.3, changes=FEW_LAYERS["e2b"]), "e2b", kind, intervals=True)


def check_steps(model: nn.Module, name: str, kind: str, intervals: bool = False) -> None:
    expected = plainly(lambda: [step(model, seed, kind) for seed in range(4)], attention=intervals)
    with fastgemma.patched(**(OVER_INTERVALS if intervals else OVER_MASKS)):
        for seed in range(4):
            assert_same(step(model, seed, kind), expected[seed])
        fast, reasons = counts()
    if name == "26b-a4b":
        assert fast == 0 and reasons["experts"] > 0
    else:
        assert fast == 2 * len(layers(model))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="bfloat16 and 4-bit as on the GPU")
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("name", structures.STRUCTURES)
def test_steps_are_bit_equal_in_bfloat16(name: str, quantized: bool) -> None:
    model = build(name, torch.bfloat16, quantized, lora_dropout=0.1)
    with fastgemma.patched(cuda_graphs=False, checkpointing=False):
        expected = [step(model, seed) for seed in range(4)]
    for features in ({"cuda_graphs": False}, OVER_INTERVALS):  # as one operation, and replayed
        with fastgemma.patched(**features):
            for seed in range(4):
                assert_same(step(model, seed), expected[seed])
    assert name == "26b-a4b" or fastgemma.status()["checkpointing"].fast_calls > 0


@pytest.mark.slow
def test_a_layer_that_runs_over_tiles_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_mlp, "workspace_bytes", lambda device: 1 << 16)
    model, batch = one_layer(), structures.batch("padding", rows=2, seq_len=150, device=DEVICE)
    expected = plainly(lambda: step(model, **batch))
    with fastgemma.patched(**OVER_MASKS):
        for _ in range(3):
            actual = step(model, **batch)
        assert counts()[0] == 1
    assert_same(actual, expected)


@pytest.mark.slow
def test_the_optimizer_moves_what_is_replayed() -> None:
    def train(**features: Any) -> list[Results]:
        model = build()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        found = []
        with fastgemma.patched(**features):
            for seed in range(5):
                found.append(step(model, seed))
                optimizer.step()
        return found

    for actual, expected in zip(train(**OVER_MASKS), train(cuda_graphs=False, attention=False)):
        assert_same(actual, expected)


@pytest.mark.parametrize("change", slow_after(1, CHANGES))
def test_a_changed_layer_is_recorded_anew(change: Callable[[nn.Module], None], warm: nn.Module) -> None:
    before = step(warm)
    change(warm)
    expected = plainly(lambda: step(warm))
    assert expected.keys() != before.keys() or any(
        not torch.equal(value, before[name]) for name, value in expected.items()
    )
    with fastgemma.patched(**OVER_MASKS):
        for _ in range(4):
            assert_same(step(warm), expected)
        assert counts()[0] > 0


@pytest.mark.parametrize("name", slow_after(1, ["forward", "apply_rotary_pos_emb"]))
def test_what_was_replaced_is_not_replayed(name: str, warm: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    owner: Any = modeling_gemma4.Gemma4TextDecoderLayer if name == "forward" else modeling_gemma4
    ours = getattr(owner, name)

    def another(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(name)
        return ours(*args, **kwargs).tanh()

    before = step(warm)
    fast, _ = counts()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, another)
        for _ in range(4):
            assert not torch.equal(step(warm)["loss"], before["loss"])
    assert calls and counts()[0] == fast
    assert_same(step(warm), before)


@pytest.mark.slow
def test_a_frozen_parameter_in_place_is_read_in_place(warm: nn.Module) -> None:
    with torch.no_grad():
        layers(warm)[0].input_layernorm.weight.mul_(1.5)
    actual = step(warm)
    assert_same(actual, plainly(lambda: step(warm)))


def test_a_layer_is_read_anew_only_where_it_changed(warm: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    original = layer_readings.read_before
    monkeypatch.setattr(
        layer_readings, "read_before", lambda layer, *args: read.append(layer) or original(layer, *args)
    )
    expected = step(warm)
    assert read == []
    layers(warm)[1].mlp.register_forward_hook(lambda *args: None).remove()
    layers(warm)[1].notes = "of somebody"
    assert_same(step(warm), expected)
    assert read == [layers(warm)[1]]
    assert_same(step(warm), expected)
    assert len(read) == 1


@pytest.mark.slow
def test_keys_that_the_caller_sees_are_not_replayed(warm: nn.Module) -> None:
    fast, _ = counts()
    step(warm, return_shared_kv_states=True)
    assert counts()[1]["keys and values that the caller sees"] == 1
    step(warm)
    assert counts()[0] >= fast + len(layers(warm))


@pytest.mark.slow
def test_several_forwards_before_their_backwards(warm: nn.Module) -> None:
    batches = [structures.batch("padding", device=DEVICE)]
    batches.append({**batches[0], "input_ids": batches[0]["input_ids"].flip(1)})

    def both() -> list[Results]:
        found = []
        losses = [warm(**batch).loss for batch in batches]
        for loss in losses:
            for _ in range(2):
                warm.zero_grad()
                loss.backward(retain_graph=True)
                found.append({"loss": loss.detach(), **gradients(warm)})
        return found

    actual = both()
    assert counts()[0] == 3 * len(layers(warm))
    for got, right in zip(actual, plainly(both)):
        assert_same(got, right)


@pytest.mark.slow
def test_gradient_of_some_parameters(warm: nn.Module) -> None:
    some = [p for p in layers(warm)[-1].parameters() if p.requires_grad][:3]

    def grads() -> Results:
        loss = warm(**structures.batch("padding", device=DEVICE)).loss
        return dict(zip("abc", torch.autograd.grad(loss, some)))

    assert_same(grads(), plainly(grads))


@pytest.mark.slow
def test_gradients_accumulate(warm: nn.Module) -> None:
    def accumulate() -> Results:
        warm.zero_grad()
        for _ in range(3):
            warm(**structures.batch("padding", device=DEVICE)).loss.backward()
        return gradients(warm)

    assert_same(accumulate(), plainly(accumulate))


def test_patches_may_go_before_the_backward(warm: nn.Module) -> None:
    expected = step(warm)
    warm.zero_grad()
    loss = warm(**structures.batch("padding", device=DEVICE)).loss
    fastgemma.unpatch()
    loss.backward()
    assert_same({"loss": loss.detach(), "random": expected["random"], **gradients(warm)}, expected)


@pytest.mark.slow
def test_a_step_between_forward_and_backward_is_an_error(warm: nn.Module) -> None:
    loss = warm(**structures.batch("padding", device=DEVICE)).loss
    with torch.no_grad():
        layers(warm)[0].self_attn.q_proj.lora_A["default"].weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified in place"):
        loss.backward()


def _hook_layer(layer: Any) -> None:
    layer.register_forward_hook(lambda *_: None)


def _subclass(layer: Any) -> None:
    layer.__class__ = type("Ours", (type(layer),), {})


def _hook_norm(layer: Any) -> None:
    layer.input_layernorm.register_forward_hook(lambda *_: None)


def _checkpoint_otherwise(layer: Any) -> None:
    function = layer._gradient_checkpointing_func
    layer._gradient_checkpointing_func = functools.partial(
        lambda *args, use_reentrant: function(*args), use_reentrant=False
    )


def _drop_attention(layer: Any) -> None:
    layer.self_attn.attention_dropout = 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_hook_layer, "hooks on the layer"),
        (_subclass, "own call is not stock's"),
        (_hook_norm, "input_layernorm does more"),
        (_checkpoint_otherwise, "another kind of checkpointing"),
        (_drop_attention, "attention other than SDPA"),
    ],
)
def test_what_cannot_be_replayed_is_not(change: Callable[[Any], None], reason: str, warm: nn.Module) -> None:
    change(layers(warm)[0])
    fast = counts()[0]
    actual = step(warm)
    assert counts()[0] < fast + len(layers(warm))
    assert any(reason in found for found in counts()[1]), counts()[1]
    assert_same(actual, plainly(lambda: step(warm)))


@pytest.mark.slow
def test_eager_attention_is_replayed_over_intervals_alone(warm: nn.Module) -> None:
    warm.get_base_model().config._attn_implementation = "eager"
    if DEVICE.type == "cuda":  # where float32 attention is stock's
        warm.to(torch.bfloat16)
    fast = counts()[0]
    with fastgemma.patched(**OVER_INTERVALS):
        for _ in range(3):
            actual = step(warm)
    assert counts()[0] == fast + len(layers(warm))
    assert_same(actual, plainly(lambda: step(warm), attention=True))
    step(warm)
    assert counts()[0] == fast + len(layers(warm))
    assert counts()[1]["attention other than SDPA without dropout"] == len(layers(warm))


@pytest.mark.slow
def test_large_trained_weights_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_recordings, "_MAX_TRAINED_BYTES", 100)
    model = build()
    with fastgemma.patched(**OVER_MASKS):
        for _ in range(4):
            step(model)
        fast, reasons = counts()
    assert fast == 0 and reasons["large trained weights"] > 0


@pytest.mark.slow
def test_only_training_with_checkpointing_is_replayed(warm: nn.Module) -> None:
    before = counts()
    batch = structures.batch("padding", device=DEVICE)
    with torch.no_grad():
        warm(**batch)
    warm.eval()
    warm(**batch).loss.backward()
    warm.train()
    warm.gradient_checkpointing_disable()
    step(warm)
    assert counts() == before


@pytest.mark.slow
def test_shapes_that_come_often_are_recorded_and_rare_ones_are_not() -> None:
    model = one_layer()
    with fastgemma.patched(**OVER_MASKS):
        for index in range(24):  # every other batch is as long as no other
            step(model, **of_length(9 if index % 2 else 10 + index))
        assert counts() == (10, {"first calls of a shape": 14})
        for _ in range(3):  # a shape that comes at last, and still rarely
            step(model, **of_length(7))
        assert counts()[1] == {"first calls of a shape": 16, "shapes that vary": 1}


@pytest.mark.slow
def test_recordings_of_several_shapes() -> None:
    model = one_layer()
    expected = {length: plainly(functools.partial(step, model, **of_length(length))) for length in (9, 10)}
    with fastgemma.patched(**OVER_MASKS):
        for index in range(10):
            assert_same(step(model, **of_length(9 + index % 2)), expected[9 + index % 2])
        assert counts()[0] == 6


@pytest.fixture
def arenas(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Any]]:
    """Every arena that was made, whether it still lives or not."""
    found: list[weakref.ref[Any]] = []
    original = graph_replay.Arena.__init__

    def note(self: Any, device: torch.device) -> None:
        found.append(weakref.ref(self))
        original(self, device)

    monkeypatch.setattr(graph_replay.Arena, "__init__", note)
    return found


@pytest.mark.slow
def test_few_recordings_are_kept(arenas: list[weakref.ref[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_recordings, "_MAX_GRAPHS", 2)
    model = one_layer()
    with fastgemma.patched(**OVER_MASKS):
        for length, times in ((9, 4), (10, 5), (11, 10)):
            for _ in range(times):
                step(model, **of_length(length))
        gc.collect()
        assert len(arenas) == 3 and sum(arena() is not None for arena in arenas) == 2


@pytest.mark.slow
def test_no_memory_for_a_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    model = one_layer()
    expected = plainly(lambda: step(model))

    def none_left(*_: Any) -> Any:
        raise torch.OutOfMemoryError("none left")

    with fastgemma.patched(**OVER_MASKS):
        for _ in range(2):
            step(model)
        with monkeypatch.context() as patch:
            patch.setattr(graph_replay.Graph, "__init__", none_left)
            assert_same(step(model), expected)
            assert counts()[1]["no memory for a recording"] == len(layers(model))
        step(model)  # not tried again
        assert counts()[0] == 0 and counts()[1]["no memory for a recording"] == 2 * len(layers(model))
    with fastgemma.patched(cuda_graphs=False, attention=False):
        pass
    with fastgemma.patched(**OVER_MASKS):
        for _ in range(3):
            step(model)
        assert counts()[0] == len(layers(model))


@pytest.mark.slow
def test_another_thread_records_for_itself(arenas: list[weakref.ref[Any]]) -> None:
    model = one_layer()
    expected = plainly(lambda: step(model))
    found: list[Results] = []
    with fastgemma.patched(**OVER_MASKS):
        for _ in range(3):
            step(model)
        thread = threading.Thread(target=lambda: found.extend(step(model) for _ in range(3)))
        thread.start()
        thread.join()
        assert counts() == (2, {"first calls of a shape": 4}) and len(arenas) == 2
    for got in found:
        assert_same(got, expected)


def test_a_recording_that_fails_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model = one_layer()

    def fail(*_: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    with fastgemma.patched(**OVER_MASKS):
        for _ in range(2):
            step(model)
        monkeypatch.setattr(graph_replay.Graph, "__init__", fail)
        with pytest.raises(fastgemma.PatchError, match=r"not permitted when stream is capturing\).*cuda_graphs=False"):
            step(model)


def test_a_frozen_model_is_left_alone() -> None:
    model = one_layer()
    model.get_input_embeddings()._forward_hooks.clear()  # those that make its output require gradients
    model.requires_grad_(False)
    with fastgemma.patched(**OVER_MASKS):
        for _ in range(4):
            model(**structures.batch("padding", device=DEVICE))
        assert counts() == (0, {"first calls of a shape": 2, "nothing to differentiate": 2})


@pytest.mark.slow
def test_recordings_die_with_the_model_and_with_the_patch(arenas: list[weakref.ref[Any]]) -> None:
    model = build()
    with fastgemma.patched(**OVER_MASKS):
        for _ in range(3):
            step(model)
        assert arenas[0]() is not None
    gc.collect()
    assert arenas[0]() is None
    if DEVICE.type == "cpu":
        return  # the stand-in keeps the work that it records, and with it the model
    with fastgemma.patched(**OVER_MASKS):
        for _ in range(3):
            step(model)
        del model
        gc.collect()
        assert len(arenas) == 2 and arenas[1]() is None


@pytest.mark.slow
def test_two_models(warm: nn.Module) -> None:
    other = build("12b")
    expected = [plainly(lambda m=m: step(m)) for m in (warm, other)]
    with fastgemma.patched(**OVER_MASKS):
        for _ in range(4):
            for model, right in zip((warm, other), expected):
                assert_same(step(model), right)


def test_without_a_gpu_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert layer_graphs._not_worth("always", torch.zeros(2, 3)) == "no gpu"


@pytest.mark.parametrize(
    ("gib", "rows", "mode", "reason"),
    [
        (80, 8448, "auto", None),
        (80, 8449, "auto", "many rows"),
        (8, 64, "auto", "little memory"),
        (8, 9000, "always", None),
    ],
)
def test_where_it_pays(gib: int, rows: int, mode: str, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    class Hidden:
        device = torch.device("cuda", 0)
        shape = torch.Size((1, rows, 4))

    class Card:
        multi_processor_count, total_memory = 132, gib << 30

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda index: 1.0)
    found = layer_graphs._not_worth(mode, Hidden())  # type: ignore[arg-type]
    assert found is None if reason is None else found is not None and reason in found
