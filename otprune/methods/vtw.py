"""VTW, visual tokens withdrawal (arXiv 2405.05803): layers K and later read no image token.

Text keeps its positions, as in the "keep" mode that produced the release's numbers; the release's renumbering is left
out. `vtw_search.find_vtw_layer` chooses K. Written from the description: the release has no licence.

Departures:
- K = 0 (text alone) and K = number of layers (the unpruned model) are allowed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from otprune.layerwise.policy import Need, State, check_layer
from otprune.methods.base import InModel
from otprune.methods.search import Search
from otprune.methods.settings import Setting
from otprune.methods.vtw_search import calibrate_vtw
from otprune.schedules import stage_rows


@dataclass(frozen=True, kw_only=True)
class VTW:
    """`layer` is K: layers 0 .. K-1 read every token, later layers only the text."""

    layer: int
    renumbers = False

    def events(self, num_layers: int) -> Mapping[int, Need]:
        check_layer(self.layer, num_layers)
        return {self.layer - 1: "none"}

    def choose(self, state: State) -> Tensor:
        return torch.zeros_like(state.layout.image)


def _match(search: Search, *, layer: int | None = None) -> dict[str, Any]:
    """Searches `layer` in 0 .. num_layers."""
    if layer is not None:
        return {"layer": layer}
    return search.smallest([{"layer": layer} for layer in range(search.num_layers + 1)])


METHOD = InModel(
    name="vtw",
    policy=VTW,
    cost=lambda sizes, *, layer: 0,  # the choice reads nothing
    rows=lambda num_visual, num_layers, _, *, layer: stage_rows(num_visual, num_layers, {layer: 0}),
    match=_match,
    takes_tiles=True,
    calibrate=calibrate_vtw,
    settings={
        "layer": Setting(
            meaning="layers before this one read every token, later layers none; null matches retention's FLOPs",
            kind="integer",
            low=0,
        )
    },
)
