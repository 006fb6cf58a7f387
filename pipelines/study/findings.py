"""What the numbers say, in sentences made from them: where the paper is reproduced, and where it is not.

Nothing here is known beforehand: another seed, model or number of scenes gives other sentences.
"""

import math
from collections.abc import Sequence
from statistics import fmean

from pipelines.study.correlation import MAXIMISED
from pipelines.study.demo_points import FIGURE_2, FIGURE_4
from pipelines.study.pieces import Row

GUARANTEE = 1 - 1 / math.e


def of_table2(table: Sequence[Row]) -> list[str]:
    said = []
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
        said.append(f"With {form}, the printed value lies within one standard deviation over data sets for {counts}.")
    wins = {name: [row for row in table if row["method"] == name] for name in ("otprune", "divprune")}
    pairs = list(zip(wins["otprune"], wins["divprune"], strict=True))
    ahead = sum(ours["win"] > theirs["win"] for ours, theirs in pairs)
    said.append(
        f"The ordering is the paper's in {ahead} of {len(pairs)} lines: OTPrune beats more subsets than DivPrune."
    )
    spread = max(row["win_sd"] for row in wins["divprune"])
    said.append(
        f"DivPrune's win rate varies by up to {spread:.0f} points (SD) from one data set to the next. The paper does "
        "not say how many data sets its digits stand for, how they were drawn or what gamma was: no digit can be "
        "checked."
    )
    return said


def of_greedy(table: Sequence[Row]) -> list[str]:
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
        "This is about the surrogate log det alone. It does not carry over to the trace objective of Eq. 4 or to any "
        "distance, although the paper's text extends it.",
    ]


def of_gamma(widths: Sequence[Row], accuracy: Sequence[Row], reference: int) -> list[str]:
    said = []
    others = [row for row in widths if row["width"] != reference]
    scales = list(dict.fromkeys(row["scale"] for row in widths))
    if others:
        narrow = min(row["width"] for row in others)
        shares = ", ".join(
            f"{scale} {100 * fmean(r['overlap'] for r in others if r['scale'] == scale and r['width'] == narrow):.0f} %"
            for scale in scales
        )
        said.append(
            f"Share of the tokens kept at width {narrow} that width {reference} keeps too, same gamma, mean over "
            f"gammas: {shares}. Part of what is missing is noise of the embedding, which is the same for every scale."
        )
        large = ", ".join(
            f"{scale} {100 * fmean(r['largest'] for r in others if r['scale'] == scale and r['width'] == narrow):.0f} %"
            for scale in scales
        )
        said.append(f"Share of the kept that are merely the largest tokens, at width {narrow}: {large}.")
    for scale in scales:
        mine = [row for row in accuracy if row["scale"] == scale]
        if mine:
            best, worst = (pick(mine, key=lambda row: row["qa"]) for pick in (max, min))
            said.append(
                f"Demo model at {100 * best['retention']:g} %, {scale} scale: questions right from {worst['qa']:.3f} "
                f"(gamma {worst['gamma']:g}) to {best['qa']:.3f} (gamma {best['gamma']:g})."
            )
    return said


def of_distance(table: Sequence[Row], correlations: Sequence[Row], whole: Sequence[Row]) -> list[str]:
    rho = {(r["methods"], r["distance"], r["reading"]): r for r in correlations if r["task"] == "qa"}
    distances = list(dict.fromkeys(distance for _, distance, _ in rho))
    over_all = [rho["all", distance, "mean"] for distance in distances]
    said = [
        f"Unpruned, the demo model answers {row['qa']:.3f} of the questions ({row['scenes']} scenes)." for row in whole
    ]
    for kind, text in VERDICTS.items():
        each = "; ".join(
            f"{NAMES[row['distance']]} {row['rho']:+.2f} ({row['methods_low']:+.2f} to {row['methods_high']:+.2f})"
            for row in over_all
            if verdict(row) == kind
        )
        if each:
            said.append(f"{text}, by rho among all selectors at one retention: {each}.")
    if ("figure 2", distances[0], "mean") in rho:
        five = [rho["figure 2", distance, "mean"]["rho"] for distance in distances]
        said.append(
            f"Over the paper's own five strategies rho is {min(five):+.2f} to {max(five):+.2f} by every definition: "
            f"{'its Fig. 2 is reproduced' if min(five) > 0.5 else 'its Fig. 2 is not reproduced'}. "
            f"{_worst_two(table)} OTPrune itself is not among the five."
        )
    if ("looking", distances[0], "mean") in rho:
        looking = [rho["looking", distance, "mean"]["rho"] for distance in distances]
        said.append(
            f"Over the selectors that look at the tokens, those one would choose among, it is {min(looking):+.2f} to "
            f"{max(looking):+.2f}."
        )
    return said + _closest(table, [distance for distance in distances if distance not in MAXIMISED])


