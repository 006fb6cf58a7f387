"""Chooses the format of a corpus by the names of its files, and asks where they could be two things.

A corpus is never guessed into a download: img2dataset leaves a Parquet file with the addresses beside every tar shard,
and a folder of downloaded pictures often holds the list of their addresses.
"""

import contextlib
import posixpath
from collections.abc import Mapping, Sequence
from typing import NoReturn

from pipelines.corpus.columns import ColumnChoice
from pipelines.corpus.file import ReadRange, covering
from pipelines.corpus.format import Format, Found
from pipelines.corpus.listing import Listing
from pipelines.errors import UserError
from pipelines.store import scheme_of

PEEKED_ROWS = 20  # rows that tell whether a corpus of addresses points to the web
TABLES, MANIFESTS = ("parquet", "arrow"), ("jsonl", "csv")


def choose_format(listing: Listing, formats: Sequence[Format], choice: ColumnChoice) -> tuple[Format, Found]:
    """The format of a listing, and the corpus that it finds there.

    Args:
        formats: at least one recognises a file; the first of them wins where no rule of `_rivals` speaks.

    Raises:
        UserError: if the files could be two things, or as of the format.
    """
    names = {format.name: files_of(format, listing) for format in formats}
    names = {kind: files for kind, files in names.items() if files}
    if "imagefolder" in names and "images" not in names:  # a list named metadata.* without pictures beside it
        del names["imagefolder"]
    elif "imagefolder" in names:
        listed = set(names["imagefolder"])
        names = {kind: rest for kind, files in names.items() if (rest := _without(kind, files, listed))}
    first, second = _rivals(names)
    if second:
        _ask(listing, first, second, names[second][0])
    chosen = next(format for format in formats if format.name == first)
    if first == "images" and (lists := [kind for kind in MANIFESTS if kind in names]):
        for manifest in (format for format in formats if format.name in lists):
            if _holds_addresses(listing, manifest, names[manifest.name], choice):
                _ask(listing, "images", manifest.name, names[manifest.name][0])
    found = chosen.files(listing, names[first], choice)
    if first in TABLES and "images" in names and _points_to_the_web(listing, chosen, found):
        _ask(listing, first, "images", names["images"][0])
    return chosen, found


def files_of(format: Format, listing: Listing) -> list[str]:
    """Names of the files of a format, in order."""
    return [name for name in listing.sizes if format.recognises(name)]


def _without(kind: str, files: Sequence[str], listed: set[str]) -> list[str]:
    return [name for name in files if kind == "imagefolder" or name not in listed]


def _rivals(names: Mapping[str, Sequence[str]]) -> tuple[str, str]:
    """The format to take, and the one that it could be as well, or an empty string."""
    tables = [kind for kind in TABLES if kind in names]
    if "tar" in names:
        shards = {_stem(name) for name in names["tar"]}
        lone = (kind for kind in tables if any(_stem(name) not in shards for name in names[kind]))
        return "tar", next(lone, "")
    if tables:
        return tables[0], next(iter(tables[1:]), "")
    if "imagefolder" in names:
        return "imagefolder", ""
    if "images" in names:
        return "images", ""
    lists = [kind for kind in MANIFESTS if kind in names]
    if lists:
        return lists[0], next(iter(lists[1:]), "")
    return next(iter(names)), ""


def _stem(name: str) -> str:
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])


def _holds_addresses(listing: Listing, format: Format, names: Sequence[str], choice: ColumnChoice) -> bool:
    """Whether one of the lists beside image files has a column of addresses. A list of labels has none."""
    for name in names:
        with contextlib.suppress(UserError):
            format.files(listing, [name], ColumnChoice(choice.image, "none", "none", ()))
            return True
    return False


def _points_to_the_web(listing: Listing, format: Format, found: Found) -> bool:
    """Whether the first rows of a corpus hold addresses outside it."""
    if found.columns is None or found.columns.kind != "uri":
        return False
    file, stop = found.files[0], min(PEEKED_ROWS, found.files[0].num_rows)
    [groups] = covering(file, [(0, stop)])
    rows = ReadRange((file.source,), 0, stop, groups)
    records = format.records(listing.store, rows, found.columns, max_bytes=2**20, with_references=False)
    return any(isinstance(record.data, str) and scheme_of(record.data) for record in records)


def _ask(listing: Listing, first: str, second: str, example: str) -> NoReturn:
    raise UserError(
        f"input.path {listing.store.path} could be read in two ways, because of {example} and others: set "
        f"input.format={first} or input.format={second}"
    )
