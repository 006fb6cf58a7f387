"""A span: the units of one read task, as a Ray Data row."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pipelines.corpus.file import CorpusFile, ReadRange, RowGroups, covering
from pipelines.output.unit import Unit


@dataclass(frozen=True, slots=True)
class SpanRow:
    """The plan of one read task: units of one row group, or of joined small ones, or one unit of image files.

    Units of rows come in the order of their rows. Rows between two of them may be done already.
    """

    units: tuple[Unit, ...]
    row_groups: RowGroups  # only those that hold the units' rows, so that a span's size does not grow with its file
    num_samples: int  # images of the span's first unit to show in the report

    @property
    def rows(self) -> ReadRange:
        """The rows that the corpus has to read for the span."""
        first, last = self.units[0], self.units[-1]
        return ReadRange(first.sources, first.start, last.stop, self.row_groups)

    def to_row(self) -> dict[str, Any]:
        """The span as a Ray Data row with one column of JSON, which grows by the range of each unit alone."""
        first = self.units[0]
        ranges = [(unit.start, unit.stop, *([unit.redo] if unit.redo else [])) for unit in self.units]
        span = {"key": first.key, "sources": first.sources, "ranges": ranges, "num_samples": self.num_samples}
        return {"span": json.dumps({**span, "row_groups": asdict(self.row_groups)})}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "SpanRow":
        """The span that `to_row` wrote."""
        span = json.loads(row["span"])
        key, sources = span["key"], tuple(span["sources"])
        units = tuple(Unit(key, start, stop, sources, *map(tuple, redo)) for start, stop, *redo in span["ranges"])
        groups = span["row_groups"]
        row_groups = RowGroups(**{**groups, "rows": tuple(groups["rows"]), "offsets": tuple(groups["offsets"])})
        return cls(units, row_groups, span["num_samples"])


def with_row_groups(file: CorpusFile, spans: Iterable[Iterable[Unit]]) -> Iterator[tuple[tuple[Unit, ...], RowGroups]]:
    """Yields each span of units of the file with the row groups that hold the span."""
    spans = [tuple(units) for units in spans]
    groups = covering(file, ((units[0].start, units[-1].stop) for units in spans))
    return zip(spans, groups, strict=True)
