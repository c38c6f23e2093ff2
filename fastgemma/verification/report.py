"""What `verify` returns: a table to print, and data to read."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from fastgemma.verification.judge import GRADIENT, TensorErrors
from fastgemma.verification.measure import LOGITS, LOSS

_WORST = 8


@dataclass(frozen=True)
class FeatureVerdict:
    """One feature alone; or all together.

    `verdict` is "exact" (within the limits), "wrong", "inconclusive" (within limits that anything would be in: stock
    itself is that inexact on this batch), "refused" (it raised instead of computing), "did not run" (every call took
    the original code), "not exercised" (nothing of it shows in one step), "off" (in the user's settings), or, for
    `fixes`, "changes numbers" or "did not act".
    """

    verdict: str
    fast_calls: int = 0  # in this run
    fallbacks: dict[str, int] = field(default_factory=dict)  # reason -> calls that ran the original
    note: str = ""
    tensors: dict[str, TensorErrors] = field(default_factory=dict)  # as in `VerifyReport`

    @property
    def ok(self) -> bool:
        return self.verdict not in ("wrong", "refused", "inconclusive")

    @property
    def worst(self) -> str | None:
        """The name of the tensor that uses up the largest share of its limits."""
        return max(self.tensors, key=lambda name: self.tensors[name].strain, default=None)


@dataclass(frozen=True)
class VerifyReport(Mapping[str, TensorErrors]):
    """The verdict, and the errors of all features together by tensor; prints as a table.

    The keys are "loss", "logits", "gradient" (all gradients as one vector) and the names of the trainable parameters.
    """

    features: dict[str, FeatureVerdict]
    together: FeatureVerdict  # all features that are on
    with_dropout: FeatureVerdict | None  # the same with dropout, judged against stock; None where the model has none
    stock_loss: float
    loss: float  # of all features together
    rule: str  # what the limits are
    notes: tuple[str, ...]  # what to know about how it was measured

    @property
    def ok(self) -> bool:
        """Whether every feature that ran was exact, alone and together."""
        return all(verdict.ok for verdict in self._verdicts())

    @property
    def conclusive(self) -> bool:
        """Whether stock itself is exact enough on this batch for a verdict, or something is wrong nevertheless."""
        verdicts = self._verdicts()
        return any(each.verdict in ("wrong", "refused") for each in verdicts) or all(each.ok for each in verdicts)

    def _verdicts(self) -> list[FeatureVerdict]:
        return [*self.features.values(), self.together, *([self.with_dropout] if self.with_dropout else [])]

    @property
    def worst(self) -> dict[str, TensorErrors]:
        """The tensors that use up most of their limits, worst first."""
        tensors = self.together.tensors
        names = sorted(tensors, key=lambda name: tensors[name].strain, reverse=True)
        return {name: tensors[name] for name in names[:_WORST]}

    def __getitem__(self, tensor: str) -> TensorErrors:
        return self.together.tensors[tensor]

    def __iter__(self) -> Iterator[str]:
        return iter(self.together.tensors)

    def __len__(self) -> int:
        return len(self.together.tensors)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        buffer = io.StringIO()
        console = Console(file=buffer, width=120, highlight=False)
        table = Table(title="fastgemma verify: stock against patched")
        for column in ("on", "verdict", "fast calls", "worst tensor", "error", "limit", "notes"):
            table.add_column(column, overflow="fold", justify="right" if column == "fast calls" else "left")
        rows = {**{f"{name} alone": verdict for name, verdict in self.features.items()}, "all together": self.together}
        if self.with_dropout is not None:
            rows["all, with dropout"] = self.with_dropout
        for name, verdict in rows.items():
            worst = verdict.worst
            cells = ("", "", "") if worst is None else (_short(worst), *_cells(verdict.tensors[worst]))
            table.add_row(name, verdict.verdict, str(verdict.fast_calls or ""), *cells, _notes(verdict))
        console.print(table, markup=False)
        table = Table(title="All together: the whole, and the tensors that use up most of their limits")
        for column in ("tensor", "error", "of stock", "limit", "largest", "limit of largest"):
            table.add_column(column, overflow="fold")
        for name in dict.fromkeys((*(key for key in (LOSS, LOGITS, GRADIENT) if key in self), *self.worst)):
            found = self[name]
            stock = "" if found.stock_error is None else f"{found.stock_error:.1e}"
            largest_limit = "" if math.isinf(found.largest_limit) else f"{found.largest_limit:.1e}"
            errors = (f"{found.error:.1e}", stock, f"{found.limit:.1e}", f"{found.largest:.1e}", largest_limit)
            table.add_row(_short(name), *errors)
        console.print(table, markup=False)
        losses = f"Loss: stock {self.stock_loss:.6f}, patched {self.loss:.6f}."
        for line in (losses, self.rule, *self.notes, self._summary()):
            console.print(line, markup=False)
        return buffer.getvalue().rstrip()

    __repr__ = __str__

    def _summary(self) -> str:
        if self.ok:
            return "Verdict: exact. On this batch the patched model trains as stock does."
        if not self.conclusive:
            return (
                "Verdict: none. Stock's own 16-bit result is too far from its reference on this batch to measure "
                "anything by, as with weights that were never trained. Load the model in float32 for a verdict, or "
                "pass another batch."
            )
        blamed = [name for name, verdict in self.features.items() if verdict.verdict in ("wrong", "refused")]
        if not blamed and self.together.ok:
            return (
                "Verdict: not exact with dropout. Training with lora_dropout would not be stock's: its masks differ, "
                "or are applied differently. Until that is mended use fastgemma.patch(lora=False), and report it with "
                "this table."
            )
        if not blamed:
            return (
                "Verdict: not exact together, although every feature alone is. Training with these settings would not "
                "be stock's. Find the pair by leaving features out of fastgemma.patch(), and report it."
            )
        without = ", ".join(f"{name}=False" for name in blamed)
        return (
            f"Verdict: not exact. Training with {', '.join(blamed)} would not be stock's. "
            f"Until that is mended use fastgemma.patch({without}), and report it with this table."
        )


def _short(name: str) -> str:
    """A parameter's name without what PEFT puts before and after all of them."""
    return name.removeprefix("base_model.model.").replace(".default.weight", "")


def _cells(errors: TensorErrors) -> tuple[str, str]:
    """The error and the limit that is more used up: of the norm, or of the largest element."""
    if errors.largest_limit < math.inf and errors.strain > errors.error / max(errors.limit, 1e-300):
        return f"{errors.largest:.1e} (largest)", f"{errors.largest_limit:.1e}"
    return f"{errors.error:.1e}", f"{errors.limit:.1e}"


def _notes(verdict: FeatureVerdict) -> str:
    fallbacks = [f"{reason}: {count}" for reason, count in verdict.fallbacks.items()]
    return "; ".join([*([verdict.note] if verdict.note else []), *fallbacks])
