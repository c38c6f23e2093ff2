"""What `patch()` and `status()` return: a table to print, and data to read."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class FeatureReport:
    """One feature at the time of the report."""

    targets: tuple[str, ...]  # what it replaces, as "module.Class.method"
    state: str  # "active", "off" or "refused"
    reason: str | None  # why it is refused, or what to know about it
    fast_calls: int  # calls that ran fastgemma's path
    fallbacks: dict[str, int] = field(default_factory=dict)  # reason -> calls that ran the original


class PatchReport(Mapping[str, FeatureReport]):
    """Feature name -> `FeatureReport`; prints as a table."""

    def __init__(self, features: dict[str, FeatureReport], workspace: int) -> None:
        self._features = features
        self.workspace_bytes = workspace

    def __getitem__(self, feature: str) -> FeatureReport:
        return self._features[feature]

    def __iter__(self) -> Iterator[str]:
        return iter(self._features)

    def __len__(self) -> int:
        return len(self._features)

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table(title="fastgemma", caption=f"workspace {self.workspace_bytes / 2**20:.0f} MiB")
        for column in ("feature", "state", "fast calls", "fallbacks", "notes"):
            table.add_column(column, overflow="fold")
        for name, feature in self._features.items():
            fallbacks = ", ".join(f"{reason}: {count}" for reason, count in feature.fallbacks.items())
            table.add_row(name, feature.state, str(feature.fast_calls), fallbacks, feature.reason or "")
        buffer = io.StringIO()
        Console(file=buffer, width=120).print(table)
        return buffer.getvalue().rstrip()

    __repr__ = __str__


def summarise(ops: list) -> FeatureReport:
    """One feature's report from its places in the table."""
    states = {op.state for op in ops}
    state = "active" if "active" in states else "refused" if "refused" in states else "off"
    reasons: dict[str, list[str]] = {}
    for op in ops:
        for text in (op.reason, op.note):
            if text is not None:
                reasons.setdefault(text, []).append(op.target)
    notes = [f"{', '.join(targets)}: {reason}" for reason, targets in reasons.items()]
    fallbacks: Counter[str] = Counter()
    for op in ops:
        fallbacks.update(op.fallbacks)
    return FeatureReport(
        targets=tuple(op.target for op in ops),
        state=state,
        reason="; ".join(notes) or None,
        fast_calls=sum(op.fast_calls for op in ops),
        fallbacks=dict(fallbacks),
    )
