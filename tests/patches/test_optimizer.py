"""bitsandbytes' optimizers: the same C calls by a shorter way, and no wait where a stream orders the work."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_checks import gpu

import fastgemma
from fastgemma.patches import optimizer as patch

bitsandbytes = pytest.importorskip("bitsandbytes")
optimizer_module = pytest.importorskip("bitsandbytes.optim.optimizer")
STOCK: dict[str, Any] = dict.fromkeys(fastgemma.status(), False)
ON_A_GPU: Any = SimpleNamespace(device=torch.device("cuda", 0), is_cuda=True, get_device=lambda: 0)
# Distinct, so that no two arguments can change places unseen.
HYPERPARAMETERS: dict[str, Any] = {
    "betas": (0.9, 0.95, 0.99), "eps": 1e-7, "weight_decay": 0.05, "alpha": 0.3, "skip_zeros": True,
}  # fmt: skip
Call = tuple[str, tuple[Any, ...]]


def patched() -> AbstractContextManager[Any]:
    return fastgemma.patched(**{**STOCK, "optimizer": True})


def counts() -> tuple[int, dict[str, int]]:
    report = fastgemma.status()["optimizer"]
    return report.fast_calls, dict(report.fallbacks)


# The wait


@pytest.fixture
def default_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose device 0 is current, and its default stream too."""
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)


@pytest.fixture
def waits(default_stream: None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the waits."""
    counted: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: counted.append(1))
    return counted


def test_the_wait_is_left_out_and_comes_back(waits: list[int]) -> None:
    with patched():
        before, _ = counts()
        optimizer_module.sync_gpu(ON_A_GPU)
        assert counts()[0] == before + 1
        captured = optimizer_module.sync_gpu
    assert not waits
    captured(ON_A_GPU)
    optimizer_module.sync_gpu(ON_A_GPU)
    assert len(waits) == 2


def test_another_stream_waits(waits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7)
    with patched():
        optimizer_module.sync_gpu(ON_A_GPU)
        assert counts()[1]["a stream of its own"]
    assert len(waits) == 1


def test_paged_states_wait(waits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.functional import GlobalPageManager

    monkeypatch.setattr(GlobalPageManager.get_instance(), "paged_tensors", [object()])
    with patched():
        optimizer_module.sync_gpu(ON_A_GPU)
        assert counts()[1]["paged states"]
    assert len(waits) == 1


# The update


@pytest.fixture
def calls(default_stream: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Call]]:
    """What the C functions receive, where CPU tensors pass for tensors of GPU 0 and C functions only take notes."""
    from bitsandbytes.backends.cuda import ops

    received: list[Call] = []

    def c_functions(bits: str, types: tuple[Any, ...]) -> tuple[Any, ...]:
        def noting(dtype: str) -> Callable[..., None]:
            return lambda *arguments: received.append((f"{bits} {dtype}", arguments))

        return tuple(ctypes.CFUNCTYPE(None, *types)(noting(dtype)) for dtype in ("float32", "float16", "bfloat16"))

    monkeypatch.setitem(ops.str2optimizer8bit_blockwise, "adam", c_functions("8bit", patch._8BIT_TYPES))
    monkeypatch.setitem(ops.str2optimizer32bit, "adam", c_functions("32bit", patch._32BIT_TYPES))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: 0 if tensor.device.type == "cpu" else 1)
    # What bitsandbytes runs for CPU tensors is replaced by what it runs on a GPU, behind torch's dispatcher.
    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for name in ("optimizer_update_8bit_blockwise", "optimizer_update_32bit"):
            library.impl(name, getattr(ops, f"_{name}_impl"), "CPU", allow_override=True)
    yield received
    library._destroy()


def parameters(device: str = "cpu") -> list[torch.nn.Parameter]:
    """Of every dtype; the one of 4000 elements is below bitsandbytes' threshold for 8-bit states."""
    shapes = [
        ((64, 128), torch.bfloat16),
        ((40, 100), torch.bfloat16),
        ((4097,), torch.float32),
        ((90, 70), torch.half),
    ]
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype, device=device)) for shape, dtype in shapes]


def an_optimizer(bits: int = 8, params: list[Any] | None = None, **changes: Any) -> Any:
    params = parameters() if params is None else params
    made = optimizer_module.Optimizer2State("adam", params, optim_bits=bits, **{**HYPERPARAMETERS, **changes})
    for p in params:
        p.grad = torch.randn_like(p)
    return made


