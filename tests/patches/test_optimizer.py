"""bitsandbytes' wait after every parameter: left out where a stream orders the work, kept where it does not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kernel_checks import gpu

import fastgemma

optimizer_module = pytest.importorskip("bitsandbytes.optim.optimizer")
STOCK: dict[str, Any] = dict.fromkeys(fastgemma.status(), False)
ON_A_GPU: Any = SimpleNamespace(device=torch.device("cuda", 0))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Counts the waits, on a machine whose default stream is 0 and the current one too."""
    counted: list[int] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *args: counted.append(1))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *args: 0)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda *args: 0)
    return counted


def test_the_wait_is_left_out_and_comes_back(waits: list[int]) -> None:
    with fastgemma.patched(**{**STOCK, "optimizer": True}):
        before = fastgemma.status()["optimizer"].fast_calls
        optimizer_module.sync_gpu(ON_A_GPU)
        assert fastgemma.status()["optimizer"].fast_calls == before + 1
        captured = optimizer_module.sync_gpu
    assert not waits
    captured(ON_A_GPU)
    optimizer_module.sync_gpu(ON_A_GPU)
    assert len(waits) == 2


def test_another_stream_waits(waits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *args: 7)
    with fastgemma.patched(**{**STOCK, "optimizer": True}):
        optimizer_module.sync_gpu(ON_A_GPU)
        assert fastgemma.status()["optimizer"].fallbacks["a stream of its own"]
    assert len(waits) == 1


def test_paged_states_wait(waits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from bitsandbytes.functional import GlobalPageManager

    monkeypatch.setattr(GlobalPageManager.get_instance(), "paged_tensors", [object()])
    with fastgemma.patched(**{**STOCK, "optimizer": True}):
        optimizer_module.sync_gpu(ON_A_GPU)
        assert fastgemma.status()["optimizer"].fallbacks["paged states"]
    assert len(waits) == 1


@pytest.mark.parametrize("name", [pytest.param(name, marks=gpu) for name in ("AdamW8bit", "PagedAdamW8bit", "AdamW")])
def test_steps_are_bit_equal(name: str) -> None:
    import bitsandbytes

    def train(features: dict[str, Any]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        parameters = [torch.randn(64, 512, device="cuda").requires_grad_() for _ in range(50)]
        optimizer = getattr(bitsandbytes.optim, name)(parameters, lr=1e-2, min_8bit_size=1)
        with fastgemma.patched(**features):
            for step in range(5):
                # Work that the step must not overtake.
                for number, parameter in enumerate(parameters):
                    noise = torch.randn(512, 512, device="cuda")
                    parameter.grad = (parameter.detach() @ noise @ noise).mul_(step + number)
                optimizer.step()
                optimizer.zero_grad()
        return [parameter.detach().clone() for parameter in parameters]

    stock, ours = train(STOCK), train({**STOCK, "optimizer": True})
    assert all(torch.equal(a, b) for a, b in zip(ours, stock))
