"""Models on GPUs where attention is PyTorch's memory-efficient kernel: stock's results, or stock, counted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import structures
import torch
from efficient_stand_in import StandIn, efficient, stand_in  # noqa: F401
from graph_stand_in import graphs  # noqa: F401
from kernel_checks import FLOAT32_BUDGET, relative_error
from torch import nn
from transformers.models.gemma4 import modeling_gemma4
from transformers.models.gemma4_unified import modeling_gemma4_unified

import fastgemma
from fastgemma.kernels import key_intervals
from fastgemma.patches import host_copies, interval_masks, layer_graphs
from fastgemma.patches.attention import intervals_unusable
from fastgemma.patches.projections import Unsupported
from fastgemma.patches.table import ENGINE

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the operators' stand-in is the CPU's"),
    pytest.mark.usefixtures("efficient"),
]

ATTENTION: dict[str, Any] = {**dict.fromkeys(fastgemma.status(), False), "attention": True}
REFUSED = "which PyTorch's memory-efficient kernel does not take without a dense mask"


@pytest.fixture(autouse=True)
def no_counts_of_before() -> Iterator[None]:
    for op in ENGINE.ops:
        op.fast_calls, op.fallbacks = 0, type(op.fallbacks)()
    yield
    for op in ENGINE.ops:
        op.note = None


def counts(feature: str = "attention") -> tuple[int, dict[str, int]]:
    report = fastgemma.status()[feature]
    return report.fast_calls, report.fallbacks


def batch(kind: str) -> dict[str, Any]:
    """Rows of a length, without padding, or "packing"."""
    if kind == "packing":
        return structures.batch("packing")
    inputs = structures.batch("padding", seq_len=int(kind))
    inputs["input_ids"] = inputs["input_ids"].clamp(min=3)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


def results(model: nn.Module, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(**inputs)
    out.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": out.loss.detach(), "logits": out.logits.detach(), **gradients}


def assert_equal(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(actual[name], value) <= FLOAT32_BUDGET, name


@pytest.mark.parametrize("kind", ["5", "13", "packing"])
@pytest.mark.parametrize("name", ["e2b", "12b"])
def test_equals_stock_and_builds_no_mask(
    name: str,
    kind: str,
    efficient: StandIn,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows shorter and longer than the window of 8."""
    model = structures.build(name).train()
    inputs = batch(kind)
    stock = results(model, inputs)
    module = modeling_gemma4_unified if name == "12b" else modeling_gemma4
    for function in ("create_causal_mask", "create_sliding_window_causal_mask"):
        monkeypatch.setattr(module, function, lambda *args, **kwargs: pytest.fail("a dense mask was built"))
    with fastgemma.patched(**ATTENTION):
        assert_equal(results(model, inputs), stock)
        report = fastgemma.status()
    n_layers = len(model.model.layers)
    assert counts() == (n_layers, {})
    assert [call.name for call in efficient.calls] == ["forward"] * n_layers + ["backward"] * n_layers
    assert "PyTorch's memory-efficient kernel: for a test" in (report["attention"].reason or "")
    assert "memory-efficient kernel" in " ".join(str(report).split())
    windows = [call.window_size for call in efficient.calls[:n_layers]]
    sliding = [layer.self_attn.layer_type == "sliding_attention" for layer in model.model.layers]
    assert windows == [8 if kind != "5" and windowed else None for windowed in sliding]
    assert {call.sequences for call in efficient.calls} == {4 if kind == "packing" else 2}


def test_status_says_nothing_of_it_elsewhere() -> None:
    assert fastgemma.status()["attention"].reason is None


