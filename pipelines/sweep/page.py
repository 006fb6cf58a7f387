"""report.html of a sweep: which setting to buy and why, on one self-contained page that opens offline."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipelines.config.load import to_yaml
from pipelines.metrics.ptb import tokenize
from pipelines.metrics.rouge import rouge_l
from pipelines.output.schema import REASONS
from pipelines.report.caption_plots import Axes, Mark, colors, lines, log_window, scatter, window
from pipelines.report.page import STAGES, packages, pruned_area
from pipelines.run.outcome import SAMPLES
from pipelines.store import read_json
from pipelines.sweep.advice import Advice, Setting, advise_sweep, has_prices, percent, settings_of
from pipelines.sweep.point import FINISHED, Record, machines_of, store_of

if TYPE_CHECKING:
    from pipelines.sweep.checked import Sweep
    from pipelines.sweep.judge import Judge

STAGE_COLORS = ("#98a2b3", "#c77800", "#0b6bcb", "#2e8b57", "#8e5cc2")
SHOWN_IMAGES, SHOWN_LINES = 12, 6
WIDE = 3.0  # costs that differ by more go on a logarithmic axis


def render_sweep(sweep: "Sweep", records: Mapping[str, Record], judge: "Judge") -> str:
    """The page for what is known so far; records by the name of their point."""
    known = [records[point.name] for point in sweep.points if point.name in records]
    advice, settings = advise_sweep(sweep, records, judge), settings_of(known)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    cluster = advice.buy.values["cluster"] if advice.buy else settings[0].values["cluster"] if settings else None
    here = [setting for setting in settings if setting.values["cluster"] == cluster]
    priced = has_prices(known)
    shown = _shown_setting(advice, here)
    return environment.get_template("sweep.html.jinja").render(
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
        stages=(stages := [_split(setting) for setting in here]),
        longest_split=max((sum(row["parts"].values()) for row in stages), default=1) or 1,
        stage_colors=dict(zip(STAGES, STAGE_COLORS, strict=True)),
        compared=shown,
        images=worst_images(sweep, shown, advice) if shown else [],
        reasons=_reasons(known),
        environment=packages(),
        machines=sorted(filter(None, {machines_of(record) for record in known})),
        config_yaml=to_yaml(sweep.config),
    )


def pareto_front(settings: Sequence[Setting]) -> list[Setting]:
    """Settings that no other one beats in cost and quality at once, cheapest first."""
    front: list[Setting] = []
    for setting in sorted(settings, key=lambda s: (s.cost[0], -(s.quality or (0,))[0])):
        if setting.quality and (not front or setting.quality[0] > front[-1].quality[0]):  # pyright: ignore
            front.append(setting)
    return front


def pareto_plot(settings: Sequence[Setting], advice: Advice, priced: bool, tolerance: float) -> Any:
    """Cost against quality; None with fewer than two settings whose quality is known, as without an unpruned point."""
    shown = [setting for setting in settings if setting.quality]
    if len(shown) < 2:
        return None
    methods = list(dict.fromkeys(setting.values["method"] for setting in shown))
    tint = colors(methods)
    marks = [
        Mark(
            x=s.cost[0],
            y=100 * s.quality[0],
            x_ends=s.cost[1:],
            y_ends=(100 * s.quality[1], 100 * s.quality[2]),
            label="none" if s.is_unpruned else f"{100 * s.values['retention']:g}%",
            title=f"{s.label}: {_cost_text(s.cost[0], priced)}, quality {percent(s.quality)}",
            color=tint[s.values["method"]],
            chosen=advice.buy is not None and s.name == advice.buy.name,
        )
        for s in shown
        if s.quality
    ]
    floor = 100 * (1 - tolerance)
    costs = [end for mark in marks for end in (mark.x, *mark.x_ends)]
    is_wide = min(costs) > 0 and max(mark.x for mark in marks) > WIDE * min(mark.x for mark in marks)
    axes = Axes(
        x=log_window(costs) if is_wide else window(costs),
        y=window([floor, *(end for mark in marks for end in (mark.y, *mark.y_ends))]),
        x_label=f"{'dollars' if priced else 'hours'} per million images, at steady speed"
        + (" (each step a multiple)" if is_wide else ""),
        y_label="quality, % of unpruned",
        log_x=is_wide,
    )
    front = [(s.cost[0], 100 * s.quality[0]) for s in pareto_front(shown) if s.quality]
    return {"svg": scatter(marks, front, axes, floor), "colors": {method: tint[method] for method in methods}}


def scaling_plot(sweep: "Sweep", settings: Sequence[Setting], advice: Advice) -> Any:
    """Images a second over clusters, of the unpruned model, the advised setting and its method at other retentions."""
    names = list(dict.fromkeys(point.values["cluster"] for point in sweep.points))
    if len(names) < 2 or advice.buy is None:
        return None
    pruned = [setting for setting in settings if not setting.is_unpruned]
    method = advice.buy.values["method"] if not advice.buy.is_unpruned else pruned[0].values["method"] if pruned else ""
    labels = dict.fromkeys(s.label for s in settings if s.is_unpruned or s.values["method"] == method)
    tint = colors(["none" if label == "unpruned" else label for label in labels])
    series: dict[str, list[Mark]] = {}
    for setting in settings:
        if setting.label in list(labels)[:SHOWN_LINES]:
            series.setdefault(setting.label, []).append(_rate_mark(setting, names, tint))
    for marks in series.values():
        marks.sort(key=lambda mark: mark.x)
    ends = [end for marks in series.values() for mark in marks for end in (mark.y, *mark.y_ends)]
    axes = Axes(
        (-0.3, len(names) - 0.2), window([0, *ends], zero=True), "cluster (pool sizes)", "images a second, steady"
    )
    return lines(series, names, axes)


def _rate_mark(setting: Setting, names: Sequence[str], tint: Mapping[str, str]) -> Mark:
    metrics, x = setting.record["metrics"], float(names.index(setting.values["cluster"]))
    ends = metrics.get("images_per_second_low", setting.rate), metrics.get("images_per_second_high", setting.rate)
    title = f"{setting.label} on {setting.values['cluster']}: {setting.rate:.1f} images/s"
    color = tint["none" if setting.is_unpruned else setting.label]
    return Mark(x, setting.rate, (x, x), ends, "", title, color)


def _cost_text(cost: float, priced: bool) -> str:
    """Three digits or cents, whichever is more: corpora cost cents on toys and thousands on clusters."""
    text = f"{cost:,.2f}" if cost >= 1 else f"{cost:.3g}"
    return f"${text}" if priced else f"{text} h"


def _split(setting: Setting) -> dict[str, Any]:
    """Milliseconds of work an image in each stage, and the shares of time in which the actors of a pool waited."""
    metrics = setting.record["metrics"]
    images = max(1.0, metrics.get("images_captioned", 0) + metrics.get("images_quarantined", 0))
    parts = {stage: 1000 * metrics.get(f"seconds/{stage}", 0.0) / images for stage in STAGES}
    steady = max(1e-9, metrics.get("wall_seconds", 0.0) - metrics.get("startup_seconds", 0.0))
    pools = {
        stage: int(setting.record["pools"][stage]) for stage in ("encode", "generate") if "pools" in setting.record
    }
    idle = {
        stage: max(0.0, 1 - metrics.get(f"seconds/{stage}", 0.0) / (size * steady)) for stage, size in pools.items()
    }
    return {"setting": setting, "parts": parts, "idle": idle, "startup": metrics.get("startup_seconds", 0.0)}


def _shown_setting(advice: Advice, here: Sequence[Setting]) -> Setting | None:
    """The pruned setting whose images are shown: the advised one, else the best that is not."""
    if advice.buy and not advice.buy.is_unpruned:
        return advice.buy
    pruned = [setting for setting in here if not setting.is_unpruned and setting.quality]
    return max(pruned, key=lambda s: s.quality[0] if s.quality else 0.0, default=None)


def worst_images(sweep: "Sweep", shown: Setting, advice: Advice) -> list[dict[str, Any]]:
    """The sampled images whose pruned caption is furthest from the unpruned one (by ROUGE-L), those first.

    Images with references come before all others: with them one sees which of the two is right.
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
    """Quarantine of one finished point; images that cannot be read are the same in every one."""
    counts = [Counter(record["totals"]["reasons"]) for record in records if record["status"] == FINISHED]
    return [
        (reason, REASONS.get(reason, ""), n)
        for reason, n in max(counts, key=Counter.total, default=Counter()).most_common()
    ]
