"""What the modules of a decoder layer hold for its operations, read once for as long as nothing in them changes.

Reading them asks a few hundred questions; an unchanged layer (`snapshot`) answers them as it did.
"""

from __future__ import annotations

from typing import Any

import torch

from fastgemma.kernels.checkpointed_layer import After, Before, CheckpointedLayer
from fastgemma.patches.attention import angles_unusable
from fastgemma.patches.projections import Unsupported, autocast_dtype
from fastgemma.patches.snapshot import Notes
from fastgemma.patches.whole_layer import read_after, read_before

# Readings of a layer that are kept: for activations of several dtypes, say.
_MOST = 4


class Reading:
    """A layer as it was found."""

    def __init__(self, attention: Any, before: Before, after: After) -> None:
        self.before, self.after = before, after
        self.operation = CheckpointedLayer(before, after, attention.scaling, attention.store_full_length_kv)
        self.trained = [*self.operation.trained_before, *self.operation.trained_after]
        self.trains_leaves = all(tensor.is_leaf for tensor in self.trained)
        # Of recordings of it, by what they depend on beside it.
        self.keys: dict[Any, Any] = {}


class Readings:
    """Readings of layers, kept with them."""

    def __init__(self) -> None:
        self._notes = Notes(_MOST)

    def find(
        self,
        layer: Any,
        hidden_states: torch.Tensor,
        per_layer_input: torch.Tensor | None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
    ) -> Reading:
        """The layer as it is now, for such activations.

        Raises:
            Unsupported: something about it is unusual.
        """
        key = (
            hidden_states.device,
            hidden_states.dtype,
            autocast_dtype(hidden_states),
            None if per_layer_input is None else per_layer_input.dtype,
        )
        found: Reading | None = self._notes.find(layer, key)
        if found is None:
            before = read_before(layer, hidden_states, position_embeddings)
            after = read_after(layer, hidden_states, per_layer_input)
            found = Reading(layer.self_attn, before, after)
            self._notes.put(layer, key, found)
        else:
            reason = angles_unusable(layer.self_attn, hidden_states, *position_embeddings)
            if reason is not None:
                raise Unsupported(reason)
        return found

    def forget(self, layer: Any) -> None:
        """Lets go of the weights that are only kept because the layer may come again as it was."""
        self._notes.drop(layer)

    def clear(self) -> None:
        self._notes.clear()
