"""Which setting to buy, and how sure that is: plain sentences computed from the records of a sweep.

A setting is advised if the lower end of its quality interval stays within `tolerance` of the unpruned model; of those,
the one that costs least at steady speed. Everything that the intervals do not settle is a warning.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from otprune.methods import BASELINES, UNPRUNED
from pipelines.sweep.point import FINISHED, Record, machines_of, store_of

if TYPE_CHECKING:
    from pipelines.sweep.checked import Sweep
    from pipelines.sweep.judge import Judge


Interval = tuple[float, float, float]
Difference = Callable[[str, str], Interval | None]
"""(point, other point) -> quality of the first minus that of the second, in CIDEr; None where it cannot be told."""

FEW_IMAGES, CUT_SHARE, DISORDER = 400, 0.05, 0.1


@dataclass(frozen=True, slots=True)
class Setting:
    """What a finished point says to a buyer. `cost` is in dollars per million images, or in hours without a price."""

    name: str
    label: str
    values: dict[str, Any]
    cost: Interval
    rate: float  # images a second
    quality: Interval | None  # share of the unpruned model's
    record: Record = field(repr=False)

    @property
    def is_unpruned(self) -> bool:
        return self.values["method"] == UNPRUNED


@dataclass(frozen=True, slots=True)
class Advice:
    """`buy` is None where nothing can be advised; `headline` then says why."""

    buy: Setting | None
    unpruned: Setting | None  # on the same cluster, if it was run there
    headline: str
    reasons: list[str]
    warnings: list[str]


def settings_of(records: Sequence[Record]) -> list[Setting]:
    """The finished points, cheapest first."""
    done = [record for record in records if record["status"] == FINISHED]
    priced = has_prices(records)
    settings = [
        Setting(
            record["name"],
            label_of(record["values"]),
            record["values"],
            _cost(record["metrics"], priced),
            record["metrics"].get("images_per_second", 0.0),
            tuple(quality) if (quality := (record.get("quality") or {}).get("relative")) else None,  # pyright: ignore
            record,
        )
        for record in done
    ]
    return sorted(settings, key=lambda setting: setting.cost[0])


def has_prices(records: Sequence[Record]) -> bool:
    """Whether every finished point knows its dollars, by the same prices; else hours are what can be compared."""
    done = [record for record in records if record["status"] == FINISHED]
    return bool(done) and all(
        "usd_per_million_images_steady" in record["metrics"] and not record.get("stale_price") for record in done
    )


def label_of(values: dict[str, Any]) -> str:
    """A setting without its cluster, in words."""
    if values["method"] == UNPRUNED:
        return "unpruned"
    return f"{values['method']} at {100 * values['retention']:g} %"


def _cost(metrics: dict[str, float], priced: bool) -> Interval:
    if priced:
        name = "usd_per_million_images_steady"
        value = metrics[name]
        return value, metrics.get(f"{name}_low", value), metrics.get(f"{name}_high", value)
    rate = metrics.get("images_per_second", 0.0)
    ends = metrics.get("images_per_second_high", rate), metrics.get("images_per_second_low", rate)
    value, low, high = (1e6 / 3600 / max(each, 1e-9) for each in (rate, *ends))
    return value, low, high


def advise(records: Sequence[Record], *, tolerance: float, difference: Difference) -> Advice:
    """The advice that the records give."""
    settings = settings_of(records)
    if not any(setting.is_unpruned for setting in settings):
        text = "No advice: no unpruned point has finished, so there is nothing to hold quality against."
        return Advice(None, None, text, [], _failures(records))
    fit = [s for s in settings if s.is_unpruned or (s.quality is not None and s.quality[1] >= 1 - tolerance)]
    buy = fit[0]  # there is one: the unpruned point
    unpruned = _like(buy, settings, UNPRUNED) or next(s for s in settings if s.is_unpruned)
    warnings = _failures(records) + _doubts(buy, unpruned, fit, settings, difference)
    kept = f"{100 * (1 - tolerance):g} %"
    if buy.is_unpruned:
        headline = f"Buy the unpruned model ({buy.values['cluster']})"
        reasons = [_why_unpruned(buy, settings, tolerance, kept)]
    else:
        headline = f"Buy {buy.label} of the visual tokens ({buy.values['cluster']})"
        reasons = [
            f"It is the cheapest setting whose 95 % interval stays above {kept} of the unpruned quality: "
            f"{percent(buy.quality)} by {buy.record['quality']['relative_by']}."
        ]
        reasons += [_saving(buy, unpruned)] if unpruned.values["cluster"] == buy.values["cluster"] else []
    return Advice(buy, unpruned, headline, reasons, warnings)


def _saving(buy: Setting, unpruned: Setting) -> str:
    saved = 1 - buy.cost[0] / unpruned.cost[0]
    return f"It costs {100 * saved:.0f} % less than the unpruned model on the same machines ({buy.values['cluster']})."


def _why_unpruned(buy: Setting, settings: Sequence[Setting], tolerance: float, kept: str) -> str:
    fit = [s for s in settings if not s.is_unpruned and s.quality is not None and s.quality[1] >= 1 - tolerance]
    if fit:
        return (
            f"No setting whose interval stays above {kept} of its quality costs less: the cheapest is {_named(fit[0])}."
        )
    measured = [s for s in settings if not s.is_unpruned and s.quality is not None]
    if not measured:
        return "No pruned setting has finished and been held against it."
    best = max(measured, key=lambda s: s.quality[1] if s.quality else 0.0)
    best_known = f"{_named(best)} with {percent(best.quality)}"
    return f"No pruned setting's interval stays above {kept} of its quality; the best is {best_known}."


def _doubts(
    buy: Setting, unpruned: Setting, fit: Sequence[Setting], settings: Sequence[Setting], difference: Difference
) -> list[str]:
    found = []
    if not buy.is_unpruned and buy.cost[2] >= unpruned.cost[1]:
        found.append("Its cost interval overlaps that of the unpruned model: a saving is not shown. Sweep more images.")
    tied = [s for s in fit if s is not buy and s.cost[1] <= buy.cost[2] and _quality(s) > _quality(buy)]
    if tied:
        best = max(tied, key=_quality)
        found.append(
            f"Its cost cannot be told from that of {len(tied)} settings of higher quality, such as {_named(best)} "
            f"({percent(best.quality) if best.quality else '100 %'}): if in doubt, take that one."
        )
    found += _against_baselines(buy, settings, difference)
    found += _disorder(settings)
    if stale := sum(bool(s.record.get("stale_price")) for s in settings):
        found.append(
            f"{stale} points were priced by other prices than those of now: costs are in hours. cost.usd_per_hour "
            "prices all of them alike."
        )
    for cluster, where in _machines(settings).items():
        if len(where) > 1:
            places = " and on ".join(where)
            found.append(f"Points of {cluster} ran on {places}: speeds of unlike machines do not compare.")
    quality, metrics = buy.record.get("quality") or {}, buy.record["metrics"]
    if quality.get("relative_by", "").startswith("ROUGE"):
        found.append("The corpus has no references: quality is agreement with unpruned captions, not accuracy.")
    images = quality.get("referenced") or quality.get("captions") or 0
    if images < FEW_IMAGES:
        found.append(f"Quality is that of {images} images; the intervals say how much that leaves open.")
    if metrics.get("finished_by_length", 0) > CUT_SHARE:
        share = f"{100 * metrics['finished_by_length']:.0f} %"
        found.append(f"{share} of its captions are cut at generate.max_new_tokens, which also sets their cost.")
    return found


def _against_baselines(buy: Setting, settings: Sequence[Setting], difference: Difference) -> list[str]:
    if buy.values["method"] in (UNPRUNED, *BASELINES):
        return []
    found = []
    for method in BASELINES:
        other = _like(buy, settings, method)
        if other is None:
            found.append(f"{method} was not run at this retention: whether the method earns its name is open.")
        elif (gap := difference(buy.name, other.name)) is not None and gap[1] <= 0:
            found.append(
                f"It is not shown to be better than {method} tokens at the same retention: CIDEr differs by "
                f"{100 * gap[0]:+.0f} ({100 * gap[1]:+.0f} to {100 * gap[2]:+.0f}, in hundredths)."
            )
    return found


def _disorder(settings: Sequence[Setting]) -> list[str]:
    """Fewer tokens cannot cost more to decode: where they seem to, the speeds are noise."""
    pairs = [
        (few, many)
        for few in settings
        for many in settings
        if not few.is_unpruned and few.values["retention"] < many.values["retention"]
        if many is _like(few, [many], few.values["method"], retention=many.values["retention"])
    ]
    wrong = sum(few.cost[0] > many.cost[0] for few, many in pairs)
    if wrong <= DISORDER * len(pairs):
        return []
    return [
        f"Speeds are noisy: in {wrong} of {len(pairs)} pairs of retentions the one with fewer tokens seems to cost "
        "more. Other work on the machines, or too few images a point: trust quality, and repeat the costs you decide "
        "by."
    ]


def _machines(settings: Sequence[Setting]) -> dict[str, list[str]]:
    """Cluster -> what its points say that they ran on, without the dashboard's address, which changes."""
    found: dict[str, set[str]] = {}
    for setting in settings:
        found.setdefault(setting.values["cluster"], set()).add(machines_of(setting.record))
    return {cluster: sorted(where) for cluster, where in found.items()}