def repeated(optimizer: Any, calls: list[Call]) -> tuple[list[Call], list[Call]]:
    """The calls of one and the same step: bitsandbytes', and patch."""
    optimizer.step()
    stock = calls.copy()
    calls.clear()
    for state in optimizer.state.values():
        state["step"] -= 1
    with patched():
        optimizer.step()
    return stock, calls


@pytest.mark.parametrize("bits", [8, 32])
def test_the_same_arguments_reach_c(calls: list[Call], bits: int) -> None:
    optimizer = an_optimizer(bits)
    versions = [p._version for p in optimizer.param_groups[0]["params"]]
    for step in range(1, 4):
        optimizer.param_groups[0]["lr"] = 0.1 / step
        calls.clear()
        before = counts()
        stock, ours = repeated(optimizer, calls)
        assert ours == stock and len(stock) == 4
        assert counts() == (before[0] + 8, before[1])  # four updates, four waits
        assert [state["step"] for state in optimizer.state.values()] == [step] * 4
    expected = ["bfloat16", "bfloat16", "float32", "float16"]
    assert [name for name, _ in stock] == [
        f"{32 if bits == 32 or n == 1 else 8}bit {dtype}" for n, dtype in enumerate(expected)
    ]
    assert [p._version for p in optimizer.param_groups[0]["params"]] == versions
    # Each argument is a different number, or the comparison would be blind to two that changed places.
    numbers = [x for x in stock[0][1] if x not in (None, 0.0, 1.0, True)]
    assert len(numbers) == len(set(numbers)) == (17 if bits == 8 else 13)


