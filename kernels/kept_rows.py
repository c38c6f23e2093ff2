"""The rows of a batch that take part in a loss, found without stalling the GPU.

How many labels are not ignored is known on the GPU only, and the host needs the number to size the tensors of the loss.
Reading it where it is needed would make the host wait for the whole backbone. Built before the backbone is enqueued,
`KeptRows` reads it behind the backbone's back: count and order are the first work on the stream, the count travels to
pinned memory on its own, and by the time the loss asks for it, it has long arrived.
"""

from __future__ import annotations

import torch


class KeptRows:
    """The positions in `labels`, read as one flat row, that differ from `ignore_index`.

    Args:
        labels: int64, any shape; already aligned with the hidden states.
        ignore_index: the label of a position without a loss.

    Raises:
        TypeError: labels that are not int64.
    """

    def __init__(self, labels: torch.Tensor, ignore_index: int = -100) -> None:
        if labels.dtype != torch.int64:
            raise TypeError(f"fastgemma: labels are {labels.dtype}; give int64.")
        self.ignore_index = ignore_index
        self.total = labels.numel()
        self._event: torch.cuda.Event | None = None
        kept = labels.detach().reshape(-1) != ignore_index
        if kept.device.type != "cuda":
            self._order = kept.nonzero().squeeze(1)
            self._count = torch.tensor(self._order.numel())
            return
        with torch.cuda.device(kept.device):
            self._count = torch.empty((), dtype=torch.int64, device="cpu", pin_memory=True)
            self._count.copy_(kept.sum(), non_blocking=True)
            # A stable sort keeps the kept rows in ascending order, ahead of the others.
            self._order = torch.sort(kept.to(torch.uint8), descending=True, stable=True).indices
            self._event = torch.cuda.Event()
            self._event.record()

    @property
    def count(self) -> int:
        """How many rows are kept. Waits for the work enqueued by the constructor, and for nothing after it."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return int(self._count)

    def index(self) -> torch.Tensor:
        """The kept rows, [count] int64 in ascending order. Waits as `count` does."""
        return self._order[: self.count]
