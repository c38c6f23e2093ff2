"""One table: (kernel, shape class, architecture) -> block sizes, warps and stages.

The dispatcher reads it at every launch; a tuner and the portability gate read the same rows. An architecture without
a row of its own uses "any". "interpreter" rows trade blocks for few, large programs: Triton's interpreter pays per
operation, not per element. Beside it: the architectures on which attention is another's kernel.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import torch

from fastgemma.kernels.backend import HAS_TRITON, interpreting, triton


@dataclass(frozen=True, eq=False)
class Launch:
    """How to launch one kernel: its constexpr block sizes, the compiler's options, and how tiles are loaded.

    Equal to itself alone, which makes it a key of what is worked out from it.
    """

    blocks: dict[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1
    descriptors: bool = False  # through the copy engine (TMA) of sm_90 and later

    def kwargs(self) -> dict[str, int]:
        return self._kwargs

    def within_heads(self, head_dim: int) -> Launch:
        """The same with no piece of a head larger than a head."""
        pieces = ("BLOCK_D", "DIMS", "KEY_DIMS")
        blocks = {name: min(size, head_dim) if name in pieces else size for name, size in self.blocks.items()}
        return replace(self, blocks=blocks)

    @functools.cached_property
    def _kwargs(self) -> dict[str, int]:
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages}


def _products(for_q: tuple[int, int, int, int], for_keys: tuple[int, int, int, int], num_warps: int = 4) -> Launch:
    """Of "attention_products". For dq: rows, keys at a time, a piece of a head, stages; for dk and dv: keys, rows at a
    time, and the same."""
    names = ("BLOCK_M", "BLOCK_K", "DIMS", "STAGES", "KEY_BLOCK_N", "KEY_BLOCK_K", "KEY_DIMS", "KEY_STAGES")
    return Launch(dict(zip(names, for_q + for_keys)), num_warps)


# Shape classes are the padded row width, as text, or "any".
TABLE: dict[tuple[str, str, str], Launch] = {
    # Row kernels hold whole rows in registers: about 16 elements per thread.
    ("rms_norm", "256", "any"): Launch({"BLOCK_M": 8}, num_warps=4),
    ("rms_norm", "512", "any"): Launch({"BLOCK_M": 4}, num_warps=4),
    ("rms_norm", "1024", "any"): Launch({"BLOCK_M": 2}, num_warps=4),
    ("rms_norm", "2048", "any"): Launch({"BLOCK_M": 1}, num_warps=4),
    ("rms_norm", "4096", "any"): Launch({"BLOCK_M": 1}, num_warps=8),
    ("rms_norm", "8192", "any"): Launch({"BLOCK_M": 1}, num_warps=16),
    ("rms_norm", "any", "any"): Launch({"BLOCK_M": 1}, num_warps=4),
    ("rms_norm", "any", "interpreter"): Launch({"BLOCK_M": 64}),
    # Heads of 256 or 512: a tile of tokens by one head.
    ("qk_norm_rope", "256", "any"): Launch({"BLOCK_M": 4}, num_warps=2),
    ("qk_norm_rope", "512", "any"): Launch({"BLOCK_M": 2}, num_warps=2),
    ("qk_norm_rope", "any", "any"): Launch({"BLOCK_M": 16}, num_warps=4),
    # A warp of 64 threads has twice the lanes to fill with 16 bytes each.
    ("qk_norm_rope", "256", "gfx942"): Launch({"BLOCK_M": 8}, num_warps=2),
    ("qk_norm_rope", "512", "gfx942"): Launch({"BLOCK_M": 4}, num_warps=2),
    ("qk_norm_rope", "any", "gfx942"): Launch({"BLOCK_M": 16}, num_warps=2),
    ("qk_norm_rope", "any", "interpreter"): Launch({"BLOCK_M": 64}),
    # Elementwise tiles.
    ("geglu", "any", "any"): Launch({"BLOCK_M": 1, "BLOCK_N": 1024}, num_warps=4),
    ("geglu", "256", "any"): Launch({"BLOCK_M": 4, "BLOCK_N": 256}, num_warps=4),
    ("geglu", "any", "gfx942"): Launch({"BLOCK_M": 1, "BLOCK_N": 1024}, num_warps=2),
    ("geglu", "256", "gfx942"): Launch({"BLOCK_M": 4, "BLOCK_N": 256}, num_warps=2),
    ("geglu", "any", "interpreter"): Launch({"BLOCK_M": 64, "BLOCK_N": 1024}),
    ("dequantize_nf4", "any", "any"): Launch({"BLOCK": 512}, num_warps=4),
    ("dequantize_nf4", "any", "interpreter"): Launch({"BLOCK": 1 << 14}),
    ("block_diagonal", "any", "any"): Launch({"BLOCK_M": 32}, num_warps=4),
    ("block_diagonal", "any", "interpreter"): Launch({"BLOCK_M": 256}),
    # Rows are (position, head of a group) pairs; shape classes are head_dim, "any" for float32. BLOCK_D and DIMS are
    # pieces of a head, at most. BLOCK_M of "ds" is a multiple of BLOCK_M and KEY_BLOCK_K of "products", its BLOCK_N one
    # of BLOCK_K and KEY_BLOCK_N.
    # Of 4 warps, which sm_90 keeps, "fwd" and "ds" for any shape would spill on smaller cards.
    ("attention_fwd", "any", "any"): Launch({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=8),
    ("attention_fwd", "any", "sm_90"): Launch({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4),
    ("attention_fwd", "256", "any"): Launch({"BLOCK_M": 32, "BLOCK_N": 32}, num_warps=8, num_stages=2),
    ("attention_fwd", "256", "sm_100"): Launch({"BLOCK_M": 64, "BLOCK_N": 16}, num_warps=8, num_stages=3),
    # Two programs a multiprocessor: one's softmax runs beside the other's products.
    ("attention_fwd", "256", "sm_90"): Launch(
        {"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=4, num_stages=2, descriptors=True
    ),
    ("attention_fwd", "any", "interpreter"): Launch({"BLOCK_M": 512, "BLOCK_N": 128}),
    ("attention_scores", "any", "any"): Launch({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 16}, num_warps=4),
    ("attention_scores", "512", "any"): Launch(
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": 64}, num_warps=8, num_stages=3
    ),
    ("attention_scores", "512", "sm_90"): Launch(
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": 64}, num_warps=4, num_stages=3
    ),
    ("attention_scores", "any", "interpreter"): Launch({"BLOCK_M": 512, "BLOCK_N": 128, "BLOCK_D": 512}),
    ("attention_output", "any", "any"): Launch({"BLOCK_M": 64, "BLOCK_K": 32, "DIMS": 16}, num_warps=4),
    ("attention_output", "512", "any"): Launch({"BLOCK_M": 128, "BLOCK_K": 32, "DIMS": 128}, num_warps=8, num_stages=3),
    ("attention_output", "512", "sm_90"): Launch(
        {"BLOCK_M": 128, "BLOCK_K": 64, "DIMS": 256}, num_warps=8, num_stages=3
    ),
    ("attention_output", "any", "interpreter"): Launch({"BLOCK_M": 512, "BLOCK_K": 128, "DIMS": 512}),
    ("attention_delta", "any", "any"): Launch({"BLOCK_M": 8}, num_warps=4),
    ("attention_delta", "any", "interpreter"): Launch({"BLOCK_M": 256}),
    ("attention_sum", "any", "any"): Launch({"BLOCK": 1024}, num_warps=4),
    ("attention_sum", "any", "gfx942"): Launch({"BLOCK": 1024}, num_warps=2),
    ("attention_sum", "any", "interpreter"): Launch({"BLOCK": 1 << 16}),
    ("attention_ds", "any", "any"): Launch({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 16}, num_warps=8),
    ("attention_ds", "any", "gfx942"): Launch({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 32}, num_warps=8),
    ("attention_ds", "any", "sm_90"): Launch({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_D": 16}, num_warps=4),
    ("attention_ds", "any", "interpreter"): Launch({"BLOCK_M": 512, "BLOCK_N": 128, "BLOCK_D": 512}),
    ("attention_products", "any", "any"): _products((64, 32, 16, 1), (64, 32, 16, 1)),
    ("attention_products", "any", "interpreter"): _products((512, 128, 512, 1), (128, 512, 512, 1)),
    **{
        (f"attention_{name}", head_dim, architecture): row
        for head_dim in ("256", "512")
        for name, architecture, row in (
            ("ds", "any", Launch({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_D": 32}, num_warps=8, num_stages=3)),
            ("ds", "sm_90", Launch({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_D": 64}, num_warps=8, num_stages=3)),
            ("products", "any", _products((128, 32, 128, 3), (64, 32, 128, 3), num_warps=8)),
            ("products", "sm_90", _products((128, 64, 256, 3), (128, 64, 128, 4), num_warps=8)),
        )
    },
    # One program per row of logits, streaming over the vocabulary.
    ("softcapped_logits", "any", "any"): Launch({"BLOCK_V": 4096}, num_warps=16),
    ("softcapped_logits", "any", "gfx942"): Launch({"BLOCK_V": 4096}, num_warps=8),
    ("softcapped_logits", "any", "interpreter"): Launch({"BLOCK_V": 4096}),
    ("linear_cross_entropy", "any", "any"): Launch({"BLOCK_V": 4096}, num_warps=8),
    ("linear_cross_entropy", "any", "interpreter"): Launch({"BLOCK_V": 4096}),
}


@dataclass(frozen=True)
class Instead:
    """Why attention runs through PyTorch's memory-efficient kernel on an architecture, and not through ours."""

    reason: str
    tritons: tuple[str, ...] = ()  # the versions that it is true of; empty: all


