"""FitPrune (arXiv 2409.10197): each layer of a recipe deletes a given number of the image tokens least attended to.

With A the attention of layer l, the maximum over heads, and N the image tokens that are left:

    self_i = 1/N sum over image rows j of A[j, i]      cross_i = sum over text rows t behind the image of A[t, i]

Layer l deletes the n_l tokens with the smallest self_i * cross_i (`layerwise/attention.py`). `fitprune_fit` fits a
recipe to the user's own sample. Written from the formulas: the release has no licence.

Departures:
- Rows are deleted after the whole layer. The release deletes them between attention and FFN, which saves the FFN of the
  deleted rows and changes nothing in the others; `schedules.recipe_rows` counts either way.
- The attention of one head at a time is computed beside the fused kernel, instead of eager attention.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from otprune.layerwise.attention import attention_mass
from otprune.layerwise.policy import Need, State, keep_top
from otprune.methods.base import Fit, InModel, Sizes
from otprune.methods.fitprune_fit import Recipe, calibrate_fitprune, fit_recipes
from otprune.methods.search import Search
from otprune.methods.settings import Setting
from otprune.schedules import recipe_rows

LLAVA_15_7B_RECIPES: dict[int, Recipe] = {
    80: {
        **{0: 128, 1: 127, 2: 118, 3: 35, 4: 26, 5: 8, 6: 13, 7: 3, 8: 2, 9: 1, 13: 2, 14: 1},
        **{15: 8, 16: 7, 17: 8, 18: 5, 19: 11, 20: 2, 21: 6, 22: 1, 23: 1, 27: 1},
    },
    90: {0: 262, 1: 153, 2: 80, 3: 19, 4: 13, 5: 1, 6: 2, 15: 1, 16: 1, 17: 2, 18: 1, 19: 2, 21: 1, 27: 1},
}
"""Released recipes for LLaVA-1.5-7B's 576 tokens: {percentage of FLOPs that the release claims to save: recipe}."""


@dataclass(frozen=True, kw_only=True)
class FitPrune:
    """`recipe` is {layer: number of image tokens to delete after it}."""

    recipe: Recipe
    renumbers = False

    def __post_init__(self):
        if any(deleted < 0 for deleted in self.recipe.values()):
            raise ValueError(f"recipe must delete 0 tokens or more in every layer, got {dict(self.recipe)}")

    def events(self, num_layers: int) -> Mapping[int, Need]:
        outside = [layer for layer in self.recipe if not 0 <= layer < num_layers]
        if outside:
            raise ValueError(f"recipe must name layers in [0, {num_layers}), got {outside}")
        return {layer: "headmax" for layer, deleted in self.recipe.items() if deleted}

    def choose(self, state: State) -> Tensor:
        self_BL, cross_BL = attention_mass(state.required_attention(), state.layout)
        deleted = self.recipe[state.layer]
        return keep_top(self_BL * cross_BL, state.layout, [num - deleted for num in state.layout.num_image])


def _cost(sizes: Sizes, *, recipe: Recipe) -> int:
    """Multiply-adds of recomputing all queries and scores, which fused attention does not return, and of two sums."""
    queries = sizes.shape.heads * sizes.shape.head_dim
    num_rows = [sizes.num_text + sizes.rows[layer][0] for layer, deleted in recipe.items() if deleted]
    return sum(num * sizes.shape.hidden * queries + num**2 * (queries + 2) for num in num_rows)


def _rows(num_visual: int, num_layers: int, as_released: bool, *, recipe: Recipe):
    return recipe_rows(num_visual, num_layers, recipe, before_ffn=as_released)


def _match(search: Search, *, recipe: Recipe | None = None, recipes: Sequence[Recipe] = ()) -> dict[str, Any]:
    """The cheapest of `recipes` that costs no less than the target."""
    if recipe is not None:
        return {"recipe": recipe}
    if not recipes:
        raise ValueError("recipes must hold one to choose from, got none")
    budgets = [{"recipe": candidate} for candidate in recipes]
    return search.smallest(sorted(budgets, key=lambda settings: search.flops(**settings)))


METHOD = InModel(
    name="fitprune",
    policy=FitPrune,
    cost=_cost,
    rows=_rows,
    match=_match,
    calibrate=calibrate_fitprune,
    fit=Fit(setting="recipe", values=fit_recipes),
    settings={
        "recipe": Setting(
            meaning="{layer: tokens to delete after it}, or a file of jobs/calibrate.py", kind="counts or file"
        )
    },
)
