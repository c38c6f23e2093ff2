"""Records the launches that operations make, on CPU tensors, without executing any.

Operations run on the published shapes, in tensors whose memory nobody touches; what they would launch is kept as
kernel, types, constexprs and compiler options, which is all that a compiler asks for.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # Triton reads it when a kernel is defined

import torch  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from fastgemma.kernels import launch  # noqa: E402
from fastgemma.kernels.adapter_columns import Block, block_diagonal  # noqa: E402
from fastgemma.kernels.attention import attention  # noqa: E402
from fastgemma.kernels.geglu import geglu, geglu_bwd  # noqa: E402
from fastgemma.kernels.key_intervals import key_intervals  # noqa: E402
from fastgemma.kernels.linear_cross_entropy import linear_cross_entropy, linear_log_probs  # noqa: E402
from fastgemma.kernels.nf4 import NestedScales, NF4Weight, dequantize_nf4, dequantize_nf4_stack  # noqa: E402
from fastgemma.kernels.qk_norm_rope import qk_norm_rope  # noqa: E402
from fastgemma.kernels.rms_norm import rms_norm, rms_norm_bwd, rms_norm_residual  # noqa: E402

_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")

Row = tuple[str, str, str]
Operation = Callable[[torch.dtype], None]


@dataclass(frozen=True)
class Recorded:
    """One launch: a kernel, the types of its arguments, its constexprs, what 16 divides, and compiler options."""

    module: str
    name: str
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    divisible: frozenset[str]
    options: tuple[tuple[str, Any], ...]

    @property
    def kernel(self) -> JITFunction:
        found = getattr(importlib.import_module(self.module), self.name)
        return getattr(found, "function", found)

    @property
    def reads_16_bits(self) -> bool:
        return any("bf16" in kind or "fp16" in kind for _, kind in self.signature)


class _Watched(dict[Row, launch.Launch]):
    """The launch table, noting the rows that were taken from it."""

    def __init__(self, table: dict[Row, launch.Launch]) -> None:
        super().__init__(table)
        self.taken: set[Row] = set()

    def get(self, key: Row, default: Any = None) -> Any:
        if key in self:
            self.taken.add(key)
        return super().get(key, default)


def record(operations: Iterable[Operation], dtype: torch.dtype, architecture: str) -> tuple[list[Recorded], set[Row]]:
    """The distinct launches that operations make with the rows that `architecture` would get, and those rows.

    Triton compiles a kernel anew where a number is 1 or stops being a multiple of 16. Of launches that differ in that
    only, one is kept, which takes for granted what is true of them all.
    """
    alike: dict[Any, list[dict[str, Any]]] = {}

    def capture(self: JITFunction, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any) -> None:
        values = {**dict(zip(self.arg_names, args)), **kwargs}
        alike.setdefault((self.fn.__module__, self.fn.__name__, _fixed(self, values)), []).append(values)

    table = _Watched(launch.TABLE)
    launch.launch.cache_clear()
    with (
        mock.patch.object(JITFunction, "run", capture),
        mock.patch.object(launch, "TABLE", table),
        mock.patch.object(launch, "architecture", lambda device: architecture),
        mock.patch("fastgemma.kernels.backend.interpreting", lambda: True),
    ):
        for operation in operations:
            operation(dtype)
    launch.launch.cache_clear()
    launches = {_record(module, name, fixed, calls) for (module, name, fixed), calls in alike.items()}
    return sorted(launches, key=str), table.taken


def _kind(value: Any) -> str:
    """Triton's name of an argument's type."""
    if isinstance(value, torch.Tensor):
        return f"*{_TYPES[value.dtype]}"
    if hasattr(value, "block_shape"):  # triton.tools.tensor_descriptor.TensorDescriptor
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, float):
        return "fp32"
    return "i64" if abs(value) >= 2**31 else "i32"


def _fixed(kernel: JITFunction, values: dict[str, Any]) -> tuple[Any, ...]:
    """What sets a launch apart whatever its numbers are: constexprs, the types of the rest, options."""
    constants, kinds = [], []
    for parameter in kernel.params:
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            constants.append((parameter.name, value))
        else:
            kinds.append((parameter.name, _kind(value)))
    options = tuple((name, values[name]) for name in _OPTIONS if name in values)
    return tuple(constants), tuple(kinds), options


def _record(module: str, name: str, fixed: tuple[Any, ...], calls: list[dict[str, Any]]) -> Recorded:
    constants, kinds, options = fixed
    constants, divisible = dict(constants), set()
    kernel = Recorded(module, name, (), (), frozenset(), ()).kernel
    ignored = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    for parameter, kind in kinds:
        if kind.startswith("*"):
            divisible.add(parameter)
        elif kind in ("i32", "i64") and parameter not in ignored:
            numbers = {call[parameter] for call in calls}
            if numbers == {1}:
                constants[parameter] = 1
            elif all(number % 16 == 0 for number in numbers):
                divisible.add(parameter)
    kinds = dict(kinds)
    signature = tuple((name, "constexpr" if name in constants else kinds[name]) for name in kernel.arg_names)
    return Recorded(module, name, signature, tuple(constants.items()), frozenset(divisible), options)


def _empty(dtype: torch.dtype, *shape: int, grad: bool = True) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype).requires_grad_(grad)


def _backward(*outputs: torch.Tensor | None) -> None:
    """The backward of outputs, from gradients that are tensors like any other."""
    some = [output for output in outputs if output is not None]
    torch.autograd.backward(some, [torch.empty_like(output) for output in some])


def norms(dtype: torch.dtype) -> None:
    """Every padded width; weightless and without residual at one of them."""
    for hidden in (64, 256, 512, 768, 1536, 2560, 5376):
        for trained in (False, True):
            x, residual = _empty(dtype, 2, 16, hidden), _empty(dtype, 2, 16, hidden)
            weight = _empty(dtype, hidden, grad=trained)
            _backward(rms_norm_residual(x, weight, residual, _empty(dtype, 1, grad=False)))
    x, rstd = _empty(dtype, 32, 1536, grad=False), torch.empty(32)
    for some_weight in (None, x[0]):
        rms_norm(x, some_weight)
        rms_norm_bwd(x, x, some_weight, rstd, addend=x, needs_dweight=some_weight is not None)


def heads(dtype: torch.dtype) -> None:
    for n_heads, kv_heads, head_dim, rotary, values_from_keys in (
        (8, 1, 256, 256, False),
        (8, 0, 256, 256, False),
        (8, 1, 512, 128, False),
        (32, 4, 512, 128, True),
        (8, 8, 128, 128, False),
    ):
        for trained in (False, True):
            q = _empty(dtype, 2, 16, n_heads * head_dim)
            k = _empty(dtype, 2, 16, kv_heads * head_dim) if kv_heads else None
            v = _empty(dtype, 2, 16, kv_heads * head_dim) if kv_heads and not values_from_keys else None
            angle, weight = _empty(dtype, 1, 16, head_dim, grad=False), _empty(dtype, head_dim, grad=trained)
            k_weight = weight if kv_heads else None
            _backward(*qk_norm_rope(q, k, v, angle, angle, weight, k_weight, head_dim, rotary, values_from_keys))


def gates(dtype: torch.dtype) -> None:
    for columns in (256, 6144):
        gate, up = _empty(dtype, 32, columns), _empty(dtype, 32, columns)
        _backward(geglu(gate, up))
    gate, up = gate.detach(), up.detach()
    geglu_bwd(gate, gate, up, gate, up, gate)


def quantised(dtype: torch.dtype) -> None:
    for nested in (False, True):
        scales = NestedScales(torch.ones(1), torch.ones(256), torch.zeros(()), 256) if nested else None
        absmax = torch.ones(64, dtype=torch.uint8 if nested else torch.float32)
        packed = torch.zeros(2048, 1, dtype=torch.uint8)
        weight = NF4Weight(packed, absmax, torch.ones(16), torch.Size((64, 64)), dtype, 64, scales)
        dequantize_nf4(weight)
        dequantize_nf4_stack([weight, weight, weight], dtype)
        wider = torch.empty(192, 64 + 48, dtype=dtype)
        dequantize_nf4(weight, wider[:64, :64])
        dequantize_nf4_stack([weight, weight, weight], dtype, wider[:, :64])


def adapters(dtype: torch.dtype) -> None:
    blocks = [Block(torch.empty(64, 16, dtype=dtype), 64 * number, 64, 16 * number) for number in range(3)]
    block_diagonal(blocks, torch.empty(192, 64 + 48, dtype=dtype)[:, 64:])


def losses(dtype: torch.dtype) -> None:
    head, labels = torch.zeros(262144, 8, dtype=dtype), torch.zeros(16, dtype=torch.int64)
    _backward(linear_cross_entropy(_empty(dtype, 16, 8), head, labels, softcap=30.0))
    _backward(linear_cross_entropy(_empty(torch.float32, 16, 8), head, labels, softcap=30.0))
    _backward(linear_cross_entropy(_empty(dtype, 16, 8), head.clone().requires_grad_(), labels, softcap=30.0))
    linear_cross_entropy(_empty(dtype, 16, 8, grad=False), head, labels, softcap=30.0)
    fields: tuple[str, ...] = ("log_probs", "entropy", "mean_logits", "is_top1")
    linear_log_probs(_empty(dtype, 16, 8), head, labels, softcap=30.0, outputs=fields)
    fields = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    statistics = linear_log_probs(_empty(dtype, 16, 8), head, labels, softcap=30.0, outputs=fields)
    _backward(statistics.log_probs, statistics.entropy)


def attentions(dtype: torch.dtype) -> None:
    """Heads of both widths, in the smallest and the largest model, in one chunk of positions and in several."""
    for n_heads, kv_heads, head_dim, seq_len, window in (
        (8, 1, 256, 4096, 512),
        (32, 16, 256, 1000, 1024),
        (8, 1, 512, 1000, None),
        (32, 4, 512, 4096, None),
    ):
        q, k, v = (_empty(dtype, 2, seq_len, count, head_dim) for count in (n_heads, kv_heads, kv_heads))
        _backward(attention(q, k, v, key_intervals(2, seq_len, q.device, window)))


def other_attentions(dtype: torch.dtype) -> None:
    """What takes the rows for any shape: numbers of 4 bytes, and heads of another width, which no model trains."""
    q, k, v = (_empty(torch.float32, 2, 1000, count, 512) for count in (8, 1, 1))
    _backward(attention(q, k, v, key_intervals(2, 1000, q.device)))
    q, k, v = (_empty(dtype, 2, 1000, count, 128, grad=False) for count in (8, 4, 4))
    attention(q, k, v, key_intervals(2, 1000, q.device))


STREAMING: list[Operation] = [norms, heads, gates, quantised, adapters, losses]
MATMULS: list[Operation] = [attentions, other_attentions]
