"""The warnings beside an advice: everything that the intervals and the records of a sweep leave open."""

from collections.abc import Callable, Sequence

from otprune.methods import BASELINES, UNPRUNED
from pipelines.sweep.point import FINISHED, Record, machines_of
from pipelines.sweep.setting import Interval, Setting, percent, similar

Difference = Callable[[str, str], Interval | None]
"""(point, other point) -> quality of the first minus quality of the second, in CIDEr; None without references."""

FEW_IMAGES = 400  # below this number of judged images, a warning says how many there were
CUT_SHARE = 0.05  # above this share of captions that end at max_new_tokens, a warning says so
LOOP_SHARE = 0.001  # share of looping captions from which a caveat tells it
DISORDER = 0.1  # above this share of pairs in which fewer tokens cost more, speeds are called noisy


def caveats(
    buy: Setting, unpruned: Setting, fit: Sequence[Setting], settings: Sequence[Setting], difference: Difference
) -> list[str]:
    """Warnings about buying the setting `buy`, one by one. `fit` holds the settings that keep the quality."""
    return [
        *_cost_overlaps(buy, unpruned, fit),
        *_unproven_gain(buy, settings, difference),
        *_noisy_speeds(settings),
        *_unlike_prices_and_machines(settings),
        *_weak_quality(buy),
    ]


def failures(records: Sequence[Record]) -> list[str]:
    """One warning about the points that failed, or none."""
    failed = [record for record in records if record["status"] != FINISHED]
    if not failed:
        return []
    name, reason = failed[0]["name"], failed[0]["reason"]
    return [f"{len(failed)} points failed and are not in this advice; reason of the first ({name}): {reason}"]


def _cost_overlaps(buy: Setting, unpruned: Setting, fit: Sequence[Setting]) -> list[str]:
    found = []
    if not buy.is_unpruned and buy.cost[2] >= unpruned.cost[1]:
        found.append("Its cost interval overlaps that of the unpruned model: a saving is not shown. Sweep more images.")
    tied = [s for s in fit if s is not buy and s.cost[1] <= buy.cost[2] and s.quality_value > buy.quality_value]
    if tied:
        best = max(tied, key=lambda setting: setting.quality_value)
        quality = percent(best.quality) if best.quality else "100 %"
        found.append(
            f"Its cost cannot be told from that of {len(tied)} settings of higher quality, such as {best.full_name} "
            f"({quality}): if in doubt, take that one."
        )
    return found


def _unproven_gain(buy: Setting, settings: Sequence[Setting], difference: Difference) -> list[str]:
    """Whether the bought method is shown to beat the baselines, which keep random or evenly spaced tokens."""
    if buy.values["method"] in (UNPRUNED, *BASELINES):
        return []
    found = []
    for method in BASELINES:
        other = similar(buy, settings, method)
        if other is None:
            found.append(f"{method} was not run at this retention: the gain over {method} tokens is not known.")
        elif (gap := difference(buy.name, other.name)) is not None and gap[1] <= 0:
            found.append(
                f"It is not shown to be better than {method} tokens at the same retention: CIDEr differs by "
                f"{100 * gap[0]:+.0f} ({100 * gap[1]:+.0f} to {100 * gap[2]:+.0f}, in hundredths)."
            )
    return found


def _noisy_speeds(settings: Sequence[Setting]) -> list[str]:
    """Fewer tokens cannot cost more to decode. Where they seem to cost more, the measured speeds are noise."""
    pairs = [
        (few, many)
        for few in settings
        for many in settings
        if not few.is_unpruned and few.values["retention"] < many.values["retention"]
        if many is similar(few, [many], few.values["method"], retention=many.values["retention"])
    ]
    wrong = sum(few.cost[0] > many.cost[0] for few, many in pairs)
    if wrong <= DISORDER * len(pairs):
        return []
    return [
        f"Speeds are noisy: in {wrong} of {len(pairs)} pairs of retentions the one with fewer tokens seems to cost "
        "more. The machines had other work, or a point had too few images. Trust the quality, and repeat the points "
        "whose costs decide."
    ]


def _unlike_prices_and_machines(settings: Sequence[Setting]) -> list[str]:
    found = []
    if stale := sum(bool(setting.record.get("stale_price")) for setting in settings):
        found.append(
            f"{stale} points were priced by other prices than the current ones, so costs are in hours. Set "
            "cost.usd_per_hour to price all points alike."
        )
    for cluster, machines in _machines(settings).items():
        if len(machines) > 1:
            places = " and on ".join(machines)
            found.append(f"Points of {cluster} ran on {places}: their speeds do not compare.")
    return found


def _machines(settings: Sequence[Setting]) -> dict[str, list[str]]:
    """Cluster -> the machines that its points ran on, sorted."""
    found: dict[str, set[str]] = {}
    for setting in settings:
        found.setdefault(setting.values["cluster"], set()).add(machines_of(setting.record))
    return {cluster: sorted(machines) for cluster, machines in found.items()}


def _weak_quality(buy: Setting) -> list[str]:
    found, quality, metrics = [], buy.record.get("quality") or {}, buy.record["metrics"]
    if quality.get("relative_by", "").startswith("ROUGE"):
        found.append("The corpus has no references: quality is agreement with unpruned captions, not accuracy.")
    images = quality.get("referenced") or quality.get("captions") or 0
    if images < FEW_IMAGES:
        found.append(f"Quality is that of {images} images; the intervals show how uncertain it is.")
    if metrics.get("finished_by_length", 0) > CUT_SHARE:
        share = f"{100 * metrics['finished_by_length']:.0f} %"
        found.append(f"{share} of its captions are cut at generate.max_new_tokens, which also sets their cost.")
    if metrics.get("finished_by_loop", 0) > LOOP_SHARE:
        share = f"{100 * metrics['finished_by_loop']:.1f} %"
        found.append(f"{share} of its captions end in a loop, after every retry (generate.retries).")
    return found
