"""VTW's search for its layer and FitPrune's fit of its recipe, against their definitions by brute force."""

import pytest
import torch

from otprune.layerwise import generate_layerwise, prefill_logits
from otprune.layerwise.executor import prefill
from otprune.methods import Sample, get_method
from otprune.methods.fitprune import LLAVA_15_7B_RECIPES, FitPrune
from otprune.methods.fitprune_fit import fit_fitprune, fit_recipe, measure, recipe_at
from otprune.methods.pyramiddrop import pyramid_stages
from otprune.methods.vtw import VTW
from otprune.methods.vtw_search import calibrate_vtw, find_vtw_layer, vtw_divergences
from otprune.part_flops import prefill_flops
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


@pytest.fixture(scope="module")
def masses():
    """(self, cross) of 7 samples, 4 layers and 16 tokens, uneven as attention is."""
    return torch.rand(2, 7, 4, 16, generator=torch.Generator().manual_seed(3)).pow(4)


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
    message = rf"a layer in \[1, 4\] meets, got 0: the smallest divergence is {values[nearest]:.3g}, .*at layer {nearest}"
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


def test_masses_are_the_mean_over_image_rows_and_the_sum_over_text_behind_them(model, prompts):
    self_STN, cross_STN = measure(model, prompts, SPANS)
    for s, (rows, (start, end)) in enumerate(zip(prompts, SPANS, strict=True)):
        seen = {}
        llama_oracle.forward(model, rows, lambda layer, attention, _: seen.update({layer: attention}) or set())  # noqa: B023
        for layer in range(LAYERS):
            largest = seen[layer].amax(dim=0)
            own = largest[start:end, start:end].mean(dim=0)
            cross = largest[end:, start:end].sum(dim=0)
            torch.testing.assert_close(self_STN[s, layer].double(), own, atol=1e-5, rtol=0)
            torch.testing.assert_close(cross_STN[s, layer].double(), cross, atol=1e-5, rtol=0)


def deletable(mass, left, alpha):
    """The longest run of tokens, from the smallest mass up, that keeps the mass gone at most alpha of all."""
    gone = sum(m for i, m in enumerate(mass) if i not in left)
    found = set()
    for i in sorted(left, key=lambda i: mass[i]):
        gone += mass[i]
        if gone > alpha * sum(mass):
            break
        found.add(i)
    return found


