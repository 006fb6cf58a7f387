"""Finds the corpus: its files, their format, and the columns to read. Runs once, on the driver."""

import logging
import posixpath
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from pipelines.corpus.columns import ColumnChoice, Columns
from pipelines.corpus.file import CorpusFile
from pipelines.corpus.format import Format
from pipelines.corpus.formats import FORMATS
from pipelines.corpus.ranges import VERSIONS
from pipelines.errors import UserError
from pipelines.store import STORE_ERRORS, Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Corpus:
    """The files of one format in a folder."""

    store: Store
    files: tuple[CorpusFile, ...]
    format: Format
    columns: Columns | None = None  # passed on to the format's functions; None for a format without columns

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

    `format` is the name of one of `formats`, or `auto` for the first format that recognises a file.

    Raises:
        UserError: if the format is unknown, the path holds no file or no file of the format, a file is damaged, or no
            image column is usable.
    """
    candidates = _candidate_formats(format, formats)
    root, sizes, tags = _list_files(store)
    chosen = _choose_format(candidates, root, sizes)
    choice = ColumnChoice(image_column, id_column, reference_column, tuple(templates))
    files, columns = chosen.files(root, sizes, choice)
    if chosen.one_image_a_file:
        files = [replace(file, tag=tags[file.source]) for file in files]
    corpus = Corpus(root, tuple(files), chosen, columns)
    shown_format = f"{format}, found {chosen.name}" if format == "auto" else format
    logger.info("input.format=%s: %d files, %d rows in %s", shown_format, len(corpus.files), corpus.num_rows, root.path)
    return corpus


def _candidate_formats(name: str, formats: Sequence[Format]) -> Sequence[Format]:
    """The formats that `input.format=name` allows."""
    candidates = [candidate for candidate in formats if name in ("auto", candidate.name)]
    if not candidates:
        known = ", ".join(["auto", *(candidate.name for candidate in formats)])
        raise UserError(f"input.format must be one of {known}, got {name!r}")
    return candidates


def _choose_format(candidates: Sequence[Format], root: Store, sizes: Mapping[str, int]) -> Format:
    """The first candidate that recognises a file."""
    for candidate in candidates:
        if any(map(candidate.recognises, sizes)):
            return candidate
    titles = " or ".join(candidate.title for candidate in candidates)
    examples = ", ".join(list(sizes)[:3])
    raise UserError(f"input.path must hold {titles} files, found {len(sizes)} others in {root.path}: {examples}")


def _list_files(store: Store) -> tuple[Store, dict[str, int], dict[str, str]]:
    """The folder that sources are relative to, and the size in bytes and the tag of every file by its name, sorted.

    Names with a part that begins with a dot or an underscore are left out, as Spark and Hive do.
    """
    fs, path = store.fs, store.root
    try:
        # A path that exists under its own name is no glob, even if it holds a bracket.
        if any(mark in path for mark in "*?[") and not fs.exists(path):
            prefix = re.split(r"[*?\[]", path, maxsplit=1)[0]
            root = prefix.rpartition("/")[0] or "/"
            matches = cast(dict[str, Any], fs.glob(path, detail=True))
            # A symbolic link has a type of its own, so the check is against "directory" and not for "file".
            found = {p: info for p, info in matches.items() if info["type"] != "directory"}
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
    tags = {posixpath.relpath(p, root): _tag(info) for p, info in found.items()}
    return Store(scheme + root, store.endpoint_url, store.anonymous), names, tags


def _tag(info: Mapping[str, Any]) -> str:
    """What a listing says of a file that changes with its content."""
    return next((str(info[name]) for name in VERSIONS if info.get(name) is not None), "")
