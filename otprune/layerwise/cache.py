"""A key-value cache whose layers may have different lengths."""

from typing import Any

import torch
from torch import Tensor


class LayerCache:
    """The `past_key_values` of a transformers decoder layer, which calls only `update`.

    The first update of a layer holds the prompt rows that the layer processes, and allocates `room` more rows, so that
    decoding writes in place. Keys and values are [prompts, key heads, rows, head width].
    """

    def __init__(self, num_layers: int, *, room: int):
        self.room = room
        self.lengths = [0] * num_layers
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Appends to a layer and returns all of its keys and values; the signature is that of transformers' caches."""
        self._keys[layer] = _append(self._keys[layer], keys, self.lengths[layer], self.room)
        self._values[layer] = _append(self._values[layer], values, self.lengths[layer], self.room)
        self.lengths[layer] += keys.shape[2]
        return self.keys(layer), self._filled(self._values, layer)

    def keys(self, layer: int) -> Tensor:
        """Rotated keys of a layer that has run: [prompts, key heads, rows, head width]."""
        return self._filled(self._keys, layer)

    def _filled(self, tensors: list[Tensor | None], layer: int) -> Tensor:
        tensor = tensors[layer]
        assert tensor is not None, f"layer {layer} has not run"
        return tensor[:, :, : self.lengths[layer]]


def _append(stored: Tensor | None, new: Tensor, length: int, room: int) -> Tensor:
    """`stored` with `new` written behind its first `length` rows; the first call allocates `room` more rows."""
    if stored is None:
        if not room:
            return new  # nothing will be appended, so the prompt needs no copy
        stored = torch.empty(*new.shape[:2], new.shape[2] + room, new.shape[3], dtype=new.dtype, device=new.device)
    stored[:, :, length : length + new.shape[2]] = new
    return stored
