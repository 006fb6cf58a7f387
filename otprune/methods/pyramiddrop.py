"""PyramidDrop (arXiv 2410.17247): image tokens thin out in stages, by what the last prompt token would look at next.

Before layer l of each stage: score_i = mean over heads of softmax(q_last K^T / sqrt(d))_i with layer l's own queries
and keys of the rows that enter it; the stage's number of best tokens goes on. Released for LLaVA: layers 8, 16 and 24
of 32, each stage half of the one before, rounded down.

Departures:
- Positions stay those of the whole prompt; the release renumbers in some versions.
- A stage may start at layer 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from otprune.layerwise.policy import Need, State, keep_top
from otprune.methods.base import InModel, Sizes
from otprune.methods.search import Search
from otprune.methods.settings import Setting
from otprune.schedules import stage_rows


@dataclass(frozen=True, kw_only=True)
class PyramidDrop:
    """`stages`: {layer: image tokens that this layer and the following ones work on}."""

    stages: Mapping[int, int]

    def events(self, num_layers: int) -> Mapping[int, Need]:
        outside = [layer for layer in self.stages if not 0 <= layer < num_layers]
        if outside:
            raise ValueError(f"stages must start at layers [0, {num_layers}), got {outside}")
        return {layer - 1: "next_row" for layer in self.stages}

    def choose(self, state: State) -> Tensor:
        kept = self.stages[state.layer + 1]
        return keep_top(state.seen(), state.layout, [kept] * len(state.layout.num_image))


def pyramid_stages(num_visual: int, layers: Sequence[int] = (8, 16, 24), ratio: float = 0.5) -> dict[int, int]:
    """{layer: floor(num_visual * ratio^stage)}: 576 tokens give 288, 144 and 72.

    Raises:
        ValueError: if ratio is not in (0, 1].
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"ratio must be in (0, 1], got {ratio}")
    return {layer: int(num_visual * ratio**stage) for stage, layer in enumerate(sorted(layers), start=1)}


def _cost(sizes: Sizes, *, stages: Mapping[int, int]) -> int:
    """At each stage one query and its scores in a layer that has not run and has no keys yet."""
    shape, rows = sizes.shape, sizes.rows
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    entering = [sizes.num_text + (rows[layer - 1][0] if layer else sizes.num_visual) for layer in stages]
    return sum(each * shape.hidden * keys + (shape.hidden + each) * queries for each in entering)


def _match(
    search: Search, *, stages: dict[int, int] | None = None, layers: Sequence[int] | None = None
) -> dict[str, Any]:
    """The share that each stage keeps of the one before; stages begin at `layers`, None is the model's quarters."""
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
            meaning="{layer: tokens from it on}; null thins out at the quarters, matching retention's FLOPs",
            kind="counts",
        )
    },
)
