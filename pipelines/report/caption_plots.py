"""Plots as inline SVG, for pages that open offline. Plain elements, no script; every mark has a tooltip (`title`)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 74, 24, 16, 52
COLORS = ("#0b6bcb", "#d1495b", "#2e8b57", "#8e5cc2", "#c77800", "#00868b", "#7a5c3e", "#b0338a")
GRAY = "#475467"


@dataclass(frozen=True, slots=True)
class Mark:
    """A point with the ends of its intervals; equal ends draw no bar."""

    x: float
    y: float
    x_ends: tuple[float, float]
    y_ends: tuple[float, float]
    label: str
    title: str
    color: str
    chosen: bool = False


@dataclass(frozen=True, slots=True)
class Axes:
    """The window of a plot in data units, and what its axes say."""

    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str
    y_label: str
    log_x: bool = False

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Data -> pixels, held inside the window."""
        held, low, high = min(max(x, self.x[0]), self.x[1]), *self.x
        scale = math.log if self.log_x else float
        across = (scale(held) - scale(low)) / (scale(high) - scale(low))
        up = (min(max(y, self.y[0]), self.y[1]) - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)


def scatter(marks: Sequence[Mark], front: Sequence[tuple[float, float]], axes: Axes, floor: float | None) -> Markup:
    """Marks with both intervals, the front as a line, and a dashed line at y = `floor`."""
    parts = [_frame(axes)]
    if floor is not None:
        (x0, y), (x1, _) = axes.at(axes.x[0], floor), axes.at(axes.x[1], floor)
        parts.append(f'<line x1="{x0}" y1="{y:.1f}" x2="{x1}" y2="{y:.1f}" stroke="#b42318" stroke-dasharray="5 4"/>')
    if len(front) > 1:
        parts.append(_line(axes, front, "#98a2b3", 'stroke-dasharray="2 3" '))
    for mark in marks:
        x, y = axes.at(mark.x, mark.y)
        (left, _), (right, _) = axes.at(mark.x_ends[0], mark.y), axes.at(mark.x_ends[1], mark.y)
        (_, low), (_, high) = axes.at(mark.x, mark.y_ends[0]), axes.at(mark.x, mark.y_ends[1])
        at = f'cx="{x:.1f}" cy="{y:.1f}"'
        ring = f'<circle {at} r="11" fill="none" stroke="#1c2330" stroke-width="2"/>' if mark.chosen else ""
        bars = f"M{left:.1f} {y:.1f}H{right:.1f}M{x:.1f} {low:.1f}V{high:.1f}"
        parts.append(
            f"<g><title>{escape(mark.title)}</title>"
            f'<path d="{bars}" stroke="{mark.color}" stroke-opacity=".45" stroke-width="1.5"/>'
            f'<circle {at} r="5" fill="{mark.color}"/>{ring}'
            f'<text x="{x + 8:.1f}" y="{y - 7:.1f}" font-size="11" fill="{mark.color}">{escape(mark.label)}</text></g>'
        )
    return _svg(parts)


def lines(series: Mapping[str, Sequence[Mark]], ticks: Sequence[str], axes: Axes) -> Markup:
    """One line for each series over named positions 0, 1, ...; intervals as vertical bars."""
    parts = [_frame(axes, ticks)]
    for name, marks in series.items():
        parts.append(_line(axes, [(mark.x, mark.y) for mark in marks], marks[0].color, ""))
        for mark in marks:
            x, y = axes.at(mark.x, mark.y)
            (_, low), (_, high) = axes.at(mark.x, mark.y_ends[0]), axes.at(mark.x, mark.y_ends[1])
            parts.append(
                f"<g><title>{escape(mark.title)}</title>"
                f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{mark.color}" stroke-opacity=".45"/>'
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{mark.color}"/></g>'
            )
        x, y = axes.at(marks[-1].x, marks[-1].y)
        at = f'x="{x + 9:.1f}" y="{y + 4:.1f}"'
        parts.append(f'<text {at} font-size="12" fill="{marks[0].color}">{escape(name)}</text>')
    return _svg(parts)


def window(values: Sequence[float], *, zero: bool = False, room: float = 0.08) -> tuple[float, float]:
    """Data ends with room around them; from 0 if `zero`."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    pad = (high - low or abs(high) or 1.0) * room
    return (0.0 if zero else low - pad), high + pad


def log_window(values: Sequence[float], room: float = 1.15) -> tuple[float, float]:
    """Data ends, all positive, with room around them on the scale of logarithms."""
    return min(values) / room, max(values) * room


def colors(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name, gray for the unpruned model; the same for the same names."""
    others = [name for name in names if name != "none"]
    return {"none": GRAY} | {name: COLORS[i % len(COLORS)] for i, name in enumerate(others)}


def _frame(axes: Axes, x_ticks: Sequence[str] | None = None) -> str:
    parts = []
    for value in _steps(axes.y):
        (x0, y), (x1, _) = axes.at(axes.x[0], value), axes.at(axes.x[1], value)
        parts.append(f'<line x1="{x0}" y1="{y:.1f}" x2="{x1}" y2="{y:.1f}" stroke="#e2e6ee"/>')
        parts.append(f'<text x="{x0 - 8}" y="{y + 4:.1f}" text-anchor="end" {_SMALL}>{value:,g}</text>')
    named = enumerate(x_ticks) if x_ticks else ((v, f"{v:,g}") for v in (_log_steps if axes.log_x else _steps)(axes.x))
    for value, text in named:
        x, y = axes.at(value, axes.y[0])
        parts.append(f'<line x1="{x:.1f}" y1="{y}" x2="{x:.1f}" y2="{y + 5}" stroke="#98a2b3"/>')
        parts.append(f'<text x="{x:.1f}" y="{y + 19}" text-anchor="middle" {_SMALL}>{escape(text)}</text>')
    x, y = axes.at(axes.x[0], axes.y[0])
    parts.append(f'<path d="M{x} {TOP}V{y}H{WIDTH - RIGHT}" fill="none" stroke="#98a2b3"/>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" {_NAME}>{escape(axes.x_label)}</text>')
    parts.append(f'<text transform="translate(16 {middle}) rotate(-90)" {_NAME}>{escape(axes.y_label)}</text>')
    return "".join(parts)


_SMALL = 'font-size="11" fill="#667085"'
_NAME = 'text-anchor="middle" font-size="13" fill="#344054"'


def _line(axes: Axes, points: Sequence[tuple[float, float]], color: str, style: str) -> str:
    path = " ".join("{:.1f},{:.1f}".format(*axes.at(x, y)) for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.5" {style}/>'


def _steps(ends: tuple[float, float], wanted: int = 6) -> list[float]:
    """Round numbers inside the window."""
    raw = (ends[1] - ends[0]) / wanted
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw)
    return [round(i * step, 10) for i in range(math.ceil(ends[0] / step), math.floor(ends[1] / step) + 1)]


def _log_steps(ends: tuple[float, float]) -> list[float]:
    """1, 2 and 5 times powers of ten inside the window."""
    powers = range(math.floor(math.log10(ends[0])), math.ceil(math.log10(ends[1])) + 1)
    steps = [round(factor * 10.0**power, 10) for power in powers for factor in (1, 2, 5)]
    return [step for step in steps if ends[0] <= step <= ends[1]]


def _svg(parts: Sequence[str]) -> Markup:
    head = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-family="system-ui, sans-serif">'
    return Markup(head + "".join(parts) + "</svg>")
