"""FastV (arXiv 2403.06764): after layer K-1, keep the image tokens to which the last prompt token attends most.

    score_i = mean over heads of softmax(q_last K^T / sqrt(d))_i      in layer K-1

Layers 0 .. K-1 process and cache every token. The paper has K = 2 and keeps half the tokens; the table of the release's
README has K = 3. Written from the formula: the release has no licence.

Departures:
- Tokens are ranked once, in prefill, as in the release's variant with a cache; the variant without a cache ranks again
  at every new token.
- The release's variant with a cache runs layer K-1 twice and appends its keys twice (repository issue 46); here layer
  K-1 runs once. test_every_layer_caches_what_the_cost_model_says
- One row of attention is computed beside the fused kernel, instead of eager attention.
  test_what_is_deleted_is_what_the_method_says
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from otprune.layerwise.policy import Need, State, check_layer, keep_top
from otprune.methods.base import InModel, Sizes
from otprune.methods.search import Search
from otprune.methods.settings import Setting
from otprune.schedules import num_kept, stage_rows


@dataclass(frozen=True, kw_only=True)
class FastV:
    """`layer` is K, at least 1. Layers from K on read `kept` image tokens of each prompt, or the share `retention`.

    `retention` is 1 - R of the paper.
    """

    layer: int
    kept: int | None = None
    retention: float | None = None
    renumbers = False

    def __post_init__(self):
        if (self.kept is None) == (self.retention is None):
            raise ValueError(f"fastv must be given kept or retention, got {self.kept} and {self.retention}")
        if self.kept is not None and self.kept < 1:
            raise ValueError(f"kept must be at least 1, got {self.kept}")
        if self.retention is not None:
            num_kept(self.retention, 1)  # raises ValueError outside (0, 1]

    def events(self, num_layers: int) -> Mapping[int, Need]:
        check_layer(self.layer, num_layers, lowest=1)
        return {self.layer - 1: "last_row"}

    def choose(self, state: State) -> Tensor:
        return keep_top(state.required_attention(), state.layout, [self._kept(num) for num in state.layout.num_image])

    def _kept(self, num_image: int) -> int:
        if self.kept is not None:
            return self.kept
        assert self.retention is not None
        return num_kept(self.retention, num_image)


def _cost(sizes: Sizes, *, layer: int, kept: int) -> int:
    """Multiply-adds of one query and its scores in the last layer that processes every token."""
    queries = sizes.shape.heads * sizes.shape.head_dim
    return (sizes.shape.hidden + sizes.num_text + sizes.num_visual) * queries if layer > 0 else 0


def _match(search: Search, *, layer: int | None = None, kept: int | None = None) -> dict[str, Any]:
    """Searches `kept` in 1 .. num_visual.

    `layer` None is 2, or 1 if two full layers cost more than the target even when one token is kept.
    """
    if kept is not None:
        return {"layer": layer or 2, "kept": kept}
    layer = layer or (2 if search.flops(layer=2, kept=1) <= search.target else 1)
    return search.smallest([{"layer": layer, "kept": kept} for kept in range(1, search.num_visual + 1)])


METHOD = InModel(
    name="fastv",
    policy=FastV,
    cost=_cost,
    rows=lambda num_visual, num_layers, _, *, layer, kept: stage_rows(num_visual, num_layers, {layer: kept}),
    match=_match,
    settings={
        "layer": Setting(
            meaning="layers before this one read every token; null is 2, or 1 where 2 cost more than the budget",
            kind="integer",
            low=1,
        ),
        "kept": Setting(meaning="tokens from this layer on; null matches retention's FLOPs", kind="integer", low=1),
    },
)
