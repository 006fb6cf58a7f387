"""The input and output of methods before the language model: `Seen` goes in, one `Reduced` a picture comes out.

Shape suffixes: B pictures, N visual tokens of each, D feature width, K rows left of one picture, P prompts in all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Requirement = Literal["keys", "class_attention", "relevance"]
"""A field of `Seen` that the encoder computes only for methods that require it."""

Wish = Literal["saliency", "patches"]
"""A field of `Seen` that methods use where the encoder has it, and do without elsewhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """The encoder's output for a batch of pictures. A field that the method does not ask for is None."""

    features: Tensor
    """[B, N, D]: projected tokens, or the projector's input if the method acts before the projector."""
    seeds: Tensor
    """int64 [B]: the seed of each picture."""
    prompts: Sequence[Sequence[str]]
    """The prompts of each picture."""
    pictures: Sequence[int] = ()
    """Where a method looks at each crop by itself, the number of the picture of which each of B is a crop; () if each
    is a picture of its own."""
    keys: Tensor | None = None
    """[B, N, width]: the keys of the vision layer that reads the tower's features."""
    class_attention: Tensor | None = None
    """[B, N]: the class token's attention to each token in that layer."""
    relevance: Tensor | None = None
    """[P, N]: the relevance of each token to the prompt, one row for each prompt of each picture."""
    saliency: Tensor | None = None
    """[B, N]: the class token's attention in the layer that makes the features, the mean over its heads."""
    patches: Tensor | None = None
    """[B, N, W]: the projector's input."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reduced:
    """The rows that a method leaves of one picture."""

    features: Tensor
    """[K, D]."""
    source: Tensor
    """int64 [K]: the index of the token that each row was or was made from; -1 if that is no single token."""


Reduction = Callable[[Seen, int], list[list[Reduced]]]
"""(seen, k) -> for each picture a list of one `Reduced`, or of one for each prompt if the method is `per_prompt`."""


def keep_all(seen: Seen, k: int) -> list[list[Reduced]]:
    """Every token of each picture, in order: the reduction of methods that prune nothing here."""
    source = torch.arange(seen.features.shape[1])
    return [[Reduced(features=features, source=source)] for features in seen.features]


def keep_rows(features_BND: Tensor, index_BK: Tensor) -> list[Reduced]:
    """The tokens at `index_BK` of each picture."""
    pairs = zip(features_BND, index_BK, strict=True)
    return [Reduced(features=features_ND[index_K], source=index_K) for features_ND, index_K in pairs]
