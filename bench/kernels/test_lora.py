"""QLoRA's projections and MLP beside PEFT on bitsandbytes; the ceiling is cuBLAS on dense weights, without adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import models
import pytest
import torch
from kernel_inputs import activation, projection, qlora
from kernel_timing import Subject
from torch import nn
from torch.nn.functional import linear
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextAttention, Gemma4TextMLP

from fastgemma.kernels.lora import lora_linear, lora_linear_reference, lora_qkv
from fastgemma.kernels.lora_mlp import lora_mlp, lora_mlp_reference

SHAPES = [(rows, size) for size in ("e2b", "e4b") for rows in (2048, 32768)]
TINY = (7, "e2b")


def gemms(linears: list[tuple[int, int]], rows: int, device: torch.device) -> Subject:
    """The base products alone, each of an input of its own: cuBLAS on dense weights [out_features, in_features]."""

    def make() -> list[torch.Tensor]:
        weights = [activation(*shape, device=device, grad=False) for shape in linears]
        return weights + [activation(rows, in_features, device=device) for _, in_features in linears]

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        return [linear(x, weight) for weight, x in zip(tensors[: len(linears)], tensors[len(linears) :])]

    return Subject(make, run)


def compare(
    measure: Any,
    shape: tuple[int, str],
    impl: str,
    direction: str,
    *,
    op: str,
    cls: type[nn.Module],
    names: tuple[str, ...],
    run: dict[str, Callable[..., Any]],
    reference: Callable[..., Any],
) -> None:
    """Measures `op` on the linear layers `names` of transformers' class.

    `run` takes (x, the quantised module with adapters, what each projection computes), `reference` (x, projections).
    """
    rows, size = shape
    config = models.text_config(size, tiny=measure.tiny)

    def skeleton() -> nn.Module:
        with torch.device("meta"):
            return cls(config, 0).requires_grad_(False)

    def make() -> tuple[Any, ...]:
        module = qlora(skeleton(), names, measure.device)
        x = activation(rows, config.hidden_size, device=measure.device)
        return x, module, [projection(module.get_submodule(name)) for name in names]

    def exact(x: torch.Tensor, module: nn.Module, _: Any) -> Any:
        return reference(x.float(), [projection(module.get_submodule(name), dtype=torch.float32) for name in names])

    dense = skeleton()
    linears = [tuple(dense.get_submodule(name).weight.shape) for name in names]
    bare = gemms(linears, rows, measure.device)
    measure(
        bare if impl == "cublas" else Subject(make, run[impl]),
        op=op,
        impl=impl,
        shape=[rows, *linears[0][::-1]],
        direction=direction,
        reference=None if impl == "cublas" else exact,
        # The base products; rank 16 adds about a hundredth.
        flops=2 * rows * sum(out_features * in_features for out_features, in_features in linears),
        ceiling=bare,
    )


@pytest.mark.shapes(SHAPES, tiny=TINY)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("impl", ["fastgemma", "hf", "cublas"])
def test_lora_mlp(measure, shape, impl, direction):
    compare(
        measure,
        shape,
        impl,
        direction,
        op="lora_mlp",
        cls=Gemma4TextMLP,
        names=("gate_proj", "up_proj", "down_proj"),
        run={
            "fastgemma": lambda x, mlp, projections: lora_mlp(x, *projections),
            "hf": lambda x, mlp, projections: mlp(x),
        },
        reference=lambda x, projections: lora_mlp_reference(x, *projections),
    )


@pytest.mark.shapes(SHAPES, tiny=TINY)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("impl", ["fastgemma", "hf", "cublas"])
def test_lora_qkv(measure, shape, impl, direction):
    names = ("q_proj", "k_proj", "v_proj")
    compare(
        measure,
        shape,
        impl,
        direction,
        op="lora_qkv",
        cls=Gemma4TextAttention,
        names=names,
        run={
            "fastgemma": lambda x, attention, projections: lora_qkv(x, *projections),
            "hf": lambda x, attention, projections: [attention.get_submodule(name)(x) for name in names],
        },
        reference=lambda x, projections: [lora_linear_reference(x, p) for p in projections],
    )


@pytest.mark.shapes(SHAPES[:2], tiny=TINY)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("impl", ["fastgemma", "hf", "cublas"])
def test_lora_linear(measure, shape, impl, direction):
    """The query projection alone, as layers without keys and values of their own have it."""
    compare(
        measure,
        shape,
        impl,
        direction,
        op="lora_linear",
        cls=Gemma4TextAttention,
        names=("q_proj",),
        run={
            "fastgemma": lambda x, attention, projections: lora_linear(x, *projections),
            "hf": lambda x, attention, projections: attention.q_proj(x),
        },
        reference=lambda x, projections: lora_linear_reference(x, *projections),
    )
