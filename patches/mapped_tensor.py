"""One tensor of a safetensors file, as a private memory map of just its bytes, and a watch over that file.

The file stays open, so that it may be deleted, renamed or replaced by another under its name: what is mapped is the
file that was opened. Writing into that file itself is another matter: where it ends early, the operating system kills
the process that reads on (SIGBUS), and bytes that are written show in rows that were not read before.
"""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
from collections.abc import Iterable
from typing import Any, BinaryIO

import torch
from transformers.modeling_utils import str_to_torch_dtype

from fastgemma.patches.engine import PatchError

logger = logging.getLogger("fastgemma")


class DamagedFileError(RuntimeError):
    """A safetensors file that cannot be what was saved."""


class MappedTensor:
    """A tensor whose values are read from `file` when they are used."""

    def __init__(self, file: BinaryIO, tensor: torch.Tensor, end: int) -> None:
        """`end`: bytes of the file that are needed."""
        self.tensor = tensor
        self._file, self._end = file, end
        self._written = os.fstat(file.fileno()).st_mtime_ns

    def check(self) -> None:
        """Asks the file, in about a microsecond, whether it is still what was mapped.

        Raises:
            PatchError: it is too short by now.
        """
        state = os.fstat(self._file.fileno())
        if state.st_size < self._end:
            raise PatchError(
                f"fastgemma: {self._file.name} was cut to {state.st_size} bytes after the model was loaded, and the "
                "per-layer embedding table is read from it: reading on would end this process. No loss was computed. "
                "Restore the file, then continue from the last checkpoint of the run. Replace a checkpoint by renaming "
                "another to its name, or load it with from_pretrained(..., disable_mmap=True), which copies the table."
            )
        if state.st_mtime_ns != self._written:
            self._written = state.st_mtime_ns
            logger.warning(
                "fastgemma: %s was written to after the model was loaded, and the per-layer embedding table is read "
                "from it: if the bytes changed, embeddings did, and this run trains on a mixture. Unless it is certain "
                "that they did not, start again from a checkpoint that nothing writes to.",
                self._file.name,
            )

    def __deepcopy__(self, memo: Any) -> MappedTensor:
        return self

    def __reduce__(self) -> Any:
        return type(None), ()  # a pickled table holds its values, and maps nothing


def map_tensor(files: Iterable[str], suffix: str) -> MappedTensor | None:
    """The one tensor whose key ends in `suffix`, or None.

    The loader's own view would keep the map of the whole file alive, and with it every page read for other tensors.

    Raises:
        DamagedFileError: a file on the way to it is missing, or is no whole safetensors file.
    """
    for path in files:
        if not path.endswith(".safetensors"):
            continue
        try:
            found = _map_from(path, suffix)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise DamagedFileError(f"{path} ({error!r})") from error
        if found is not None:
            return found
    return None


def _map_from(path: str, suffix: str) -> MappedTensor | None:
    with contextlib.ExitStack() as closing:
        file = closing.enter_context(open(path, "rb"))
        file_size = os.fstat(file.fileno()).st_size
        header_size = int.from_bytes(file.read(8), "little")
        start = 8 + header_size
        if not 8 < start <= file_size:
            raise ValueError(f"a header of {header_size} bytes in a file of {file_size}")
        for key, entry in json.loads(file.read(header_size)).items():
            if not key.endswith(suffix):
                continue
            begin, end = (start + offset for offset in entry["data_offsets"])
            if not start <= begin <= end <= file_size:
                raise ValueError(f"{key} ends at byte {end} of a file of {file_size}")
            base = begin - begin % mmap.ALLOCATIONGRANULARITY
            view = mmap.mmap(file.fileno(), end - base, access=mmap.ACCESS_COPY, offset=base)
            if hasattr(mmap, "MADV_RANDOM"):
                view.madvise(mmap.MADV_RANDOM)  # rows are read singly: read-ahead would be waste
            flat = torch.frombuffer(view, dtype=str_to_torch_dtype[entry["dtype"]], offset=begin - base)
            tensor = flat[: (end - begin) // flat.element_size()].view(entry["shape"])
            closing.pop_all()
            return MappedTensor(file, tensor, end)
    return None
