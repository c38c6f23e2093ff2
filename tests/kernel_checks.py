"""What the kernel tests share: accuracy budgets, hostile memory layouts, and counters of launches and allocations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import bitsandbytes.functional
import pytest
import torch
from hypothesis import HealthCheck, settings
from torch.utils._python_dispatch import TorchDispatchMode

from fastgemma.kernels.backend import Prepared, interpreting
from fastgemma.kernels.nf4 import NestedScales, NF4Weight, dequantize_nf4_reference

# float32: relative L2 error per tensor against float64.
FLOAT32_BUDGET = 1e-5
# Half precision: relative L2 error and largest error against float64, as multiples of what stock's eager ops have.
STOCK_L2_FACTOR = 1.1
STOCK_MAX_FACTOR = 1.5

HALF_DTYPES = (torch.float16, torch.bfloat16)
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
# For tests that look at attention over intervals in models of float32.
attends_in_float32 = pytest.mark.skipif(torch.cuda.is_available(), reason="float32, which the interpreter alone takes")
few_examples = settings(
    deadline=None, max_examples=10, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

Inputs = dict[str, Any]
Results = dict[str, torch.Tensor]


# Inputs


def _expanded(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.randn(1, *shape[1:], device=device).expand(shape)


LAYOUTS: dict[str, Callable[[tuple[int, ...], torch.device], torch.Tensor]] = {
    "contiguous": lambda shape, device: torch.randn(shape, device=device),
    "sliced columns": lambda shape, device: torch.randn(*shape[:-1], shape[-1] + 7, device=device)[..., 3:-4],
    "every other column": lambda shape, device: torch.randn(*shape[:-1], 2 * shape[-1], device=device)[..., ::2],
    "every third row": lambda shape, device: torch.randn(3 * shape[0], *shape[1:], device=device)[::3],
    "picked from a stack": lambda shape, device: torch.randn(*shape[:-1], 3, shape[-1], device=device)[..., 1, :],
    "transposed": lambda shape, device: torch.randn(*reversed(shape), device=device).permute(
        *reversed(range(len(shape)))
    ),
    "expanded": _expanded,
}


def fresh(
    *shape: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    grad: bool = True,
    outliers: float | None = None,
) -> torch.Tensor:
    """A random leaf of this shape and memory layout; `outliers` puts that value into every tenth element or so."""
    x = LAYOUTS[layout](shape, device)
    if dtype != torch.float32:
        strides = x.stride()
        half = torch.empty_strided(x.shape, strides, dtype=dtype, device=device)
        x = x.contiguous().to(dtype) if 0 in strides else half.copy_(x)
    if outliers is not None:
        x = torch.where(torch.rand(shape, device=device) < 0.1, outliers, x)
    return x.detach().requires_grad_(grad)


def nf4(
    out_features: int, in_features: int, device: torch.device, dtype: torch.dtype = torch.float32, nested: bool = True
) -> NF4Weight:
    """A random weight as bitsandbytes quantises it."""
    dense = torch.randn(out_features, in_features, device=device).to(dtype)
    packed, s = bitsandbytes.functional.quantize_4bit(dense, blocksize=64, compress_statistics=nested, quant_type="nf4")
    scales = NestedScales(s.state2.absmax, s.state2.code, s.offset, s.state2.blocksize) if nested else None
    return NF4Weight(packed, s.absmax, s.code, dense.shape, dtype, 64, scales)


def seeded(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` drawing the same dropout masks at every call."""

    def run(**inputs: Any) -> Any:
        torch.manual_seed(11)
        return fn(**inputs)

    return run


