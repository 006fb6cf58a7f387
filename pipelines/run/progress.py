"""Shows the progress of the job: one live line on a terminal, else a plain line every few seconds."""

import sys
from collections import deque
from typing import Any, Literal

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pipelines.dollars.meter import Meter
from pipelines.output.totals import Totals
from pipelines.run.rate_interval import Gaps

RATE_WINDOW = 60.0  # seconds of the recent rate, which the progress line shows
AFTER_START = ("encode", "generate", "write")  # the work on a unit that needs running actors, or follows it

Counted = Literal["images", "questions"]


class Progress:
    """Counts images (or questions) of this run against the plan. As a context manager, it restores the terminal.

    The clock and the start of the run are those of the `meter`, so that seconds and dollars agree.

    Args:
        num_rows: rows of the plan.
        num_done: rows that earlier runs committed.
        every: seconds between progress points.
    """

    def __init__(
        self,
        num_rows: int,
        num_done: int,
        meter: Meter,
        every: float,
        counted: Counted = "images",
    ):
        self.num_rows, self.num_done, self.meter, self.every = num_rows, num_done, meter, every
        self.counted: Counted = counted
        self.totals = Totals()
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False, transient=True) if sys.stderr.isatty() else None
        self._shown = 0.0
        self._history: deque[tuple[float, int]] = deque()  # (time, count) after each unit of the last minute
        self._first: tuple[float, int] | None = None  # (time, count) when the actors began the first unit with captions
        self._gaps = Gaps()

    def __enter__(self) -> "Progress":
        if self._live:
            self._live.start()
        self.show(force=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, unit: dict[str, Any]) -> bool:
        """Counts a committed unit by its summary. Returns whether a progress point is due."""
        before = self.count
        self.totals.add(unit)
        now = self.meter.now
        # A unit of broken images alone is committed before the actors are up, so it does not start the rate.
        if unit["captions"] or self._history:
            if self._history:
                self._gaps.add(now - self._history[-1][0], self.count - self._history[-1][1])
            self._history.append((now, self.count))
            if self._first is None:
                worked = sum(unit["seconds"].get(stage, 0.0) for stage in AFTER_START)
                # The actors began this unit as long ago as the unit took after the start-up.
                self._first = (max(self.meter.started, now - worked), before)
                self._gaps.add(now - self._first[0], self.count - before)
        while len(self._history) > 2 and now - self._history[0][0] > RATE_WINDOW:
            self._history.popleft()
        return self.show()

    def show(self, force: bool = False) -> bool:
        """Refreshes the line. Returns whether a progress point was due, or was forced."""
        now = self.meter.now
        if not force and now - self._shown < self.every:
            if self._live:
                self._live.update(Text(self.line()), refresh=True)
            return False
        self._shown = now
        if self._live:
            self._live.update(Text(self.line()), refresh=True)
        else:
            self._console.print(self.line(), highlight=False, soft_wrap=True)
        return True

    @property
    def count(self) -> int:
        """Images, or questions, that this run has committed."""
        return self.totals.images if self.counted == "images" else self.totals.questions

    @property
    def elapsed(self) -> float:
        """Seconds since the job started, start-up included; the cluster is held for all of them."""
        return self.meter.elapsed

    @property
    def startup_seconds(self) -> float:
        """Seconds until the actors began their first unit with captions; `elapsed` before such a unit."""
        return self.elapsed if self._first is None else self._first[0] - self.meter.started

    @property
    def usd(self) -> float | None:
        """Dollars of this run so far; None without a price."""
        return self.meter.usd

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the end of the plan at the rate of the last minute; None before there is a rate."""
        rate = self.rates(recent=True)[f"{self.counted}_per_second"]
        return (self.num_rows - self.num_done - self.count) / rate if rate > 0 and self._first else None

    @property
    def usd_left(self) -> float | None:
        """Dollars to the end of the plan with the nodes of now; None without a price or a rate."""
        left, price = self.seconds_left, self.meter.usd_per_hour
        return None if left is None or price is None else price * left / 3600

    def rates(self, *, recent: bool = False) -> dict[str, float]:
        """Images, questions (of an evaluation) and generated tokens a second, of the whole run or of its last minute.

        The rates count from the moment when the actors began the first unit with captions, so they leave the start-up
        out. `_low` and `_high` are the ends of the 95 % interval of the rate of the whole run (rate_interval.py).
        """
        if self._first is None:
            rate = self.count / max(1e-9, self.elapsed)
        else:
            end, after = self._history[-1]
            start, before = self._history[0] if recent and end - self._first[0] > RATE_WINDOW else self._first
            rate = (after - before) / max(1e-9, end - start)
        per_counted = rate / max(1, self.count)
        rates = {
            "images_per_second": per_counted * self.totals.images,
            f"{self.counted}_per_second": rate,
            "tokens_per_second": per_counted * self.totals.generated_tokens,
        }
        if not recent and (ends := self._gaps.interval()):
            rates |= {
                f"{self.counted}_per_second_{end}": value for end, value in zip(("low", "high"), ends, strict=True)
            }
        return rates

    def line(self) -> str:
        """The progress as one line of text."""
        done, rates = self.num_done + self.count, self.rates(recent=True)
        rate, left, usd_left = rates[f"{self.counted}_per_second"], self.seconds_left, self.usd_left
        parts = [
            f"{done:,}/{self.num_rows:,} {self.counted}",
            f"{rate:.1f} {self.counted}/s",
            f"{rates['tokens_per_second']:.0f} tokens/s",
            f"{self.totals.images_quarantined} quarantined",
            f"ETA {'-' if left is None else _duration(left)}",
        ]
        if self.usd is not None:
            parts.append(f"${self.usd:.4f} so far" + ("" if usd_left is None else f", ${usd_left:.4f} to finish"))
        return " | ".join(parts)


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"
