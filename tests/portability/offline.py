"""Compiles recorded launches for GPUs that are not there, and reads from the result what they need.

Triton's wheel carries the compilers. Results are kept in a directory, under a hash of everything that they follow from:
the kernel's source and that of the functions it calls, types, constexprs, options, target, Triton, and this file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

from launches import Recorded, torch
from triton import __version__ as TRITON
from triton import backends
from triton import compile as triton_compile
from triton.backends.amd.compiler import HIPBackend
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

# What users get; Triton 3.9 warns where it is left out.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


@dataclass(frozen=True)
class Target:
    """A card: what Triton calls it, its shared memory per block in bytes, and what runs on it."""

    gpu: GPUTarget
    shared_limit: int
    dtype: torch.dtype = torch.bfloat16
    matmuls: bool = True


TARGETS = {
    # Triton has no tensor cores there: attention stays stock.
    "sm_75": Target(GPUTarget("cuda", 75, 32), 65_536, torch.float16, matmuls=False),
    "sm_80": Target(GPUTarget("cuda", 80, 32), 166_912),
    "sm_86": Target(GPUTarget("cuda", 86, 32), 101_376),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 101_376),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 232_448),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 232_448),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 101_376),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 65_536),
}

# 16 bytes a thread and instruction: loads to registers or to shared memory, and tensors copied as a whole.
_WIDE_LOAD = {
    "cuda": r"ld\.global\S*\.(v4\.[bfsu]32|v8\.[bfsu]32|v[24]\.[bfsu]64|b128)|"
    r"cp\.async\.cg\.shared\.global.*, (16|0x10)\b|cp\.async\.bulk",
    "hip": r"(global|buffer)_load_(lds_)?dwordx4",
}
_WIDE_STORE = {
    "cuda": r"st\.global\S*\.(v4\.[bfsu]32|v8\.[bfsu]32|v[24]\.[bfsu]64|b128)|cp\.async\.bulk",
    "hip": r"(global|buffer)_store_dwordx4",
}
_TENSOR_CORE = {"cuda": r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", "hip": r"\bv_s?mfmac?_"}


@dataclass(frozen=True)
class Compiled:
    """What a launch needs on a target, or why it does not compile.

    `spills`: bytes of memory a thread keeps registers in (CUDA: its stack), or spilled registers (AMD).
    `matmul`: it multiplies matrices, and reads numbers of 16 bits. `tensor_core`: it does so on tensor cores alone.
    """

    kernel: str
    target: str
    constexprs: dict[str, Any]
    warps: int = 0
    shared: int = 0
    registers: int = 0
    spills: int = 0
    matmul: bool = False
    tensor_core: bool = False
    wide_load: bool = False
    wide_store: bool = False
    error: str | None = None


def compile_launch(recorded: Recorded, target: str) -> Compiled:
    """Compiles one launch for one target; a compiler that raises gives a result with its error."""
    result = Compiled(recorded.name, target, dict(recorded.constexprs))
    kernel = recorded.kernel
    source = ASTSource(
        fn=kernel,
        signature=dict(recorded.signature),
        constexprs=dict(recorded.constexprs),
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in recorded.divisible},
    )
    gpu = TARGETS[target].gpu
    try:
        # AMD's assembly says all; Triton 3.4 would link it, and ask for the version of a linker that it lacks.
        with mock.patch.multiple(HIPBackend, make_hsaco=lambda *_: b"", hash=lambda _: ""):
            compiled = triton_compile(source, target=gpu, options=dict(recorded.options))
    except Exception as error:
        return replace(result, error=traceback.format_exception_only(error)[-1].strip()[:500])
    assembly = compiled.asm["ptx" if gpu.backend == "cuda" else "amdgcn"]
    read = _of_cubin(compiled.asm["cubin"]) if gpu.backend == "cuda" else _of_amdgcn(assembly)
    registers, spills = read
    # The types that the products' factors have, in Triton's first representation.
    factors = re.findall(r"tt\.dot\b.* : tensor<[\dx]+x(\w+)> \*", compiled.asm["ttir"])
    return replace(
        result,
        warps=compiled.metadata.num_warps,
        shared=compiled.metadata.shared,
        registers=registers,
        spills=spills,
        matmul=bool(factors) and recorded.reads_16_bits,
        tensor_core="f32" not in factors and bool(re.search(_TENSOR_CORE[gpu.backend], assembly)),
        wide_load=bool(re.search(_WIDE_LOAD[gpu.backend], assembly)),
        wide_store=bool(re.search(_WIDE_STORE[gpu.backend], assembly)),
    )


def _of_cubin(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack that instructions touch) of a thread."""
    tool = str(Path(backends.__file__).parent / "nvidia" / "bin" / "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
        match = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
        assert match is not None, usage.stdout
        registers, stack = int(match[1]), int(match[2])
        if stack:
            # The compiler reserves a few bytes for some functions, and never touches them.
            code = subprocess.run([tool, "--dump-sass", file.name], capture_output=True, text=True, check=True)
            stack = stack if re.search(r"\b(STL|LDL)\b", code.stdout) else 0
    return registers, stack


def _of_amdgcn(assembly: str) -> tuple[int, int]:
    """(vector registers, spilled registers of both kinds) of a thread."""
    counts = dict(re.findall(r"\.(vgpr_count|[vs]gpr_spill_count):\s+(\d+)", assembly))
    return int(counts["vgpr_count"]), int(counts["vgpr_spill_count"]) + int(counts["sgpr_spill_count"])


def compile_all(jobs: Iterable[tuple[Recorded, str]], cache: Path, workers: int) -> Iterator[Compiled]:
    """The result of every (launch, target), from the cache where it has one, else from worker processes."""
    cache.mkdir(parents=True, exist_ok=True)
    missing = []
    for recorded, target in jobs:
        file = cache / f"{_key(recorded, target)}.json"
        if file.exists():
            yield Compiled(**json.loads(file.read_text()))
        else:
            missing.append((recorded, target, file))
    if not missing:
        return
    # Triton's own cache is the user's, who has no use for other cards' kernels.
    with tempfile.TemporaryDirectory() as scratch, ProcessPoolExecutor(workers, None, _start, (scratch,)) as pool:
        futures = {pool.submit(compile_launch, recorded, target): file for recorded, target, file in missing}
        for future in as_completed(futures):
            result = future.result()
            # An error may be the machine's: try again the next time.
            if result.error is None:
                _write(futures[future], json.dumps(asdict(result)))
            yield result


def _start(scratch: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = scratch


def _write(file: Path, text: str) -> None:
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(text)
    part.replace(file)


def _key(recorded: Recorded, target: str) -> str:
    """A hash of what the result follows from."""
    parts = [TRITON, Path(__file__).read_text(), recorded.kernel.cache_key, target, recorded.name]
    parts += [recorded.signature, recorded.constexprs, sorted(recorded.divisible), recorded.options]
    return hashlib.sha256(repr(parts).encode()).hexdigest()
