"""VTW's search for its layer and FitPrune's fit of its recipe, against their definitions by brute force."""

import pytest
import torch

from otprune.layerwise import generate_layerwise, prefill_logits
from otprune.layerwise.executor import prefill
from otprune.methods import Sample, get_method
from otprune.methods.fitprune import LLAVA_15_7B_RECIPES, FitPrune
from otprune.methods.fitprune_fit import Trials, fit_fitprune, fit_flops, fit_recipes
from otprune.methods.pyramiddrop import pyramid_stages
from otprune.methods.vtw import VTW
from otprune.methods.vtw_search import calibrate_vtw, find_vtw_layer, vtw_divergences
from otprune.part_flops import prefill_flops
from otprune.schedules import recipe_rows
from otprune.shapes import MODELS, LanguageShape
from tests import llama_oracle
from tests.llama_oracle import WIDTH, tiny_model

SPANS = [(3, 15), (0, 12), (5, 17)]
LENGTHS = [21, 13, 30]
LAYERS = 5


@pytest.fixture(scope="module")
def model():
    return tiny_model(layers=LAYERS)


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(length, WIDTH, generator=generator) for length in LENGTHS]


def divergence(model, prompts, layer):
    """Mean over samples of the sum of q log(q / p), p unpruned and q with withdrawal at `layer`, each run in full."""
    p = prefill_logits(model, prompts, SPANS).double().softmax(dim=-1)
    q = prefill_logits(model, prompts, SPANS, VTW(layer=layer)).double().softmax(dim=-1)
    return float((q * (q / p).log()).sum(dim=-1).mean())


def test_vtw_divergences_are_those_of_full_runs(model, prompts):
    found = dict(vtw_divergences(model, prompts, SPANS, first_layer=0))
    assert list(found) == list(range(LAYERS))
    for layer, value in found.items():
        assert value == pytest.approx(divergence(model, prompts, layer), rel=1e-3, abs=1e-6)


def test_vtw_takes_the_first_layer_under_the_threshold(model, prompts):
    values = dict(vtw_divergences(model, prompts, SPANS, first_layer=1))
    threshold = sorted(values.values())[1]
    expected = next(layer for layer, value in values.items() if value <= threshold)
    assert find_vtw_layer(model, prompts, SPANS, threshold=threshold, first_layer=1) == expected


def test_vtw_names_the_nearest_layer_where_none_is_under_the_threshold(model, prompts):
    values = dict(vtw_divergences(model, prompts, SPANS, first_layer=1))
    nearest = min(values, key=values.__getitem__)
    message = (
        rf"a layer in \[1, 4\] meets, got 0: the smallest divergence is {values[nearest]:.3g}, .*at layer {nearest}"
    )
    with pytest.raises(ValueError, match=message):
        find_vtw_layer(model, prompts, SPANS, threshold=0, first_layer=1)
    sample = Sample(model, prompts, SPANS)
    with pytest.raises(ValueError, match=message):
        calibrate_vtw(sample, threshold=0, first_layer=1)


