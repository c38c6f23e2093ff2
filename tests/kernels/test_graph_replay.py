"""A function replayed from recordings: its values and gradients, what it copies, what it refuses."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from graph_stand_in import DEVICE, graphs  # noqa: F401

from fastgemma.kernels.graph_replay import Arena, Replay

pytestmark = pytest.mark.usefixtures("graphs")
NAMES = (("x", "y"), ("c",))


def function(inputs: Any, constants: Any, trained: Any, reads: bool = True) -> tuple[torch.Tensor, ...]:
    """Two outputs, a third that nothing differentiates, and a trained tensor that nothing uses."""
    (x, y), (c,), (a, b, _) = inputs, constants, trained
    h = torch.tanh(x @ a) * c
    return h if y is None else h + y, (h * b).sum(1), c * 2.0


def tensors(seed: int, rows: int = 5, dtype: torch.dtype = torch.float32) -> tuple[Any, Any, Any]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype).to(DEVICE)

    inputs = [draw(rows, 7).requires_grad_(), draw(rows, 3).requires_grad_()]
    return inputs, [draw(rows, 3)], [draw(7, 3).requires_grad_(), draw(3).requires_grad_(), draw(2).requires_grad_()]


def record(inputs: Any, constants: Any, trained: Any, arena: Arena | None = None, **options: Any) -> Replay:
    options = {"function": function, "draws": False, "kind": None, **options}
    run = options.pop("function")
    return Replay(run, arena or Arena(DEVICE), NAMES, inputs, constants, trained, **options)


def results(run: Any, inputs: Any, constants: Any, trained: Any) -> list[torch.Tensor | None]:
    outs = run(inputs, constants, trained)
    leaves = [t for t in (*inputs, *trained) if t is not None and t.requires_grad]
    ups = [torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out) for out in outs[:2]]
    return [*outs, *torch.autograd.grad(outs[:2], leaves, ups, allow_unused=True)]


def assert_same(actual: Any, expected: Any) -> None:
    assert len(actual) == len(expected)
    for index, (got, right) in enumerate(zip(actual, expected)):
        assert (got is None) == (right is None), index
        assert got is None or torch.equal(got, right), index


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_values_and_gradients_are_those_of_a_plain_call(dtype: torch.dtype) -> None:
    inputs, constants, trained = tensors(0, dtype=dtype)
    replay = record(inputs, constants, trained)
    for seed in (1, 2):  # other inputs and constants; the trained tensors keep their places and change their values
        inputs, constants, values = tensors(seed, dtype=dtype)
        with torch.no_grad():
            for tensor, value in zip(trained, values):
                tensor.copy_(value)
        assert_same(
            results(replay, inputs, constants, trained),
            results(function, inputs, constants, trained),
        )


def test_gradients_that_are_only_handed_on() -> None:
    """They are parts of the output's gradient, whose buffer another gradient is written to."""

    def function(inputs: Any, constants: Any, trained: Any, reads: bool = True) -> tuple[torch.Tensor, ...]:
        (x, y), (c,), (weight,) = inputs, constants, trained
        return (x * weight + torch.cat([c, y]),)

    def draw(rows: int) -> torch.Tensor:
        return torch.randn(rows, 3, device=DEVICE)

    inputs, constants = [draw(6).requires_grad_(), draw(2).requires_grad_()], [draw(4)]
    weight = torch.tensor([3.0], device=DEVICE, requires_grad=True)
    replay = record(inputs, constants, [weight], function=function)
    assert_same(results(replay, inputs, constants, [weight]), results(function, inputs, constants, [weight]))


def test_a_missing_input_and_frozen_ones() -> None:
    (x, _), constants, trained = tensors(0)
    for inputs in ([x, None], [x.detach(), None]):
        replay = record(inputs, constants, trained)
        assert_same(results(replay, inputs, constants, trained), results(function, inputs, constants, trained))


def test_outputs_and_gradients_are_the_callers() -> None:
    inputs, constants, trained = tensors(0)
    replay = record(inputs, constants, trained)
    first = results(replay, inputs, constants, trained)
    kept = copy.deepcopy([None if t is None else t.detach() for t in first])
    results(replay, *tensors(1)[:2], trained)
    assert_same([None if t is None else t.detach() for t in first], kept)


def test_gradients_start_where_vectors_may() -> None:
    inputs, constants, trained = tensors(0)
    grads = results(record(inputs, constants, trained), inputs, constants, trained)[-3:]
    assert grads[2] is None
    for grad, tensor in zip(grads, trained):
        assert grad is None or grad.stride() == tensor.stride()
        assert grad is None or grad.storage_offset() * grad.element_size() % 256 == 0


def test_backward_twice_and_after_other_calls() -> None:
    inputs, constants, trained = tensors(0)
    replay = record(inputs, constants, trained)
    others = tensors(1)[:2]
    out = replay(inputs, constants, trained)[0]
    other = replay(*others, trained)[0]
    expected = [torch.autograd.grad(function(*c, trained)[0].sum(), trained[0]) for c in ((inputs, constants), others)]
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(out.sum(), trained[0], retain_graph=True)[0], expected[0][0])
        assert torch.equal(torch.autograd.grad(other.sum(), trained[0], retain_graph=True)[0], expected[1][0])


