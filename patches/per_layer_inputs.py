"""Per-layer inputs as one tensor for each layer, so that their gradient is written once.

Stock gives layer i the slice `[:, :, i, :]` of a tensor [batch, seq_len, layers, size]. The gradient of a slice is as
large as that tensor, zeros elsewhere, and autograd adds one for each layer: of E2B's 35 layers, 35 times 37 MB written
and 34 sums at 2048 tokens. One `unbind` has the same slices, and one `stack` as its gradient, equal to the bit. A slice
is not to be written to, and what is asked of the whole tensor's gradient does not see the layers'.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fastgemma.patches.engine import Op

_ALL, _FROM_THE_FIRST = slice(None), slice(0, None)


class _Unbind(torch.autograd.Function):
    """The tensor again, and its layers."""

    @staticmethod
    def forward(ctx, per_layer_inputs):
        ctx.set_materialize_grads(False)
        # A layer reads its own part several times in a step: as one contiguous piece.
        by_layer = per_layer_inputs.permute(2, 0, 1, 3).contiguous()
        return by_layer.permute(1, 2, 0, 3), *by_layer.unbind()

    @staticmethod
    def backward(ctx, d_whole, *d_layers):
        given = next((gradient for gradient in d_layers if gradient is not None), None)
        if given is None:
            return d_whole
        d_layers = [torch.zeros_like(given) if gradient is None else gradient for gradient in d_layers]
        stacked = torch.stack(d_layers, dim=2)
        return stacked if d_whole is None else stacked + d_whole


class _PerLayerInputs(torch.Tensor):
    """[batch, seq_len, layers, size] with its layers unbound beforehand; all else that is done to it is a tensor's."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    _layers: list[torch.Tensor]

    @classmethod
    def of(cls, per_layer_inputs: torch.Tensor) -> _PerLayerInputs:
        whole, *layers = _Unbind.apply(per_layer_inputs)
        whole = whole.as_subclass(cls)
        whole._layers = layers
        return whole

    def __getitem__(self, index: Any) -> torch.Tensor:
        if isinstance(index, tuple) and len(index) == 4:
            batch, seq_len, layer, size = index
            # transformers cuts the tokens that the last layers need, which are all of them in training.
            if batch == size == _ALL and seq_len in (_ALL, _FROM_THE_FIRST):
                if layer == _ALL:
                    return self
                if isinstance(layer, int):
                    return self._layers[layer]
        return super().__getitem__(index)


def make_projection(original: Callable[..., Any], ops: dict[str, Op]) -> Callable[..., Any]:
    """`project_per_layer_inputs`, which makes what the decoder's loop takes a layer's inputs from."""
    op = ops["per_layer_embeddings"]

    def project_per_layer_inputs(self, *args: Any, **kwargs: Any) -> Any:
        projected = original(self, *args, **kwargs)
        if (
            not op.active
            or type(projected) is not torch.Tensor
            or projected.dim() != 4
            or not projected.requires_grad
            or torch.compiler.is_compiling()
            or torch._C._are_functorch_transforms_active()
        ):
            return projected
        op.fast()
        return _PerLayerInputs.of(projected)

    return project_per_layer_inputs
