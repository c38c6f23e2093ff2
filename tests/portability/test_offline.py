"""Every operation's launches compile for the GPUs of the launch table, fit their shared memory and do not spill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
SCRIPT = Path(__file__).parent / "offline.py"


def compile_all(*targets: str) -> list[dict]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), "--targets", ",".join(targets)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    "target",
    [
        pytest.param(target, marks=() if target == "sm_89" else pytest.mark.slow)
        for target in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
    ],
)
def test_launches_fit_the_target(target):
    results = compile_all(target)
    kernels = {result["kernel"] for result in results}
    assert len(kernels) >= 8, kernels
    for result in results:
        assert result["shared"] <= result["shared_limit"], result
        assert result["stack"] <= result["stack_limit"], result
        assert result["vector_access"], result
