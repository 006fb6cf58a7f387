"""The advice of a sweep: which setting to buy and why, in plain sentences computed from the records.

A setting keeps the quality if the lower end of its quality interval stays within `tolerance` of the unpruned model. Of
these settings, the advice is the one that costs least at steady speed. Everything that the intervals do not settle is a
warning (caveats.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from otprune.methods import UNPRUNED
from pipelines.sweep.caveats import Difference, caveats, failures
from pipelines.sweep.point import Record, store_of
from pipelines.sweep.setting import STEADY_USD, Setting, percent, settings_of, similar

if TYPE_CHECKING:
    from pipelines.sweep.checked import Sweep
    from pipelines.sweep.judge import Judge


@dataclass(frozen=True, slots=True)
class Advice:
    """The setting to buy. If there is no advice, `buy` is None and `headline` says why."""

    buy: Setting | None
    unpruned: Setting | None  # on the same cluster, if an unpruned point ran there
    headline: str
    reasons: list[str]
    warnings: list[str]


def advise_sweep(sweep: "Sweep", records: Mapping[str, Record], judge: "Judge") -> Advice:
    """The advice for what is known so far; `records` by the name of their point."""
    points = {point.name: point for point in sweep.points}
    return advise(
        [records[point.name] for point in sweep.points if point.name in records],
        tolerance=sweep.config.sweep.tolerance,
        difference=lambda name, other: judge.difference(store_of(points[name]), store_of(points[other])),
    )


def advise(records: Sequence[Record], *, tolerance: float, difference: Difference) -> Advice:
    """The advice that the records give. `tolerance` is the share of the unpruned quality that may be lost."""
    settings = settings_of(records)
    if not any(setting.is_unpruned for setting in settings):
        text = "No advice: no unpruned point has finished, so there is no quality to compare with."
        return Advice(None, None, text, [], failures(records))
    fit = [setting for setting in settings if setting.is_unpruned or _keeps_quality(setting, tolerance)]
    buy = fit[0]  # exists: the unpruned setting is one
    unpruned = similar(buy, settings, UNPRUNED) or next(s for s in settings if s.is_unpruned)
    warnings = failures(records) + caveats(buy, unpruned, fit, settings, difference)
    kept = f"{100 * (1 - tolerance):g} %"
    if buy.is_unpruned:
        headline = f"Buy the unpruned model ({buy.values['cluster']})"
        reasons = [_why_unpruned(settings, tolerance, kept)]
    else:
        headline = f"Buy {buy.label} of the visual tokens ({buy.values['cluster']})"
        reasons = [
            f"It is the cheapest setting whose 95 % interval stays above {kept} of the unpruned quality: "
            f"{percent(buy.quality)} by {buy.record['quality']['relative_by']}."
        ]
        reasons += [_saving(buy, unpruned)] if unpruned.values["cluster"] == buy.values["cluster"] else []
    return Advice(buy, unpruned, headline, reasons, warnings)


def headline_metrics(advice: Advice) -> dict[str, float]:
    """Metrics of the advised setting, for the MLflow run of the sweep; empty without an advice."""
    buy = advice.buy
    if buy is None:
        return {}
    quality = {} if buy.quality is None else {"accuracy/unpruned/relative": buy.quality[0]}
    dollars = {STEADY_USD: buy.record["metrics"][STEADY_USD]} if STEADY_USD in buy.record["metrics"] else {}
    return {**quality, **dollars, "images_per_second": buy.rate}


def _keeps_quality(setting: Setting, tolerance: float) -> bool:
    return setting.quality is not None and setting.quality[1] >= 1 - tolerance


def _saving(buy: Setting, unpruned: Setting) -> str:
    saved = 1 - buy.cost[0] / unpruned.cost[0]
    return f"It costs {100 * saved:.0f} % less than the unpruned model on the same machines ({buy.values['cluster']})."


def _why_unpruned(settings: Sequence[Setting], tolerance: float, kept: str) -> str:
    fit = [setting for setting in settings if not setting.is_unpruned and _keeps_quality(setting, tolerance)]
    if fit:
        return (
            f"No setting whose interval stays above {kept} of its quality costs less: the cheapest is "
            f"{fit[0].full_name}."
        )
    measured = [setting for setting in settings if not setting.is_unpruned and setting.quality is not None]
    if not measured:
        return "No pruned setting has finished and been compared with it."
    best = max(measured, key=lambda setting: setting.quality[1] if setting.quality else 0.0)
    best_known = f"{best.full_name} with {percent(best.quality)}"
    return f"No pruned setting's interval stays above {kept} of its quality; the best is {best_known}."
