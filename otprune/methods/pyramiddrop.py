"""PyramidDrop (arXiv 2410.17247): stages delete image tokens, by the last prompt token's attention in the next layer.

Before the first layer l of a stage, score_i = mean over heads of softmax(q_last K^T / sqrt(d))_i, with layer l's own
queries and keys of the rows that enter it. The tokens with the best scores stay, in the number of the stage. The
release for LLaVA has stages at layers 8, 16 and 24 of 32; each keeps half of the tokens of the previous one, rounded
down.

After each stage the release numbers the rows that are left anew, 0 .. n'-1; the scores of a stage still see the numbers
of the stage before. A generated token's position in a layer is therefore the number of rows before it in that layer,
another one in each stage. `positions="original"` keeps the numbers of the whole prompt instead, as FastV, VTW and
FitPrune do: kept tokens stay as far from each other and from the text as they are in the unpruned prompt.

Departures:
- A stage may start at layer 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from otprune.layerwise.policy import Need, State, keep_top
from otprune.methods.base import InModel, Sizes
from otprune.methods.search import Search
from otprune.methods.settings import Setting
from otprune.schedules import stage_rows

Positions = Literal["renumbered", "original"]


@dataclass(frozen=True, kw_only=True)
class PyramidDrop:
    """`stages` is {layer: number of image tokens that this layer and the following ones process}."""

    stages: Mapping[int, int]
    positions: Positions = "renumbered"

    @property
    def renumbers(self) -> bool:
        return self.positions == "renumbered"

    def events(self, num_layers: int) -> Mapping[int, Need]:
        outside = [layer for layer in self.stages if not 0 <= layer < num_layers]
        if outside:
            raise ValueError(f"stages must start at layers [0, {num_layers}), got {outside}")
        return {layer - 1: "next_row" for layer in self.stages}

    def choose(self, state: State) -> Tensor:
        kept = self.stages[state.layer + 1]
        return keep_top(state.required_attention(), state.layout, [kept] * len(state.layout.num_image))


def pyramid_stages(num_visual: int, layers: Sequence[int] = (8, 16, 24), ratio: float = 0.5) -> dict[int, int]:
    """{layer: floor(num_visual * ratio^stage)}; by default 576 tokens give 288, 144 and 72.

    Raises:
        ValueError: if ratio is not in (0, 1].
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")
    return {layer: int(num_visual * ratio**stage) for stage, layer in enumerate(sorted(layers), start=1)}


def _cost(sizes: Sizes, *, stages: Mapping[int, int]) -> int:
    """Multiply-adds of one query, all keys and their scores a stage, whose first layer has not run yet."""
    shape, rows = sizes.shape, sizes.rows
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    num_rows = [sizes.num_text + (rows[layer - 1][0] if layer else sizes.num_visual) for layer in stages]
    return sum(num * shape.hidden * keys + (shape.hidden + num) * queries for num in num_rows)


def _match(
    search: Search, *, stages: dict[int, int] | None = None, layers: Sequence[int] | None = None
) -> dict[str, Any]:
    """Searches the share of tokens that each stage keeps. Stages begin at `layers`; None is the model's quarters."""
    if stages is not None:
        return {"stages": stages}
    layers = layers or sorted({search.num_layers * quarter // 4 for quarter in (1, 2, 3)})
    shares = (kept / search.num_visual for kept in range(1, search.num_visual + 1))
    return search.smallest([{"stages": pyramid_stages(search.num_visual, layers, share)} for share in shares])


METHOD = InModel(
    name="pyramiddrop",
    policy=PyramidDrop,
    cost=_cost,
    rows=lambda num_visual, num_layers, _, *, stages: stage_rows(num_visual, num_layers, stages),
    match=_match,
    settings={
        "stages": Setting(
            meaning="{layer: tokens from it on}; null prunes at the quarters of the model, matching retention's FLOPs",
            kind="counts",
        ),
        "positions": Setting(
            meaning="of the tokens left after a stage: numbered anew, as in the release, or those of the whole prompt",
            kind="text",
            default="renumbered",
            choices=("renumbered", "original"),
            schedules=False,
        ),
    },
)
