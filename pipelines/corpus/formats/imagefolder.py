"""The format of Hugging Face dataset folders: pictures with a metadata file in each folder that names them.

The rows are those of the metadata files (metadata.csv, metadata.jsonl or metadata.parquet); the column `file_name` is
relative to the file's own folder. The rest is that of the file's own format. A metadata file counts as changed with any
picture below its folder, because its rows are what is planned.
"""

import hashlib
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import replace

from pipelines.corpus.columns import ColumnChoice, Columns
from pipelines.corpus.file import CorpusFile, ReadRange
from pipelines.corpus.format import Format, Found, Record
from pipelines.corpus.formats import lines, parquet
from pipelines.corpus.listing import Listing
from pipelines.corpus.suffixes import is_image
from pipelines.errors import UserError
from pipelines.store import Store

NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_NAME = "file_name"


def is_metadata(name: str) -> bool:
    """Whether a file is the metadata of the pictures in its folder."""
    return posixpath.basename(name) in NAMES


def find_files(listing: Listing, names: Sequence[str], choice: ColumnChoice) -> Found:
    """The metadata files with their rows, and the columns to read.

    Raises:
        UserError: as of the files' format, or if the files are of several formats.
    """
    kinds = sorted({posixpath.basename(name) for name in names})
    if len(kinds) > 1:
        raise UserError(f"the metadata files of {listing.store.path} must be of one kind, got {', '.join(kinds)}")
    if choice.image == "auto":
        choice = replace(choice, image=FILE_NAME)
    found = _format_of(names[0]).files(listing, names, choice)
    assert found.columns is not None
    pictures = _pictures(listing, names)
    files = [replace(f, tag=f"{f.tag} {pictures[posixpath.dirname(f.source)]}") for f in found.files]
    return replace(found, files=files, columns=replace(found.columns, folder_relative=True))


def _pictures(listing: Listing, names: Sequence[str]) -> dict[str, str]:
    """For the folder of each metadata file, a hash of what the listing says about the pictures below it."""
    digests = {posixpath.dirname(name): hashlib.sha256() for name in names}
    for name in filter(is_image, listing.sizes):
        folder = posixpath.dirname(name)
        while folder not in digests and folder:
            folder = posixpath.dirname(folder)
        if folder in digests:
            digests[folder].update(
                f"{name}\0{listing.sizes[name]}\0{listing.versions.get(name, '')}\0".encode(errors="surrogateescape")
            )
    return {folder: digest.hexdigest()[:16] for folder, digest in digests.items()}


def read_records(
    store: Store, rows: ReadRange, columns: Columns | None, *, max_bytes: int, with_references: bool
) -> Iterator[Record]:
    """Yields one record for each row, with the address of its picture."""
    read = _format_of(rows.sources[0]).records
    return read(store, rows, columns, max_bytes=max_bytes, with_references=with_references)


def read_references(
    store: Store, file: CorpusFile, columns: Columns | None, rows: Sequence[int]
) -> dict[int, list[str]]:
    """Reference captions by row, for those of `rows` that have any."""
    return _format_of(file.source).references(store, file, columns, rows)


def _format_of(name: str) -> Format:
    return parquet.FORMAT if parquet.is_parquet(name) else lines.CSV if lines.is_csv(name) else lines.JSONL


FORMAT = Format(
    name="imagefolder",
    title="metadata",
    one_image_a_file=False,
    recognises=is_metadata,
    files=find_files,
    records=read_records,
    references=read_references,
)
