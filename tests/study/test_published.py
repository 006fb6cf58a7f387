"""What can be recomputed from the published tables, recomputed."""

import sys
from itertools import product
from math import comb

import pytest
from scipy.stats import rankdata

from otprune.flops import paper_table
from pipelines.study.published import (
    average_ranks,
    published_ranks,
    relative_gains,
    wilcoxon_variants,
)
from pipelines.study.published_tables import BENCHMARKS, ONE_SHOT, ORIGINAL, TABLE_1, TABLE_2, WILCOXON_P

PRUNED = [(model, method) for model in TABLE_1 for method in TABLE_1[model] if method != ORIGINAL]


def test_the_tables_are_whole():
    assert {model: len(block) for model, block in TABLE_1.items()} == {
        "llava-1.5-7b": 10,
        "llava-1.5-13b": 7,
        "llava-1.6-7b": 5,
    }
    assert all(len(row.scores) == len(BENCHMARKS) == 11 for block in TABLE_1.values() for row in block.values())
    assert len(TABLE_2) == 5


@pytest.mark.parametrize(("model", "method"), PRUNED)
def test_every_printed_average_rank_follows_from_the_rule(model, method):
    assert round(published_ranks(model)[method][0], 2) == TABLE_1[model][method].average_rank


@pytest.mark.parametrize(("model", "method"), list(product(TABLE_1, ONE_SHOT)))
def test_every_printed_one_shot_rank_follows_from_the_rule(model, method):
    rank = published_ranks(model)[method][1]
    assert rank is not None
    assert round(rank, 2) == TABLE_1[model][method].one_shot_rank


def test_that_is_31_ranks_and_no_other_method_has_a_one_shot_rank():
    rows = [TABLE_1[model][method] for model, method in PRUNED]
    assert sum(row.average_rank is not None for row in rows) == 19
    assert sum(row.one_shot_rank is not None for row in rows) == 12
    for model, method in PRUNED:
        assert (published_ranks(model)[method][1] is None) == (method not in ONE_SHOT)


@pytest.mark.parametrize("ties", ["min", "max", "dense"])
def test_no_other_rule_for_ties_gives_the_printed_ranks(ties):
    wrong = 0
    for model in TABLE_1:
        methods = [method for method in TABLE_1[model] if method != ORIGINAL]
        scores = [TABLE_1[model][method].scores for method in methods]
        ranks = rankdata([[-score for score in row] for row in scores], method=ties, axis=0).mean(axis=1)
        wrong += sum(
            round(rank, 2) != TABLE_1[model][method].average_rank for method, rank in zip(methods, ranks, strict=True)
        )
    assert wrong > 0


def test_average_ranks_are_scipys():
    scores = {"a": [3, 1, 2, 5], "b": [3, 2, 2, 1], "c": [1, 2, 2, 3]}
    expected = rankdata([[-value for value in row] for row in scores.values()], axis=0).mean(axis=1)
    assert list(average_ranks(scores).values()) == pytest.approx(expected.tolist())


def test_pope_falls_below_divprune_on_every_model():
    pope = BENCHMARKS.index("POPE")
    assert [round(relative_gains(model)[pope], 1) for model in TABLE_1] == [-7.5, -4.8, -1.9]


def p_value(scores: str, alternative: str, method: str, correction: bool) -> float:
    wanted = (scores, alternative, method, correction)
    (found,) = [v for v in wilcoxon_variants() if (v.scores, v.alternative, v.method, v.correction) == wanted]
    return found.p_value


def test_the_printed_p_is_the_13b_model_alone_with_continuity_correction():
    assert p_value("llava-1.5-13b", "greater", "approx", True) == pytest.approx(0.02796, abs=5e-6)
    assert round(p_value("llava-1.5-13b", "greater", "approx", True), 3) == WILCOXON_P


def test_no_other_one_sided_reading_gives_the_printed_p():
    fitting = [v for v in wilcoxon_variants() if v.alternative == "greater" and round(v.p_value, 3) == WILCOXON_P]
    assert [(v.scores, v.method, v.correction) for v in fitting] == [("llava-1.5-13b", "approx", True)]


def test_one_two_sided_reading_would_also_round_to_the_printed_p():
    """The paper says one-sided, so LLaVA-1.6 alone, two-sided, without correction is the less likely origin."""
    fitting = [v for v in wilcoxon_variants() if v.alternative == "two-sided" and round(v.p_value, 3) == WILCOXON_P]
    assert [(v.scores, v.method, v.correction) for v in fitting] == [("llava-1.6-7b", "approx", False)]
    assert fitting[0].p_value == pytest.approx(0.02842, abs=5e-6)


@pytest.mark.parametrize(
    ("scores", "method", "correction", "p"),
    [
        ("all", "exact", False, 0.00083),
        ("all", "approx", False, 0.00115),
        ("all", "approx", True, 0.00119),
        ("llava-1.5-7b", "exact", False, 0.16016),
        ("llava-1.5-13b", "exact", False, 0.02686),
        ("llava-1.5-13b", "approx", False, 0.02523),
        ("llava-1.6-7b", "exact", False, 0.01367),
    ],
)
def test_other_one_sided_readings_of_the_signed_rank_test(scores, method, correction, p):
    assert p_value(scores, "greater", method, correction) == pytest.approx(p, abs=5e-6)


def test_the_exact_p_of_13b_counts_sign_patterns():
    """The definition: of all 2^11 signs of the ranks, the share whose positive sum is at least the observed one."""
    gains = relative_gains("llava-1.5-13b")
    ranks = rankdata([abs(gain) for gain in gains])
    observed = sum(rank for rank, gain in zip(ranks, gains, strict=True) if gain > 0)
    sums = [sum(rank for rank, up in zip(ranks, signs, strict=True) if up) for signs in product((0, 1), repeat=11)]
    share = sum(total >= observed for total in sums) / 2**11
    assert p_value("llava-1.5-13b", "greater", "exact", False) == pytest.approx(share)


@pytest.mark.parametrize("model", list(TABLE_1))
def test_printed_costs_of_the_selectors_are_the_paper_book(model):
    row = TABLE_1[model]["OTPrune"]
    full, pruned, ratio = paper_table(model, "otprune", retention=0.098)
    assert (round(full, 3), round(pruned, 3)) == (TABLE_1[model][ORIGINAL].tflops, row.tflops)
    # LLaVA-1.6's 10.7966 is printed as 10.79: cut, not rounded.
    assert row.ratio_percent in (round(ratio, 2), int(ratio * 100) / 100)


def test_the_exhaustive_rows_of_table_2_try_every_subset():
    assert [row.num_subsets for row in TABLE_2 if row.exhaustive] == [comb(20, 5), comb(30, 10)]


def test_user_mistakes_are_value_errors():
    with pytest.raises(ValueError, match="model must be one of"):
        published_ranks("llava-2")
    for scores in ({}, {"a": []}, {"a": [1], "b": [1, 2]}):
        with pytest.raises(ValueError, match="scores must be one row of equal length"):
            average_ranks(scores)


def test_without_scipy_the_wilcoxon_variants_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"otprune\[test\]"):
        wilcoxon_variants()
