"""FitPrune's calibration: fits the recipe of a compute budget to the attention of a few samples.

The unpruned model reads every sample once, and the self and cross mass (`layerwise/attention.py`) of each image token
in every layer is recorded. One number alpha in [0, 1] then decides how many tokens each layer deletes. In layer l, for
either mass, the tokens are sorted ascending; the largest prefix whose cumulated mass is at most alpha times the layer's
total is deletable. A sample deletes the tokens that are deletable under both masses, and

    n_l = floor(mean over samples of the number of deleted tokens)

Bisection finds, to 0.01, the smallest alpha whose recipe costs at most (1 - reduction) of the unpruned model, counting
image tokens alone:  4 n d^2 + 2 n^2 d + 3 n d m  a layer. The paper takes 655 samples of LLaVA's training mix.

Departures:
- The user provides the samples; the authors' are not published.
- A deleted token is lost to all later layers: its mass counts as spent in each of them. The paper leaves this open.
  test_a_deleted_token_is_spent_mass_later
- Deleted rows are charged to the attention and the FFN of their layer, because here they are deleted after it. The
  release must charge them to neither: only then do its own recipes save what it claims.
  test_the_released_recipes_promise_what_charges_deleted_rows_to_nothing

Shape suffixes: S samples, T layers, N image tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from otprune.layerwise.attention import attention_mass
from otprune.layerwise.executor import prefill
from otprune.layerwise.policy import Need, State
from otprune.methods.base import Sample
from otprune.methods.search import Search
from otprune.part_flops import prefill_flops, selector_prefill
from otprune.schedules import recipe_rows
from otprune.shapes import LanguageShape

Recipe = Mapping[int, int]
"""{layer: number of image tokens that the layer deletes}."""

TOLERANCE = 0.01  # of alpha


def calibrate_fitprune(
    sample: Sample, *, retention: float, threshold: float | None = None, first_layer: int | None = None
) -> dict[str, Any]:
    """{"recipe": the recipe of the largest alpha whose prefill costs no less than a selector's at `retention`}."""
    [recipe] = fit_recipes(sample, [retention])
    return {"recipe": recipe}


def fit_recipes(sample: Sample, retentions: Sequence[float]) -> list[dict[int, int]]:
    """The recipe for each of `retentions`. The model reads the sample once; its first prompt defines the budgets."""
    (start, end), length = sample.spans[0], len(sample.embeds[0])
    masses = measure(sample.model, sample.embeds, sample.spans)
    shape, text = LanguageShape.from_config(sample.model.config), length - (end - start)
    return match_recipes(*masses, shape, text, retentions)


def match_recipes(
    self_STN: Tensor, cross_STN: Tensor, shape: LanguageShape, num_text: int, retentions: Sequence[float]
) -> list[dict[int, int]]:
    """For each of `retentions`, the cheapest recipe of any alpha whose prefill costs no less than a selector's."""
    num_visual, steps = self_STN.shape[-1], round(1 / TOLERANCE)

    def flops(recipe: Recipe) -> int:
        return prefill_flops(shape, num_text, visual=recipe_rows(num_visual, shape.layers, recipe))

    recipes = sorted((recipe_at(self_STN, cross_STN, step * TOLERANCE) for step in range(steps + 1)), key=flops)
    budgets, matched = [{"recipe": recipe} for recipe in recipes], []
    for retention in retentions:
        target = selector_prefill(shape, num_text, num_visual, retention)
        search = Search(flops=flops, target=target, num_visual=num_visual, num_layers=shape.layers)
        matched.append(search.smallest(budgets)["recipe"])
    return matched


def fit_fitprune(
    model: Any, embeds: list[Tensor], image_spans: list[tuple[int, int]], *, reduction: float
) -> dict[int, int]:
    """A recipe for `FitPrune`, fitted on the given prompts, that saves the share `reduction` of the image tokens' work.

    The model reads the prompts one at a time. `embeds` and `image_spans` are as in `generate_layerwise`; all images
    must have the same number of tokens.

    Raises:
        ValueError: as `generate_layerwise`, `measure` and `fit_recipe`.
    """
    self_STN, cross_STN = measure(model, embeds, image_spans)
    return fit_recipe(self_STN, cross_STN, LanguageShape.from_config(model.config), reduction=reduction)


def measure(model: Any, embeds: list[Tensor], image_spans: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """The self and the cross mass [S, T, N] of every image token in every layer of the unpruned model.

    Both are float32 on the CPU.

    Raises:
        ValueError: if there is no sample, or the images differ in their number of tokens.
    """
    sizes = sorted({end - start for start, end in image_spans})
    if len(sizes) != 1:
        raise ValueError(f"samples must all have the same number of image tokens, got {sizes}")
    masses = []
    for rows, span in zip(embeds, image_spans, strict=True):
        recorder = _Masses()
        prefill(model, [rows], [span], recorder)
        masses.append(torch.stack(recorder.by_layer))
    mass_ST2N = torch.stack(masses)
    return mass_ST2N[:, :, 0], mass_ST2N[:, :, 1]


def fit_recipe(self_STN: Tensor, cross_STN: Tensor, shape: LanguageShape, *, reduction: float) -> dict[int, int]:
    """The recipe of the smallest alpha, to TOLERANCE, that saves at least `reduction`.

    The recipe leaves out layers that delete nothing.

    Raises:
        ValueError: if reduction is outside [0, 1), or larger than what deleting every token in the first layer saves.
    """
    if not 0 <= reduction < 1:
        raise ValueError(f"reduction must be in [0, 1), got {reduction}")
    num_visual = self_STN.shape[-1]
    allowed = (1 - reduction) * _image_flops(shape, num_visual, {})

    def attempt(alpha: float) -> tuple[dict[int, int], bool]:
        recipe = recipe_at(self_STN, cross_STN, alpha)
        return recipe, _image_flops(shape, num_visual, recipe) <= allowed

    low, high = 0.0, 1.0
    recipe, accepted = attempt(low)
    if accepted:
        return recipe
    best, accepted = attempt(high)
    if not accepted:
        raise ValueError(f"reduction must be one that deleting tokens can reach, got {reduction}")
    while high - low > TOLERANCE:
        middle = (low + high) / 2
        recipe, accepted = attempt(middle)
        if accepted:
            high, best = middle, recipe
        else:
            low = middle
    return best


def recipe_at(self_STN: Tensor, cross_STN: Tensor, alpha: float) -> dict[int, int]:
    """{layer: n_l} for `alpha`, without the layers where n_l is 0."""
    left_SN = torch.ones_like(self_STN[:, 0], dtype=torch.bool)
    recipe = {}
    for layer in range(self_STN.shape[1]):
        deleted_SN = _deletable(self_STN[:, layer], left_SN, alpha) & _deletable(cross_STN[:, layer], left_SN, alpha)
        left_SN = left_SN & ~deleted_SN
        if number := int(deleted_SN.sum()) // len(deleted_SN):
            recipe[layer] = number
    return recipe


def _deletable(mass_SN: Tensor, left_SN: Tensor, alpha: float) -> Tensor:
    """The deletable tokens under one mass, bool [S, N].

    They are the largest prefix, in ascending order of mass, of the tokens left whose mass, with that of the deleted
    tokens, is at most the share alpha of all mass.
    """
    mass_SN = mass_SN.double()
    spent_S1 = mass_SN.masked_fill(left_SN, 0).sum(dim=1, keepdim=True)
    order_SN = mass_SN.argsort(dim=1, stable=True)
    cumulated_SN = spent_S1 + mass_SN.masked_fill(~left_SN, 0).gather(1, order_SN).cumsum(dim=1)
    # The total is the last cumulated value: a separate sum would round differently, and alpha = 1 could miss tokens.
    inside_SN = cumulated_SN <= alpha * cumulated_SN[:, -1:]
    return torch.zeros_like(left_SN).scatter_(1, order_SN, inside_SN) & left_SN


def _image_flops(shape: LanguageShape, num_visual: int, recipe: Recipe) -> int:
    """Multiply-adds of a prefill with image tokens alone, under `recipe`."""
    return prefill_flops(shape, 0, visual=recipe_rows(num_visual, shape.layers, recipe), head=False)


@dataclass(frozen=True)
class _Masses:
    """A policy that deletes nothing and records the (self, cross) mass [2, N] of each layer, for one prompt."""

    by_layer: list[Tensor] = field(default_factory=list)
    renumbers = False

    def events(self, num_layers: int) -> Mapping[int, Need]:
        return dict.fromkeys(range(num_layers), "headmax")

    def choose(self, state: State) -> Tensor:
        image_BL = state.layout.image
        both_2BL = torch.stack(attention_mass(state.required_attention(), state.layout))
        self.by_layer.append(both_2BL[:, image_BL].cpu())
        return image_BL
