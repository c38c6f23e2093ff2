"""Runs every kernel on the GPU, for NVIDIA's compute-sanitizer to watch: `make sanitize`.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitize.py

The operations are those whose launches the portability gate compiles, at lengths that end in the middle of tiles too;
attention at these alone, as a sanitizer takes minutes for the published ones. Without torch's caching allocator every
tensor is an allocation of its own, so that an access one element past it shows.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "portability"))

import launches  # noqa: E402
import torch  # noqa: E402
from launches import Operation  # noqa: E402

from fastgemma.kernels.attention import attention  # noqa: E402
from fastgemma.kernels.geglu import geglu  # noqa: E402
from fastgemma.kernels.key_intervals import key_intervals  # noqa: E402
from fastgemma.kernels.linear_cross_entropy import linear_cross_entropy  # noqa: E402
from fastgemma.kernels.qk_norm_rope import qk_norm_rope  # noqa: E402
from fastgemma.kernels.rms_norm import rms_norm_residual  # noqa: E402
from fastgemma.kernels.workspace import set_workspace_bytes  # noqa: E402


def _values(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def ragged(dtype: torch.dtype) -> None:
    """Sizes that no block divides."""
    for rows, hidden in ((1, 1536), (7, 2560), (3, 1000)):
        x, residual, weight = (_values(*shape, dtype=dtype) for shape in ((rows, hidden), (rows, hidden), (hidden,)))
        rms_norm_residual(x, weight, residual, torch.ones(1, dtype=dtype)).sum().backward()
        geglu(x, residual).sum().backward()
    for seq_len in (1, 65, 513):
        for kv_heads, head_dim, window in ((2, 256, 64), (1, 512, None)):
            q, k, v = (_values(2, seq_len, count, head_dim, dtype=dtype) for count in (8, kv_heads, kv_heads))
            documents = torch.arange(seq_len).expand(2, -1) // 50
            for kind in (None, documents):
                intervals = key_intervals(2, seq_len, q.device, window, documents=kind)
                attention(q, k, v, intervals, head_dim**-0.5).sum().backward()
    q, k = _values(1, 13, 8 * 256, dtype=dtype), _values(1, 13, 256, dtype=dtype)
    angle, weight = torch.randn(1, 13, 256, dtype=dtype), _values(256, dtype=dtype)
    outputs = qk_norm_rope(q, k, None, angle, angle, weight, weight, 256, 256, True)
    sum(x.sum() for x in outputs if x is not None).backward()
    hidden_states, head = _values(5, 64, dtype=dtype), torch.randn(1003, 64, dtype=dtype)
    linear_cross_entropy(hidden_states, head, torch.tensor([0, 1002, -100, 500, 7]), softcap=30.0).backward()


# Attention's kernels take longer to compile than to run here.
OPERATIONS: list[tuple[Operation, tuple[torch.dtype, ...]]] = [
    *((operation, (torch.bfloat16, torch.float16)) for operation in launches.STREAMING),
    (ragged, (torch.bfloat16,)),
]


def main() -> None:
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    set_workspace_bytes(4 << 20)  # several chunks of positions
    for operation, dtypes in OPERATIONS:
        for dtype in dtypes:
            operation(dtype)
            torch.cuda.synchronize()
        print(operation.__name__, flush=True)


if __name__ == "__main__":
    main()
