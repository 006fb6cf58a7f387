"""The interface of a policy: after which layers it acts, which attention it needs there, and which image rows it keeps.

Shape suffixes: B prompts, L rows of the longest prompt, D model width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from otprune.layerwise.layout import Layout

Need = Literal["none", "last_row", "next_row", "headmax"]
"""The attention that an event needs:
    none       no attention
    last_row   [B, L]: the last prompt token's attention in the layer that has just run, mean over heads
    next_row   [B, L]: the same in the layer that comes next
    headmax    [B, L, L]: the whole attention of the layer that has just run, maximum over heads
"""


@dataclass(frozen=True, kw_only=True)
class State:
    """A batch at an event."""

    layer: int
    """The layer that has just run; -1 before layer 0."""
    hidden: Tensor
    """[B, L, D]: the rows that leave `layer`; the embeddings if it is -1."""
    layout: Layout
    attention: Tensor | None
    """The attention that the event needs."""

    def required_attention(self) -> Tensor:
        """`attention`, for a policy whose events need it."""
        assert self.attention is not None, f"the event after layer {self.layer} declares no attention"
        return self.attention


class Policy(Protocol):
    """A method that deletes image tokens inside the model. A policy holds only settings, so any batch may use it."""

    @property
    def renumbers(self) -> bool:
        """Whether the rows that are left after a deletion are numbered anew (`layout.keep_rows`)."""
        ...

    def events(self, num_layers: int) -> Mapping[int, Need]:
        """{l: needed attention}: the executor calls `choose` after each layer l; -1 is before layer 0.

        Raises:
            ValueError: if the policy's settings do not fit a model of `num_layers` layers.
        """
        ...

    def choose(self, state: State) -> Tensor:
        """The image rows to keep, bool [B, L]. The values of other rows are ignored: text stays."""
        ...


@dataclass(frozen=True)
class KeepAll:
    """The policy that deletes nothing: it runs the unpruned model on the same executor."""

    renumbers = False

    def events(self, num_layers: int) -> Mapping[int, Need]:
        return {}

    def choose(self, state: State) -> Tensor:
        return state.layout.image


def keep_top(score_BL: Tensor, layout: Layout, kept: list[int]) -> Tensor:
    """The `kept[b]` image rows of prompt b with the largest scores, bool [B, L]; ties go to the earlier row.

    Raises:
        ValueError: if a prompt has fewer image rows than it must keep, or a count is negative.
    """
    for index, (count, available) in enumerate(zip(kept, layout.num_image, strict=True)):
        if not 0 <= count <= available:
            raise ValueError(
                f"image tokens to keep must be in [0, {available}], what prompt {index} has here, got {count}"
            )
    order_BL = score_BL.masked_fill(~layout.image, -torch.inf).argsort(dim=1, descending=True, stable=True)
    # The rank of every row is the inverse of the sort permutation: one sort serves a different count in each prompt.
    rank_BL = torch.empty_like(order_BL)
    rank_BL.scatter_(1, order_BL, torch.arange(order_BL.shape[1], device=order_BL.device).expand_as(order_BL))
    return layout.image & (rank_BL < torch.tensor(kept, device=rank_BL.device)[:, None])


def check_layer(layer: int, num_layers: int, *, lowest: int = 0) -> None:
    """Raises ValueError for a pruning layer K outside [lowest, num_layers]; layers 0 .. K-1 process every token."""
    if not lowest <= layer <= num_layers:
        raise ValueError(f"layer must be in [{lowest}, {num_layers}] for a model of {num_layers} layers, got {layer}")