def _like(setting: Setting, settings: Sequence[Setting], method: str, retention: float | None = None) -> Setting | None:
    """The same setting with another method, and with another retention if one is given; `none` has none."""
    wanted = setting.values | {"method": method} | ({} if retention is None else {"retention": retention})
    if method == UNPRUNED:
        wanted.pop("retention")
    return next((other for other in settings if wanted.items() <= other.values.items()), None)


def _failures(records: Sequence[Record]) -> list[str]:
    failed = [record for record in records if record["status"] != FINISHED]
    if not failed:
        return []
    first = f"the first ({failed[0]['name']}) by: {failed[0]['reason']}"
    return [f"{len(failed)} points failed and are not in this advice, {first}"]


def _quality(setting: Setting) -> float:
    return setting.quality[0] if setting.quality else 1.0 if setting.is_unpruned else 0.0


def _named(setting: Setting) -> str:
    return f"{setting.label} ({setting.values['cluster']})"


def percent(ends: Interval | None) -> str:
    """`97 % (95 to 99)`."""
    return "unknown" if ends is None else f"{100 * ends[0]:.0f} % ({100 * ends[1]:.0f} to {100 * ends[2]:.0f})"


def advise_sweep(sweep: "Sweep", records: Mapping[str, Record], judge: "Judge") -> Advice:
    by_name = {point.name: point for point in sweep.points}
    return advise(
        [records[point.name] for point in sweep.points if point.name in records],
        tolerance=sweep.config.sweep.tolerance,
        difference=lambda ours, theirs: judge.difference(store_of(by_name[ours]), store_of(by_name[theirs])),
    )


def headline_metrics(advice: Advice) -> dict[str, float]:
    """Of the advised setting, for the sweep's own MLflow run."""
    buy = advice.buy
    if buy is None:
        return {}
    quality = {} if buy.quality is None else {"accuracy/unpruned/relative": buy.quality[0]}
    name = "usd_per_million_images_steady"
    dollars = {name: buy.record["metrics"][name]} if name in buy.record["metrics"] else {}
    return {**quality, **dollars, "images_per_second": buy.rate}
