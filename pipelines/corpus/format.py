"""The interface of a corpus format. formats/__init__.py collects one `Format` for each.

The same code plans, reads, verifies and samples a corpus of every format. To add a format, write a module with a
`FORMAT` in formats/ and name it there.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipelines.corpus.columns import ColumnChoice, Columns
from pipelines.corpus.file import CorpusFile, ReadRange
from pipelines.corpus.listing import Listing
from pipelines.images.decode import Reject
from pipelines.store import Store


@dataclass(frozen=True, slots=True)
class InStore:
    """A file of the corpus that is still to be fetched."""

    name: str  # relative to the corpus


@dataclass(frozen=True, slots=True)
class Record:
    """One row of the corpus, its image still encoded."""

    id: str  # value of the id column, else `source#row`, or the source of a file that is one image
    source: str
    row: int  # index within the source
    data: bytes | str | InStore | Reject | None  # str: an address still to be fetched; None: null in the corpus
    fields: dict[str, Any] = field(default_factory=dict)  # column -> value for the prompt templates; None: null
    references: list[str] = field(default_factory=list)  # empty unless the caller asked for references


@dataclass(frozen=True, slots=True)
class Found:
    """The corpus that a format found in a listing."""

    files: Sequence[CorpusFile]  # with their row groups, in order
    columns: Columns | None = None  # passed on to the format's functions; None for a format without columns
    left_out: Mapping[str, int] = field(default_factory=dict)  # what is no row and no file of the corpus, by reason


class FindFiles(Protocol):
    """Runs once, on the driver."""

    def __call__(self, listing: Listing, names: Sequence[str], choice: ColumnChoice) -> Found:
        """The files of this format with their row groups, in order, and the columns to read.

        Args:
            listing: everything at input.path.
            names: the names of this format's files, at least one, in order.

        Raises:
            UserError: if a file is unusable, a column is missing, or there are no rows at all.
        """
        ...


class ReadRecords(Protocol):
    """Runs in a read task."""

    def __call__(
        self, store: Store, rows: ReadRange, columns: Columns | None, *, max_bytes: int, with_references: bool
    ) -> Iterator[Record]:
        """Yields the records of a range, in order. Memory holds a bounded batch of records, however long the range.

        A record whose image cannot be read carries a `Reject`. A format need not read the data of an image above
        `max_bytes`. An exception fails the units of the range.
        """
        ...


class ReadReferences(Protocol):
    """Runs on the driver, for a sample."""

    def __call__(
        self, store: Store, file: CorpusFile, columns: Columns | None, rows: Sequence[int]
    ) -> dict[int, list[str]]:
        """Reference captions by row, for those of `rows` that have any."""
        ...


@dataclass(frozen=True, slots=True)
class Format:
    """One way to store a corpus in files.

    The callables must be functions of a module: pickle hands them to a read task by name.
    """

    name: str  # the value of input.format
    title: str  # what messages call the files: "Parquet", "image"
    one_image_a_file: bool  # true: a unit is several whole files; false: a unit is rows of one file
    recognises: Callable[[str], bool]  # takes a file's name, relative to the input
    files: FindFiles
    records: ReadRecords
    references: ReadReferences
