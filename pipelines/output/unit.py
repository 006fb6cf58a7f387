"""Units of work: how rows are cut into units, how the part of a unit is named, and which rows are left to do.

A unit is a range of rows of one file, or a list of image files. The name of its part is a pure function of the file,
the range and the fingerprint of the configuration, and spells out the range. So one LIST of the output tells which rows
are done, whatever size the units of earlier runs had. The rows left to do are the planned rows minus the committed
ranges: an image that has a caption never gets a second one.

The corpus is cut before anything is taken out, so a commit never moves the boundaries of another unit. Two plans of one
configuration that are made at different times have the same units, without those committed in between.
"""

import hashlib
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter

from pipelines.corpus.file import CorpusFile

SPAN_UNITS = 8  # least units of a span, if its row group has as many
REREAD_BYTES = 1024  # bytes a row that may be read once more than needed, so that a row group is read in parallel


@dataclass(frozen=True, slots=True)
class Unit:
    """Rows [start, stop) of `sources[0]`, or whole image files `sources[start:stop]` with start 0."""

    key: str  # 12 hex digits that stand for the files and the fingerprint
    start: int
    stop: int
    sources: tuple[str, ...]
    redo: tuple[int, ...] = ()  # of a committed unit, the positions of the rows that are tried again; empty: all rows

    @property
    def name(self) -> str:
        return f"{self.key}-{self.start:09d}-{self.stop:09d}"

    @property
    def part(self) -> str:
        """File name of the part that commits the unit, and of its part in the quarantine folder."""
        return f"part-{self.name}.parquet"

    @property
    def num_images(self) -> int:
        """Images that this run works on."""
        return len(self.redo) or self.stop - self.start

    @property
    def where(self) -> str:
        """The unit for people: its file with its rows, or its files."""
        first, *others = self.sources
        if others:
            return f"{first} to {others[-1]}"
        return f"{first}, " + (
            f"row {self.start}" if self.stop == self.start + 1 else f"rows {self.start} to {self.stop - 1}"
        )


def unit_key(files: Iterable[CorpusFile], fingerprint: str) -> str:
    """12 hex digits: a hash of the files' relative paths, sizes and tags and of the configuration's fingerprint."""
    digest = hashlib.sha256(fingerprint.encode())
    for file in files:
        digest.update(f"\0{file.source}\0{file.size}\0{file.tag}".encode())
    return digest.hexdigest()[:12]


def parse_part(name: str) -> tuple[str, int, int]:
    """(key, start, stop) of a part's name `part-<key>-<start>-<stop>.parquet`.

    Raises:
        ValueError: if the name does not have this form.
    """
    match = re.fullmatch(r"part-([0-9a-f]+)-(\d+)-(\d+)\.parquet", name)
    if match is None:
        raise ValueError(f"an output part must be named part-<key>-<start>-<stop>.parquet, got {name!r}")
    return match[1], int(match[2]), int(match[3])


def plan_rows(
    file: CorpusFile, fingerprint: str, num_images: int, stop: int, done: list[tuple[int, int]]
) -> list[list[Unit]]:
    """Cuts rows [0, stop) of a file, without the ranges in `done`, into spans: lists of units that one task reads.

    Consecutive small row groups are joined to one unit of at most `num_images` rows. A row group larger than a unit is
    cut evenly. A reader cannot start inside a row group, so the units of one share one read. Only where the rows are
    small, as addresses are, several reads share a row group: each but the first reads rows that it does not need.

    The cuts depend on neither `stop` nor `done`. Of a unit that `done` covers in part, each piece left is a unit.
    """
    key, done = unit_key([file], fingerprint), _united(done)
    num_reads = 1 + 2 * REREAD_BYTES * file.num_rows // max(1, file.size)  # on average, each reads half a row group
    spans = []
    for group in _cut(file.row_groups, num_images):
        cuts = _even(*group, num_images)
        left = [Unit(key, a, b, (file.source,)) for cut in cuts for a, b in _subtract(*cut, stop, done)]
        length = max(SPAN_UNITS, math.ceil(len(left) / num_reads))
        spans += [left[i : i + length] for i in range(0, len(left), length)]
    return spans


def plan_images(files: list[CorpusFile], fingerprint: str, num_images: int) -> list[Unit]:
    """Units of `num_images` consecutive files each; the last may have fewer."""
    chunks = (files[i : i + num_images] for i in range(0, len(files), num_images))
    return [Unit(unit_key(c, fingerprint), 0, len(c), tuple(f.source for f in c)) for c in chunks]


def split_unit(unit: Unit, files: Mapping[str, CorpusFile], fingerprint: str) -> list[Unit]:
    """The unit's images as units of one image each, to find the image that kills its process.

    `files` are the corpus's files by name.
    """
    if len(unit.sources) == 1:  # rows of one file, or one image file, for which the result is the unit itself
        return [Unit(unit.key, row, row + 1, unit.sources) for row in range(unit.start, unit.stop)]
    return plan_images([files[source] for source in unit.sources], fingerprint, 1)


def _cut(row_groups: tuple[int, ...], num_images: int) -> Iterator[tuple[int, int]]:
    """Yields ranges of rows, each one row group or several consecutive ones that fit into one unit together."""
    start = stop = 0
    for rows in row_groups:
        if stop > start and stop - start + rows > num_images:
            yield start, stop
            start = stop
        stop += rows
    if stop > start:
        yield start, stop


def _united(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same rows as sorted ranges that do not overlap."""
    united: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if united and start < united[-1][1]:
            united[-1] = united[-1][0], max(stop, united[-1][1])
        else:
            united.append((start, stop))
    return united


def _subtract(start: int, stop: int, end: int, done: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yields the pieces of [start, stop) below `end` that no range of `done` (sorted, without overlaps) covers."""
    stop = min(stop, end)
    for i in range(bisect_right(done, start, key=itemgetter(1)), len(done)):
        a, b = done[i]
        if a >= stop:
            break
        if a > start:
            yield start, a
        start = b
    if start < stop:
        yield start, stop


def _even(start: int, stop: int, num_images: int) -> Iterator[tuple[int, int]]:
    """Yields [start, stop) in the fewest pieces of at most `num_images` rows, with sizes that differ by at most 1."""
    pieces = math.ceil((stop - start) / num_images)
    for i in range(pieces):
        yield start + (stop - start) * i // pieces, start + (stop - start) * (i + 1) // pieces
