"""FitPrune (arXiv 2409.10197): every layer of a recipe deletes its number of the image tokens least attended to.

With A the attention of layer l, largest over heads, and N image tokens left:

    self_i = 1/N sum over image rows j of A[j, i]      cross_i = sum over text rows t behind the image of A[t, i]

layer l deletes the n_l tokens with the smallest self_i * cross_i. `fitprune_fit` makes a recipe from the user's own
sample. Written from the formulas: the release has no licence.

Departures:
- Rows leave after the whole layer. The release drops them behind its attention, before its FFN, which costs the FFN of
  the deleted rows less and changes nothing in those that stay; `schedules.visual_rows` counts either way.
- One head's matrix at a time beside the fused kernel, instead of eager attention.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from otprune.layerwise.layout import Layout
from otprune.layerwise.policy import Need, State, keep_top

Recipe = Mapping[int, int]
"""{layer: image tokens it deletes}."""

LLAVA_15_7B_RECIPES: dict[int, Recipe] = {
    80: {
        **{0: 128, 1: 127, 2: 118, 3: 35, 4: 26, 5: 8, 6: 13, 7: 3, 8: 2, 9: 1, 13: 2, 14: 1},
        **{15: 8, 16: 7, 17: 8, 18: 5, 19: 11, 20: 2, 21: 6, 22: 1, 23: 1, 27: 1},
    },
    90: {0: 262, 1: 153, 2: 80, 3: 19, 4: 13, 5: 1, 6: 2, 15: 1, 16: 1, 17: 2, 18: 1, 19: 2, 21: 1, 27: 1},
}
"""Released recipes for LLaVA-1.5-7B's 576 tokens, by the percentage of FLOPs that they promise to save."""


@dataclass(frozen=True, kw_only=True)
class FitPrune:
    """`recipe`: {layer: image tokens that leave after it}."""

    recipe: Recipe

    def __post_init__(self):
        if any(deleted < 0 for deleted in self.recipe.values()):
            raise ValueError(f"recipe must delete 0 tokens or more in every layer, got {dict(self.recipe)}")

    def events(self, num_layers: int) -> Mapping[int, Need]:
        outside = [layer for layer in self.recipe if not 0 <= layer < num_layers]
        if outside:
            raise ValueError(f"recipe must name layers in [0, {num_layers}), got {outside}")
        return {layer: "headmax" for layer, deleted in self.recipe.items() if deleted}

    def choose(self, state: State) -> Tensor:
        self_BL, cross_BL = attention_mass(state.seen(), state.layout)
        deleted = self.recipe[state.layer]
        return keep_top(self_BL * cross_BL, state.layout, [num - deleted for num in state.layout.num_image])


def attention_mass(headmax_BLL: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """(self [B, L], cross [B, L]) of the formulas above, for every column.

    All text rows are summed: those before the image see none of it.
    """
    image_BL = layout.image.to(headmax_BLL.dtype)
    text_BL = (layout.valid & ~layout.image).to(headmax_BLL.dtype)
    num_image_B1 = image_BL.sum(dim=1, keepdim=True).clamp_min(1)
    return (image_BL[:, None] @ headmax_BLL)[:, 0] / num_image_B1, (text_BL[:, None] @ headmax_BLL)[:, 0]
