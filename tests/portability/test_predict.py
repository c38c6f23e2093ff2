"""The predicted step counts a model's own weights, and reproduces the profile that it was calibrated with."""

from __future__ import annotations

import predict
import pytest
import torch


@pytest.mark.parametrize("size", ["e2b", "e4b"])
def test_every_matrix_of_the_layers_is_counted(size: str) -> None:
    model = predict.shape_of(size)
    counted = sum(k * n for layer in predict.layers(model) for k, n in (*layer.adapted, *layer.others))
    unused = 0
    for layer in model.model.layers:
        attention = layer.self_attn
        for name in ("k_proj", "v_proj"):  # some versions build them where a layer shares another's
            linear = getattr(attention, name, None)
            unused += linear.weight.numel() if linear is not None and attention.is_kv_shared_layer else 0
    linears = [m for layer in model.model.layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    assert counted == sum(linear.weight.numel() for linear in linears) - unused


def test_work_grows_with_tokens_and_attention_with_their_square() -> None:
    model = predict.shape_of("e2b")
    short, twice, long = (predict.count(model, b, s) for b, s in ((1, 512), (2, 512), (1, 1024)))
    assert twice.flops["gemm"] == pytest.approx(2 * short.flops["gemm"])
    assert twice.flops["attention"] == pytest.approx(2 * short.flops["attention"])
    assert twice.bytes["norm and rope"] == pytest.approx(2 * short.bytes["norm and rope"])
    assert twice.bytes["dequantise"] == short.bytes["dequantise"] > 0
    # Of 35 layers, 7 attend to everything; the windows of the others hold 512 keys.
    assert 2 * twice.flops["attention"] > long.flops["attention"] > twice.flops["attention"]


def test_calibration_reproduces_its_profile() -> None:
    model, card = predict.shape_of("e2b"), predict.CARDS[0]
    work = predict.count(model, 1, 2048)
    measured = {kind: 10.0 + number for number, kind in enumerate((*predict.BYTES, *predict.FLOPS))}
    measured["gemm"] = 1e4  # more than its adapters' bytes take
    times = predict.Shares.measured(work, measured, card).milliseconds(work, card)
    assert times == pytest.approx(measured)
