"""A file of the corpus as planning sees it, and the part of it that one read task asks for."""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """A file of rows, with its natural cuts, or a file that is one image (`row_groups` empty).

    A row group is a stretch of rows that a reader reads from its beginning: a row group of Parquet, or the rows between
    two places at which a reader may start.
    """

    source: str  # relative to the input, with forward slashes
    size: int  # bytes
    row_groups: tuple[int, ...] = ()  # rows of each
    offsets: tuple[int, ...] = ()  # byte at which each row group begins, and the last ends; empty: the file itself says

    @property
    def num_rows(self) -> int:
        return sum(self.row_groups) if self.row_groups else 1


@dataclass(frozen=True, slots=True)
class RowGroups:
    """Consecutive row groups of a file; none of a file that is one image."""

    first: int = 0  # number of the first one in the file
    start: int = 0  # row at which the first one begins
    rows: tuple[int, ...] = ()  # of each
    offsets: tuple[int, ...] = ()  # as `CorpusFile.offsets`, of these row groups alone


@dataclass(frozen=True, slots=True)
class ReadRange:
    """Rows [start, stop) of one file, or whole image files `sources[start:stop]` with start 0."""

    sources: tuple[str, ...]
    start: int
    stop: int
    groups: RowGroups  # those that hold the rows, perhaps with others around them


def covering(file: CorpusFile, ranges: Iterable[tuple[int, int]]) -> Iterator[RowGroups]:
    """For each range [start, stop) of rows of the file, the row groups that hold it and no others."""
    ends = list(accumulate(file.row_groups))  # once a file: a file may have as many ranges as row groups
    for start, stop in ranges:
        first, last = bisect_right(ends, start), bisect_right(ends, stop - 1)
        rows = file.row_groups[first : last + 1]
        yield RowGroups(first, ends[first] - rows[0], rows, file.offsets[first : last + 2])