_NO_TENSOR_CORES = Instead("Triton has no tensor cores on GPUs before Ampere")
_DOES_NOT_COMPILE = Instead("Triton 3.6 and 3.7 cannot compile ours for B200; 3.8 can", ("3.6", "3.7"))
# By architecture; where there is no row, attention is ours.
EFFICIENT_ATTENTION: dict[str, Instead] = {
    "sm_70": _NO_TENSOR_CORES,
    "sm_72": _NO_TENSOR_CORES,
    "sm_75": _NO_TENSOR_CORES,
    "sm_100": _DOES_NOT_COMPILE,
    "sm_103": _DOES_NOT_COMPILE,
}


@functools.cache
def why_efficient_attention(device: torch.device) -> str | None:
    """Why attention on a device is PyTorch's memory-efficient kernel; None where it is ours."""
    row = EFFICIENT_ATTENTION.get(architecture(device))
    if row is None:
        return None
    version = ".".join(triton.__version__.split(".")[:2]) if HAS_TRITON else ""
    return row.reason if not row.tritons or version in row.tritons else None


@functools.cache
def architecture(device: torch.device) -> str:
    """The table's name of a device: "sm_90", "gfx942" and the like, or "interpreter"."""
    if device.type != "cuda" or interpreting():
        return "interpreter"
    if torch.version.hip is not None:
        # What follows the first colon are features: "gfx942:sramecc+:xnack-".
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least."""
    if device.type != "cuda":
        return 8
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def launch(kernel: str, shape_class: str, device: torch.device, head_dim: int | None = None) -> Launch:
    """The most specific row of the table for this kernel, shape class and device, with pieces within `head_dim`.

    A row for this shape class on any device comes before one for any shape on this device.
    """
    arch = architecture(device)
    devices = ("interpreter",) if arch == "interpreter" else (arch, "any")
    for shape in (shape_class, "any"):
        for candidate in devices:
            row = TABLE.get((kernel, shape, candidate))
            if row is not None:
                return row if head_dim is None else row.within_heads(head_dim)
    raise LookupError(f"fastgemma: launch.py has no row for kernel {kernel!r}, shape class {shape_class!r}, {arch}.")
