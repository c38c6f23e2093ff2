"""Gemma 4's GeGLU MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastgemma.kernels.geglu import geglu
from fastgemma.kernels.lora_mlp import lora_mlp
from fastgemma.patches import projections
from fastgemma.patches.engine import Op
from fastgemma.patches.guards import activation_unusable, for_hooks, unusable


def gate_times_up(op: Op, activation: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`activation(gate) * up`, in one launch where that is exact."""
    if op.active:
        reason = unusable(gate)
        if reason is None and gate.dtype != up.dtype:
            reason = "gate and up in different dtypes"
        if reason is None and gate.shape != up.shape:
            reason = "gate and up of different shapes"
        if reason is None:
            reason = activation_unusable(activation)
        if reason is None:
            op.fast()
            return geglu(gate, up)
        op.fallback(reason)
    return activation(gate) * up


def project_one(op: Op, layer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """`layer(x)`, through `kernels.lora` where that is exact."""
    if op.active:
        reason = unusable(x)
        if reason is None and projections.fused_gemm_is_better(layer, x):
            reason = "few rows: fused 4-bit product"
        if reason is None:
            try:
                (y,) = projections.project([layer], x)
                op.fast()
                return y
            except projections.Unsupported as unsupported:
                reason = str(unsupported)
        op.fallback(reason)
    return layer(x)


def make_mlp(original: Callable[..., Any], ops: dict[str, Op]) -> Callable[..., Any]:
    lora, activation = ops["lora"], ops["geglu"]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (lora.active or activation.active):
            return original(self, x)
        return for_hooks(self, fused(self, x))

    def fused(self, x: torch.Tensor) -> torch.Tensor:
        reason = unusable(x)
        if reason is None and projections.fused_gemm_is_better(self.gate_proj, x):
            reason = "few rows: fused 4-bit product"
        if lora.active and reason is not None:
            lora.fallback(reason)
        elif lora.active:
            try:
                if activation.active and activation_unusable(self.act_fn) is None:
                    gate, up, down = projections.read((self.gate_proj, self.up_proj, self.down_proj), x)
                    y = lora_mlp(x, gate, up, down, projections.autocast_dtype(x))
                    lora.fast()
                    activation.fast()
                    return projections.as_output(y, down, x)
                halves = projections.project([self.gate_proj, self.up_proj], x)
                lora.fast()
                h = gate_times_up(activation, self.act_fn, *halves)
                return project_one(lora, self.down_proj, h)
            except projections.Unsupported as unsupported:
                lora.fallback(str(unsupported))
        h = gate_times_up(activation, self.act_fn, self.gate_proj(x), self.up_proj(x))
        return self.down_proj(h)

    return forward
