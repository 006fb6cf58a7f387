"""Renders report.html of a sweep: the advice, its reasons and all points, on one page that opens offline."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from pipelines.config.load import to_yaml
from pipelines.metrics.ptb import tokenize
from pipelines.metrics.rouge import rouge_l
from pipelines.output.fingerprint import fingerprint
from pipelines.output.schema import REASONS
from pipelines.report.environment import render_page
from pipelines.report.page import STAGES, pruned_area
from pipelines.report.plots import LARGE, Point, Series, legend, plot, styles_of
from pipelines.report.scale import axis_of_names, axis_over
from pipelines.run.outcome import SAMPLES
from pipelines.store import read_json
from pipelines.sweep.advice import Advice, advise_sweep
from pipelines.sweep.point import FINISHED, Record, machines_of, store_of
from pipelines.sweep.setting import Setting, has_prices, percent, settings_of

if TYPE_CHECKING:
    from pipelines.sweep.checked import Sweep
    from pipelines.sweep.judge import Judge

Figure = dict[str, Markup]  # {"plot": ..., "legend": ...}

SHOWN_IMAGES, SHOWN_LINES = 12, 6
WIDE = 3.0  # costs that differ by more than this factor get a logarithmic axis


def render_sweep(sweep: "Sweep", records: Mapping[str, Record], judge: "Judge") -> str:
    """The page, as HTML, for the points that have a record so far; `records` by the name of their point."""
    known = [records[point.name] for point in sweep.points if point.name in records]
    advice, settings = advise_sweep(sweep, records, judge), settings_of(known)
    cluster = advice.buy.values["cluster"] if advice.buy else settings[0].values["cluster"] if settings else None
    here = [setting for setting in settings if setting.values["cluster"] == cluster]
    priced = has_prices(known)
    shown = _shown_setting(advice, here)
    return render_page(
        "sweep/sweep.html.jinja",
        kind="sweep",
        fingerprint=fingerprint(sweep.config.dotted()),
        config_yaml=to_yaml(sweep.config),
        machines=tuple(sorted(filter(None, {machines_of(record) for record in known}))),
        sweep=sweep,
        config=sweep.config,
        advice=advice,
        unit="$" if priced else "h",
        cost_of=lambda value: _cost_text(value, priced),
        percent=percent,
        settings=settings,
        failed=[record for record in known if record["status"] != FINISHED],
        left=len(sweep.points) - len(known),
        cluster=cluster,
        clusters=len({point.values["cluster"] for point in sweep.points}),
        pareto=pareto_plot(here, advice, priced, sweep.config.sweep.tolerance),
        scaling=scaling_plot(sweep, settings, advice),
        stages=_splits(here),
        stage_legend=legend(styles_of(STAGES), dots=True),
        compared=shown,
        images=worst_images(sweep, shown, advice) if shown else [],
        reasons=_reasons(known),
    )


def pareto_front(settings: Sequence[Setting]) -> list[Setting]:
    """The settings that no other setting beats in both cost and quality, cheapest first."""
    front: list[Setting] = []
    # By rising cost, and at equal cost by falling quality: a setting is on the front if its quality is a new maximum.
    for setting in sorted(settings, key=lambda s: (s.cost[0], -(s.quality or (0,))[0])):
        if setting.quality and (not front or setting.quality[0] > front[-1].quality[0]):  # pyright: ignore
            front.append(setting)
    return front


def pareto_plot(settings: Sequence[Setting], advice: Advice, priced: bool, tolerance: float) -> Figure | None:
    """Cost against quality. None if fewer than two settings have a known quality, e.g. without an unpruned point."""
    shown = [setting for setting in settings if setting.quality]
    if len(shown) < 2:
        return None
    styles = styles_of(setting.values["method"] for setting in shown)
    points: dict[str, list[Point]] = {method: [] for method in styles}
    for setting in shown:
        points[setting.values["method"]].append(_cost_point(setting, advice, priced))
    series = [Series(method, points[method], style, joined=False) for method, style in styles.items()]
    drawn = [point for line in series for point in line.points]
    # The axes must hold the ends of the intervals too, and the line of the tolerance.
    floor, costs = 100 * (1 - tolerance), [end for point in drawn for end in (point.x, *(point.x_ends or ()))]
    is_wide = min(costs) > 0 and max(point.x for point in drawn) > WIDE * min(point.x for point in drawn)
    x_label = f"{'dollars' if priced else 'hours'} per million images, at steady speed"
    x = axis_over(costs, x_label + (" (each step a multiple)" if is_wide else ""), log=is_wide)
    qualities = [floor, *(end for point in drawn for end in (point.y, *(point.y_ends or ())))]
    y = axis_over(qualities, "quality, % of unpruned")
    front = [(s.cost[0], 100 * s.quality[0]) for s in pareto_front(shown) if s.quality]
    return {
        "plot": plot(series, x, y, levels=[(floor, "")], front=front, size=LARGE),
        "legend": legend({"unpruned" if name == "none" else name: style for name, style in styles.items()}, dots=True),
    }


def _cost_point(setting: Setting, advice: Advice, priced: bool) -> Point:
    value, low, high = (100 * end for end in setting.quality or (0.0, 0.0, 0.0))
    return Point(
        x=setting.cost[0],
        y=value,
        x_ends=setting.cost[1:],
        y_ends=(low, high),
        label="none" if setting.is_unpruned else f"{100 * setting.values['retention']:g}%",
        title=f"{setting.label}: {_cost_text(setting.cost[0], priced)}, quality {percent(setting.quality)}",
        ringed=advice.buy is not None and setting.name == advice.buy.name,
    )


def scaling_plot(sweep: "Sweep", settings: Sequence[Setting], advice: Advice) -> Figure | None:
    """Images a second on each cluster, for the unpruned model and for the advised method at its retentions.

    None with one cluster, or without an advice.
    """
    names = list(dict.fromkeys(point.values["cluster"] for point in sweep.points))
    if len(names) < 2 or advice.buy is None:
        return None
    pruned = [setting for setting in settings if not setting.is_unpruned]
    method = advice.buy.values["method"] if not advice.buy.is_unpruned else pruned[0].values["method"] if pruned else ""
    points: dict[str, list[Point]] = {}
    for setting in settings:
        if setting.is_unpruned or setting.values["method"] == method:
            points.setdefault(setting.label, []).append(_rate_point(setting, names))
    points = dict(list(points.items())[:SHOWN_LINES])
    styles = styles_of(points, quiet=("unpruned",))
    series = [Series(label, sorted(marks, key=lambda p: p.x), styles[label]) for label, marks in points.items()]
    rates = [end for marks in points.values() for point in marks for end in (point.y, *(point.y_ends or ()))]
    x, y = axis_of_names(names, "cluster (pool sizes)"), axis_over([0, *rates], "images a second, steady", zero=True)
    return {"plot": plot(series, x, y, size=LARGE), "legend": legend({label: styles[label] for label in points})}


def _rate_point(setting: Setting, names: Sequence[str]) -> Point:
    metrics, x = setting.record["metrics"], float(names.index(setting.values["cluster"]))
    ends = metrics.get("images_per_second_low", setting.rate), metrics.get("images_per_second_high", setting.rate)
    title = f"{setting.label} on {setting.values['cluster']}: {setting.rate:.1f} images/s"
    return Point(x, setting.rate, y_ends=ends, title=title)


def _cost_text(cost: float, priced: bool) -> str:
    """The cost with two decimals, or with three significant digits below 1: a demo costs cents, a corpus thousands."""
    text = f"{cost:,.2f}" if cost >= 1 else f"{cost:.3g}"
    return f"${text}" if priced else f"{text} h"


def _splits(settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """`_split` of every setting, with a bar for each stage, in per cent of the longest."""
    splits, styles = [_split(setting) for setting in settings], styles_of(STAGES)
    longest = max((sum(split["parts"].values()) for split in splits), default=0.0) or 1.0
    for split in splits:
        parts = split["parts"].items()
        split["bars"] = [(100 * ms / longest, styles[stage].color, f"{stage} {ms:.1f} ms") for stage, ms in parts]
    return splits


def _split(setting: Setting) -> dict[str, Any]:
    """Milliseconds of work for an image in each stage, and the share of time in which each pool waited."""
    metrics = setting.record["metrics"]
    images = max(1.0, metrics.get("images_captioned", 0) + metrics.get("images_quarantined", 0))
    parts = {stage: 1000 * metrics.get(f"seconds/{stage}", 0.0) / images for stage in STAGES}
    steady = max(1e-9, metrics.get("wall_seconds", 0.0) - metrics.get("startup_seconds", 0.0))
    pools = {
        stage: int(setting.record["pools"][stage]) for stage in ("encode", "generate") if "pools" in setting.record
    }
    # Pools work in parallel: a pool of n actors has n seconds of capacity for each second after start-up.
    idle = {
        stage: max(0.0, 1 - metrics.get(f"seconds/{stage}", 0.0) / (size * steady)) for stage, size in pools.items()
    }
    return {"setting": setting, "parts": parts, "idle": idle, "startup": metrics.get("startup_seconds", 0.0)}


def _shown_setting(advice: Advice, here: Sequence[Setting]) -> Setting | None:
    """The pruned setting whose images the page shows: the advised one, else the best one of `here`."""
    if advice.buy and not advice.buy.is_unpruned:
        return advice.buy
    pruned = [setting for setting in here if not setting.is_unpruned and setting.quality]
    return max(pruned, key=lambda s: s.quality[0] if s.quality else 0.0, default=None)


def worst_images(sweep: "Sweep", shown: Setting, advice: Advice) -> list[dict[str, Any]]:
    """The sampled images whose pruned and unpruned captions agree least, by ROUGE-L; worst first.

    Images with references come before all others, because a reference shows which of the two captions is right.
    """
    by_name = {point.name: point for point in sweep.points}
    pruned = read_json(store_of(by_name[shown.name]), SAMPLES) or []
    others = read_json(store_of(by_name[advice.unpruned.name]), SAMPLES) or [] if advice.unpruned else []
    unpruned = {(sample["source"], sample["row"]): sample for sample in others}
    found = []
    for sample in pruned:
        other = unpruned.get((sample["source"], sample["row"]))
        if other is None:
            continue
        captions = sample["captions"][0]["caption"], other["captions"][0]["caption"]
        agreement = rouge_l(tokenize(captions[0]), [tokenize(captions[1])])
        found.append(
            {
                **sample,
                "jpeg": sample["jpeg"] or other["jpeg"],
                "shade": pruned_area(sample),
                "pruned": captions[0],
                "unpruned": captions[1],
                "agreement": agreement,
            }
        )
    return sorted(found, key=lambda image: (not image["references"], image["agreement"]))[:SHOWN_IMAGES]


def _reasons(records: Sequence[Record]) -> list[tuple[str, str, int]]:
    """(reason, stage, count) of the finished point with most quarantined images.

    Unreadable images are the same in every point, so one point stands for all.
    """
    counts = [Counter(record["totals"]["reasons"]) for record in records if record["status"] == FINISHED]
    return [
        (reason, REASONS.get(reason, ""), n)
        for reason, n in max(counts, key=Counter.total, default=Counter()).most_common()
    ]