@pytest.mark.slow
def test_everything_together_and_recomputed(efficient: StandIn) -> None:  # noqa: F811
    model = structures.build("e2b").train()
    inputs = batch("13")
    stock = results(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with fastgemma.patched(cuda_graphs=False, cross_entropy=False, per_layer_embeddings=False):
        assert_equal(results(model, inputs), stock)
    assert [call.name for call in efficient.calls].count("forward") == 2 * len(model.model.layers)


def test_gradients_of_inputs_alone() -> None:
    model = structures.build("e2b").train().requires_grad_(False)
    inputs = batch("13")
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach().requires_grad_()

    def gradient() -> torch.Tensor:
        # The per-layer inputs need the tokens.
        per_layer = model.model.get_per_layer_inputs(inputs["input_ids"], None)
        out = model.model(inputs_embeds=embeds, per_layer_inputs=per_layer, use_cache=False).last_hidden_state
        return torch.autograd.grad(out.square().sum(), embeds)[0]

    stock = gradient()
    with fastgemma.patched(**ATTENTION):
        assert relative_error(gradient(), stock) <= FLOAT32_BUDGET
    assert counts() == (6, {})


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_keeps_stock(side: str, efficient: StandIn) -> None:  # noqa: F811
    model = structures.build("e2b").train()
    inputs = structures.batch("padding")
    if side == "left":
        inputs = {name: x.flip(1) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    stock = results(model, inputs)
    with fastgemma.patched(**ATTENTION):
        ours = results(model, inputs)
    for name, value in stock.items():
        assert torch.equal(ours[name], value), name
    assert counts() == (0, {f"padding, {REFUSED}": 1}) and not efficient.calls
    assert fastgemma.status()["attention"].reason is None


def test_images_keep_stock() -> None:
    model = structures.multimodal(**structures.STRUCTURES["31b"], use_bidirectional_attention="vision")
    ids = torch.tensor([[2, 9, 40, 50, 60, 7]])
    kinds = torch.tensor([[0, 0, 1, 1, 1, 0]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": kinds, "use_cache": False}
    with torch.no_grad():
        stock = model(**inputs).logits
        with fastgemma.patched(**ATTENTION):
            assert torch.equal(model(**inputs).logits, stock)
    assert counts() == (0, {f"images, {REFUSED}": 1})


def test_packed_rows_are_asked_of_the_host_copy() -> None:
    """A GPU would have to be waited for; the meta device cannot answer at all."""
    model = structures.build("e2b").train().model
    host = structures.batch("packing")["position_ids"]
    moved = host.to("meta")
    given = {"position_ids": moved, "use_cache": False}
    with pytest.raises(Unsupported, match="before they were on the GPU"):
        interval_masks._documents(model, given, 1, None, True, on_host=True)
    assert interval_masks._documents(model, given, 1, None, True, on_host=False).device.type == "meta"
    host_copies.remember(moved, host)
    found = interval_masks._documents(model, given, 1, None, True, on_host=True)
    assert found is not None and found.diff().nonzero()[:, 1].tolist() == [5, 6, 15]


def test_where_stock_would_mix_documents_the_gpu_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the loss would depend on how a batch came to the GPU."""
    model = structures.build("e2b").train().model
    monkeypatch.setattr(interval_masks, "host_copy", lambda tensor: None)
    given = {"position_ids": structures.batch("packing")["position_ids"], "use_cache": True}
    found = interval_masks._documents(model, given, 1, None, True, on_host=True)
    assert found is not None and found.device.type == "cpu" and found.diff().nonzero()[:, 1].tolist() == [5, 6, 15]


def test_accelerate_s_batches_keep_their_positions_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def moves(tensor: Any, device: Any) -> Any:
        return {name: x.to(device) for name, x in tensor.items()}

    op = next(op for op in ENGINE.ops if op.feature == "attention" and op.target.endswith("send_to_device"))
    monkeypatch.setattr(op, "active", True)
    send = host_copies.make_send_to_device(moves, {"attention": op})
    batch = structures.batch("packing")
    sent = send({"position_ids": batch["position_ids"], "input_ids": batch["input_ids"]}, torch.device("meta"))
    assert host_copies.host_copy(sent["position_ids"]) is batch["position_ids"]


def test_a_mask_made_for_another_kind_of_gpu_is_refused() -> None:
    x = torch.zeros(1, 4, 16)
    device = torch.device("cpu")
    plain = key_intervals.key_intervals(1, 4, device)
    padded = key_intervals.key_intervals(1, 4, device, padding_mask=torch.ones(1, 4))
    assert intervals_unusable(x, 16, plain) is None
    assert intervals_unusable(x, 16, padded) == "a mask for another device"


@pytest.mark.slow
@pytest.mark.usefixtures("graphs")
def test_recorded_layers(efficient: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Replayed to the bit. Launches of packed rows follow from their lengths, which no two batches share."""
    monkeypatch.setattr(layer_graphs, "_not_worth", lambda mode, hidden_states: None)
    layers = ["sliding_attention", "full_attention", "full_attention"]
    model = structures.build("e2b", layer_types=layers, num_kv_shared_layers=1).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    options: dict[str, Any] = {"cross_entropy": False, "per_layer_embeddings": False}
    batches = [{**batch("13"), "input_ids": batch("13")["input_ids"].roll(n, 1)} for n in range(4)]
    with fastgemma.patched(cuda_graphs=False, **options):
        expected = [results(model, inputs) for inputs in batches]
    before = counts()[0]
    efficient.calls.clear()
    with fastgemma.patched(cuda_graphs="always", **options):
        for inputs, right in zip(batches, expected):
            actual = results(model, inputs)
            assert all(torch.equal(actual[name], value) for name, value in right.items())
        fast, reasons = counts("cuda_graphs")
        assert fast == 2 * len(layers) and reasons == {"first calls of a shape": 2 * len(layers)}
        assert counts()[0] - before >= 4 * len(layers)
        assert sum(call.name == "backward" for call in efficient.calls) >= 4 * len(layers)
        results(model, batch("packing"))
        (reason,) = set(counts("cuda_graphs")[1]) - set(reasons)
        assert "packed rows" in reason
