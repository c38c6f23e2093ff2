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
from torch.utils import _pytree as pytree

_OVERWRITTEN = (
    "fastgemma: logits were read after something had overwritten {what} that they come from. The loss and its "
    "gradients are right. Read outputs.logits earlier, or call fastgemma.patch(cross_entropy=False)."
)


def _version(tensor: torch.Tensor) -> int | None:
    """How often it was written to; tensors of inference mode do not count."""
    return None if tensor.is_inference() else tensor._version


class DeferredLogits:
    """What stands among a model's outputs for logits of [batch, seq_len, vocab_size].

    The outputs make them when they are read. Where outputs are taken apart, this object is found instead: it has the
    logits' attributes, and torch's functions take it for them.
    """

    def __init__(self, head: nn.Linear, hidden_states: torch.Tensor, softcap: float | None) -> None:
        device = head.weight.device.type
        self._head, self._weight, self._hidden_states, self._softcap = head, head.weight, hidden_states, softcap
        self._versions = _version(hidden_states), _version(head.weight)
        self._grad = torch.is_grad_enabled()
        self._autocast = torch.is_autocast_enabled(device)
        self._autocast_dtype = torch.get_autocast_dtype(device)
        self._then: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = ()
        self._made: torch.Tensor | None = None
        self.dtype = self._autocast_dtype if self._autocast else head.weight.dtype

    def _followed_by(self, step: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> DeferredLogits:
        other = object.__new__(DeferredLogits)
        other.__dict__.update(self.__dict__, _then=(*self._then, step), dtype=dtype, _made=None)
        return other

    def float(self) -> DeferredLogits:
        """The same, in float32 once they are made."""
        return self._followed_by(lambda logits: logits.float(), torch.float32)

    def to(self, *args: Any, **options: Any) -> DeferredLogits:
        """The same, on a device, or in a dtype, once they are made."""
        dtype = next((x for x in (*args, options.get("dtype")) if isinstance(x, torch.dtype)), self.dtype)
        return self._followed_by(lambda logits: logits.to(*args, **options), dtype)

    def tensor(self) -> torch.Tensor:
        """The logits, under the gradient mode and autocast of the forward that they belong to; made once.

        Raises:
            RuntimeError: the hidden states, or the head, were overwritten since.
        """
        if self._made is None:
            self._made = self._make()
        return self._made

    def _make(self) -> torch.Tensor:
        weight = self._weight
        if _version(self._hidden_states) != self._versions[0]:
            raise RuntimeError(_OVERWRITTEN.format(what="the hidden states"))
        if self._head.weight is not weight or _version(weight) != self._versions[1] or weight.requires_grad:
            raise RuntimeError(_OVERWRITTEN.format(what="the output embedding"))
        device = weight.device
        with (
            torch.inference_mode(self._hidden_states.is_inference()),
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

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.tensor(), name)

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.tensor()[index]

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = pytree.tree_map(lambda x: x.tensor() if isinstance(x, cls) else x, (args, kwargs or {}))
        return function(*args, **kwargs)


class _Deferring:
    """A ModelOutput with a field `logits` that makes deferred ones when they are read."""

    @property
    def logits(self) -> Any:
        found = self.__dict__.get("logits")
        if isinstance(found, DeferredLogits):
            found = self["logits"] = found.tensor()  # type: ignore[index]
        return found

    @logits.setter
    def logits(self, value: Any) -> None:
        self.__dict__["logits"] = value

    def __getitem__(self: Any, key: Any) -> Any:
        if key == 0:  # the loss, for the most part
            return self[next(iter(self))]
        if not isinstance(key, str) or key == "logits":
            self.logits  # noqa: B018
        return super().__getitem__(key)  # type: ignore[misc]

    def get(self: Any, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401

    def __reduce__(self: Any) -> Any:
        return type(self).__bases__[1](**dict(zip(self.keys(), self.to_tuple()))).__reduce__()


@functools.cache
def deferring(output_class: Any) -> Any:
    """A subclass of `output_class`, which is a ModelOutput, that makes deferred logits when they are read."""
    # pytree knows classes by these names.
    module = f"{__name__}.{output_class.__module__.rpartition('.')[2]}"
    return type(output_class.__name__, (_Deferring, output_class), {"__module__": module})
