"""What differs between the formats of a corpus: one `Format` each, collected in formats.py.

A corpus of a format is planned, read, verified and sampled by the same code as every other. To add a format, write a
module with a `FORMAT` and name it in formats.py.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipelines.corpus.columns import ColumnChoice, Columns
from pipelines.corpus.file import CorpusFile, ReadRange
from pipelines.images.decode import Reject
from pipelines.store import Store


@dataclass(frozen=True, slots=True)
class Record:
    """One row of the corpus, its image still encoded."""

    id: str  # the corpus's own key, else `source#row`, or the source of a file that is one image
    source: str
    row: int  # in the source
    data: bytes | str | Reject | None  # str: a URI still to be fetched; None: null in the corpus
    fields: dict[str, Any] = field(default_factory=dict)  # of the prompt templates, by column; None: null
    references: list[str] = field(default_factory=list)  # empty unless they were asked for


class FindFiles(Protocol):
    """Runs once, on the driver."""

    def __call__(
        self, store: Store, sizes: Mapping[str, int], choice: ColumnChoice
    ) -> tuple[Sequence[CorpusFile], Columns | None]:
        """The files of this format with their rows and natural cuts, in order, and the columns to read.

        Args:
            sizes: name -> bytes of every file at input.path, in order; at least one is recognised.

        Raises:
            UserError: a file that cannot be used, a column that is not there, or no rows at all.
        """
        ...


class ReadRecords(Protocol):
    """Runs in a read task."""

    def __call__(
        self, store: Store, rows: ReadRange, columns: Columns | None, *, max_bytes: int, with_references: bool
    ) -> Iterator[Record]:
        """The records of a range, in order. Memory holds a bounded batch of them, whatever the range.

        An image that cannot be had is a record with a `Reject`. Of images above `max_bytes` a format need not read
        the data. What is raised fails the units of the range.
        """
        ...


class ReadReferences(Protocol):
    """Runs on the driver, for a sample."""

    def __call__(
        self, store: Store, file: CorpusFile, columns: Columns | None, rows: Sequence[int]
    ) -> dict[int, list[str]]:
        """Row -> reference captions, of those of the rows that have some."""
        ...


@dataclass(frozen=True, slots=True)
class Format:
    """A way for a corpus to lie in files. The functions are of a module, since a read task imports them by name."""

    name: str  # the value of input.format
    title: str  # of its files in messages: "Parquet", "image"
    one_image_a_file: bool  # a unit is several whole files; else it is rows of one file
    recognises: Callable[[str], bool]  # by a file's name, relative to the input
    files: FindFiles
    records: ReadRecords
    references: ReadReferences
