"""A file of the corpus as planning sees it, and the range of its rows that one read task asks for."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """A file of rows with its row groups, or a file that is one image (`row_groups` is empty).

    A row group is a stretch of rows whose first row is the only place to start reading: a row group of Parquet, or the
    rows between two places at which a reader may start.
    """

    source: str  # relative to the input, with forward slashes
    size: int  # bytes
    row_groups: tuple[int, ...] = ()  # number of rows of each
    offsets: tuple[int, ...] = ()  # byte where each row group begins, then where the last ends; empty: see the file
    tag: str = ""  # changes with the content, also at equal size: a hash of the footer, an ETag, a time of change

    @property
    def num_rows(self) -> int:
        return sum(self.row_groups) if self.row_groups else 1


@dataclass(frozen=True, slots=True)
class RowGroups:
    """Consecutive row groups of a file. A file that is one image has none."""

    first: int = 0  # index of the first row group in the file
    start: int = 0  # row of the file at which the first row group begins
    rows: tuple[int, ...] = ()  # number of rows of each
    offsets: tuple[int, ...] = ()  # `CorpusFile.offsets` of these row groups alone


@dataclass(frozen=True, slots=True)
class ReadRange:
    """Rows [start, stop) of one file, or whole image files `sources[start:stop]` with start 0."""

    sources: tuple[str, ...]
    start: int
    stop: int
    groups: RowGroups  # row groups that hold the rows; further row groups may surround them


def covering(file: CorpusFile, ranges: Iterable[tuple[int, int]]) -> Iterator[RowGroups]:
    """Yields, for each range [start, stop) of rows of the file, exactly the row groups that hold the range."""
    # Computed once for all ranges: a file may have as many ranges as row groups, and tens of thousands of both.
    ends = list(accumulate(file.row_groups))
    for start, stop in ranges:
        first, last = bisect_right(ends, start), bisect_right(ends, stop - 1)
        rows = file.row_groups[first : last + 1]
        yield RowGroups(first, ends[first] - rows[0], rows, file.offsets[first : last + 2])
