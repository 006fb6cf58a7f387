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

from torch import Tensor

from otprune.layerwise.policy import Need, State, keep_top


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