def test_constants_are_copied_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, constants, trained = tensors(0)
    replay = record(inputs, constants, trained)
    copies = []
    original = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, source: copies.append(source) or original(self, source))

    def loads() -> int:
        copies.clear()
        replay.forward(inputs, constants)
        return sum(source.data_ptr() == constants[0].data_ptr() for source in copies)

    assert loads() == 0
    constants[0].add_(1.0)
    assert loads() == 1 and loads() == 0
    assert torch.equal(replay(inputs, constants, trained)[0], function(inputs, constants, trained)[0])
    constants = [constants[0].clone()]
    assert loads() == 1


def test_recurring_inputs_of_several_recordings() -> None:
    inputs, constants, _ = tensors(0)
    arena = Arena(DEVICE)
    own = [tensors(seed)[2] for seed in (1, 2)]
    replays = [record(inputs, constants, trained, arena, recurring=frozenset("y")) for trained in own]
    for index in (0, 1, 1, 0):
        with torch.no_grad():
            inputs[1].add_(1.0)
        for _ in range(2):
            assert_same(
                results(replays[index], inputs, constants, own[index]),
                results(function, inputs, constants, own[index]),
            )


def test_random_numbers_are_those_of_plain_calls() -> None:
    def drop(inputs: Any, constants: Any, trained: Any, reads: bool = True) -> tuple[torch.Tensor, ...]:
        return (torch.nn.functional.dropout(inputs[0] @ trained[0], 0.5),)

    inputs, constants, trained = tensors(0, rows=64)
    replay = record(inputs, constants, trained, function=drop, draws=True)

    def steps(run: Any) -> list[torch.Tensor]:
        torch.manual_seed(5)
        outs = [run(inputs, constants, trained)[0] for _ in range(3)]
        after = torch.rand(4, device=DEVICE)
        grads = [torch.autograd.grad(out.sum(), trained[0])[0] for out in outs]
        return [*outs, after, *grads, torch.rand(4, device=DEVICE)]

    assert_same(steps(replay), steps(drop))


def test_a_parameter_changed_before_the_backward() -> None:
    inputs, constants, trained = tensors(0)
    replay = record(inputs, constants, trained)
    for change in (lambda t: t.add_(1.0), lambda t: setattr(t, "data", t.clone())):
        out = replay(inputs, constants, trained)[0]
        with torch.no_grad():
            change(trained[0])
        with pytest.raises(RuntimeError, match="modified in place between a forward and its backward"):
            out.sum().backward()


def test_hooks_of_an_enclosing_region_see_the_inputs_alone() -> None:
    inputs, constants, trained = tensors(0)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        replay = record(inputs, constants, trained)
        assert not saved
        out = replay(inputs, constants, trained)[0]
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in inputs]
    assert torch.equal(
        torch.autograd.grad(out.sum(), trained[0])[0],
        torch.autograd.grad(function(inputs, constants, trained)[0].sum(), trained[0])[0],
    )


def test_autocast_is_recorded_and_left_as_it_was() -> None:
    inputs, constants, trained = tensors(0)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        replay = record(inputs, constants, trained)
        assert torch.is_autocast_cache_enabled() and torch.is_autocast_enabled(DEVICE.type)
        expected = function(inputs, constants, trained)
        actual = replay(inputs, constants, trained)
    assert_same(actual, expected)


def test_a_failed_recording_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("none left")

    inputs, constants, trained = tensors(0)
    arena = Arena(DEVICE)
    with pytest.raises(torch.OutOfMemoryError):
        record(inputs, constants, trained, arena, function=fail)
    replay = record(inputs, constants, trained, arena)
    assert_same(results(replay, inputs, constants, trained), results(function, inputs, constants, trained))


def test_a_failed_recording_draws_nothing() -> None:
    """The plain call that follows draws what it would have drawn without an attempt."""

    def draw_and_fail(*_: Any) -> Any:
        torch.rand(3, device=DEVICE)
        raise torch.OutOfMemoryError("none left")

    inputs, constants, trained = tensors(0)
    torch.manual_seed(0)
    expected = torch.rand(3, device=DEVICE)
    torch.manual_seed(0)
    with pytest.raises(torch.OutOfMemoryError):
        record(inputs, constants, trained, function=draw_and_fail, draws=True)
    assert torch.equal(torch.rand(3, device=DEVICE), expected)


def test_a_copy_that_fails_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, constants, trained = tensors(0)
    arena = Arena(DEVICE)
    replay = record(inputs, constants, trained, arena)
    others = tensors(1)[1]
    buffer, copy_ = arena.buffer("c", others[0].shape, others[0].dtype), torch.Tensor.copy_

    def fail_at_constants(self: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        if self is buffer:
            raise torch.OutOfMemoryError("none left")
        return copy_(self, source)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(torch.Tensor, "copy_", fail_at_constants)
        replay(inputs, others, trained)
    for which in (others, constants):
        assert_same(results(replay, inputs, which, trained), results(function, inputs, which, trained))


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="memory of recordings")
def test_recordings_share_memory_and_keep_no_activations() -> None:
    def wide(inputs: Any, constants: Any, trained: Any, reads: bool = True) -> tuple[torch.Tensor, ...]:
        h = inputs[0]
        for _ in range(4):  # saves its own output, as fused attention does
            h = torch.softmax(h, dim=-1)
        return (h * trained[0],)

    x = torch.randn(1024, 1024, device=DEVICE, requires_grad=True)
    weight = torch.ones(1, device=DEVICE, requires_grad=True)
    arena = Arena(DEVICE)
    replays = []
    allocated = []
    for _ in range(4):
        replays.append(record([x, None], [None], [weight], arena, function=wide))
        gc.collect()  # the recorded autograd graph may lie in cycles
        allocated.append(torch.cuda.memory_allocated())
    assert allocated == allocated[:1] * 4
