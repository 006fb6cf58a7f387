"""Axes of plots: their range, their ticks at round numbers, and the scale from data to pixels."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CHARACTER = 6.2  # width of one character of a tick's text, in pixels


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis: its label and its range in data units. Without `named` ticks, its ticks are round numbers."""

    label: str
    low: float
    high: float
    log: bool = False
    named: tuple[tuple[float, str], ...] = ()

    def ticks(self) -> Sequence[tuple[float, str]]:
        """(value, text) of each tick inside the range."""
        values = log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)
        return self.named or [(value, f"{value:,g}") for value in values]


@dataclass(frozen=True, slots=True)
class Scale:
    """Maps data to pixels: the low end of the axis to `start`, the high end to `stop`. Values outside are clamped."""

    axis: Axis
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        ends = self.axis.low, self.axis.high
        clamped = min(max(value, ends[0]), ends[1])
        low, high, clamped = (math.log(x) if self.axis.log else x for x in (*ends, clamped))
        return self.start + (clamped - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """(pixel, text) of the ticks. A tick whose text would touch the text before it is left out."""
        shown: list[tuple[float, str]] = []
        for value, text in self.axis.ticks():
            pixel = self(value)
            if not shown or abs(pixel - shown[-1][0]) > CHARACTER * (len(text) + len(shown[-1][1])) / 2 + 4:
                shown.append((pixel, text))
        return shown


def axis_over(
    values: Iterable[float], label: str, *, log: bool = False, zero: bool = False, ticks: Iterable[float] = ()
) -> Axis:
    """An axis with a margin around the values. It begins at 0 if `zero`. A `log` axis needs positive values.

    Values that are not finite, such as a ratio to a score of 0, count for nothing.
    """
    values = [value for value in values if math.isfinite(value)]
    low, high = min(values, default=0.0), max(values, default=1.0)
    named = tuple((tick, f"{tick:,g}") for tick in sorted(set(ticks)))
    if log:
        return Axis(label, low / 1.15, high * 1.15, True, named)
    room = 0.08 * (high - low or abs(high) or 1.0)
    return Axis(label, 0.0 if zero else low - room, high + room, named=named)


def axis_of_names(names: Sequence[str], label: str) -> Axis:
    """An axis with the names as ticks at 0, 1, 2, ..."""
    return Axis(label, -0.5, len(names) - 0.5, named=tuple((float(i), name) for i, name in enumerate(names)))


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers in [low, high]: at most about `wanted` of them."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    # Tolerances of 1e-9: 0.3 / 0.1 is slightly below 3, and a tick at the end of the range must not get lost.
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten in [low, high]; the ticks of a linear axis if there are fewer than two."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [round(factor * 10.0**power, 10) for power in powers for factor in (1, 2, 5)]
    inside = [value for value in values if low <= value <= high]
    return inside if len(inside) > 1 else ticks(low, high)
