"""VTW, visual tokens withdrawal (arXiv 2405.05803): layers K and later see no image token at all.

Text keeps its positions (the release's "keep" mode, with which its numbers were made; its renumbering is left out).
`vtw_search.find_vtw_layer` chooses K. Written from the description: the release has no licence.

Departures:
- K = 0 and K = number of layers are allowed: text alone, and the unpruned model.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from otprune.layerwise.policy import Need, State, check_layer


@dataclass(frozen=True, kw_only=True)
class VTW:
    """`layer` is K: layers 0 .. K-1 see every token, the others the text."""

    layer: int

    def events(self, num_layers: int) -> Mapping[int, Need]:
        check_layer(self.layer, num_layers)
        return {self.layer - 1: "none"}

    def choose(self, state: State) -> Tensor:
        return torch.zeros_like(state.layout.image)
