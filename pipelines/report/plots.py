"""Small charts as inline SVG: no script, no network, readable in print."""

import html
import math
from collections.abc import Mapping, Sequence

COLORS = ("#0b6bcb", "#d1495b", "#2e933c", "#b5651d", "#7b4fb5", "#00838f", "#c2185b", "#5d6d1e", "#37474f", "#e09f3e")
GRAY, INK = "#98a2b3", "#475467"
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 24, 34

Interval = tuple[float, float, float]  # value, low, high


def line_chart(
    title: str,
    labels: Sequence[str],
    series: Mapping[str, Sequence[Interval | None]],
    styles: Mapping[str, tuple[str, bool]],
    *,
    level: tuple[str, float] | None = None,
    size: tuple[int, int] = (304, 210),
) -> str:
    """Series over equally spaced `labels`, with bars for the intervals; `styles` are (colour, dashed) by series.

    `level` is a named horizontal line. Series are set a little apart, so that their bars do not hide each other.
    """
    width, height = size
    points = [point for values in series.values() for point in values if point is not None]
    low, high, step = ticks(
        min(p[1] for p in points), max([p[2] for p in points] + ([level[1]] if level else [])), count=4
    )
    inner = width - LEFT - RIGHT
    apart = min(3.2, 0.6 * inner / len(labels) / len(series))

    def x(i: int, offset: int = 0) -> float:
        return LEFT + inner * (i + 0.5) / len(labels) + apart * (offset - (len(series) - 1) / 2)

    def y(value: float) -> float:
        return TOP + (height - TOP - BOTTOM) * (high - value) / (high - low)

    parts = [_text(LEFT, 14, title, weight="600", fill="#1c2330")]
    for n in range(round((high - low) / step) + 1):
        at = low + n * step
        parts.append(f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{y(at):.1f}" y2="{y(at):.1f}" stroke="#e2e6ee"/>')
        parts.append(_text(LEFT - 6, y(at) + 4, f"{at:g}", anchor="end"))
    parts += [_text(x(i), height - 14, label, anchor="middle") for i, label in enumerate(labels)]
    if level:
        parts.append(_dashes(LEFT, width - RIGHT, y(level[1]), "#1c2330"))
        parts.append(_text(width - RIGHT, y(level[1]) - 4, level[0], anchor="end"))
    for offset, (name, values) in enumerate(series.items()):
        color, dashed = styles[name]
        known = [(x(i, offset), point) for i, point in enumerate(values) if point is not None]
        path = " ".join(f"{px:.1f},{y(point[0]):.1f}" for px, point in known)
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.6"{dash}/>')
        for px, (value, bottom, top) in known:
            tip = f"<title>{html.escape(name)}: {value:.3g} ({bottom:.3g} to {top:.3g})</title>"
            bar = f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{y(bottom):.1f}" y2="{y(top):.1f}" stroke="{color}"/>'
            parts.append(f'<g>{tip}{bar}<circle cx="{px:.1f}" cy="{y(value):.1f}" r="2.6" fill="{color}"/></g>')
    return _svg(width, height, title, parts)


def scatter(
    title: str,
    axis: str,
    points: Sequence[tuple[str, float, float]],
    styles: Mapping[str, tuple[str, bool]],
    *,
    size: tuple[int, int] = (304, 210),
) -> str:
    """Named points (series, x, y); `axis` names the x axis."""
    width, height = size
    left, right, step_x = ticks(min(p[1] for p in points), max(p[1] for p in points), count=4)
    low, high, step_y = ticks(min(p[2] for p in points), max(p[2] for p in points), count=4)
    parts = [_text(LEFT, 14, title, weight="600", fill="#1c2330"), _text(width - RIGHT, height - 3, axis, anchor="end")]

    def x(value: float) -> float:
        return LEFT + 8 + (width - LEFT - RIGHT - 16) * (value - left) / (right - left)

    def y(value: float) -> float:
        return TOP + (height - TOP - BOTTOM) * (high - value) / (high - low)

    for n in range(round((high - low) / step_y) + 1):
        at = low + n * step_y
        parts.append(f'<line x1="{LEFT}" x2="{width - RIGHT}" y1="{y(at):.1f}" y2="{y(at):.1f}" stroke="#e2e6ee"/>')
        parts.append(_text(LEFT - 6, y(at) + 4, f"{at:g}", anchor="end"))
    for n in range(round((right - left) / step_x) + 1):
        parts.append(_text(x(left + n * step_x), height - 18, f"{left + n * step_x:g}", anchor="middle"))
    for name, px, py in points:
        tip = f"<title>{html.escape(name)}: {px:.4g}, {py:.3g}</title>"
        parts.append(f'<circle cx="{x(px):.1f}" cy="{y(py):.1f}" r="4" fill="{styles[name][0]}">{tip}</circle>')
    return _svg(width, height, title, parts)


def ticks(low: float, high: float, count: int) -> tuple[float, float, float]:
    """(first, last, step) of about `count` round steps that cover [low, high]."""
    span = (high - low) or 0.2 * abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / count))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power * count >= span)
    first, last = math.floor(low / step) * step, math.ceil(high / step) * step
    return (first, last, step) if first < last else (first - step, last + step, step)


def series_styles(names: Sequence[str], quiet: Sequence[str]) -> dict[str, tuple[str, bool]]:
    """(colour, dashed) of each series; those of `quiet` are gray and dashed."""
    loud = [name for name in names if name not in quiet]
    colors = {name: (COLORS[i % len(COLORS)], i >= len(COLORS)) for i, name in enumerate(loud)}
    grays = {name: (GRAY if i % 2 else INK, True) for i, name in enumerate(name for name in names if name in quiet)}
    return {**colors, **grays}


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "400", fill: str = INK) -> str:
    style = f'text-anchor="{anchor}" font-size="11" font-weight="{weight}" fill="{fill}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{html.escape(text)}</text>'


def _dashes(x1: float, x2: float, y: float, color: str) -> str:
    return f'<line x1="{x1}" x2="{x2}" y1="{y:.1f}" y2="{y:.1f}" stroke="{color}" stroke-dasharray="2 3"/>'


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    head = f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
    return f'{head} aria-label="{html.escape(title)}">{"".join(parts)}</svg>'