VERDICTS = {
    "supported": "The premise is supported",
    "contradicted": "The premise is contradicted: closer selections answer worse",
    "undecided": "The premise is neither supported nor contradicted, as the interval over scenes and methods holds 0",
}


def verdict(row: Row) -> str:
    """By the interval over scenes and methods: the premise is about methods, not about these few."""
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
    agreeing = sum(row["agrees"] for row in ranks)
    printed = p_values[0]["printed"]
    everything = next(
        row for row in p_values if (row["scores"], row["alternative"], row["method"]) == ("all", "greater", "exact")
    )
    matching = [row for row in p_values if row["agrees"]]
    listed = "; ".join(
        f"{row['scores']}, {'one-sided' if row['alternative'] == 'greater' else 'two-sided'}, {how(row)}: "
        f"{row['p_value']:.4f}"
        for row in matching
    )
    return [
        f"{agreeing} of {len(ranks)} printed ranks follow from the printed scores: rank per benchmark among the pruned "
        "methods, ties share the mean rank, mean over the eleven benchmarks.",
        f"The printed p = {printed:g} is not that of all 33 scores, whose one-sided exact p is "
        f"{everything['p_value']:.4f}.",
        f"Readings that round to {printed:g}: {listed}. The paper's test is one-sided.",
    ]


def how(row: Row) -> str:
    """Of a p-value: exact, or which approximation."""
    if row["method"] == "exact":
        return "exact"
    return f"normal approximation with{'' if row['correction'] else 'out'} continuity correction"


def _within(row: Row, value: str, printed: str) -> bool:
    # A value that never varies, say 100.00, agrees if it is the printed one.
    return abs(row[value] - row[printed]) <= max(row[f"{value}_sd"], 0.005)


def closest(table: Sequence[Row], distance: str, names: Sequence[str] | None = None) -> dict[float, str]:
    """At each retention, the selector (of `names`) with the smallest mean distance; of an objective, the largest."""
    best = max if distance in MAXIMISED else min
    return {
        retention: best(
            (r for r in table if r["retention"] == retention and (names is None or r["point"] in names)),
            key=lambda row: row[distance],
        )["point"]
        for retention in sorted({row["retention"] for row in table})
    }


def _closest(table: Sequence[Row], distances: Sequence[str]) -> list[str]:
    """Where OTPrune is the closest: of all, and of the paper's four (its Fig. 4)."""
    said = []
    for names, whom in ((None, "of all selectors"), (FIGURE_4, "of OTPrune, DivPrune, DPP and random (its Fig. 4)")):
        found = {distance: closest(table, distance, names) for distance in distances}
        counts = ", ".join(
            f"{NAMES[distance]} {sum(name.startswith('OTPrune') for name in at.values())} of {len(at)}"
            for distance, at in found.items()
        )
        said.append(f"Retentions at which OTPrune is the closest {whom}: {counts}.")
    return said


def _worst_two(table: Sequence[Row]) -> str:
    """Says so if first and last, which lose most of the picture, answer worst of the five at every retention."""
    five = [row for row in table if row["point"] in FIGURE_2]
    for retention in {row["retention"] for row in five}:
        ranked = sorted((r for r in five if r["retention"] == retention), key=lambda row: row["qa"])
        if {row["point"] for row in ranked[:2]} != {"first", "last"}:
            return ""
    return "Two of the five, first and last, drop most of the picture: far and bad by any measure."
