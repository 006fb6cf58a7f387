"""Makes sentences from the numbers of a study: where the results agree with the paper, and where they do not.

The numbers decide every sentence: another seed, model or number of scenes gives other sentences.
"""

import math
from collections.abc import Sequence
from statistics import fmean

from pipelines.study.correlation import MAXIMISED
from pipelines.study.demo_points import FIGURE_2, FIGURE_4
from pipelines.study.pieces import Row

GUARANTEE = 1 - 1 / math.e  # smallest ratio of the greedy to the best value (paper Eq. 9)


def of_table2(table: Sequence[Row]) -> list[str]:
    """Agreement with the printed win rates and ratios, the order of the methods, and the spread over data sets."""
    sentences = []
    for centered, form in ((True, "centred covariances"), (False, "second moments about zero, the paper's text")):
        rows = [row for row in table if row["centered"] == centered]
        fits = {
            kind: sum(_within(row, value, printed) for row in rows)
            for kind, value, printed in (
                ("win rates", "win", "printed_win"),
                ("ratios as q", "q_ratio", "printed_ratio"),
                ("ratios as f = q squared", "f_ratio", "printed_ratio"),
            )
        }
        counts = ", ".join(f"{count} of {len(rows)} {kind}" for kind, count in fits.items())
        sentences.append(
            f"With {form}, the printed value lies within one standard deviation over data sets for {counts}."
        )
    wins = {name: [row for row in table if row["method"] == name] for name in ("otprune", "divprune")}
    pairs = list(zip(wins["otprune"], wins["divprune"], strict=True))
    ahead = sum(otprune["win"] > divprune["win"] for otprune, divprune in pairs)
    sentences.append(
        f"In {ahead} of {len(pairs)} lines the order is that of the paper: OTPrune beats more subsets than DivPrune."
    )
    spread = max(row["win_sd"] for row in wins["divprune"])
    sentences.append(
        f"DivPrune's win rate varies by up to {spread:.0f} points (SD) from one data set to the next. The paper does "
        "not say how many data sets are behind its numbers, how they were drawn or what gamma was, so no digit can be "
        "checked."
    )
    return sentences


def of_greedy(table: Sequence[Row]) -> list[str]:
    """Whether the guarantee of the greedy search holds, and how far the search stays above it."""
    worst = min(table, key=lambda row: row["worst_ratio"])
    optimal = fmean(row["share_optimal"] for row in table)
    broken = sum(row["worst_ratio"] < GUARANTEE for row in table)
    return [
        f"The guarantee 1 - 1/e = {GUARANTEE:.3f} holds in all {len(table)} settings."
        if not broken
        else f"The guarantee 1 - 1/e = {GUARANTEE:.3f} is BROKEN in {broken} of {len(table)} settings.",
        f"It is far from tight: the worst of {sum(row['num_seeds'] for row in table)} searches reaches "
        f"{100 * worst['worst_ratio']:.2f} % of the best value ({worst['num_tokens']} tokens of width "
        f"{worst['width']}, {worst['keep']} kept, gamma {worst['gamma']:g}), and {100 * optimal:.0f} % find the best "
        "subset itself.",
        "The guarantee is about the surrogate log det alone. It does not hold for the trace objective of Eq. 4 or for "
        "any distance, although the paper's text extends it to them.",
    ]


def of_gamma(widths: Sequence[Row], accuracy: Sequence[Row], reference: int) -> list[str]:
    """How far each scale keeps the same tokens at another width than `reference`, and how gamma moves the accuracy."""
    sentences = []
    others = [row for row in widths if row["width"] != reference]
    scales = list(dict.fromkeys(row["scale"] for row in widths))
    if others:
        narrow = min(row["width"] for row in others)
        shares = ", ".join(
            f"{scale} {100 * fmean(r['overlap'] for r in others if r['scale'] == scale and r['width'] == narrow):.0f} %"
            for scale in scales
        )
        sentences.append(
            f"Share of the tokens kept at width {narrow} that are kept at width {reference} too, with the same gamma "
            f"(mean over gammas): {shares}. Noise of the embedding, equal for all scales, causes part of the rest."
        )
        large = ", ".join(
            f"{scale} {100 * fmean(r['largest'] for r in others if r['scale'] == scale and r['width'] == narrow):.0f} %"
            for scale in scales
        )
        sentences.append(f"Share of the kept tokens that are simply the largest tokens, at width {narrow}: {large}.")
    for scale in scales:
        of_scale = [row for row in accuracy if row["scale"] == scale]
        if of_scale:
            best, worst = (pick(of_scale, key=lambda row: row["qa"]) for pick in (max, min))
            sentences.append(
                f"Demo model at {100 * best['retention']:g} %, {scale} scale: questions right from {worst['qa']:.3f} "
                f"(gamma {worst['gamma']:g}) to {best['qa']:.3f} (gamma {best['gamma']:g})."
            )
    return sentences


