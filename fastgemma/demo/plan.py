"""What one run of the demo does, and the plan for this machine."""

from __future__ import annotations

import dataclasses
import importlib.util

import torch

from fastgemma.kernels.backend import HAS_TRITON

_MODULES = ("trl", "datasets", "matplotlib")


class DemoError(Exception):
    """Why the demo cannot run, or what it found wrong; one message for the user."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One demo run; all three stages read the same one."""

    device: str  # "cuda" or "cpu"
    steps: int
    rows: int  # per batch
    seq_len: int
    hidden_size: int
    intermediate_size: int
    head_dim: int
    global_head_dim: int
    per_layer_size: int
    sliding_layers: int  # before each of the two full-attention layers
    vocab_size: int
    sliding_window: int
    base_steps: int  # in which the base model learns its text
    base_rate: float
    rate: float
    # |patched - stock| <= absolute + relative * |stock|, at every step
    absolute: float
    relative: float
    seed: int = 7
    per_layer_embeddings: str = "auto"  # fastgemma's feature of that name; "auto" is its default

    @property
    def layer_types(self) -> list[str]:
        return (["sliding_attention"] * self.sliding_layers + ["full_attention"]) * 2

    def allowed(self, stock_loss: float) -> float:
        return self.absolute + self.relative * abs(stock_loss)


CPU_PLAN = Plan(
    device="cpu",
    steps=6,
    rows=2,
    seq_len=64,
    hidden_size=64,
    intermediate_size=128,
    head_dim=16,
    global_head_dim=32,
    per_layer_size=16,
    sliding_layers=2,
    vocab_size=640,
    sliding_window=24,
    base_steps=350,
    base_rate=5e-3,
    rate=5e-3,
    # Both halves compute in float32 and differ in the order of their sums only: some 1e-6 of the loss where this was
    # tuned. The rest is room for other machines, since Adam divides by gradients that may be close to zero. A missing
    # dropout mask, the lost gradient of one projection or a single wrong sign show as 1e-3 and more by the second step.
    absolute=0.0,
    relative=2e-4,
)

GPU_PLAN = Plan(
    device="cuda",
    steps=30,
    rows=4,
    seq_len=512,
    hidden_size=512,
    intermediate_size=2048,
    head_dim=256,
    global_head_dim=512,
    per_layer_size=256,
    sliding_layers=4,
    vocab_size=1024,
    sliding_window=128,
    base_steps=200,
    base_rate=1e-3,
    rate=1e-3,
    # bfloat16 keeps 8 bits, so each half is about as far from the exact loss as from the other. On the mean over some
    # two thousand tokens that is a few thousandths at the first step, and it grows as the two runs step along weights
    # that were rounded differently. A wrong gradient or dropout mask parts the curves by far more within a few steps.
    absolute=0.05,
    relative=0.0,
)


def gpu_problem() -> str | None:
    """Why the kernels cannot run on this machine's GPU, or None."""
    if not HAS_TRITON:
        return "Triton is not installed (it is published for Linux only)"
    if not torch.cuda.is_available():
        return "there is no CUDA GPU, or this build of PyTorch cannot use it"
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"{torch.cuda.get_device_name()} has compute capability {major}.{minor}, and bfloat16 kernels need 8.0"
    return None


def make_plan(device: str = "auto", steps: int | None = None, per_layer_embeddings: str = "auto") -> Plan:
    """The plan for this machine.

    Args:
        device: "cuda", "cpu", or "auto" for the GPU where kernels can run on it.
        steps: optimizer steps of each half (default: the plan's own).
        per_layer_embeddings: mode of that feature in the patched half.

    Raises:
        DemoError: an unknown device; kernels cannot run on it; or a package that the demo needs is missing.
    """
    if device not in ("auto", "cuda", "cpu"):
        raise DemoError(f"--device {device}: it is one of auto, cuda, cpu.")
    problem = gpu_problem()
    if device == "cuda" and problem:
        raise DemoError(f"The kernels cannot run on a GPU here: {problem}.")
    if not HAS_TRITON:
        raise DemoError(f"The kernels cannot run here: {problem}. Without it fastgemma runs stock code everywhere.")
    plan = GPU_PLAN if device == "cuda" or (device == "auto" and problem is None) else CPU_PLAN
    needed = (*_MODULES, "bitsandbytes") if plan.device == "cuda" else _MODULES
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise DemoError(f'The demo needs {", ".join(missing)}: pip install "fastgemma[train]"')
    if steps is not None:
        plan = dataclasses.replace(plan, steps=steps)
    return dataclasses.replace(plan, per_layer_embeddings=per_layer_embeddings)
