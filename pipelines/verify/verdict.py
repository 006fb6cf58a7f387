"""What verification found."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from pipelines.output.unit import parse_part
from pipelines.store import Store

MAX_SHOWN = 20  # differences kept in words; all are counted


@dataclass(slots=True)
class Verdict:
    """Counts of what was found, and where it is not what it must be."""

    counted: Literal["rows", "questions"] = "rows"
    rows: int = 0  # of the input, as far as input.limit asks; or questions
    captioned: int = 0  # images with their captions or answers
    captions: int = 0  # one for each prompt; or answers
    unanswered: int = 0  # questions about images in quarantine
    objects: int = 0  # committed
    reasons: Counter[str] = field(default_factory=Counter)  # of the quarantined images
    num_differences: int = 0
    differences: list[str] = field(default_factory=list)  # the first MAX_SHOWN

    @property
    def quarantined(self) -> int:
        return self.reasons.total()

    def lines(self) -> list[str]:
        """What was found, for people."""
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.reasons.most_common())
        where = f"{self.quarantined:,} images{f' ({reasons})' if reasons else ''}"
        if self.counted == "questions":
            return [
                f"input        {self.rows:,} questions",
                f"answered     {self.captions:,} questions about {self.captioned:,} images in {self.objects:,} objects",
                f"unanswered   {self.unanswered:,} questions about {where} in quarantine",
            ]
        return [
            f"input        {self.rows:,} rows",
            f"captioned    {self.captioned:,} images, {self.captions:,} captions in {self.objects:,} objects",
            f"quarantined  {where}",
        ]

    def differ(self, text: str) -> None:
        self.num_differences += 1
        if len(self.differences) < MAX_SHOWN:
            self.differences.append(text)


def committed_names(output: Store, folder: str, verdict: Verdict) -> list[str]:
    """Sorted names of the committed objects; whatever else lies in `folder` or the quarantine is a difference."""
    found = {each: sorted(output.list(each)) for each in (folder, "quarantine")}
    names = []
    for name in found[folder]:
        try:
            parse_part(name)
        except ValueError:
            verdict.differ(f"{folder}/{name} is no object of this job")
        else:
            names.append(name)
    for name in sorted({*found["quarantine"]} - {*names}):
        verdict.differ(f"quarantine/{name} belongs to no {folder} object: its unit was never committed")
    verdict.objects = len(names)
    return names
