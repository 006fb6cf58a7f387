"""The paper book: the published cost tables to every printed digit."""

import operator
from itertools import accumulate

import pytest

from otprune.flops import PAPER_PROMPTS, match_flops, paper_table, prefill_flops, true_flops
from otprune.methods import get_method
from otprune.select import METHODS
from otprune.shapes import MODELS

FITPRUNE_90 = {0: 262, 1: 153, 2: 80, 3: 19, 4: 13, 5: 1, 6: 2, 15: 1, 16: 1, 17: 2, 18: 1, 19: 2, 21: 1, 27: 1}
"""FitPrune's released recipe for LLaVA-1.5-7B that promises 90 % fewer FLOPs."""

VIDEO = "llava-next-video-7b"


@pytest.mark.parametrize(
    ("model", "method", "settings", "full", "pruned", "ratio"),
    [
        ("llava-1.5-7b", "otprune", {"retention": 0.098}, 3.2280, 0.5122, 15.6303),
        ("llava-1.5-13b", "otprune", {"retention": 0.098}, 6.2813, 1.0020, 15.7132),
        ("llava-1.6-7b", "otprune", {"retention": 0.098}, 11.8489, 1.2659, 10.7966),  # printed truncated: 10.79
        (VIDEO, "otprune", {"retention": 0.1}, 6.5386, 0.9371, 14.1044),
    ],
)
def test_the_published_tables_are_reproduced(model, method, settings, full, pruned, ratio):
    """TFLOPs and percents to four decimals, so with DivPrune Eq. 5's sign as the tables have it."""
    assert [round(x, 4) for x in paper_table(model, method, **settings)] == [full, pruned, ratio]


@pytest.mark.parametrize(
    ("model", "method", "settings", "pruned", "ratio"),
    [
        ("llava-1.5-7b", "vtw", {"layer": 4}, 0.603, 18.46),
        ("llava-1.5-13b", "vtw", {"layer": 4}, 1.030, 16.16),
        ("llava-1.6-7b", "vtw", {"layer": 3}, 1.318, 11.23),
        (VIDEO, "vtw", {"layer": 4}, 1.124, 16.97),
        ("llava-1.5-7b", "fastv", {"layer": 3, "kept": 1}, 0.514, 15.69),
        ("llava-1.5-13b", "fastv", {"layer": 3, "kept": 13}, 1.003, 15.73),
        ("llava-1.6-7b", "fastv", {"layer": 3, "kept": 2}, 1.327, 11.30),
        (VIDEO, "fastv", {"layer": 1, "kept": 81}, 0.943, 14.20),
    ],
)
def test_recovered_baseline_settings_give_the_printed_costs(model, method, settings, pruned, ratio):
    """No paper states these layers and counts; at them the printed cost of every baseline row comes out."""
    _, tflops, percent = paper_table(model, method, **settings)
    assert (round(tflops, 3), round(percent, 2)) == (pruned, ratio)


def test_fitprune_release_recipe():
    _, tflops, percent = paper_table("llava-1.5-7b", "fitprune", recipe=FITPRUNE_90)
    assert (round(tflops, 3), round(percent, 1)) == (0.552, 16.9)
    rows = get_method("fitprune").visual_rows(576, 32, recipe=FITPRUNE_90, as_released=True)
    assert rows[-1] == (37, 37)
    assert rows[0] == (576, 576 - 262)


def test_the_published_fitprune_row_charges_nothing_to_the_layer_that_deletes():
    """The printed 0.513 / 15.65 % is the released recipe with a layer's rows counted after its own deletion, although
    that layer's attention, which chooses them, has to see them."""
    left = accumulate(FITPRUNE_90.values(), operator.sub, initial=576)
    stages = dict(zip(FITPRUNE_90, list(left)[1:], strict=True))
    _, tflops, percent = paper_table("llava-1.5-7b", "pyramiddrop", stages=stages)
    assert (round(tflops, 3), round(percent, 2)) == (0.513, 15.65)


def test_fitprune_rows_charged_to_the_ffn_of_their_last_layer_cost_more():
    """Deleting at a layer's output, as here, keeps the attention rows and moves the deletion past the FFN."""
    shape, ratios = MODELS["llava-1.5-7b"].language, []
    for num_visual, text in PAPER_PROMPTS["llava-1.5-7b"]:
        rows = get_method("fitprune").visual_rows(num_visual, 32, recipe=FITPRUNE_90)
        late = prefill_flops(shape, text, visual=rows, ffn_matrices=2, head=False)
        ratios.append(late / prefill_flops(shape, text + num_visual, ffn_matrices=2, head=False))
    assert round(100 * sum(ratios) / len(ratios), 1) == 18.4


