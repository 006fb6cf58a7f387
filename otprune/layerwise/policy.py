"""What a policy is: after which layers it acts, what it must see there, and which image tokens stay.

Shape suffixes: B prompts, L rows of the longest prompt, D model width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from otprune.layerwise.layout import Layout

Need = Literal["none", "last_row", "next_row", "headmax"]
"""What an event must see: nothing; the last prompt token's attention in the layer that has just run, mean over heads,
[B, L]; the same in the layer that comes next; the just-run layer's whole attention, largest over heads, [B, L, L]."""


@dataclass(frozen=True, kw_only=True)
class State:
    """A batch after `layer` has run (-1: the embeddings, before any has): its rows `hidden` [B, L, D], where they come
    from, and the attention that the event asked for."""

    layer: int
    hidden: Tensor
    layout: Layout
    attention: Tensor | None

    def required_attention(self) -> Tensor:
        """`attention`, for a policy whose events ask for it."""
        assert self.attention is not None, f"the event after layer {self.layer} asked for no attention"
        return self.attention


class Policy(Protocol):
    """A method that deletes image tokens inside the model. State lives in its settings alone, so batches are free."""

    def events(self, num_layers: int) -> Mapping[int, Need]:
        """{l: what is needed}: `choose` is called after layer l, -1 being before the first.

        Raises:
            ValueError: if the policy's settings do not fit a model of `num_layers` layers.
        """
        ...

    def choose(self, state: State) -> Tensor:
        """bool [B, L]: image rows to keep. Other rows are ignored: text stays."""
        ...


@dataclass(frozen=True)
class KeepAll:
    """Deletes nothing: the unpruned model on the same executor."""

    def events(self, num_layers: int) -> Mapping[int, Need]:
        return {}

    def choose(self, state: State) -> Tensor:
        return state.layout.image


def keep_top(score_BL: Tensor, layout: Layout, kept: list[int]) -> Tensor:
    """bool [B, L]: of each prompt's image rows the `kept[b]` with the largest score; ties go to the earlier row.

    Raises:
        ValueError: if a prompt has fewer image rows than it should keep, or a count is negative.
    """
    for index, (count, available) in enumerate(zip(kept, layout.num_image, strict=True)):
        if not 0 <= count <= available:
            raise ValueError(
                f"image tokens to keep must be in [0, {available}], what prompt {index} has here, got {count}"
            )
    order_BL = score_BL.masked_fill(~layout.image, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank_BL = torch.empty_like(order_BL)
    rank_BL.scatter_(1, order_BL, torch.arange(order_BL.shape[1], device=order_BL.device).expand_as(order_BL))
    return layout.image & (rank_BL < torch.tensor(kept, device=rank_BL.device)[:, None])


def check_layer(layer: int, num_layers: int, *, lowest: int = 0) -> None:
    """Refuses a pruning layer K outside [lowest, num_layers]; layers 0 .. K-1 see every token."""
    if not lowest <= layer <= num_layers:
        raise ValueError(f"layer must be in [{lowest}, {num_layers}] for a model of {num_layers} layers, got {layer}")
