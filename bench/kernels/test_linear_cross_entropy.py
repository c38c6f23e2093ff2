"""The loss and its gradient from hidden states and a frozen head, `logits` and `chunked_head` included.

The ceiling is what a frozen head cannot do without: the product that makes the logits and the one that takes their
gradient back to the hidden states.
"""

from __future__ import annotations

import pytest
import torch
from kernel_inputs import activation
from kernel_timing import Subject
from torch.utils.checkpoint import checkpoint
from transformers.loss.loss_utils import ForCausalLMLoss

from fastgemma.kernels.kept_rows import KeptRows
from fastgemma.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

SHAPES = [(2048, 1536, 262144), (2048, 2560, 262144), (32768, 1536, 262144)]
SOFTCAP = 30.0
# Rows whose full logits any of these cards can hold, in stock's several copies.
CHUNK = 2048


@pytest.mark.shapes(SHAPES, tiny=(7, 48, 640))
@pytest.mark.parametrize("impl", ["fastgemma", "hf", "compile", "liger", "cublas"])
def test_linear_cross_entropy(measure, shape, impl):
    rows, hidden_size, vocabulary = shape
    device = measure.device
    if impl in ("hf", "compile") and rows > CHUNK:
        pytest.skip("full logits of so many rows do not fit")
    # Logits of standard deviation 3.
    weight = activation(vocabulary, hidden_size, device=device, grad=False) * (3 / hidden_size**0.5)

    def make() -> tuple[torch.Tensor, torch.Tensor, KeptRows]:
        labels = torch.randint(0, vocabulary, (rows,), device=device)
        kept = KeptRows(labels)
        # The patched model builds it ahead of the backbone, so that the loss never waits.
        assert kept.count == rows
        return activation(rows, hidden_size, device=device), labels, kept

    def stock(hidden: torch.Tensor, labels: torch.Tensor, kept: KeptRows) -> torch.Tensor:
        """As `Gemma4ForCausalLM.forward` has it; the labels are already aligned."""
        logits = torch.nn.functional.linear(hidden, weight)
        logits = torch.tanh(logits / SOFTCAP) * SOFTCAP
        return ForCausalLMLoss(logits, labels, vocabulary, shift_labels=labels)

    def fastgemma(hidden: torch.Tensor, labels: torch.Tensor, kept: KeptRows) -> torch.Tensor:
        return linear_cross_entropy(hidden, weight, labels, softcap=SOFTCAP, kept_rows=kept)

    def liger():
        from liger_kernel.transformers.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(softcap=SOFTCAP)
        return lambda hidden, labels, kept: loss(weight, hidden, labels)

    def reference(hidden: torch.Tensor, labels: torch.Tensor, kept: KeptRows) -> torch.Tensor:
        def summed(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return linear_cross_entropy_reference(x, weight, y, softcap=SOFTCAP, reduction="sum")

        pairs = zip(hidden.split(CHUNK), labels.split(CHUNK))
        return torch.stack([checkpoint(summed, x, y, use_reentrant=False) for x, y in pairs]).sum() / rows

    def products(hidden: torch.Tensor) -> torch.Tensor:
        d_hidden = torch.empty_like(hidden)
        for x, out in zip(hidden.split(CHUNK), d_hidden.split(CHUNK)):
            torch.mm(torch.mm(x, weight.t()), weight, out=out)
        return d_hidden

    bare = Subject(lambda: (activation(rows, hidden_size, device=device, grad=False),), products, captured=False)
    subject = bare
    if impl != "cublas":
        run = measure.choose(impl, fastgemma=fastgemma, hf=stock, compiled=hidden_size == 1536, liger=liger)
        subject = Subject(make, run, captured=False)
    measure(
        subject,
        op="linear_cross_entropy",
        impl=impl,
        shape=list(shape),
        direction="forward+backward",
        reference=None if impl == "cublas" else reference,
        flops=4 * rows * hidden_size * vocabulary,
        ceiling=bare,
    )
