"""A span: the units of one read task, as a Ray Data row."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.corpus.file import CorpusFile, ReadRange, RowGroups, covering
from pipelines.output.unit import Unit


@dataclass(frozen=True, slots=True)
class SpanRow:
    """The plan of one read task: consecutive units of one file of rows, or one unit of image files."""

    units: tuple[Unit, ...]
    row_groups: RowGroups  # only those that hold the units' rows, so that a span's size does not grow with its file
    num_samples: int  # images of the span's first unit to show in the report

    @property
    def rows(self) -> ReadRange:
        """The rows that the corpus has to read for the span."""
        first, last = self.units[0], self.units[-1]
        return ReadRange(first.sources, first.start, last.stop, self.row_groups)

    def to_row(self) -> dict[str, Any]:
        """The span as a Ray Data row with one column of JSON."""
        return {"span": json.dumps(asdict(self))}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "SpanRow":
        """The span that `to_row` wrote."""
        span = json.loads(row["span"])
        units = tuple(Unit(**{**unit, "sources": tuple(unit["sources"])}) for unit in span["units"])
        groups = span["row_groups"]
        row_groups = RowGroups(**{**groups, "rows": tuple(groups["rows"]), "offsets": tuple(groups["offsets"])})
        return cls(units, row_groups, span["num_samples"])


def with_row_groups(file: CorpusFile, spans: Iterable[Iterable[Unit]]) -> Iterator[tuple[tuple[Unit, ...], RowGroups]]:
    """Yields each span of units of the file with the row groups that hold the span."""
    spans = [tuple(units) for units in spans]
    groups = covering(file, ((units[0].start, units[-1].stop) for units in spans))
    return zip(spans, groups, strict=True)
