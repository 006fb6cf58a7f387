"""Sums over the units of a run or of a whole output."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Totals:
    """Sums over the units of a run or of a whole output; `add` counts one unit."""

    images_captioned: int = 0
    images_quarantined: int = 0
    captions: int = 0
    unanswered: int = 0  # questions of benchmarks about quarantined images
    prompt_tokens: int = 0
    generated_tokens: int = 0
    finished_by_length: int = 0
    units: int = 0
    reasons: Counter = field(default_factory=Counter)
    seconds: Counter = field(default_factory=Counter)

    def add(self, unit: dict[str, Any]) -> None:
        """Adds the totals of one unit, as the write stage makes them (`stages/write.py`)."""
        for name in (
            "images_captioned",
            "images_quarantined",
            "captions",
            "unanswered",
            "prompt_tokens",
            "generated_tokens",
            "finished_by_length",
        ):
            setattr(self, name, getattr(self, name) + unit[name])
        self.units += 1
        self.reasons.update(unit["reasons"])
        self.seconds.update(unit["seconds"])

    def to_dict(self) -> dict[str, Any]:
        return {name: dict(v) if isinstance(v := getattr(self, name), Counter) else v for name in self.__slots__}

    @property
    def images(self) -> int:
        """Images that the units account for, captioned or quarantined."""
        return self.images_captioned + self.images_quarantined

    @property
    def questions(self) -> int:
        """Prompts that the units account for, answered or not."""
        return self.captions + self.unanswered
