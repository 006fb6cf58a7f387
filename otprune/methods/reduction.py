"""What a method before the language model is given of a batch of pictures, and what it gives back.

Shape suffixes: B pictures, N visual tokens of each, D feature width, K what is left of one picture, P prompts in all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Requirement = Literal["keys", "class_attention", "relevance"]
"""What the encoder computes beside features, for the methods that require it: a field of `Seen`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Seen:
    """A batch of pictures as the encoder saw them. A field that the method does not require is None."""

    features: Tensor
    """[B, N, D]: projected tokens, or what the projector reads if the method acts before it."""
    seeds: Tensor
    """int64 [B], of each picture."""
    prompts: Sequence[Sequence[str]]
    """Of each picture."""
    keys: Tensor | None = None
    """[B, N, width] of the vision layer that reads the tower's features."""
    class_attention: Tensor | None = None
    """[B, N]: how much the class token looks at each in that layer."""
    relevance: Tensor | None = None
    """[P, N]: of each token to the prompt, one row for each prompt of each picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reduced:
    """What is left of one picture: `features` [K, D], and `source` int64 [K], the token that each row was or grew from.

    -1 is a row that grew from no one token.
    """

    features: Tensor
    source: Tensor


Reduction = Callable[[Seen, int], list[list[Reduced]]]
"""(seen, k) -> of each picture what is left of it, once; or once for each prompt if the method is `per_prompt`."""


def keep_all(seen: Seen, k: int) -> list[list[Reduced]]:
    """Every token, in its order."""
    everything = torch.arange(seen.features.shape[1])
    return [[Reduced(features=features, source=everything)] for features in seen.features]


def keep_rows(features_BND: Tensor, index_BK: Tensor) -> list[Reduced]:
    """The tokens that `index_BK` names."""
    return [Reduced(features=each[index], source=index) for each, index in zip(features_BND, index_BK, strict=True)]