def of_distance(table: Sequence[Row], correlations: Sequence[Row], unpruned: Sequence[Row]) -> list[str]:
    """Whether each distance supports the premise, the paper's five strategies, and where OTPrune is the closest."""
    rho = {(r["methods"], r["distance"], r["reading"]): r for r in correlations if r["task"] == "qa"}
    distances = list(dict.fromkeys(distance for _, distance, _ in rho))
    over_all = [rho["all", distance, "mean"] for distance in distances]
    sentences = [
        f"Unpruned, the demo model answers {row['qa']:.3f} of the questions ({row['scenes']} scenes)."
        for row in unpruned
    ]
    for kind, text in VERDICTS.items():
        rhos = "; ".join(
            f"{NAMES[row['distance']]} {row['rho']:+.2f} ({row['methods_low']:+.2f} to {row['methods_high']:+.2f})"
            for row in over_all
            if verdict(row) == kind
        )
        if rhos:
            sentences.append(f"{text}, by rho among all selectors at one retention: {rhos}.")
    if ("figure 2", distances[0], "mean") in rho:
        five = [rho["figure 2", distance, "mean"]["rho"] for distance in distances]
        sentences.append(
            f"Over the paper's own five strategies rho is {min(five):+.2f} to {max(five):+.2f} over all definitions: "
            f"{'its Fig. 2 is reproduced' if min(five) > 0.5 else 'its Fig. 2 is not reproduced'}. "
            f"{_worst_two(table)} OTPrune itself is not among the five."
        )
    if ("looking", distances[0], "mean") in rho:
        looking = [rho["looking", distance, "mean"]["rho"] for distance in distances]
        sentences.append(
            f"Over the selectors that look at the tokens, the real candidates, rho is {min(looking):+.2f} to "
            f"{max(looking):+.2f}."
        )
    return sentences + _closest(table, [distance for distance in distances if distance not in MAXIMISED])


VERDICTS = {
    "supported": "The premise is supported",
    "contradicted": "The premise is contradicted: closer selections answer worse",
    "undecided": "The premise is neither supported nor contradicted, as the interval over scenes and methods holds 0",
}


def verdict(row: Row) -> str:
    """A key of VERDICTS. The interval over scenes and methods decides: the premise is about methods in general."""
    if row["methods_low"] > 0:
        return "supported"
    return "contradicted" if row["methods_high"] < 0 else "undecided"


NAMES = {
    "w2": "Gaussian W2 about zero (Eq. 3)",
    "w2_means": "Gaussian W2 with means",
    "w2_unit": "Gaussian W2, each set at unit variance",
    "trace": "Trace objective (Eq. 4)",
    "sliced": "Sliced W2",
    "exact": "Exact W2",
}


def of_ranks(ranks: Sequence[Row], p_values: Sequence[Row]) -> list[str]:
    """Which printed ranks follow from the printed scores, and which tests give the printed p."""
    agreeing = sum(row["agrees"] for row in ranks)
    printed = p_values[0]["printed"]
    all_scores = next(
        row for row in p_values if (row["scores"], row["alternative"], row["method"]) == ("all", "greater", "exact")
    )
    matching = [row for row in p_values if row["agrees"]]
    listed = "; ".join(
        f"{row['scores']}, {'one-sided' if row['alternative'] == 'greater' else 'two-sided'}, {how(row)}: "
        f"{row['p_value']:.4f}"
        for row in matching
    )
    return [
        f"{agreeing} of {len(ranks)} printed ranks follow from the printed scores by one rule: rank the pruned methods "
        "per benchmark, let ties share the mean rank, and take the mean over the eleven benchmarks.",
        f"The printed p = {printed:g} is not the p of all 33 scores: their one-sided exact p is "
        f"{all_scores['p_value']:.4f}.",
        f"Readings that round to {printed:g}: {listed}. The paper's test is one-sided.",
    ]


def how(row: Row) -> str:
    """The method behind a p-value: exact, or the kind of approximation."""
    if row["method"] == "exact":
        return "exact"
    return f"normal approximation with{'' if row['correction'] else 'out'} continuity correction"


def _within(row: Row, value: str, printed: str) -> bool:
    """Whether the printed value lies within one standard deviation over data sets."""
    # Two decimals are printed. The floor of half a digit lets a value without spread, say 100.00, agree with itself.
    return abs(row[value] - row[printed]) <= max(row[f"{value}_sd"], 0.005)


def closest(table: Sequence[Row], distance: str, names: Sequence[str] | None = None) -> dict[float, str]:
    """Retention -> the selector (of `names`) with the smallest mean distance, or with the largest mean objective."""
    best = max if distance in MAXIMISED else min
    return {
        retention: best(
            (r for r in table if r["retention"] == retention and (names is None or r["point"] in names)),
            key=lambda row: row[distance],
        )["point"]
        for retention in sorted({row["retention"] for row in table})
    }


def _closest(table: Sequence[Row], distances: Sequence[str]) -> list[str]:
    """At how many retentions OTPrune is the closest, among all selectors and among the paper's four (its Fig. 4)."""
    sentences = []
    for names, among in ((None, "of all selectors"), (FIGURE_4, "of OTPrune, DivPrune, DPP and random (its Fig. 4)")):
        winners = {distance: closest(table, distance, names) for distance in distances}
        counts = ", ".join(
            f"{NAMES[distance]} {sum(name.startswith('OTPrune') for name in by_retention.values())} "
            f"of {len(by_retention)}"
            for distance, by_retention in winners.items()
        )
        sentences.append(f"Retentions at which OTPrune is the closest {among}: {counts}.")
    return sentences


def _worst_two(table: Sequence[Row]) -> str:
    """A sentence if first and last, which drop most of the picture, answer worst of the five at every retention."""
    five = [row for row in table if row["point"] in FIGURE_2]
    for retention in {row["retention"] for row in five}:
        ranked = sorted((r for r in five if r["retention"] == retention), key=lambda row: row["qa"])
        if {row["point"] for row in ranked[:2]} != {"first", "last"}:
            return ""
    return "Two of the five, first and last, drop most of the picture: they are far and bad by any measure."
