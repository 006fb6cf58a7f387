"""The format of a folder of image files: each file is one row, and its name is its id."""

import logging
from collections.abc import Iterator, Mapping, Sequence

from pipelines.corpus.columns import ColumnChoice, Columns, template_fields
from pipelines.corpus.file import CorpusFile, ReadRange
from pipelines.corpus.format import Format, InStore, Record
from pipelines.errors import UserError
from pipelines.store import Store

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2")
IMAGE_SUFFIXES += (".avif", ".heic", ".heif", ".ico", ".svg")  # not decoded: such a file becomes a quarantine row


def is_image(name: str) -> bool:
    """Whether a file's name ends in the suffix of an image format."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def find_files(
    store: Store, sizes: Mapping[str, int], choice: ColumnChoice
) -> tuple[Sequence[CorpusFile], Columns | None]:
    """The image files, and no columns.

    Raises:
        UserError: if a prompt template uses a column.
    """
    files = [CorpusFile(name, size) for name, size in sizes.items() if is_image(name)]
    if names := [name for template in choice.templates for name in template_fields(template)]:
        raise UserError(f"prompt.template uses the column {names[0]!r}, but a folder of image files has no columns")
    if skipped := len(sizes) - len(files):
        logger.warning("%d files without an image suffix are no part of the corpus", skipped)
    return files, None


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
