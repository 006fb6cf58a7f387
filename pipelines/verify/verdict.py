"""The result of verifying an output."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from pipelines.output.unit import parse_part
from pipelines.store import Store

MAX_SHOWN = 20  # differences that keep their text; all differences are counted


@dataclass(slots=True)
class Verdict:
    """Counts of the output's rows, images and captions, and the differences from what the output must hold."""

    counted: Literal["rows", "questions"] = "rows"
    rows: int = 0  # rows of the input up to input.limit, or questions
    captioned: int = 0  # images with captions or answers
    captions: int = 0  # one for each prompt of an image, or answers
    unanswered: int = 0  # questions about images in quarantine
    parts: int = 0  # committed
    reasons: Counter[str] = field(default_factory=Counter)  # reason -> quarantined images
    num_differences: int = 0
    differences: list[str] = field(default_factory=list)  # the first MAX_SHOWN
    broken: dict[str, str] = field(default_factory=dict)  # part that the job has to make anew -> its file and rows
    orphans: list[str] = field(default_factory=list)  # parts of the quarantine whose unit was never committed

    @property
    def quarantined(self) -> int:
        return self.reasons.total()

    def lines(self) -> list[str]:
        """The counts as lines of text for people."""
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in self.reasons.most_common())
        where = f"{self.quarantined:,} images{f' ({reasons})' if reasons else ''}"
        if self.counted == "questions":
            return [
                f"input        {self.rows:,} questions",
                f"answered     {self.captions:,} questions about {self.captioned:,} images in {self.parts:,} parts",
                f"unanswered   {self.unanswered:,} questions about {where} in quarantine",
            ]
        return [
            f"input        {self.rows:,} rows",
            f"captioned    {self.captioned:,} images, {self.captions:,} captions in {self.parts:,} parts",
            f"quarantined  {where}",
        ]

    def differ(self, text: str) -> None:
        """Counts a difference, and keeps its text if it is among the first MAX_SHOWN."""
        self.num_differences += 1
        if len(self.differences) < MAX_SHOWN:
            self.differences.append(text)

    def condemn(self, name: str, where: str, text: str) -> None:
        """Counts a difference for which the part `name`, with its file and rows `where`, has to be made anew."""
        self.broken[name] = where
        self.differ(text)


def committed_names(output: Store, folder: str, verdict: Verdict) -> tuple[list[str], frozenset[str]]:
    """Sorted names of the committed parts, and those with a quarantine.

    Any other file in `folder` or in the quarantine is a difference.
    """
    files = {listed: sorted(output.list(listed)) for listed in (folder, "quarantine")}
    names = []
    for name in files[folder]:
        try:
            parse_part(name)
        except ValueError:
            verdict.differ(f"{folder}/{name} is not a part of this job")
        else:
            names.append(name)
    for name in sorted({*files["quarantine"]} - {*names}):
        verdict.differ(f"quarantine/{name} belongs to no part in {folder}: its unit was never committed")
        if name.startswith("part-"):
            verdict.orphans.append(name)
    verdict.parts = len(names)
    return names, frozenset(files["quarantine"]) & {*names}