def double(value: Any) -> Any:
    """Tensors, in containers too, as float64 leaves; an NF4 weight becomes its dense one; the rest stays."""
    if isinstance(value, dict):
        return {name: double(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(double(item) for item in value)
    if isinstance(value, NF4Weight):
        return dequantize_nf4_reference(value).double()
    if isinstance(value, torch.Tensor):
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


# Forward and backward


def _tuple(outputs: Any) -> tuple[torch.Tensor | None, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def _grads(
    outputs: Any, inputs: Inputs, output_grads: Sequence[torch.Tensor | None], names: Sequence[str], **options: bool
) -> tuple[torch.Tensor, ...]:
    pairs = [(o, g.to(o.dtype)) for o, g in zip(_tuple(outputs), output_grads) if o is not None and g is not None]
    outs, grads = zip(*pairs)
    return torch.autograd.grad(outs, [inputs[n] for n in names], grads, materialize_grads=True, **options)


def trained(inputs: Inputs) -> list[str]:
    return [name for name, t in inputs.items() if isinstance(t, torch.Tensor) and t.requires_grad]


def evaluate(
    fn: Callable[..., Any],
    inputs: Inputs,
    output_grads: Sequence[torch.Tensor | None] = (),
    wanted: Iterable[str] | None = None,
) -> Results:
    """Outputs of `fn(**inputs)` and the gradients of the inputs named in `wanted` (default: all that require one)."""
    outputs = fn(**inputs)
    results = {f"output {i}": o.detach() for i, o in enumerate(_tuple(outputs)) if o is not None}
    names = trained(inputs) if wanted is None else list(wanted)
    if names and output_grads:
        for name, grad in zip(names, _grads(outputs, inputs, output_grads, names)):
            results[f"d{name}"] = grad
    return results


# Budgets


def relative_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    norm, error = truth.double().norm().item(), (actual.double() - truth.double()).norm().item()
    return error / norm if norm else error


def largest_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    return (actual.double() - truth.double()).abs().max().item() if truth.numel() else 0.0


def ulp(value: float, dtype: torch.dtype) -> float:
    """The spacing of `dtype` at `value`."""
    smallest = torch.finfo(dtype).smallest_normal
    return 2.0 ** math.floor(math.log2(max(abs(value), smallest))) * torch.finfo(dtype).eps


def assert_float32(actual: Results, truth: Results, budget: float = FLOAT32_BUDGET) -> None:
    """Every tensor within the float32 budget of the float64 truth, and zero wherever the truth is exactly zero."""
    assert actual.keys() == truth.keys()
    for name, value in actual.items():
        expected = truth[name]
        assert value.shape == expected.shape, name
        assert value.dtype == torch.float32, name
        error = relative_error(value, expected)
        assert error <= budget, f"{name}: relative error {error:.2e} (NaN: unwritten memory)"
        assert not value[expected == 0].any(), f"{name}: an exact zero was lost"


def assert_no_worse_than_stock(actual: Results, stock: Results, truth: Results) -> None:
    """Every tensor as close to the float64 truth as stock's eager op in the same dtype, within the factors above.

    The interpreter's cast to bfloat16 truncates, which doubles the error of a rounding: it is granted that.
    """
    assert actual.keys() == stock.keys() == truth.keys()
    for name, value in actual.items():
        expected, other = truth[name], stock[name]
        assert value.shape == expected.shape, name
        assert value.dtype == other.dtype, f"{name}: {value.dtype}, stock {other.dtype}"
        truncated = value.dtype == torch.bfloat16 and interpreting()
        error, allowed = relative_error(value, expected), STOCK_L2_FACTOR * relative_error(other, expected)
        allowed = allowed * (2.0 if truncated else 1.0) + 1e-7
        assert error <= allowed, f"{name}: relative error {error:.3e}, allowed {allowed:.3e}"
        one_ulp = ulp(expected.abs().max().item(), value.dtype) if expected.numel() else 0.0
        largest = largest_error(value, expected)
        allowed = STOCK_MAX_FACTOR * largest_error(other, expected) + one_ulp * (2.0 if truncated else 1.0)
        assert largest <= allowed, f"{name}: largest error {largest:.3e}, allowed {allowed:.3e}"


def assert_no_worse_over_seeds(actual: Sequence[Results], stock: Sequence[Results], truth: Sequence[Results]) -> None:
    """The mean relative L2 error of every tensor over several seeds, against stock's, within the factor above.

    For chains of many operations: a few rows with large gradients decide the error of one draw, whose ratio to stock's
    scatters around its mean, and that of the largest error twice over. The chain's parts are held to both.
    """
    for name in truth[0]:
        assert actual[0][name].dtype == stock[0][name].dtype, name
        errors, others = (
            [relative_error(result[name], expected[name]) for result, expected in zip(results, truth)]
            for results in (actual, stock)
        )
        error, allowed = sum(errors) / len(errors), STOCK_L2_FACTOR * sum(others) / len(others) + 1e-7
        assert error <= allowed, f"{name}: mean relative error {error:.3e}, allowed {allowed:.3e}"


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal shape, dtype and values, NaNs included."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def assert_repeatable_and_read_only(
    fn: Callable[..., Any], inputs: Inputs, output_grads: Sequence[torch.Tensor | None]
) -> None:
    """Two backwards over one graph agree bit for bit, and nothing that autograd or the caller owns is written."""
    saved: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    def snapshot(tensors: Iterable[Any]) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
        return [(t, t.detach().clone(), t._version) for t in tensors if isinstance(t, torch.Tensor)]

    watched = snapshot([*inputs.values(), *output_grads])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        outputs = fn(**inputs)
    watched += snapshot([*saved, *_tuple(outputs)])
    names = trained(inputs)
    first = [g.clone() for g in _grads(outputs, inputs, output_grads, names, retain_graph=True)]
    second = _grads(outputs, inputs, output_grads, names)
    for name, a, b in zip(names, first, second):
        assert same_bits(a, b), f"d{name} differs between two backwards"
    for tensor, before, version in watched:
        assert same_bits(tensor.detach(), before) and tensor._version == version, "a tensor was written in place"


# Counters


@dataclass
class Launched:
    name: str
    grid: tuple[int, ...]
    kwargs: dict[str, Any]


@dataclass
class _Counted:
    name: str
    kernel: Any
    log: list[Launched]

    def __getitem__(self, grid: tuple[int, ...] | Prepared) -> Callable[..., Any]:
        def run(**kwargs: Any) -> Any:
            if isinstance(grid, Prepared):
                self.log.append(Launched(self.name, grid.grid, kwargs | grid.numbers))
            else:
                self.log.append(Launched(self.name, grid, kwargs))
            return self.kernel[grid](**kwargs)

        return run


def record_launches(monkeypatch: pytest.MonkeyPatch, *modules: ModuleType) -> list[Launched]:
    """A list that grows by one entry per launch of any kernel of these modules, compiled or interpreted."""
    log: list[Launched] = []
    for module in modules:
        for name in [n for n in vars(module) if n.endswith("_kernel") and n.startswith("_")]:
            monkeypatch.setattr(module, name, _Counted(name, getattr(module, name), log))
    return log


_ALLOCATING = ("empty", "new_empty", "empty_like", "zeros", "new_zeros", "zeros_like", "clone", "_to_copy")


class Dispatched(TorchDispatchMode):
    """Shapes of the tensors that torch allocates (empty ones left out), and the number of its matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.allocated: list[tuple[int, ...]] = []
        self.matmuls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name in _ALLOCATING and result.numel():
            self.allocated.append(tuple(result.shape))
        self.matmuls += name in ("mm", "addmm", "bmm", "matmul")
        return result