def test_the_search_runs_the_image_once(model, prompts):
    """Rows through all layers: one full prefill, then text alone from layer K on, for each K."""
    rows = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1])) for layer in model.model.layers
    ]
    list(vtw_divergences(model, prompts, SPANS, first_layer=1))
    for hook in hooks:
        hook.remove()
    text = sum(LENGTHS) - 12 * len(LENGTHS)
    assert sum(rows) == LAYERS * sum(LENGTHS) + text * sum(LAYERS - layer for layer in range(1, LAYERS))


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"threshold": -0.1}, "threshold must be at least 0"), ({"first_layer": 6}, r"layer must be in \[0, 5\]")],
)
def test_a_search_that_makes_no_sense_is_refused(model, prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        find_vtw_layer(model, prompts, SPANS, **settings)
    with pytest.raises(ValueError, match="must hold a sample"):
        find_vtw_layer(model, [], [], first_layer=0)


SHAPE = LanguageShape(hidden=64, intermediate=96, layers=LAYERS, heads=4, kv_heads=2, head_dim=16, vocab=97)


def fit_cost(entering: list[int], leaving: list[int]) -> int:
    """Image tokens alone: queries, keys, values and scores of those that enter a layer, output projection and FFN of
    those that leave it. Two heads of queries share a head of keys, so that keys and values are half as wide."""
    before = sum(n * (64 * 64 + 2 * 64 * 32) + 2 * n**2 * 64 for n in entering)
    return before + sum(m * (64 * 64 + 3 * 64 * 96) for m in leaving)


def spare(mass: dict[int, float], keep: float) -> set[int]:
    """The largest number of tokens, from the smallest mass up, without which the others still have `keep`."""
    found, rest = set(), sum(mass.values())
    for i in sorted(mass, key=mass.__getitem__)[:-1]:
        rest -= mass[i]
        if rest < keep:
            break
        found.add(i)
    return found


def oracle_trial(model, rows, span, alpha):
    """The number of tokens that each layer deletes of one prompt, in a model that hides them from the next layer on.

    The masses are those of the model as it is by then; the thresholds are shares of the unpruned model's."""
    image, text = range(*span), range(span[1], len(rows))

    def masses(seen, left):
        largest = seen.amax(dim=0)
        own = {i: float(largest[sorted(left), i].mean()) for i in left}
        return own, {i: float(largest[text, i].sum()) for i in left}

    whole, counts, left = [], [], set(image)
    llama_oracle.forward(
        model, rows, lambda _, seen, __: whole.append(seen is not None and masses(seen, image)) or set()
    )

    def rule(layer, seen, _):
        if seen is None:
            return set()
        pairs = zip(masses(seen, left), whole[layer + 1], strict=True)
        own, cross = (spare(now, (1 - alpha) * sum(before.values())) for now, before in pairs)
        counts.append(len(own & cross))
        left.difference_update(own & cross)
        return own & cross

    llama_oracle.forward(model, rows, rule)
    return counts


def oracle_fit(model, prompts, alpha, reduction):
    """The recipe of `alpha` if the samples' mean work is within the budget before some layer, else None: layer by layer
    as if the layers from there on deleted nothing."""
    counts = [oracle_trial(model, rows, span, alpha) for rows, span in zip(prompts, SPANS, strict=True)]
    for stop in range(LAYERS):
        forecast = []
        for deleted in counts:
            entering = [12 - sum(deleted[: min(layer, stop)]) for layer in range(LAYERS + 1)]
            forecast.append(fit_cost(entering[:-1], entering[1:]))
        if sum(forecast) / len(forecast) <= (1 - reduction) * fit_cost([12] * LAYERS, [12] * LAYERS):
            means = [sum(deleted[layer] for deleted in counts) // len(counts) for layer in range(stop)]
            return {layer: number for layer, number in enumerate(means) if number}
    return None


@pytest.mark.slow
@pytest.mark.parametrize("reduction", [0.0, 0.2, 0.45, 0.6])
def test_a_recipe_is_measured_in_the_pruned_model_until_the_budget_is_reached(model, prompts, reduction):
    low, high, expected = 0.0, 1.0, None
    while high - low > 0.01:
        middle = (low + high) / 2
        found = oracle_fit(model, prompts, middle, reduction)
        low, high, expected = (middle, high, expected) if found is None else (low, middle, found)
    assert expected is not None
    assert fit_fitprune(model, prompts, SPANS, reduction=reduction) == expected


@pytest.mark.parametrize("alpha", [0.25, 0.8125, 0.9921875])
def test_of_any_image_a_token_stays(model, prompts, alpha):
    deleted = Trials(model, prompts, SPANS).deleted(alpha).tolist()
    assert [row[:-1] for row in deleted] == [
        oracle_trial(model, rows, span, alpha)[:-1] for rows, span in zip(prompts, SPANS, strict=True)
    ]
    assert all(sum(row) < 12 for row in deleted)


@pytest.mark.slow
def test_a_recipe_for_a_retention_costs_no_less_than_a_selector_and_hardly_more(model, prompts):
    """Where a layer works on all rows that enter it; a recipe that saves a per cent more costs less."""
    num_text, retentions = LENGTHS[0] - 12, [0.75, 0.5]

    def cost(recipe):
        return prefill_flops(SHAPE, num_text, visual=recipe_rows(12, LAYERS, recipe))

    recipes = fit_recipes(Sample(model, prompts, SPANS), retentions)
    trials = Trials(model, prompts, SPANS)
    saving = {percent: trials.fit(percent / 100) for percent in range(80)}
    for retention, recipe in zip(retentions, recipes, strict=True):
        target = prefill_flops(SHAPE, num_text + round(12 * retention))
        percent = max(percent for percent, other in saving.items() if cost(other) >= target)
        assert recipe == saving[percent]


def test_a_fitted_recipe_runs(model, prompts):
    recipe = fit_fitprune(model, prompts, SPANS, reduction=0.5)
    answers = generate_layerwise(model, prompts, SPANS, FitPrune(recipe=recipe), max_new_tokens=3)
    assert [len(answer) for answer in answers] == [3, 3, 3]
    assert prefill(model, prompts, SPANS, FitPrune(recipe=recipe)).layouts[-1].num_image == [
        get_method("fitprune").visual_rows(12, LAYERS, recipe=recipe)[-1][0]
    ] * len(prompts)


def test_a_fit_that_makes_no_sense_is_refused(model, prompts):
    with pytest.raises(ValueError, match=r"reduction must be in \[0, 1\), got 1"):
        fit_fitprune(model, prompts, SPANS, reduction=1)
    with pytest.raises(ValueError, match="deleting tokens can reach"):
        fit_fitprune(model, prompts, SPANS, reduction=0.99)
    with pytest.raises(ValueError, match=r"same number of image tokens, got \[11, 12\]"):
        fit_fitprune(model, prompts, [(3, 14), *SPANS[1:]], reduction=0.5)
    with pytest.raises(ValueError, match=r"same number of image tokens, got \[\]"):
        fit_fitprune(model, [], [], reduction=0.5)


@pytest.mark.parametrize(("percent", "left"), [(80, 20.31), (90, 10.32)])
def test_the_released_recipes_leave_what_the_release_counts(percent, left):
    """Queries, keys, values and scores of rows that enter a layer, output projection and FFN of rows that leave it."""
    language, d = MODELS["llava-1.5-7b"].language, 4096
    rows = get_method("fitprune").visual_rows(576, 32, recipe=LLAVA_15_7B_RECIPES[percent], as_released=True)
    assert 100 * fit_flops(language, 576, LLAVA_15_7B_RECIPES[percent]) == pytest.approx(
        left * fit_flops(language, 576, {}), rel=5e-4
    )
    assert fit_flops(language, 576, LLAVA_15_7B_RECIPES[percent]) == sum(
        3 * n * d**2 + 2 * n**2 * d + m * d**2 + 3 * m * d * 11008 for n, m in rows
    )


def test_the_released_90_percent_recipe_leaves_37_tokens_and_73_on_average():
    rows = get_method("fitprune").visual_rows(576, 32, recipe=LLAVA_15_7B_RECIPES[90])
    assert rows[-1][1] == 37
    assert round(sum(attention for attention, _ in rows) / 32) == 73


def test_pyramid_stages_halve_and_round_down():
    assert pyramid_stages(576) == {8: 288, 16: 144, 24: 72}
    assert pyramid_stages(15, layers=[2, 1], ratio=0.5) == {1: 7, 2: 3}
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\]"):
        pyramid_stages(576, ratio=0)
