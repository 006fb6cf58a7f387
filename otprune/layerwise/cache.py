"""Keys and values of every layer, each layer as long as it is."""

from typing import Any

import torch
from torch import Tensor


class LayerCache:
    """What a decoder layer of transformers takes as `past_key_values`: it only ever calls `update`.

    Each layer's first update is its prompt, of whatever length that layer sees; `room` places for later tokens are
    allocated with it, so that decoding writes in place. Layers hold [prompts, key heads, rows, head width].
    """

    def __init__(self, num_layers: int, *, room: int):
        self.room = room
        self.lengths = [0] * num_layers
        self._keys: list[Tensor | None] = [None] * num_layers
        self._values: list[Tensor | None] = [None] * num_layers

    def update(self, keys: Tensor, values: Tensor, layer: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Appends to a layer and returns all it holds."""
        self._keys[layer] = _append(self._keys[layer], keys, self.lengths[layer], self.room)
        self._values[layer] = _append(self._values[layer], values, self.lengths[layer], self.room)
        self.lengths[layer] += keys.shape[2]
        return self.keys(layer), self._held(self._values, layer)

    def keys(self, layer: int) -> Tensor:
        """Rotated keys of a layer that has run: [prompts, key heads, rows, head width]."""
        return self._held(self._keys, layer)

    def _held(self, tensors: list[Tensor | None], layer: int) -> Tensor:
        tensor = tensors[layer]
        assert tensor is not None, f"layer {layer} has not run"
        return tensor[:, :, : self.lengths[layer]]


def _append(held: Tensor | None, new: Tensor, length: int, room: int) -> Tensor:
    if held is None:
        if not room:
            return new
        held = torch.empty(*new.shape[:2], new.shape[2] + room, new.shape[3], dtype=new.dtype, device=new.device)
    held[:, :, length : length + new.shape[2]] = new
    return held
