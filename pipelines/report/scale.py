"""From data to pixels: windows around values, round numbers inside them, and the scale between them."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

CHARACTER = 6.2  # width in pixels of a tick's text, a character


@dataclass(frozen=True, slots=True)
class Axis:
    """What an axis says, and its window in data units. `named` are its ticks, round numbers if there are none."""

    label: str
    low: float
    high: float
    log: bool = False
    named: tuple[tuple[float, str], ...] = ()

    def ticks(self) -> Sequence[tuple[float, str]]:
        """(value, text) of each tick inside the window."""
        values = log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)
        return self.named or [(value, f"{value:,g}") for value in values]


@dataclass(frozen=True, slots=True)
class Scale:
    """Data -> pixels: the low end of the axis at `start`, the high end at `stop`; what is outside stays at the ends."""

    axis: Axis
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        ends = self.axis.low, self.axis.high
        held = min(max(value, ends[0]), ends[1])
        low, high, held = (math.log(each) if self.axis.log else each for each in (*ends, held))
        return self.start + (held - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> list[tuple[float, str]]:
        """(pixel, text) of the ticks, without those whose text would touch that of the one before."""
        shown: list[tuple[float, str]] = []
        for value, text in self.axis.ticks():
            pixel = self(value)
            if not shown or abs(pixel - shown[-1][0]) > CHARACTER * (len(text) + len(shown[-1][1])) / 2 + 4:
                shown.append((pixel, text))
        return shown


def axis_over(
    values: Iterable[float], label: str, *, log: bool = False, zero: bool = False, ticks: Iterable[float] = ()
) -> Axis:
    """An axis with room around the values, which `log` needs positive; it begins at 0 if `zero`."""
    values = list(values)
    low, high = min(values, default=0.0), max(values, default=1.0)
    named = tuple((tick, f"{tick:,g}") for tick in sorted(set(ticks)))
    if log:
        return Axis(label, low / 1.15, high * 1.15, True, named)
    room = 0.08 * (high - low or abs(high) or 1.0)
    return Axis(label, 0.0 if zero else low - room, high + room, named=named)


def axis_of_names(names: Sequence[str], label: str) -> Axis:
    """An axis with the names at 0, 1, 2, ..."""
    return Axis(label, -0.5, len(names) - 0.5, named=tuple((float(i), name) for i, name in enumerate(names)))


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers in [low, high], `wanted` or a few less."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten in [low, high]; round numbers where those are fewer than two."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    values = [round(factor * 10.0**power, 10) for power in powers for factor in (1, 2, 5)]
    inside = [value for value in values if low <= value <= high]
    return inside if len(inside) > 1 else ticks(low, high)
