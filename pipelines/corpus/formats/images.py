"""The format of a folder of image files: each file is one row, and its name is its id."""

from collections.abc import Iterator, Sequence

from pipelines.corpus.columns import ColumnChoice, Columns, template_fields
from pipelines.corpus.file import CorpusFile, ReadRange
from pipelines.corpus.format import Format, Found, InStore, Record
from pipelines.corpus.listing import Listing
from pipelines.corpus.suffixes import is_image
from pipelines.errors import UserError
from pipelines.store import Store


def find_files(listing: Listing, names: Sequence[str], choice: ColumnChoice) -> Found:
    """The image files, and no columns.

    Raises:
        UserError: if a key names a column.
    """
    if choice.image != "auto":
        raise UserError(f"input.image_column={choice.image} names a column, but a folder of image files has no columns")
    if fields := [name for template in choice.templates for name in template_fields(template)]:
        raise UserError(f"prompt.template uses the column {fields[0]!r}, but a folder of image files has no columns")
    return Found([CorpusFile(name, listing.sizes[name], tag=listing.versions.get(name, "")) for name in names])


def read_records(
    store: Store, rows: ReadRange, columns: Columns | None, *, max_bytes: int, with_references: bool
) -> Iterator[Record]:
    """Yields one record for each file, which the reader fetches."""
    return (Record(source, source, 0, InStore(source)) for source in rows.sources)


def read_references(
    store: Store, file: CorpusFile, columns: Columns | None, rows: Sequence[int]
) -> dict[int, list[str]]:
    """Empty: a folder of image files has no reference captions."""
    return {}


FORMAT = Format(
    name="images",
    title="image",
    one_image_a_file=True,
    recognises=is_image,
    files=find_files,
    records=read_records,
    references=read_references,
)
