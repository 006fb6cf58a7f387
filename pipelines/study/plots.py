"""Small plots as inline SVG, without a library and without scripts: points and lines, and values with intervals."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

COLORS = (
    "#0b6bcb", "#e07b00", "#2a9d4a", "#c2314b", "#7a52c7", "#8c6239",
    "#d457a8", "#5b6676", "#a3a500", "#00a0b0", "#123a6b", "#f0a6a0",
)  # fmt: skip
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 24, 44
LABEL = 26  # pixels between the middles of two labels that do not touch


@dataclass(frozen=True)
class Series:
    """Named points (x, y), joined in their order where `joined`."""

    name: str
    points: Sequence[tuple[float, float]]
    color: str
    joined: bool = True


@dataclass(frozen=True)
class Interval:
    """A value from low to high, and what is printed elsewhere for the same, if anything."""

    label: str
    value: float
    low: float
    high: float
    printed: float | None = None
    color: str = COLORS[0]


@dataclass(frozen=True)
class Scale:
    """Data to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (math.log10(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low or 1) * (self.stop - self.start)


def chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    x_ticks: Sequence[float] = (),
    log_x: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    y_range: tuple[float, float] | None = None,
    width: int = 400,
    height: int = 260,
) -> Markup:
    """Points of every series over common axes; `marks` are horizontal lines (y, text)."""
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points] + [y for y, _ in marks]
    x_low, x_high = _margin(min(xs), max(xs), 0.04) if not log_x else (min(xs) / 1.15, max(xs) * 1.15)
    y_low, y_high = y_range or _margin(min(ys), max(ys), 0.08)
    x, y = Scale(x_low, x_high, LEFT, width - RIGHT, log_x), Scale(y_low, y_high, height - BOTTOM, TOP)
    parts = _frame(x, y, list(x_ticks) or _ticks(x_low, x_high), _ticks(y_low, y_high), x_label, y_label, title)
    for value, text in marks:
        parts.append(_line(LEFT, y(value), width - RIGHT, y(value), "mark"))
        parts.append(
            f'<text x="{width - RIGHT - 4}" y="{y(value) - 5:.1f}" text-anchor="end" class="t">{escape(text)}</text>'
        )
    for one in series:
        if one.joined and len(one.points) > 1:
            path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in one.points)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{one.color}" stroke-width="2"/>')
        parts += [
            f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="4" fill="{one.color}" fill-opacity=".85">'
            f"<title>{escape(one.name)}: {a:.4g}, {b:.4g}</title></circle>"
            for a, b in one.points
        ]
    return _svg(parts, width, height)


def interval_chart(
    rows: Sequence[Interval], *, x_label: str, x_range: tuple[float, float], zero: float | None = None, width: int = 580
) -> Markup:
    """One line a row: a dot with its interval, and a hollow diamond for the printed value."""
    left, step = 235, 21
    height = TOP + step * len(rows) + BOTTOM - 6
    x = Scale(*x_range, left, width - RIGHT - 8)
    bottom = TOP + step * len(rows)
    parts = [
        f'{_line(x(tick), TOP - 6, x(tick), bottom, "grid")}<text x="{x(tick):.1f}" y="{bottom + 15}" '
        f'text-anchor="middle" class="t">{tick:g}</text>'
        for tick in _ticks(*x_range)
    ]
    if zero is not None:
        parts.append(_line(x(zero), TOP - 6, x(zero), bottom, "mark"))
    parts.append(
        f'<text x="{(left + width) / 2:.0f}" y="{height - 5}" text-anchor="middle" class="l">{escape(x_label)}</text>'
    )
    for i, row in enumerate(rows):
        middle = TOP + step * (i + 0.5)
        low, high = (x(min(max(value, x_range[0]), x_range[1])) for value in (row.low, row.high))
        parts.append(
            f'<text x="{left - 10}" y="{middle + 4:.1f}" text-anchor="end" class="t">{escape(row.label)}</text>'
        )
        parts.append(
            f'<line x1="{low:.1f}" y1="{middle:.1f}" x2="{high:.1f}" y2="{middle:.1f}" stroke="{row.color}" '
            f'stroke-width="2" stroke-opacity=".55"/><circle cx="{x(row.value):.1f}" cy="{middle:.1f}" r="4.5" '
            f'fill="{row.color}"><title>{escape(row.label)}: {row.value:.3g} ({row.low:.3g} to {row.high:.3g})</title>'
            "</circle>"
        )
        if row.printed is not None:
            at = x(row.printed)
            parts.append(
                f'<path d="M{at:.1f} {middle - 7:.1f}l6 7l-6 7l-6 -7z" fill="none" stroke="#1c2330" stroke-width="1.6">'
                f"<title>printed: {row.printed:g}</title></path>"
            )
    return _svg(parts, width, height)


def legend(series: Sequence[Series]) -> Markup:
    """Names with their colours, as HTML."""
    items = (f'<span class="key"><i style="background:{one.color}"></i>{escape(one.name)}</span>' for one in series)
    return Markup('<p class="legend">' + " ".join(items) + "</p>")


def _frame(
    x: Scale, y: Scale, x_ticks: Sequence[float], y_ticks: Sequence[float], x_label: str, y_label: str, title: str
) -> list[str]:
    middle_x, middle_y = (x.start + x.stop) / 2, (y.start + y.stop) / 2
    parts = [
        f'{_line(x.start, y(tick), x.stop, y(tick), "grid")}<text x="{x.start - 6:.1f}" y="{y(tick) + 4:.1f}" '
        f'text-anchor="end" class="t">{tick:g}</text>'
        for tick in y_ticks
    ]
    parts += [
        f'<text x="{x(t):.1f}" y="{y.start + 15:.1f}" text-anchor="middle" class="t">{t:g}</text>'
        for t in _apart(x_ticks, x)
    ]
    parts.append(_line(x.start, y.start, x.stop, y.start, "axis"))
    parts.append(
        f'<text x="{middle_x:.1f}" y="{y.start + 34:.1f}" text-anchor="middle" class="l">{escape(x_label)}</text>'
    )
    parts.append(
        f'<text x="13" y="{middle_y:.1f}" text-anchor="middle" class="l" transform="rotate(-90 13 {middle_y:.1f})">'
        f"{escape(y_label)}</text>"
    )
    parts.append(f'<text x="{middle_x:.1f}" y="14" text-anchor="middle" class="h">{escape(title)}</text>')
    return parts


def _apart(ticks: Sequence[float], x: Scale) -> list[float]:
    """The ticks, in order, without those whose label would touch that of the one before."""
    shown: list[float] = []
    for tick in sorted(ticks):
        if not shown or x(tick) - x(shown[-1]) > LABEL:
            shown.append(tick)
    return shown


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def _svg(parts: Sequence[str], width: int, height: int) -> Markup:
    body = "".join(parts)
    return Markup(f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img">{body}</svg>')


def _margin(low: float, high: float, share: float) -> tuple[float, float]:
    gap = (high - low or abs(high) or 1) * share
    return low - gap, high + gap


def _ticks(low: float, high: float) -> list[float]:
    """Three to seven round numbers in [low, high]."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    count = math.floor(high / step + 1e-9) - first + 1
    return [round((first + i) * step, 10) for i in range(count)]