@pytest.mark.parametrize("alpha", [0.0, 0.03, 0.2, 0.5, 0.9])
def test_a_recipe_deletes_what_both_masses_can_spare(masses, alpha):
    counts = [[] for _ in range(4)]
    for own, cross in zip(*masses.tolist(), strict=True):
        left = set(range(16))
        for layer in range(4):
            gone = deletable(own[layer], left, alpha) & deletable(cross[layer], left, alpha)
            left -= gone
            counts[layer].append(len(gone))
    expected = {layer: sum(numbers) // 7 for layer, numbers in enumerate(counts) if sum(numbers) // 7}
    assert recipe_at(*masses, alpha) == expected


@pytest.mark.parametrize("seed", range(50))
def test_alpha_1_deletes_every_token_in_the_first_layer(seed):
    """However the masses are rounded when they are summed."""
    masses = torch.rand(2, 3, 2, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).pow(8)
    assert recipe_at(*masses, 1.0) == {0: 64}


def test_a_deleted_token_is_spent_mass_later():
    """Half the mass may go: layer 0 deletes tokens 0 and 1. They hold half of layer 1's mass, so nothing else can."""
    mass = torch.tensor([[[1.0, 1, 2], [1, 1, 2], [1, 0, 2]]])
    assert recipe_at(mass, mass, 0.5) == {0: 2}
    lighter_later = torch.tensor([[[1.0, 1, 2], [0, 0, 2], [0, 0, 2]]])
    assert recipe_at(lighter_later, lighter_later, 1.0) == {0: 3}


@pytest.mark.parametrize("reduction", [0.0, 0.3, 0.6, 0.7])
def test_a_fit_saves_what_it_was_asked_for_and_hardly_more(masses, reduction):
    """Its alpha is within 0.01 of one that would not have been enough. A layer that n rows enter costs
    4 n d^2 + 2 n^2 d + 3 n d m."""
    shape = LanguageShape(hidden=8, intermediate=20, layers=4, heads=2, kv_heads=2, head_dim=4, vocab=9)

    def saved(recipe):
        rows = [16 - sum(recipe.get(before, 0) for before in range(layer)) for layer in range(4)]
        cost = sum(4 * n * 8**2 + 2 * n**2 * 8 + 3 * n * 8 * 20 for n in rows)
        return 1 - cost / (4 * (4 * 16 * 8**2 + 2 * 16**2 * 8 + 3 * 16 * 8 * 20))

    recipe = fit_recipe(*masses, shape, reduction=reduction)
    assert saved(recipe) >= reduction
    alphas = [alpha / 1000 for alpha in range(1001)]
    enough = next(alpha for alpha in alphas if saved(recipe_at(*masses, alpha)) >= reduction)
    near = [recipe_at(*masses, alpha) for alpha in alphas if enough <= alpha + 0.001 and alpha <= enough + 0.011]
    assert recipe in near


def test_a_fitted_recipe_runs(model, prompts):
    recipe = fit_fitprune(model, prompts, SPANS, reduction=0.5)
    answers = generate_layerwise(model, prompts, SPANS, FitPrune(recipe=recipe), max_new_tokens=3)
    assert [len(answer) for answer in answers] == [3, 3, 3]
    assert prefill(model, prompts, SPANS, FitPrune(recipe=recipe)).layouts[-1].num_image == [
        get_method("fitprune").visual_rows(12, LAYERS, recipe=recipe)[-1][0]
    ] * len(prompts)


def test_a_fit_that_makes_no_sense_is_refused(model, prompts, masses):
    shape = LanguageShape.from_config(model.config)
    with pytest.raises(ValueError, match=r"reduction must be in \[0, 1\), got 1"):
        fit_fitprune(model, prompts, SPANS, reduction=1)
    with pytest.raises(ValueError, match="deleting tokens can reach"):
        fit_fitprune(model, prompts, SPANS, reduction=0.99)
    with pytest.raises(ValueError, match=r"same number of image tokens, got \[11, 12\]"):
        measure(model, prompts, [(3, 14), *SPANS[1:]])
    with pytest.raises(ValueError, match=r"same number of image tokens, got \[\]"):
        measure(model, [], [])
    assert fit_recipe(*masses, shape, reduction=0) == {}


@pytest.mark.parametrize("percent", [80, 90])
def test_the_released_recipes_promise_what_charges_deleted_rows_to_nothing(percent):
    """It counts a layer's rows after its deletion; charged to that layer's attention, they miss by about 0.6 %."""
    rows = get_method("fitprune").visual_rows(576, 32, recipe=LLAVA_15_7B_RECIPES[percent], as_released=True)
    left_behind = [(after, after) for _, after in rows]
    language = MODELS["llava-1.5-7b"].language
    unpruned, promised, charged = (
        prefill_flops(language, 0, visual=schedule, head=False) for schedule in ([(576, 576)] * 32, left_behind, rows)
    )
    assert percent < 100 - 100 * promised / unpruned < percent + 0.5
    assert percent - 1 < 100 - 100 * charged / unpruned < percent


def test_the_released_90_percent_recipe_leaves_37_tokens_and_73_on_average():
    rows = get_method("fitprune").visual_rows(576, 32, recipe=LLAVA_15_7B_RECIPES[90])
    assert rows[-1][1] == 37
    assert round(sum(attention for attention, _ in rows) / 32) == 73


def test_pyramid_stages_halve_and_round_down():
    assert pyramid_stages(576) == {8: 288, 16: 144, 24: 72}
    assert pyramid_stages(15, layers=[2, 1], ratio=0.5) == {1: 7, 2: 3}
    with pytest.raises(ValueError, match=r"ratio must be in \(0, 1\]"):
        pyramid_stages(576, ratio=0)
