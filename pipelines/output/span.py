"""The plan of one read task, as it stands in a Ray Data row."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.corpus.file import CorpusFile, ReadRange, RowGroups, covering
from pipelines.output.unit import Unit


@dataclass(frozen=True, slots=True)
class SpanRow:
    """Plan of one read task, as it stands in a Ray Data row: consecutive units of one file, or one of image files."""

    units: tuple[Unit, ...]
    row_groups: RowGroups  # those that hold the units' rows: a span's size must not grow with its file
    num_samples: int  # images of the span's first unit to show in the report

    @property
    def rows(self) -> ReadRange:
        """What the corpus has to read for it."""
        first, last = self.units[0], self.units[-1]
        return ReadRange(first.sources, first.start, last.stop, self.row_groups)

    def to_row(self) -> dict[str, Any]:
        return {"span": json.dumps(asdict(self))}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "SpanRow":
        span = json.loads(row["span"])
        units = tuple(Unit(**{**unit, "sources": tuple(unit["sources"])}) for unit in span["units"])
        groups = span["row_groups"]
        row_groups = RowGroups(**{**groups, "rows": tuple(groups["rows"]), "offsets": tuple(groups["offsets"])})
        return cls(units, row_groups, span["num_samples"])


def with_row_groups(file: CorpusFile, spans: Iterable[Iterable[Unit]]) -> Iterator[tuple[tuple[Unit, ...], RowGroups]]:
    """Each span of units of this file with the row groups that it covers."""
    spans = [tuple(units) for units in spans]
    groups = covering(file, ((units[0].start, units[-1].stop) for units in spans))
    return zip(spans, groups, strict=True)
