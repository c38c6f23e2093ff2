"""Compiles the launches that operations make, for GPUs that are not there.

    python tests/portability/offline.py [--targets sm_89,sm_90]

Operations run on CPU tensors with every launch recorded instead of executed; each recorded launch is then compiled
for each target with the compiler that Triton's wheel carries. Prints one JSON line per (kernel, target): shared
memory, registers, stack bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

# Opt-in shared memory per block, in bytes.
TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166_912),
    "sm_86": (GPUTarget("cuda", 86, 32), 101_376),
    "sm_89": (GPUTarget("cuda", 89, 32), 101_376),
    "sm_90": (GPUTarget("cuda", 90, 32), 232_448),
    "sm_100": (GPUTarget("cuda", 100, 32), 232_448),
    "sm_120": (GPUTarget("cuda", 120, 32), 101_376),
}
# Bytes of stack that a launch may take where it was timed and beats those that take none.
_SPILLS = {
    ("_attention_fwd_kernel", "sm_90"): 512,
    ("_attention_output_kernel", "sm_90"): 384,
    ("_attention_ds_kernel", "sm_90"): 64,
    ("_attention_dq_kernel", "sm_90"): 128,
}
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
_VECTOR_ACCESS = r"ld\.global\S*\.(v[24]|b128)|cp\.async\.cg\.shared\.global.*, (16|0x10)\b"
_OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")


@dataclass(frozen=True)
class Recorded:
    """One launch: a kernel, the types of its arguments, its constexprs and compiler options."""

    kernel: JITFunction
    signature: tuple[tuple[str, str], ...]
    constexprs: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__


def _record(kernel: JITFunction, kwargs: dict[str, Any]) -> Recorded:
    signature, constexprs, divisible = [], [], []
    for index, parameter in enumerate(kernel.params):
        value = kwargs[parameter.name]
        if parameter.is_constexpr or value is None:
            signature.append((parameter.name, "constexpr"))
            constexprs.append((parameter.name, value))
        elif isinstance(value, torch.Tensor):
            signature.append((parameter.name, f"*{_TYPES[value.dtype]}"))
            divisible.append(index)
        elif isinstance(value, float):
            signature.append((parameter.name, "fp32"))
        elif isinstance(value, TensorDescriptor):
            tile = ", ".join(map(str, value.block_shape))
            signature.append((parameter.name, f"tensordesc<{_TYPES[value.base.dtype]}[{tile}]>"))
        elif value == 1 and not parameter.do_not_specialize:
            signature.append((parameter.name, "constexpr"))
            constexprs.append((parameter.name, 1))
        else:
            signature.append((parameter.name, "i64" if abs(value) >= 2**31 else "i32"))
            if value % 16 == 0 and not parameter.do_not_specialize:
                divisible.append(index)
    options = tuple((name, kwargs[name]) for name in _OPTIONS if name in kwargs)
    return Recorded(kernel, tuple(signature), tuple(constexprs), tuple(divisible), options)


def record(run: Any, architecture: str = "any") -> list[Recorded]:
    """The distinct launches that `run()` makes with the rows that `architecture` would get."""
    from fastgemma.kernels import launch

    launches: dict[Recorded, None] = {}

    def capture(self: JITFunction, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any) -> None:
        if args:
            kwargs = {**dict(zip(self.arg_names, args)), **kwargs}
        launches[_record(self, kwargs)] = None

    launch.launch.cache_clear()
    with (
        mock.patch.object(JITFunction, "run", capture),
        mock.patch("fastgemma.kernels.backend.interpreting", lambda: True),
        mock.patch("fastgemma.kernels.launch.architecture", lambda device: architecture),
    ):
        run()
    launch.launch.cache_clear()
    return list(launches)


def compile_for(recorded: Recorded, target: str) -> dict[str, Any]:
    """Resources of one launch on one target; raises whatever the compiler raises."""
    source = ASTSource(
        fn=recorded.kernel,
        signature=dict(recorded.signature),
        constexprs=dict(recorded.constexprs),
        attrs={(index,): [["tt.divisibility", 16]] for index in recorded.divisible},
    )
    compiled = triton.compile(source, target=TARGETS[target][0], options=dict(recorded.options))
    registers, stack = _resources(compiled.asm["cubin"])
    return {
        "kernel": recorded.name,
        "target": target,
        "constexprs": {k: v for k, v in recorded.constexprs if not isinstance(v, torch.Tensor)},
        "warps": compiled.metadata.num_warps,
        "shared": compiled.metadata.shared,
        "shared_limit": TARGETS[target][1],
        "registers": registers,
        "stack": stack,
        "stack_limit": _SPILLS.get((recorded.name, target), 0),
        "vector_access": bool(re.search(_VECTOR_ACCESS, compiled.asm["ptx"])),
    }


def _resources(cubin: bytes) -> tuple[int, int]:
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert match is not None, text
    return int(match[1]), int(match[2])


def operations(dtype: torch.dtype = torch.bfloat16) -> None:
    """Every operation once, forward and backward, on the published shapes with few tokens."""
    from fastgemma.kernels.adapter_columns import Block, block_diagonal
    from fastgemma.kernels.attention import attention
    from fastgemma.kernels.geglu import geglu
    from fastgemma.kernels.key_intervals import key_intervals
    from fastgemma.kernels.linear_cross_entropy import linear_cross_entropy
    from fastgemma.kernels.nf4 import NestedScales, NF4Weight, dequantize_nf4, dequantize_nf4_stack
    from fastgemma.kernels.qk_norm_rope import qk_norm_rope
    from fastgemma.kernels.rms_norm import rms_norm, rms_norm_residual

    def rand(*shape: int, grad: bool = True) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_(grad)

    for hidden in (256, 512, 1536, 2560, 2816, 3840, 5376):
        for trained in (False, True):
            x, weight = rand(2, 16, hidden), rand(hidden, grad=trained)
            rms_norm(x, weight).sum().backward()
            rms_norm(x, None).sum().backward()
            rms_norm_residual(x, weight, rand(2, 16, hidden), rand(1, grad=False)).sum().backward()
    for heads, kv_heads, head_dim, rotary, values_from_keys in (
        (8, 1, 256, 256, False),
        (8, 0, 256, 256, False),
        (8, 1, 512, 128, False),
        (8, 0, 512, 128, False),
        (32, 4, 512, 128, True),
    ):
        for trained in (False, True):
            k = rand(2, 16, kv_heads * head_dim) if kv_heads else None
            v = rand(2, 16, kv_heads * head_dim) if kv_heads and not values_from_keys else None
            angle, weight = rand(1, 16, head_dim, grad=False), rand(head_dim, grad=trained)
            outs = qk_norm_rope(
                rand(2, 16, heads * head_dim), k, v, angle, angle, weight, weight if kv_heads else None, head_dim,
                rotary, values_from_keys,
            )  # fmt: skip
            sum(out.sum() for out in outs if out is not None).backward()
    for columns in (256, 6144, 12288):
        geglu(rand(2, 16, columns), rand(2, 16, columns)).sum().backward()
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
    blocks = [Block(rand(64, 16, grad=False), 64 * number, 64, 16 * number) for number in range(3)]
    for count in (2, 3):
        block_diagonal(blocks[:count], torch.empty(64 * count, 64 + 16 * count, dtype=dtype)[:, 64:])
    for heads, kv_heads, head_dim, window in (
        (8, 1, 256, 512),
        (16, 8, 256, 1024),
        (8, 1, 512, None),
        (32, 4, 512, None),
    ):
        q, k, v = (rand(2, 16, count, head_dim) for count in (heads, kv_heads, kv_heads))
        attention(q, k, v, key_intervals(2, 16, q.device, window)).sum().backward()
    labels = torch.zeros(16, dtype=torch.int64)
    head = torch.zeros(262144, 8, dtype=dtype)
    linear_cross_entropy(rand(16, 8), head, labels, softcap=30.0).backward()
    linear_cross_entropy(rand(16, 8, grad=False), head, labels, softcap=30.0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--targets", default=",".join(TARGETS))
    arguments = parser.parse_args()
    bad = 0
    for target in arguments.targets.split(","):
        for recorded in record(operations, target):
            result = compile_for(recorded, target)
            fine = result["stack"] <= result["stack_limit"] and result["shared"] <= result["shared_limit"]
            bad += not fine
            print(json.dumps({**result, "ok": fine}), flush=True)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
