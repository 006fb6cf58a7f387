"""Finding the corpus: its files, their format, and the columns that matter. Runs once, on the driver."""

import logging
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pipelines.corpus.columns import ColumnChoice, Columns
from pipelines.corpus.file import CorpusFile
from pipelines.corpus.format import Format
from pipelines.corpus.formats import FORMATS
from pipelines.errors import UserError
from pipelines.store import STORE_ERRORS, Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Files of one format in a folder."""

    store: Store
    files: tuple[CorpusFile, ...]
    format: Format
    columns: Columns | None = None  # to be handed to the format, which may have none

    @property
    def num_rows(self) -> int:
        return sum(file.num_rows for file in self.files)


def find_corpus(
    store: Store,
    *,
    image_column: str,
    id_column: str,
    reference_column: str,
    templates: Sequence[str],
    format: str = "auto",
    formats: Sequence[Format] = FORMATS,
) -> Corpus:
    """The corpus at `store.path`: a file, a glob, or a folder (searched recursively).

    `format` is the name of one of `formats`, or auto for the first of them that recognises a file.

    Raises:
        UserError: no such format, nothing there, no file of the format, a damaged file, or no usable image column.
    """
    tried = _tried(format, formats)
    root, sizes = _list(store)
    chosen = _choose_format(tried, root, sizes)
    choice = ColumnChoice(image_column, id_column, reference_column, tuple(templates))
    files, columns = chosen.files(root, sizes, choice)
    corpus = Corpus(root, tuple(files), chosen, columns)
    found = f"{format}, found {chosen.name}" if format == "auto" else format
    logger.info("input.format=%s: %d files, %d rows in %s", found, len(corpus.files), corpus.num_rows, root.path)
    return corpus


def _tried(name: str, formats: Sequence[Format]) -> Sequence[Format]:
    """The formats that a file may be of."""
    tried = [each for each in formats if name in ("auto", each.name)]
    if not tried:
        known = ", ".join(["auto", *(each.name for each in formats)])
        raise UserError(f"input.format must be one of {known}, got {name!r}")
    return tried


def _choose_format(tried: Sequence[Format], root: Store, sizes: Mapping[str, int]) -> Format:
    for each in tried:
        if any(map(each.recognises, sizes)):
            return each
    titles = " or ".join(each.title for each in tried)
    shown = ", ".join(list(sizes)[:3])
    raise UserError(f"input.path must hold {titles} files, found {len(sizes)} others in {root.path}: {shown}")


def _list(store: Store) -> tuple[Store, dict[str, int]]:
    """The folder that sources are relative to, and relative name -> size of every file below it that is meant."""
    fs, path = store.fs, store.root
    try:
        if any(mark in path for mark in "*?[") and not fs.exists(path):
            fixed = re.split(r"[*?\[]", path, maxsplit=1)[0]
            root = fixed.rpartition("/")[0] or "/"
            matches = cast(dict[str, Any], fs.glob(path, detail=True))
            found = {p: info for p, info in matches.items() if info["type"] != "directory"}  # links are files too
        elif fs.isfile(path):
            root, found = posixpath.dirname(path), {path: fs.info(path)}
        else:
            root, found = path, cast(dict[str, Any], fs.find(path, detail=True))
    except STORE_ERRORS as error:
        raise UserError(f"input.path {store.path} cannot be listed: {error}") from error
    names = {posixpath.relpath(p, root): info["size"] for p, info in found.items()}
    names = {
        name: size for name, size in sorted(names.items()) if not any(p.startswith((".", "_")) for p in name.split("/"))
    }
    if not names:
        raise UserError(
            f"input.path must be a Parquet file, a glob or a folder with images, found nothing at {store.path!r}"
        )
    scheme = "s3://" if store.is_s3 else ""
    return Store(scheme + root, store.endpoint_url, store.anonymous), names
