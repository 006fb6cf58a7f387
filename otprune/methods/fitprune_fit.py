"""FitPrune's calibration: fits the recipe of a compute budget to the attention of a few samples, as the release does.

One number alpha in [0, 1] decides how many tokens each layer deletes. The unpruned model reads every sample once, which
gives W_l, the sum of a mass over all image tokens in layer l, for the self and for the cross mass
(`layerwise/attention.py`). For a given alpha the model then reads the samples again and is pruned while it reads:

    layer l sorts the tokens that are left by a mass, measured in this already pruned model. Deletable is the largest
    number of the smallest ones without which the others still have (1 - alpha) W_l. The layer deletes the tokens that
    are deletable by both masses.

Before each layer, the samples' mean work is forecast as if no further layer deleted anything. Where the forecast is
within the budget, the fit stops: the layers from this one on delete nothing. Each layer before deletes

    n_l = floor(mean over samples of the number of tokens deleted in layer l)

The work counts image tokens alone. A layer that n tokens enter and m tokens leave does 3 n d^2 + 2 n^2 d before it
deletes (queries, keys, values, scores) and m d^2 + 3 m d f after it (output projection, FFN of width f). Bisection
finds, to 0.01, the smallest alpha that reaches the budget (1 - reduction) of the unpruned work. The paper takes 655
samples of LLaVA's training mix.

Departures:
- The user provides the samples; the authors' are not published.
- The result is of the smallest alpha that reached the budget; the release prints that of the last alpha that it tried,
  which may have missed.
- Where one token alone holds (1 - alpha) W_l, all others are deletable; the release then takes the number that an
  earlier layer or sample left in its variable. test_of_any_image_a_token_stays
- A recipe for `retention` belongs to the largest reduction, in whole per cent, whose prefill costs no less than a
  selector's, as this package runs it (`run/pruning.py`).

Shape suffixes: S samples, T layers, N image tokens that are left, M = 2 masses (self and cross).
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
    """{"recipe": the recipe whose prefill costs no less than a selector's at `retention`}, as `fit_recipes`."""
    [recipe] = fit_recipes(sample, [retention])
    return {"recipe": recipe}


def fit_recipes(sample: Sample, retentions: Sequence[float]) -> list[dict[int, int]]:
    """The recipe for each of `retentions`; the first prompt of the sample defines the budgets.

    Raises:
        ValueError: as `Trials`, or if even an unpruned prefill costs less than a selector's.
    """
    trials = Trials(sample.model, sample.embeds, sample.spans)
    num_text = len(sample.embeds[0]) - trials.num_visual
    layers, fitted = trials.shape.layers, dict[float, dict[int, int]]()

    def flops(reduction: float) -> int:
        if reduction not in fitted:
            recipe = trials.fit(reduction)
            fitted[reduction] = trials.most() if recipe is None else recipe
        rows = recipe_rows(trials.num_visual, layers, fitted[reduction])
        return prefill_flops(trials.shape, num_text, visual=rows)

    recipes, budgets = [], [{"reduction": percent / 100} for percent in range(99, -1, -1)]
    for retention in retentions:
        target = selector_prefill(trials.shape, num_text, trials.num_visual, retention)
        search = Search(flops=flops, target=target, num_visual=trials.num_visual, num_layers=layers)
        recipes.append(fitted[search.smallest(budgets)["reduction"]])
    return recipes


def fit_fitprune(
    model: Any, embeds: list[Tensor], image_spans: list[tuple[int, int]], *, reduction: float
) -> dict[int, int]:
    """A recipe for `FitPrune`, fitted on the given prompts, that saves the share `reduction` of the image tokens' work.

    The recipe leaves out layers that delete nothing. It saves up to a token a layer less than its samples did, because
    their mean is rounded down.

    Raises:
        ValueError: as `Trials`; if reduction is outside [0, 1), or no alpha saves so much.
    """
    if not 0 <= reduction < 1:
        raise ValueError(f"reduction must be in [0, 1), got {reduction}")
    recipe = Trials(model, embeds, image_spans).fit(reduction)
    if recipe is None:
        raise ValueError(f"reduction must be one that deleting tokens can reach, got {reduction}")
    return recipe


class Trials:
    """Samples that the model reads once for each alpha that is tried, one prompt at a time.

    `embeds` and `image_spans` are as in `generate_layerwise`.

    Raises:
        ValueError: as `generate_layerwise`; without samples, or if their images differ in their number of tokens.
    """

    def __init__(self, model: Any, embeds: list[Tensor], image_spans: list[tuple[int, int]]):
        sizes = sorted({end - start for start, end in image_spans})
        if len(sizes) != 1:
            raise ValueError(f"samples must all have the same number of image tokens, got {sizes}")
        self.num_visual, self.shape = sizes[0], LanguageShape.from_config(model.config)
        self._model, self._samples = model, list(zip(embeds, image_spans, strict=True))
        nothing_spared = [torch.full((2,), torch.inf)] * self.shape.layers
        self._totals = [self._read(number, nothing_spared).totals for number in range(len(embeds))]
        self._deleted: dict[float, Tensor] = {}  # alpha -> int64 [S, T]

    def fit(self, reduction: float) -> dict[int, int] | None:
        """The recipe of the smallest alpha, to TOLERANCE, that reaches the budget; None if no alpha does."""
        allowed = (1 - reduction) * fit_flops(self.shape, self.num_visual, {})
        low, high, best = 0.0, 1.0, None
        while high - low > TOLERANCE:
            middle = (low + high) / 2
            deleted_ST = self.deleted(middle)
            stop = self._first_within(allowed, deleted_ST)
            if stop is None:
                low = middle
            else:
                high, best = middle, _recipe(deleted_ST[:, :stop])
        return best

    def most(self) -> dict[int, int]:
        """The recipe of the largest alpha that `fit` tries, without a budget."""
        step = 1.0
        while step > TOLERANCE:
            step /= 2
        return _recipe(self.deleted(1 - step))

    def deleted(self, alpha: float) -> Tensor:
        """The number of tokens that each layer deletes of each sample, int64 [S, T], without a budget."""
        if alpha not in self._deleted:
            counts = []
            for number, totals in enumerate(self._totals):
                spared = [(1 - alpha) * total_M for total_M in totals]
                counts.append([*self._read(number, spared).deleted, 0])  # no layer would be left to save work in
            self._deleted[alpha] = torch.tensor(counts)
        return self._deleted[alpha]

    def _read(self, number: int, spared: list[Tensor]) -> "_Trial":
        rows, span = self._samples[number]
        trial = _Trial(spared)
        prefill(self._model, [rows], [span], trial)
        return trial

    def _first_within(self, allowed: float, deleted_ST: Tensor) -> int | None:
        """The first layer before which the forecast of the mean work is at most `allowed`; None if there is none."""
        for layer in range(self.shape.layers):
            so_far_ST = deleted_ST.clone()
            so_far_ST[:, layer:] = 0
            works = [_work(self.shape, self.num_visual, row) for row in so_far_ST.tolist()]
            if sum(works) <= allowed * len(works):
                return layer
        return None


def fit_flops(shape: LanguageShape, num_visual: int, recipe: Recipe) -> int:
    """Multiply-adds of the image tokens' prefill under `recipe`, as the fit counts them."""
    return _work(shape, num_visual, [recipe.get(layer, 0) for layer in range(shape.layers)])


def _work(shape: LanguageShape, num_visual: int, deleted: Sequence[int]) -> int:
    """As `fit_flops`, from the number of tokens that each layer deletes."""
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    work, num = 0, num_visual
    for number in deleted:
        work += num * shape.hidden * (queries + 2 * keys) + 2 * num**2 * queries
        num -= number
        work += num * shape.hidden * (queries + 3 * shape.intermediate + shape.experts)
    return work


def _recipe(deleted_SL: Tensor) -> dict[int, int]:
    """{layer: mean over samples, rounded down}, without the layers where that is 0."""
    means = (deleted_SL.sum(dim=0) // len(deleted_SL)).tolist()
    return {layer: number for layer, number in enumerate(means) if number}


@dataclass(frozen=True)
class _Trial:
    """A policy for one prompt: deletes in each layer but the last what both masses can spare, and records it."""

    spared: list[Tensor]
    """Of each layer, the masses [M] that its tokens must keep."""
    totals: list[Tensor] = field(default_factory=list)
    """Of each layer, the masses [M] of all image tokens that are left, float64 on the CPU."""
    deleted: list[int] = field(default_factory=list)
    """Of each layer, the number of tokens that it deletes."""
    renumbers = False

    def events(self, num_layers: int) -> Mapping[int, Need]:
        return dict.fromkeys(range(num_layers - 1), "headmax")

    def choose(self, state: State) -> Tensor:
        image_BL = state.layout.image
        mass_MN = torch.stack(attention_mass(state.required_attention(), state.layout))[:, image_BL].double().cpu()
        deletable_N = deletable(mass_MN, self.spared[state.layer]).all(dim=0)
        self.totals.append(mass_MN.sum(dim=1))
        self.deleted.append(int(deletable_N.sum()))
        return image_BL.masked_scatter(image_BL, ~deletable_N.to(image_BL.device))


def deletable(mass_MN: Tensor, spared_M: Tensor) -> Tensor:
    """The deletable tokens under each mass, bool [M, N].

    They are the largest number, at most N - 1, of the tokens with the smallest mass without which the others still have
    `spared_M`.
    """
    ascending_MN, order_MN = mass_MN.sort(dim=1, stable=True)
    left_MN = mass_MN.sum(dim=1, keepdim=True) - ascending_MN.cumsum(dim=1)
    fits_MN = left_MN >= spared_M[:, None]
    fits_MN[:, -1] = False
    return torch.zeros_like(fits_MN).scatter_(1, order_MN, fits_MN)
