"""The fields of a request: what stands in a prompt for its pictures. The prompt holds one image token for each picture.

n pictures, K visual tokens and L token ids of all pictures together, one picture after the other:

    image_embeds     float [K, W]  rows for the language model; W is its width, times 1 + levels with DeepStack
    image_rows       int [n]       rows of each picture
    image_tokens     int [L]       ids of the spans; the rows go where the id is the image token
    image_lengths    int [n]       length of each picture's span
    image_positions  int [L, 3]    M-RoPE alone: (t, h, w) of each id, counted from where its span begins
    image_extents    int [n]       M-RoPE alone: by how much each span moves the positions of what follows
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FIELDS = ("image_embeds", "image_rows", "image_tokens", "image_lengths")
MROPE_FIELDS = ("image_positions", "image_extents")
AXES = 3  # of M-RoPE


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What the fields must fit: facts about the model in an engine."""

    image_token: int
    width: int  # of a row
    vocabulary: int  # token ids are below it
    mrope: bool
    max_positions: int  # M-RoPE: most positions that the pictures of a prompt may take

    def check(self, data: Any) -> dict[str, Tensor]:
        """The fields of one prompt, with whole numbers as int64.

        Whatever is wrong here would fail inside an engine's step and take the engine and its other requests down.

        Raises:
            ValueError: says which field is wrong, what was expected and what came.
        """
        names = FIELDS + MROPE_FIELDS if self.mrope else FIELDS
        if not isinstance(data, Mapping):
            raise ValueError(f"image must be the fields {', '.join(names)}, got {type(data).__name__}")
        if set(data) != set(names):
            raise ValueError(f"image must have the fields {', '.join(names)}, got {', '.join(sorted(map(str, data)))}")
        embeds = data["image_embeds"]
        if not isinstance(embeds, Tensor) or not embeds.is_floating_point():
            raise ValueError(f"image_embeds must be a tensor of floats, got {_kind(embeds)}")
        if embeds.ndim != 2 or embeds.shape[1] != self.width:
            raise ValueError(f"image_embeds must be [K, {self.width}], got {list(embeds.shape)}")
        rows, lengths = _counts("image_rows", data), _counts("image_lengths", data)
        if len(rows) == 0 or len(lengths) != len(rows):
            raise ValueError(
                f"image_rows and image_lengths must hold one number a picture, got {len(rows)} and {len(lengths)}"
            )
        if rows.sum() != len(embeds):
            raise ValueError(f"image_rows must add up to {len(embeds)}, the rows of image_embeds; got {rows.tolist()}")
        tokens = _integers("image_tokens", data, ndim=1)
        if lengths.sum() != len(tokens):
            raise ValueError(
                f"image_lengths must add up to {len(tokens)}, the length of image_tokens; got {lengths.tolist()}"
            )
        if tokens.min() < 0 or tokens.max() >= self.vocabulary:
            raise ValueError(
                f"image_tokens must be in [0, {self.vocabulary}), got {int(tokens.min())} to {int(tokens.max())}"
            )
        for i, (span, count) in enumerate(zip(tokens.split(lengths.tolist()), rows.tolist(), strict=True)):
            if (found := int((span == self.image_token).sum())) != count:
                raise ValueError(
                    f"image_tokens must hold the image token {self.image_token} once for each row: "
                    f"{count} times for picture {i}, got {found}"
                )
        checked = {"image_embeds": embeds, "image_rows": rows, "image_tokens": tokens, "image_lengths": lengths}
        return checked | (self._positions(data, lengths) if self.mrope else {})

    def _positions(self, data: Mapping[str, Any], lengths: Tensor) -> dict[str, Tensor]:
        total = int(lengths.sum())
        positions, extents = _integers("image_positions", data, ndim=2), _counts("image_extents", data)
        if positions.shape != (total, AXES):
            raise ValueError(f"image_positions must be [{total}, {AXES}], got {list(positions.shape)}")
        if len(extents) != len(lengths):
            raise ValueError(f"image_extents must be [{len(lengths)}], got {list(extents.shape)}")
        if extents.sum() > self.max_positions:
            raise ValueError(
                f"image_extents must add up to at most {self.max_positions}, the positions that the model has; "
                f"got {extents.tolist()}"
            )
        for i, (span, extent) in enumerate(zip(positions.split(lengths.tolist()), extents.tolist(), strict=True)):
            if span.min() < 0 or span.max() >= extent:
                raise ValueError(
                    f"image_positions of picture {i} must be in [0, {extent}), its extent; "
                    f"got {int(span.min())} to {int(span.max())}"
                )
        return {"image_positions": positions, "image_extents": extents}


def _integers(name: str, data: Mapping[str, Any], ndim: int) -> Tensor:
    value = data[name]
    if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name} must be a tensor of integers, got {_kind(value)}")
    if value.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions, got {list(value.shape)}")
    return value.long()


def _counts(name: str, data: Mapping[str, Any]) -> Tensor:
    value = _integers(name, data, ndim=1)
    if (value < 1).any():
        raise ValueError(f"{name} must hold numbers of at least 1, got {value.tolist()}")
    return value


def _kind(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
