"""The logits of a fused loss, made if somebody reads them.

Stock returns logits beside the loss, and a training script may read them: for an accuracy, or a loss of its own. Where
the loss is fused they are only made when `outputs.logits`, `outputs["logits"]` or a tuple of the outputs is asked for,
by the model's own head from the hidden states that the outputs keep: the same numbers and the same graph as stock's,
and then as much memory. Libraries that rebuild outputs from their items (accelerate converts them to float32, or moves
them) meet a `DeferredLogits` there, which remembers what they want done.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class DeferredLogits:
    """What stands among a model's outputs for logits of [batch, seq_len, vocab_size]."""

    def __init__(self, head: nn.Linear, hidden_states: torch.Tensor, softcap: float | None) -> None:
        device = head.weight.device.type
        self._head, self._hidden_states, self._softcap = head, hidden_states, softcap
        self._version = hidden_states._version
        self._grad = torch.is_grad_enabled()
        self._autocast = torch.is_autocast_enabled(device)
        self._autocast_dtype = torch.get_autocast_dtype(device)
        self._then: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = ()
        self.dtype = self._autocast_dtype if self._autocast else head.weight.dtype

    def _followed_by(self, step: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> DeferredLogits:
        other = object.__new__(DeferredLogits)
        other.__dict__.update(self.__dict__, _then=(*self._then, step), dtype=dtype)
        return other

    def float(self) -> DeferredLogits:
        """The same, in float32 once they are made."""
        return self._followed_by(lambda logits: logits.float(), torch.float32)

    def to(self, device: Any, **options: Any) -> DeferredLogits:
        """The same, on a device once they are made."""
        return self._followed_by(lambda logits: logits.to(device, **options), self.dtype)

    def tensor(self) -> torch.Tensor:
        """The logits, under the gradient mode and autocast of the forward that they belong to.

        Raises:
            RuntimeError: the hidden states were overwritten since.
        """
        if self._hidden_states._version != self._version:
            raise RuntimeError(
                "fastgemma: logits were read after something had overwritten the hidden states that they come from. "
                "The loss and its gradients are right. Read outputs.logits earlier, or call "
                "fastgemma.patch(cross_entropy=False)."
            )
        device = self._head.weight.device
        with (
            torch.set_grad_enabled(self._grad),
            torch.autocast(device.type, dtype=self._autocast_dtype, enabled=self._autocast),
        ):
            logits = self._head(self._hidden_states.to(device))
            if self._softcap is not None:
                # As transformers writes it, to round as it does.
                logits = torch.tanh(logits / self._softcap) * self._softcap
            for step in self._then:
                logits = step(logits)
        return logits


@functools.cache
def deferring(output_class: Any) -> Any:
    """`output_class`, a ModelOutput with `loss` first and `logits`, that makes deferred logits when they are read."""

    class Deferring(output_class):
        @property
        def logits(self) -> torch.Tensor | None:
            found = self.__dict__.get("logits")
            if isinstance(found, DeferredLogits):
                found = self["logits"] = found.tensor()
            return found

        @logits.setter
        def logits(self, value: Any) -> None:
            self.__dict__["logits"] = value

        def __getitem__(self, key: Any) -> Any:
            if key == 0:  # the loss
                return super().__getitem__(next(iter(self)))
            if not isinstance(key, str) or key == "logits":
                self.logits  # noqa: B018
            return super().__getitem__(key)

        def get(self, key: str, default: Any = None) -> Any:
            return self[key] if key in self else default  # noqa: SIM401

        def __reduce__(self) -> Any:
            return output_class(**dict(zip(self.keys(), self.to_tuple()))).__reduce__()

    Deferring.__name__, Deferring.__qualname__ = output_class.__name__, output_class.__qualname__
    return Deferring
