"""One forward and backward of a model, as named tensors; and how far two tensors are apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

# "loss", "logits" and the gradients by the names of their parameters, in host memory.
Result = dict[str, torch.Tensor]
LOSS, LOGITS = "loss", "logits"

_IGNORED = -100
_OF_THE_LOSS = ("labels", "shift_labels", "num_items_in_batch")  # not for a call that asks for logits
_MAX_LOGIT_BYTES = 256 << 20
# Tensors are compared piece by piece: a comparison in float64 needs four times the memory of what it compares.
_SLAB = 1 << 22


class VerifyError(RuntimeError):
    """Why nothing could be verified, and what to do about it; one message for the user."""


class LogitSample(NamedTuple):
    """Which logits are compared: all of them would take gigabytes."""

    positions: torch.Tensor  # int64 [n], ascending, on the batch's device
    real: torch.Tensor  # bool [rows, n]: False where a row has padding at that position


def sample_logits(batch: Mapping[str, Any], vocab_size: int, max_bytes: int = _MAX_LOGIT_BYTES) -> LogitSample:
    """Positions that predict a label, evenly spread over the sequence, so many that float32 logits fit `max_bytes`.

    Raises:
        VerifyError: no labels, or none that counts.
    """
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.dim() != 2:
        raise VerifyError(
            "fastgemma: the batch has no `labels` of shape [rows, seq_len], so there is no loss to verify. Pass what "
            "your collator gives the trainer; for plain text that is labels=input_ids, with -100 at padding."
        )
    predicts = (labels[:, 1:] != _IGNORED).any(0).nonzero().flatten()
    if not len(predicts):
        raise VerifyError(
            "fastgemma: every label of the batch is -100, so its loss is empty. Truncation may have cut off all that "
            "is trained on; pass a batch with labels, and check the training data for such rows."
        )
    count = max(1, min(len(predicts), max_bytes // (4 * labels.shape[0] * vocab_size)))
    positions = predicts[torch.linspace(0, len(predicts) - 1, count, device=predicts.device).round().long()]
    mask = batch.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return LogitSample(positions, mask[:, positions].bool())
    return LogitSample(positions, torch.ones(labels.shape[0], count, dtype=torch.bool, device=labels.device))


def run(model: Any, batch: Mapping[str, Any], sample: LogitSample, seed: int = 0) -> Result:
    """Loss and gradients of a training step, and the sampled logits [n, vocab] of a forward without labels.

    Args:
        model: in the mode to run it in; trainable parameters without a `.grad`, which they are left with again.
        batch: what the model is called with.
        sample: of this batch.
        seed: of the dropout masks, in both forwards.
    """
    torch.manual_seed(seed)
    loss = model(**batch).loss
    loss.backward()
    result = {LOSS: loss.detach().to("cpu")}
    del loss
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            result[name] = parameter.grad.to("cpu")
            parameter.grad = None
    result[LOGITS] = _logits(model, {key: each for key, each in batch.items() if key not in _OF_THE_LOSS}, sample, seed)
    return result


def _logits(model: Any, batch: Mapping[str, Any], sample: LogitSample, seed: int) -> torch.Tensor:
    """A fused loss returns no logits, so they take a call of their own.

    The head is given the sampled positions alone, unseen by the model, whose `logits_to_keep` is a different request:
    layers may then do less.
    """

    def pick(head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return inputs[0][:, sample.positions.to(inputs[0].device)], *inputs[1:]

    handle = model.get_output_embeddings().register_forward_pre_hook(pick)
    try:
        torch.manual_seed(seed)
        with torch.no_grad():
            logits = model(**batch).logits
    finally:
        handle.remove()
    return logits[sample.real.to(logits.device)].to("cpu")


class Distance(NamedTuple):
    """How far a tensor is from a reference."""

    error: float  # L2 norm of the difference
    norm: float  # L2 norm of the reference
    largest: float  # largest absolute difference
    scale: float  # largest absolute element of the reference

    @property
    def relative(self) -> float:
        """`error / norm`; of a reference that is zero, 0 where the tensor is zero too, else infinite."""
        if self.norm > 0 or math.isnan(self.error):
            return self.error / self.norm if self.norm > 0 else math.nan
        return math.inf if self.error > 0 else 0.0


def distance(value: torch.Tensor, reference: torch.Tensor, device: torch.device) -> Distance:
    """The distance of two tensors of one shape, in float64, computed on `device` slab by slab. NaN stays NaN."""
    error = norm = largest = scale = torch.zeros((), dtype=torch.float64, device=device)
    for ours, theirs in zip(value.reshape(-1).split(_SLAB), reference.reshape(-1).split(_SLAB)):
        expected = theirs.to(device).double()
        difference = ours.to(device).double() - expected
        error, norm = error + difference.square().sum(), norm + expected.square().sum()
        largest = torch.maximum(largest, difference.abs().max())
        scale = torch.maximum(scale, expected.abs().max())
    error, norm, largest, scale = torch.stack([error.sqrt(), norm.sqrt(), largest, scale]).tolist()
    return Distance(error, norm, largest, scale)


def pooled(distances: Iterable[Distance]) -> Distance:
    """The distance of all tensors as one vector."""
    every = list(distances)
    return Distance(
        math.hypot(*(each.error for each in every)),
        math.hypot(*(each.norm for each in every)),
        max((each.largest for each in every), default=0.0),
        max((each.scale for each in every), default=0.0),
    )
