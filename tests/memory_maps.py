"""Which of this process's memory maps holds a tensor."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

_SMAPS = Path("/proc/self/smaps")
on_linux = pytest.mark.skipif(not _SMAPS.exists(), reason="needs /proc")


@dataclass
class Mapping:
    begin: int
    end: int
    path: str  # empty where no file is mapped
    kib: dict[str, int] = field(default_factory=dict)  # the kernel's counts: "Rss", "Private_Dirty" and so on


def _mappings() -> list[Mapping]:
    found: list[Mapping] = []
    for line in _SMAPS.read_text().splitlines() if _SMAPS.exists() else ():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \S+ *(.*)", line):
            found.append(Mapping(int(head[1], 16), int(head[2], 16), head[3]))
        elif count := re.match(r"(\w+): +(\d+) kB", line):
            found[-1].kib[count[1]] = int(count[2])
    return found


def mapping_of(tensor: torch.Tensor) -> Mapping | None:
    """The mapping in which the tensor's first and last bytes lie, or None."""
    begin = tensor.data_ptr()
    end = begin + tensor.numel() * tensor.element_size()
    return next((m for m in _mappings() if m.begin <= begin and end <= m.end), None)


def mapped_from(tensor: torch.Tensor) -> str | None:
    """The file in whose memory map the tensor lies, or None."""
    mapping = mapping_of(tensor)
    return None if mapping is None else mapping.path or None