@pytest.mark.parametrize(
    ("model", "full", "pruned", "ratio"),
    [("llava-1.5-7b", 3.448, 0.721, 20.72), ("llava-1.5-13b", 6.707, 1.410, 20.83)],
)
def test_with_the_41_uncounted_prompt_tokens_a_fifth_remains(model, full, pruned, ratio):
    before, after, percent = paper_table(model, "otprune", retention=0.098, extra_text=41)
    assert (round(before, 3), round(after, 3), round(percent, 2)) == (full, pruned, ratio)


def test_with_three_ffn_matrices_the_ratios_hardly_move():
    before, after, percent = paper_table("llava-1.5-7b", "otprune", retention=0.098, ffn_matrices=3)
    assert (round(before, 3), round(after, 3), round(percent, 2)) == (4.124, 0.658, 15.72)
    assert round(paper_table("llava-1.6-7b", "otprune", retention=0.098, ffn_matrices=3)[2], 2) == 11.01


@pytest.mark.parametrize(("tokens", "percent"), [(36, 12.47), (64, 16.89), (144, 29.60), (56, 15.63)])
def test_m3_costs_15_63_percent_only_at_56_tokens_which_is_no_grid(tokens, percent):
    assert round(paper_table("llava-1.5-7b", "m3", tokens=tokens)[2], 2) == percent


def test_the_in_llm_methods_at_their_own_papers_settings_cost_half():
    assert round(paper_table("llava-1.5-7b", "fastv", layer=2, kept=288)[2], 1) == 55.7
    assert round(paper_table("llava-1.5-7b", "vtw", layer=16)[2], 1) == 53.4


def test_the_published_ratio_is_the_mean_of_ratios_and_not_the_ratio_of_means():
    full, pruned, ratio = paper_table("llava-1.5-7b", "otprune", retention=0.098)
    assert round(100 * pruned / full, 2) == 15.87
    assert round(ratio, 2) == 15.63


def test_every_selector_costs_the_same_in_the_paper_book():
    assert len({paper_table("llava-1.6-7b", method, retention=0.098) for method in METHODS}) == 1


def test_no_pruning_costs_all():
    for model in PAPER_PROMPTS:
        full, pruned, ratio = paper_table(model, "none")
        assert full == pruned
        assert ratio == 100


def test_pyramiddrop_stages_are_counted_layer_by_layer():
    rows = get_method("pyramiddrop").visual_rows(576, 32, stages={8: 288, 16: 144, 24: 72})
    assert [n for n, _ in rows] == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8


@pytest.mark.parametrize(
    ("method", "settings", "equal"),
    [
        ("fastv", {"layer": 0, "kept": 56}, ("otprune", {"retention": 0.098})),
        ("fastv", {"layer": 5, "kept": 0}, ("vtw", {"layer": 5})),
        ("vtw", {"layer": 32}, ("none", {})),
        ("fitprune", {"recipe": {}}, ("none", {})),
        ("pyramiddrop", {"stages": {3: 20}}, ("fastv", {"layer": 3, "kept": 20})),
        ("m3", {"tokens": 56}, ("otprune", {"retention": 0.098})),
    ],
)
def test_methods_coincide_where_their_schedules_do(method, settings, equal):
    assert get_method(method).visual_rows(576, 32, **settings) == get_method(equal[0]).visual_rows(576, 32, **equal[1])


@pytest.mark.parametrize(
    ("model", "method", "options", "expected"),
    [
        ("llava-1.5-7b", "vtw", {}, {"layer": 4}),
        ("llava-1.5-13b", "vtw", {}, {"layer": 4}),
        ("llava-1.6-7b", "vtw", {}, {"layer": 3}),
        (VIDEO, "vtw", {}, {"layer": 4}),
        ("llava-1.5-7b", "fastv", {"layer": 3}, {"layer": 3, "kept": 1}),
        ("llava-1.5-13b", "fastv", {"layer": 3}, {"layer": 3, "kept": 13}),
        # Fairer settings at the same cost; the published tables do not use them.
        ("llava-1.5-7b", "fastv", {"layer": 2}, {"layer": 2, "kept": 21}),
        ("llava-1.5-7b", "fastv", {"layer": 1}, {"layer": 1, "kept": 39}),
        ("llava-1.5-7b", "m3", {}, {"tokens": 64}),
        ("llava-1.5-7b", "fitprune", {"recipes": ({}, FITPRUNE_90, {0: 530})}, {"recipe": FITPRUNE_90}),
    ],
)
def test_match_flops_finds_the_smallest_budget_that_is_not_below_the_selector(model, method, options, expected):
    """The published baselines' layers and counts follow from the rule and the selector's ratio."""
    target = paper_table(model, "otprune", retention=0.1 if model == VIDEO else 0.098)[2]

    def percent(**settings):
        return paper_table(model, method, **settings)[2]

    found = match_flops(method, percent, target, num_visual=576, num_layers=32, **options)
    assert found == expected
    assert percent(**found) >= target


