"""Gemma 4's RMSNorm, alone and with the residual add that follows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastgemma.kernels.rms_norm import MAX_COLUMNS, rms_norm, rms_norm_residual
from fastgemma.patches.engine import Op
from fastgemma.patches.guards import hooked, is_ours, is_stock, plain, unusable


def norm_unusable(norm: nn.Module, x: torch.Tensor) -> str | None:
    """Why `rms_norm` cannot stand in for `norm(x)`, or None."""
    reason = unusable(x)
    if reason is not None:
        return reason
    if x.shape[-1] > MAX_COLUMNS:
        return f"rows wider than {MAX_COLUMNS}"
    weight = norm._parameters.get("weight")
    if weight is not None:
        if not plain(weight):
            return f"norm weight of type {type(weight).__name__}"
        if weight.device != x.device:
            return "norm weight on another device"
    return None


def make_norm(original: Callable[..., Any], ops: dict[str, Op]) -> Callable[..., Any]:
    op = ops["rms_norm"]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if not op.active:
            return original(self, hidden_states)
        reason = norm_unusable(self, hidden_states)
        if reason is not None:
            op.fallback(reason)
            return original(self, hidden_states)
        op.fast()
        return rms_norm(hidden_states, self.weight if self.with_scale else None, self.eps)

    return forward


def add_normed(op: Op, norm: Any, x: torch.Tensor, residual: torch.Tensor, scalar: torch.Tensor | None) -> torch.Tensor:
    """`(residual + norm(x)) * scalar`, in one launch where that is exact."""
    reason = None if op.active else "off"
    if op.active:
        reason = norm_unusable(norm, x)
        if reason is None and x.dtype != residual.dtype:
            reason = "residual in another dtype"
        if reason is None and hooked(norm):
            reason = "hooks on a norm"
        kind: Any = type(norm)
        if reason is None and not is_stock(kind):
            reason = "a norm of another class"
        if reason is None and not is_ours(kind):
            reason = "another forward of the norms"
        if reason is None and scalar is not None and (scalar.numel() != 1 or scalar.requires_grad):
            reason = "layer scalar with a gradient"
        if reason is None:
            op.fast()
            return rms_norm_residual(x, norm.weight if norm.with_scale else None, residual, scalar, norm.eps)
        op.fallback(reason)
    out = residual + norm(x)
    if scalar is not None:
        out *= scalar  # in place, as stock: keeps the dtype whatever the buffer has
    return out
