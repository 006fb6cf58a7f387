"""Plots as inline SVG: no script, no network, readable in print.

The colours of lines and marks are fixed; they are visible on light and dark backgrounds. The style sheet of the page
(base.html.jinja) sets the colours of frame and text. Every mark has a tooltip, its `title`.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from pipelines.report.scale import Axis, Scale

COLORS = (
    "#2f7fd6", "#d9534f", "#2f9450", "#9068d0", "#c4720c", "#0f8f96",
    "#c9529b", "#a3705a", "#7f8a1f", "#6b7fe0", "#5f7fa8", "#b0506e",
)  # fmt: skip
GRAYS = ("#7d8796", "#8a94a6")
DASHES = {"solid": "", "dashed": "5 3", "dotted": "1.5 3"}
SMALL, LARGE = (340, 240), (760, 400)
LEFT, RIGHT, TOP, BOTTOM = 58, 16, 26, 46
ROW, NAMES = 21, 240  # of `intervals`: height of a row, and width of the column of labels


@dataclass(frozen=True, slots=True)
class Style:
    """The look of a series. `line` is a key of DASHES, which is also a CSS border style."""

    color: str
    line: str = "solid"


@dataclass(frozen=True, slots=True)
class Point:
    """A mark at (x, y), with the ends of its intervals if it has any, a `label` beside it and a tooltip, `title`."""

    x: float
    y: float
    x_ends: tuple[float, float] | None = None
    y_ends: tuple[float, float] | None = None
    label: str = ""
    title: str = ""
    ringed: bool = False


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one name and style. If `joined`, a line goes through them in their order."""

    name: str
    points: Sequence[Point]
    style: Style
    joined: bool = True


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its interval, and `printed`, the published value of the same quantity if there is one."""

    label: str
    value: float
    low: float
    high: float
    printed: float | None = None
    color: str = COLORS[0]


def styles_of(names: Iterable[str], quiet: Sequence[str] = ("none",)) -> dict[str, Style]:
    """A style for each name. The same names give the same styles. Names in `quiet` get gray, broken lines."""
    names = list(dict.fromkeys(names))
    loud = [name for name in names if name not in quiet]
    lines = ("solid", "dashed", "dotted")
    styles = {
        name: Style(COLORS[i % len(COLORS)], lines[min(i // len(COLORS), len(lines) - 1)])
        for i, name in enumerate(loud)
    }
    # Quiet names differ by line before they differ by gray.
    for i, name in enumerate(name for name in names if name in quiet):
        styles[name] = Style(GRAYS[i // 2 % len(GRAYS)], lines[1 + i % 2])
    return styles


def plot(
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    title: str = "",
    levels: Sequence[tuple[float, str]] = (),
    front: Sequence[tuple[float, float]] = (),
    size: tuple[int, int] = SMALL,
) -> Markup:
    """Draws lines and points over common axes; returns SVG.

    Values that are not finite are not drawn. `levels` are (y, name) of horizontal dashed lines. `front` is a dotted
    line through (x, y), under everything else.
    """
    width, height = size
    across = Scale(x, LEFT, width - RIGHT)
    up = Scale(y, height - BOTTOM, TOP if title else TOP / 2)
    # SVG paints in order: frame, levels and front lie under the series.
    parts = [_frame(across, up, title)]
    for value, text in ((value, text) for value, text in levels if math.isfinite(value)):
        parts.append(_rule(across.start, up(value), across.stop, up(value), "level"))
        parts.append(_text(across.stop - 3, up(value) - 5, text, "end"))
    if front:
        parts.append(_line([(across(a), up(b)) for a, b in front], Style(GRAYS[0], "dotted")))
    for line in series:
        points = [point for point in line.points if math.isfinite(point.x) and math.isfinite(point.y)]
        if line.joined and len(points) > 1:
            parts.append(_line([(across(p.x), up(p.y)) for p in points], line.style))
        parts += [_point(point, line, across, up) for point in points]
    return _svg(parts, size, title or f"{y.label} over {x.label}")


def intervals(rows: Sequence[Interval], axis: Axis, *, level: float | None = None, width: int = 640) -> Markup:
    """Draws a row for each value: a dot with its interval, and a hollow diamond at the printed value.

    `level` is a vertical dashed line.
    """
    bottom = TOP / 2 + ROW * len(rows)
    across = Scale(axis, NAMES, width - RIGHT - 8)
    parts = []
    for pixel, text in across.ticks():
        parts.append(_rule(pixel, TOP / 4, pixel, bottom, "grid") + _text(pixel, bottom + 15, text, "middle"))
    if level is not None:
        parts.append(_rule(across(level), TOP / 4, across(level), bottom, "level"))
    parts.append(_text((across.start + across.stop) / 2, bottom + 34, axis.label, "middle", "name"))
    for i, row in enumerate(rows):
        middle = TOP / 2 + ROW * (i + 0.5)
        parts.append(_text(NAMES - 10, middle + 4, row.label, "end"))
        title = f"{row.label}: {row.value:.3g} ({row.low:.3g} to {row.high:.3g})"
        bar = f"M{across(row.low):.1f} {middle:.1f}H{across(row.high):.1f}"
        parts.append(_mark(across(row.value), middle, row.color, bar, title))
        if row.printed is not None:
            diamond = f"M{across(row.printed):.1f} {middle - 7:.1f}l6 7l-6 7l-6 -7z"
            parts.append(f'<path class="printed" d="{diamond}"><title>printed: {row.printed:g}</title></path>')
    return _svg(parts, (width, round(bottom + BOTTOM)), axis.label)


def legend(styles: Mapping[str, Style], *, dots: bool = False) -> Markup:
    """The names beside samples of their lines, or beside dots, as HTML."""
    kind = "dot" if dots else "stroke"
    items = (
        f'<span><i class="{kind}" style="border-color:{style.color};border-top-style:{style.line}"></i>'
        f"{escape(name)}</span>"
        for name, style in styles.items()
    )
    return Markup(f'<p class="legend">{"".join(items)}</p>')


def beside(i: int, count: int) -> float:
    """Offset of the i-th of `count` series on an axis of names: series side by side do not hide each other."""
    return min(0.05, 0.6 / count) * (i - (count - 1) / 2)


def _frame(across: Scale, up: Scale, title: str) -> str:
    """Grid, ticks, axes and labels. `up` maps its low end to the bottom, since y grows downwards in SVG."""
    left, right, bottom = across.start, across.stop, up.start
    parts = [
        _rule(left, pixel, right, pixel, "grid") + _text(left - 6, pixel + 4, text, "end") for pixel, text in up.ticks()
    ]
    parts += [
        _rule(pixel, bottom, pixel, bottom + 4, "axis") + _text(pixel, bottom + 16, text, "middle")
        for pixel, text in across.ticks()
    ]
    parts.append(_rule(left, bottom, right, bottom, "axis"))
    parts.append(_text((left + right) / 2, bottom + 36, across.axis.label, "middle", "name"))
    middle = (up.start + up.stop) / 2
    turned = f'transform="translate(13 {middle:.1f}) rotate(-90)" text-anchor="middle"'
    parts.append(f'<text class="name" {turned}>{escape(up.axis.label)}</text>')
    parts.append(_text(left, 15, title, "start", "title") if title else "")
    return "".join(parts)


def _point(point: Point, series: Series, across: Scale, up: Scale) -> str:
    x, y = across(point.x), up(point.y)
    bars = ""
    if point.x_ends and point.x_ends[0] < point.x_ends[1]:
        bars += f"M{across(point.x_ends[0]):.1f} {y:.1f}H{across(point.x_ends[1]):.1f}"
    if point.y_ends and point.y_ends[0] < point.y_ends[1]:
        bars += f"M{x:.1f} {up(point.y_ends[0]):.1f}V{up(point.y_ends[1]):.1f}"
    more = f'<circle class="ring" cx="{x:.1f}" cy="{y:.1f}" r="10"/>' if point.ringed else ""
    more += _text(x + 8, y - 7, point.label) if point.label else ""
    ends = " ({:.3g} to {:.3g})".format(*point.y_ends) if point.y_ends else ""
    title = point.title or f"{series.name}: {point.x:.4g}, {point.y:.4g}{ends}"
    return _mark(x, y, series.style.color, bars, title, more)


def _mark(x: float, y: float, color: str, bars: str, title: str, more: str = "") -> str:
    """A dot over its intervals. `bars` is the SVG path of the intervals."""
    path = f'<path d="{bars}" stroke="{color}" stroke-opacity=".6" stroke-width="1.5"/>' if bars else ""
    dot = f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="3.6" fill="{color}"/>'
    return f"<g><title>{escape(title)}</title>{path}{dot}{more}</g>"


def _line(pixels: Sequence[tuple[float, float]], style: Style) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in pixels)
    dashes = f' stroke-dasharray="{DASHES[style.line]}"' if DASHES[style.line] else ""
    return f'<polyline points="{path}" fill="none" stroke="{style.color}" stroke-width="1.6"{dashes}/>'


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "tick") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _svg(parts: Sequence[str], size: tuple[int, int], title: str) -> Markup:
    head = f'<svg class="plot" viewBox="0 0 {size[0]} {size[1]}" width="{size[0]}" height="{size[1]}" role="img"'
    return Markup(f'{head} aria-label="{escape(title)}">{"".join(parts)}</svg>')
