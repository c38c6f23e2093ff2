"""The portability gate passes with the installed Triton, and fails on what it is there to find."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FOLDER = Path(__file__).parent
TARGETS = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")


def gate(*arguments: str, first: str = "", path: Path = FOLDER) -> subprocess.CompletedProcess[str]:
    """Runs the gate in a process of its own, after the statements `first`; one worker, for pytest's run beside it."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    search = [str(FOLDER), str(path), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, search))
    imports = "import sys, gate\nfrom fastgemma.kernels.launch import Launch"
    command = [sys.executable, "-c", f"{imports}\n{first}\nsys.exit(gate.main())", "--workers", "1", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_every_row_serves_the_target(target: str) -> None:
    done = gate("--targets", target, "--json")
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert {result["target"] for result in results} == {target}
    products = {result["kernel"] for result in results if result["matmul"]}
    assert len(products) == (0 if target == "sm_75" else 5), products


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "row", "finding"),
    [
        (
            "attention_scores",
            '("attention_scores", "512", "any"): ({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": 64}, 8, 5)',
            "shared memory",
        ),
        ("rms_norm_fwd", '("rms_norm", "8192", "any"): ({"BLOCK_M": 1}, 1, 1)', "spills"),
        ("geglu_fwd", '("geglu", "256", "any"): ({"BLOCK_M": 1, "BLOCK_N": 256}, 4, 1)', "no access of 16 bytes"),
    ],
)
def test_a_wrong_row_fails(kernel: str, row: str, finding: str, tmp_path: Path) -> None:
    change = f"gate.TABLE.update({{key: Launch(*value) for key, value in {{{row}}}.items()}})"
    done = gate("--targets", "sm_89", "--kernels", kernel, "--cache", str(tmp_path), first=change)
    assert done.returncode == 1, done.stdout
    assert finding in done.stderr, done.stderr
    assert "FAILS" in done.stdout


@pytest.mark.slow
def test_a_row_that_no_launch_takes_fails(tmp_path: Path) -> None:
    """Without its operation, which also leaves kernels of the package out."""
    change = "gate.launches.STREAMING[:] = [gate.launches.gates]; gate.launches.MATMULS.clear()"
    done = gate("--targets", "sm_89", "--cache", str(tmp_path), first=change)
    assert done.returncode == 1, done.stdout
    assert "no launch took row ('rms_norm', '2048', 'any')" in done.stderr
    assert "_attention_fwd_kernel was not launched" in done.stderr


SCALAR = """
import torch
import triton
import triton.language as tl


@triton.jit
def scalar_dot(x_ptr, out_ptr, SCALAR: tl.constexpr):
    tile = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    x = tl.load(x_ptr + tile)
    if SCALAR:
        x = x.to(tl.float32)
    tl.store(out_ptr + tile, tl.dot(x, tl.trans(x), input_precision="ieee"))


def run(dtype):
    for scalar in (True, False):
        scalar_dot[(1,)](x_ptr=torch.empty(64, 64, dtype=dtype), out_ptr=torch.empty(64, 64), SCALAR=scalar)
"""


@pytest.mark.slow
def test_a_product_that_left_the_tensor_cores_fails(tmp_path: Path) -> None:
    (tmp_path / "scalar.py").write_text(SCALAR)
    change = "import scalar; gate.launches.MATMULS.append(scalar.run)"
    arguments = ("--targets", "sm_89", "--kernels", "scalar_dot", "--cache", str(tmp_path / "cache"))
    done = gate(*arguments, first=change, path=tmp_path)
    assert done.returncode == 1, done.stdout
    failures = [line for line in done.stderr.splitlines() if "without tensor cores" in line]
    assert len(failures) == 1, done.stderr
    assert "SCALAR=True" in failures[0]


@pytest.mark.slow
def test_results_are_kept_by_source(tmp_path: Path) -> None:
    """A second run reads what the first one wrote; another row is another result."""
    arguments = ("--targets", "sm_89", "--kernels", "geglu_fwd", "--cache", str(tmp_path), "--json")
    first = gate(*arguments)
    written = set(tmp_path.iterdir())
    assert len(written) == 2
    again = gate(*arguments, first="gate.compile_all.__globals__['compile_launch'] = None")
    assert again.returncode == first.returncode == 0, again.stderr
    assert sorted(again.stdout.splitlines()) == sorted(first.stdout.splitlines())
    assert set(tmp_path.iterdir()) == written
    gate(*arguments, first='gate.TABLE["geglu", "256", "any"] = Launch({"BLOCK_M": 8, "BLOCK_N": 256})')
    assert len(set(tmp_path.iterdir())) == 3


@pytest.mark.slow
def test_tensor_descriptors_have_a_type() -> None:
    statements = (
        "from triton.tools.tensor_descriptor import TensorDescriptor\n"
        "x = gate.launches.torch.empty(128, 256, dtype=gate.launches.torch.bfloat16)\n"
        "print(gate.launches._kind(TensorDescriptor.from_tensor(x, [64, 256])))\n"
        "sys.exit(0)"
    )
    done = gate(first=statements)
    assert done.stdout.strip() == "tensordesc<bf16[64, 256]>", done.stderr
