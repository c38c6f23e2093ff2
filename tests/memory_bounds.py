"""Has Triton's interpreter refuse to load or store outside the tensors that a launch was given.

What a kernel reads past the end of a tensor and then masks out changes no result, and what it writes there may change
none that a test looks at; on a GPU either can fault, or overwrite a neighbour.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses [first, end) between which the elements of a tensor lie."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    elements = last + 1 if tensor.numel() else 0
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.itemsize


def check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every load and every store of all launches from now on."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    given: list[tuple[int, int]] = []
    prepare = GridExecutor._init_args_hst
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def prepared(self: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        args, kwargs = prepare(self, args, kwargs)
        # Of a descriptor the tensor that it describes.
        tensors = [getattr(value, "base", value) for value in (*args, *kwargs.values())]
        given[:] = [_extent(tensor) for tensor in tensors if isinstance(tensor, torch.Tensor)]
        return args, kwargs

    def verify(pointers: Any, mask: Any) -> None:
        addresses = pointers.data[mask.data]
        if addresses.size:
            first, end = int(addresses.min()), int(addresses.max()) + pointers.get_element_ty().primitive_bitwidth // 8
            assert any(low <= first and end <= high for low, high in given), "an access outside of every tensor"

    def checked_load(self: Any, ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:
        verify(ptrs, mask)
        return load(self, ptrs, mask, *rest, **options)

    def checked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        verify(ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(GridExecutor, "_init_args_hst", prepared)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", checked_store)
