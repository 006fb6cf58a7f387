"""The contract of an encoder, the first half of a model: pictures become tokens among which a method chooses.

A picture has one region of tokens or, where a method looks at each tile by itself, one region for each tile. `regions`
computes them, a method reduces each of them, and `join` makes the picture's tokens of what is left.

Shapes: N tokens of a region, D width of the language model, W tower width, R width of a row that the language model
gets: D, or D times 1 + levels with DeepStack.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from otprune.families.geometry import Size, Way


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """The tokens among which a method chooses, in order."""

    features: Tensor
    """[N, D]: projected tokens, or [N, W] before the projector."""
    rows: Tensor | None = None
    """[N, R]: what the language model gets for each token, if that is more than `features`."""
    patches: Tensor | None = None
    """[N, W]: the hidden states that the projector reads; None if the family has none for each token."""
    keys: Tensor | None = None
    """[N, W]: with attention, the keys of the layer that reads `patches`."""
    class_attention: Tensor | None = None
    """[N]: with attention, the class token's attention in that layer."""
    saliency: Tensor | None = None
    """[N]: with saliency, the class token's attention in the layer that makes `patches`, the mean over its heads."""


@dataclass(frozen=True, slots=True)
class Kept:
    """The visual tokens that a method keeps of one picture, for one prompt if the method looks at the prompt.

    `source` holds the index of each token before pruning. The source of a merged token is the token that it grew from:
    the centre of a pooled cell, or the token that others were merged into; -1 if there is none. Indices count through
    the sequence of all tokens or, if a method chose in each tile by itself, through all crops in order.
    """

    tokens: Tensor  # [K, R]
    source: Tensor  # int64 [K]
    num_visual: int  # tokens before pruning


class Encoder(Protocol):
    """The vision tower and the projector of a checkpoint."""

    dtype: torch.dtype
    row_width: int
    """R."""

    def regions(
        self, pictures: Sequence[Tensor], sizes: Sequence[Size], way: Way, *, before_projector: bool = False
    ) -> list[list[Region]]:
        """The regions of each picture.

        Args:
            pictures: of each picture its frame, uint8 of `Frame.shape`, on any device.
            sizes: (height, width) of each picture as the user gave it.
            before_projector: the features are to be the projector's input.
        """
        ...

    def join(self, size: Size, regions: Sequence[Kept], way: Way, *, before_projector: bool = False) -> Kept:
        """The kept tokens of a picture, projected, from those that a method left of each of its regions."""
        ...