@pytest.mark.parametrize("method", ["vtw", "fastv", "m3"])
def test_match_flops_agrees_with_trying_every_budget_in_the_true_book(method):
    model = MODELS["llava-1.5-7b"]
    target = true_flops(model, "otprune", num_text=60, retention=0.098).total
    every = {
        "vtw": [{"layer": k} for k in range(33)],
        "fastv": [{"layer": 2, "kept": k} for k in range(1, 577)],
        "m3": [{"tokens": side**2} for side in (1, 2, 3, 4, 6, 8, 12, 24)],
    }[method]

    def total(**settings):
        return true_flops(model, method, num_text=60, **settings).total

    dear_enough = [settings for settings in every if total(**settings) >= target]
    given = {"layer": 2} if method == "fastv" else {}
    found = match_flops(method, total, target, num_visual=576, num_layers=32, **given)
    assert found == min(dear_enough, key=lambda settings: total(**settings))


def test_match_flops_takes_a_budget_that_meets_the_target_exactly_and_never_keeps_nothing():
    def percent(**settings):
        return paper_table("llava-1.6-7b", "fastv", **settings)[2]

    exact = percent(layer=3, kept=40)
    options = {"num_visual": 576, "num_layers": 32, "layer": 3}
    assert match_flops("fastv", percent, exact, **options) == {"layer": 3, "kept": 40}
    # Three full layers alone cost more than this; FastV without a token would be VTW.
    assert percent(layer=3, kept=0) > 10.8
    assert match_flops("fastv", percent, 10.8, **options) == {"layer": 3, "kept": 1}


def test_match_flops_refuses_a_target_out_of_reach_and_a_method_without_a_budget():
    with pytest.raises(ValueError, match=r"target must be at most 100\.0, what the largest budget costs, got 101"):
        match_flops(
            "vtw",
            lambda **s: paper_table("llava-1.5-7b", "vtw", **s)[2],
            101,
            num_visual=576,
            num_layers=32,
        )
    for method in ("none", "divprune", "prumerge"):
        with pytest.raises(ValueError, match=f"method must be one of m3, fastv, .*got '{method}'"):
            match_flops(method, lambda **_: 0.0, 1.0, num_visual=576, num_layers=32)
    with pytest.raises(ValueError, match="recipes must hold one to choose from"):
        match_flops("fitprune", lambda **_: 0.0, 1.0, num_visual=576, num_layers=32)


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("vtw", {}, r"settings of vtw must be \['layer'\], got \[\]"),
        ("vtw", {"layer": 3, "kept": 1}, r"settings of vtw must be \['layer'\], got \['kept', 'layer'\]"),
        ("otprune", {"layer": 3}, r"settings of otprune must be \['retention'\], got \['layer'\]"),
        ("otprune", {"retention": 0.0}, r"retention must be in \(0, 1\], got 0.0"),
        ("vtw", {"layer": 33}, r"layer must be in \[0, 32\], got 33"),
        ("vtw", {"layer": -1}, r"layer must be in \[0, 32\], got -1"),
        ("fastv", {"layer": 2, "kept": 577}, r"kept from layer 2 on must be in \[0, 576\], got 577"),
        ("m3", {"tokens": 600}, r"kept from layer 0 on must be in \[0, 576\], got 600"),
        ("pyramiddrop", {"stages": {8: 100, 16: 200}}, r"kept from layer 16 on must be in \[0, 100\], got 200"),
        ("fitprune", {"recipe": {0: 300, 1: 300}}, "recipe must delete at most 576 tokens"),
        ("fitprune", {"recipe": {32: 1}}, r"in layers \[0, 32\)"),
        ("fitprune", {"recipe": {3: -1}}, "recipe must delete at most 576 tokens"),
    ],
)
def test_wrong_settings_are_value_errors_that_say_what_is_wanted(method, settings, message):
    with pytest.raises(ValueError, match=message):
        paper_table("llava-1.5-7b", method, **settings)


def test_unknown_names_are_value_errors():
    with pytest.raises(ValueError, match="model must be one of"):
        paper_table("llava-2", "otprune", retention=0.1)
    with pytest.raises(ValueError, match="num_visual and num_layers must be at least 1, got 0 and 32"):
        get_method("none").visual_rows(0, 32)
    with pytest.raises(ValueError, match=r"method must be one of none, otprune, .*got 'magic'"):
        paper_table("llava-1.5-7b", "magic", retention=0.1)
