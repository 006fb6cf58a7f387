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
    crop_tokens: Counter = field(default_factory=Counter)  # of overviews and tiles (`stages/overview.py`)
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
        self.crop_tokens.update(unit.get("crop_tokens", {}))  # parts of earlier versions have none
        self.reasons.update(unit["reasons"])
        self.seconds.update(unit["seconds"])

    def crop_shares(self) -> dict[str, float]:
        """What of pictures in tiles was kept; {} if no such picture was pruned.

        `kept_from/overview`, `kept_from/tiles`: their shares of the kept tokens.
        `retention/overview`, `retention/tiles`: the share of their own tokens that was kept.
        """
        counts, parts = self.crop_tokens, ("overview", "tiles")
        if not (kept := sum(counts[f"{part}_kept"] for part in parts)):
            return {}
        return {
            **{f"kept_from/{part}": counts[f"{part}_kept"] / kept for part in parts},
            **{f"retention/{part}": counts[f"{part}_kept"] / counts[part] for part in parts},
        }

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