def test_overridden_hyperparameters_reach_c(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = an_optimizer()
    monkeypatch.setitem(optimizer.mng.pid2config, id(optimizer.param_groups[0]["params"][0]), {"lr": 0.75})
    stock, ours = repeated(optimizer, calls)
    assert ours == stock and 0.75 in stock[0][1] and 0.75 not in stock[2][1]


def test_unpatching_brings_back_the_original(calls: list[Call]) -> None:
    original = vars(optimizer_module.Optimizer2State)["update_step"]
    optimizer = an_optimizer()
    with patched():
        captured = optimizer.update_step
        assert captured.__func__ is not original
        optimizer.step()
        before = counts()
    assert vars(optimizer_module.Optimizer2State)["update_step"] is original
    group = optimizer.param_groups[0]
    calls.clear()
    captured(group, group["params"][0], 0, 0)
    assert len(calls) == 1 and counts() == before


def test_the_installed_bitsandbytes_is_known(default_stream: None) -> None:
    """After a release of bitsandbytes: read what the functions of `_known` do, then add their fingerprint."""
    assert patch._known(optimizer_module.Optimizer2State.update_step)


# What goes the long way

Spoil = Callable[[Any, pytest.MonkeyPatch], None]


def _no_gpu(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", False)


def _paged(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer.is_paged = True


def _transposed_gradient(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    p = optimizer.param_groups[0]["params"][0]
    p.grad = torch.randn(*reversed(p.shape), dtype=p.dtype).t()


def _transposed_parameter(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    p = optimizer.param_groups[0]["params"][0]
    p.data = p.data.t().contiguous().t()


def _another_device(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1)


def _unknown(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch, "_KNOWN", frozenset())


def _norm_limit(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer.args.max_unorm = 0.5
    for state in optimizer.state.values():
        state["unorm_vec"] = torch.zeros(1)


@pytest.mark.parametrize(
    ("reason", "spoil"),
    [
        ("no gpu", _no_gpu),
        ("paged states", _paged),
        ("not contiguous", _transposed_gradient),
        ("not contiguous", _transposed_parameter),
        pytest.param(
            "not on the current device",
            _another_device,
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="bitsandbytes would look for that device"),
        ),
        ("unknown bitsandbytes", _unknown),
        ("max_unorm", _norm_limit),
    ],
)
@pytest.mark.parametrize("bits", [8, 32])
def test_the_unusual_is_left_to_bitsandbytes(
    calls: list[Call], monkeypatch: pytest.MonkeyPatch, reason: str, spoil: Spoil, bits: int
) -> None:
    optimizer = an_optimizer(bits, parameters()[:1])
    optimizer.step()
    spoil(optimizer, monkeypatch)
    calls.clear()
    with patched():
        before = counts()[1].get(reason, 0)
        optimizer.update_step(optimizer.param_groups[0], optimizer.param_groups[0]["params"][0], 0, 0)
        assert counts()[1][reason] == before + 1
    assert len(calls) == 1


def test_tensor_subclasses_are_left_to_bitsandbytes(calls: list[Call]) -> None:
    class Sharded(torch.nn.Parameter):
        pass

    optimizer = an_optimizer(params=[Sharded(torch.randn(64, 128))])
    with patched():
        before = counts()[1].get("tensor subclass", 0)
        optimizer.step()
        assert counts()[1]["tensor subclass"] == before + 1
    assert len(calls) == 1


def test_compilation_sees_the_original(calls: list[Call], monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = an_optimizer(params=parameters()[:1])
    optimizer.step()
    group = optimizer.param_groups[0]
    with patched():
        before = counts()
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        optimizer.update_step(group, group["params"][0], 0, 0)
        assert counts() == before
    assert len(calls) == 2


def _state_elsewhere(name: str) -> Spoil:
    def spoil(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        state = optimizer.state[optimizer.param_groups[0]["params"][0]]
        state[name] = state[name].to("meta")

    return spoil


def _another_dtype(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    p = optimizer.param_groups[0]["params"][0]
    p.data = p.data.float()


def _double(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    p = optimizer.param_groups[0]["params"][0]
    p.grad = None
    p.data = p.data.double()
    p.grad = torch.randn_like(p)


def _sparse(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    p = optimizer.param_groups[0]["params"][0]
    p.grad = p.detach().to_sparse()


def _text(optimizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer.param_groups[0]["lr"] = "0.1"


@pytest.mark.parametrize(
    ("reason", "spoil"),
    [
        *(
            ("not on the current device", _state_elsewhere(name))
            for name in ("state1", "state2", "qmap1", "qmap2", "absmax1", "absmax2")
        ),
        ("gradient of another dtype", _another_dtype),
        ("no such kernel", _double),
        ("not contiguous", _sparse),
        ("a hyperparameter is not a number", _text),
    ],
)
def test_errors_are_those_of_bitsandbytes(
    calls: list[Call], monkeypatch: pytest.MonkeyPatch, reason: str, spoil: Spoil
) -> None:
    optimizer = an_optimizer(params=parameters()[:1])
    optimizer.step()
    calls.clear()
    spoil(optimizer, monkeypatch)
    with pytest.raises(Exception) as stock:
        optimizer.step()
    with patched():
        before = counts()[1].get(reason, 0)
        with pytest.raises(stock.type) as raised:
            optimizer.step()
        assert counts()[1][reason] == before + 1
    assert str(raised.value).splitlines()[0] == str(stock.value).splitlines()[0]
    assert not calls


# On a GPU


@pytest.mark.parametrize("name", [pytest.param(name, marks=gpu) for name in ("AdamW8bit", "PagedAdamW8bit", "AdamW")])
def test_steps_are_bit_equal(name: str) -> None:
    def train(features: dict[str, Any]) -> tuple[list[torch.Tensor], int]:
        torch.manual_seed(0)
        trained = [p for _ in range(15) for p in parameters("cuda")]
        optimizer = getattr(bitsandbytes.optim, name)(trained, weight_decay=0.1)
        before, _ = counts()
        with fastgemma.patched(**features):
            for step in range(5):
                optimizer.param_groups[0]["lr"] = 1e-2 / (1 + step)
                # Work that the step must not overtake.
                for number, p in enumerate(trained):
                    noise = torch.randn(512, 512, device="cuda")
                    p.grad = torch.randn_like(p).mul_((noise @ noise).mean()).mul_(step + number)
                optimizer.step()
                optimizer.zero_grad()
            fast_calls = counts()[0] - before
        states = [value for p in trained for value in optimizer.state[p].values() if isinstance(value, torch.Tensor)]
        return [value.detach().clone() for value in (*trained, *states)], fast_calls

    (stock, _), (ours, fast_calls) = train(STOCK), train({**STOCK, "optimizer": True})
    assert len(ours) == len(stock) and all(torch.equal(a, b) for a, b in zip(ours, stock))
    updates = 5 * 15 * 4
    assert fast_calls >= (updates if name.startswith("Paged") else 2 * updates)
