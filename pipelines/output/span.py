"""The plan of one read task, as it stands in a Ray Data row."""

import json
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.output.unit import Unit


@dataclass(frozen=True, slots=True)
class SpanRow:
    """Plan of one read task, as it stands in a Ray Data row."""

    units: tuple[Unit, ...]
    row_groups: tuple[int, ...]  # rows of each row group of the file; empty for image files
    num_samples: int  # images of the span's first unit to show in the report

    def to_row(self) -> dict[str, Any]:
        return {"span": json.dumps(asdict(self))}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "SpanRow":
        span = json.loads(row["span"])
        units = tuple(Unit(**{**unit, "sources": tuple(unit["sources"])}) for unit in span["units"])
        return cls(units, tuple(span["row_groups"]), span["num_samples"])
