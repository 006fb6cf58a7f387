"""Lists what lies at input.path, and counts what can be no part of any corpus. Runs once, on the driver."""

import glob
import os
import posixpath
import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import Any, cast

from pipelines.corpus.suffixes import is_image
from pipelines.errors import UserError
from pipelines.store import STORE_ERRORS, Store

OUTPUT_MARK = "fingerprint.json"  # `output.fingerprint.FILE`: the folder that holds it is an output of this package
HIDDEN = "hidden names"
INTERNAL = "names of other programs, which begin with _"
MINE = "files of an earlier output"
TWICE = "links to a folder that is read already"
OUTSIDE = "links out of the corpus, which input.allow_paths allows"
SPECIAL = "neither files nor folders"
VERSION_KEYS = ("ETag", "etag", "md5Hash", "generation", "blob_id", "mtime", "LastModified", "last_modified")


@dataclass(frozen=True, slots=True)
class Listing:
    """The files at input.path."""

    store: Store  # the folder that names are relative to
    sizes: Mapping[str, int]  # bytes of each file by its name, sorted by name
    versions: Mapping[str, str] = field(default_factory=dict)  # of each file, what changes with its content
    left_out: Mapping[str, int] = field(default_factory=dict)  # number of names that are no candidates, by reason
    is_one_file: bool = False  # input.path names a file
    cache: Store | None = None  # where indices of files may be kept


def list_files(store: Store, cache: Store | None = None, allow_paths: Sequence[str] = ()) -> Listing:
    """The files at `store.path`: a file, a glob, or a folder, which is searched through.

    Links are followed within the folder and to `allow_paths`. Pipes, sockets and devices are left out.

    Raises:
        UserError: if the path cannot be listed, or holds nothing.
    """
    fs, path = store.fs, store.root
    left_out: Counter[str] = Counter()
    is_one_file = False
    try:
        # A path that exists under its own name is no glob, even if it holds a bracket.
        if any(mark in path for mark in "*?[{") and not fs.exists(path):
            root, found = _match(store, path)
            if store.is_local:
                found = _without_special(found, left_out, _Bounds(root, allow_paths))
        elif fs.isfile(store.join()):
            info = _exact(store, path, fs.info(store.join()))
            root, found, is_one_file = posixpath.dirname(path), {path: info}, True
        elif store.is_local and os.path.isdir(path):
            root, found = path, dict(_walk(path, left_out, _Bounds(path, allow_paths)))
        else:
            root, found = path, cast(dict[str, Any], fs.find(path, detail=True))
    except STORE_ERRORS as error:
        raise UserError(f"input.path {store.path} cannot be listed: {error}") from error
    names = _relative(root, found)
    sizes = {name: names[name].get("size") or 0 for name in sorted(names)}
    if not is_one_file:
        sizes = _without_others(store, sizes, left_out)
    if not sizes:
        left = "".join(f", {count} {reason}" for reason, count in left_out.items())
        raise UserError(
            "input.path must be a Parquet file, a glob or a folder with images (tar shards, Parquet, image files ...), "
            f"found nothing at {store.path!r}{left}"
        )
    versions = {name: version_of(names[name]) for name in sizes}
    folder = replace(store, path=store.address(root))
    return Listing(folder, sizes, versions, left_out, is_one_file, cache)


def version_of(info: Mapping[str, Any]) -> str:
    """What a store says about a file that changes with its content: an ETag, a generation or a time."""
    return next((str(info[name]) for name in VERSION_KEYS if info.get(name)), "")


class _Bounds:
    """Where links may lead: below the corpus, below the paths that are allowed, and to the blobs of a hub cache."""

    def __init__(self, root: str, allow_paths: Sequence[str]):
        real = os.path.realpath(root)
        hub = [str(each.parent / "blobs") for each in PurePosixPath(real).parents if each.name == "snapshots"]
        self.folders = [real, *hub, *(os.path.realpath(path) for path in allow_paths if "://" not in path)]

    def hold(self, path: str) -> bool:
        real = os.path.realpath(path)
        return any(real == folder or real.startswith(folder.rstrip("/") + "/") for folder in self.folders)


def _walk(root: str, left_out: Counter[str], bounds: _Bounds) -> Iterator[tuple[str, Any]]:
    """Yields (path, info) of the files below a local folder. Reads each folder once, under its own name if it has one.

    Without this, a few links that lead to each other make a name of any length, or two to the power of their number.
    """
    read: set[tuple[int, int]] = set()
    folders, linked = [root], deque[str]()
    while folders or linked:
        folder = folders.pop() if folders else linked.popleft()
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in read:
            left_out[TWICE] += 1
            continue
        read.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda each: each.name):
                if entry.is_symlink() and (reason := _reason(entry.path, bounds)):
                    left_out[reason] += 1
                elif entry.is_dir():
                    (linked if entry.is_symlink() else folders).append(entry.path)
                elif entry.is_file():
                    status = entry.stat()
                    yield entry.path, {"size": status.st_size, "mtime": status.st_mtime_ns}
                elif entry.is_symlink():  # to nowhere: the format refuses the file, or quarantines it
                    yield entry.path, {"size": 0}
                else:
                    left_out[SPECIAL] += 1


def _reason(path: str, bounds: _Bounds) -> str | None:
    """Why a link, or what lies behind one, is no part of the corpus; None if it is one, or leads to nowhere."""
    if os.path.exists(path) and not bounds.hold(path):
        return OUTSIDE
    return SPECIAL if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)) else None


def _without_special(found: Mapping[str, Any], left_out: Counter[str], bounds: _Bounds) -> dict[str, Any]:
    """The local files of a glob that are files, and lie where links may lead."""
    reasons = {path: _reason(path, bounds) for path in found}  # some folder above it may be a link
    left_out.update(reason for reason in reasons.values() if reason)
    return {path: info for path, info in found.items() if not reasons[path]}


def _exact(store: Store, path: str, info: Mapping[str, Any]) -> Mapping[str, Any]:
    """With the time of a local file in nanoseconds, as `_walk` tells it: fsspec rounds it to a float."""
    return {**info, "mtime": os.stat(path).st_mtime_ns} if store.is_local and os.path.exists(path) else info


def _match(store: Store, path: str) -> tuple[str, dict[str, Any]]:
    """The fixed folder of a glob, and the files that the glob matches. Braces are alternatives: {a,b}."""
    fixed, pattern = _fixed_part(store, path)
    found: dict[str, Any] = {}
    for each in _expand_braces(pattern):
        matches = cast(dict[str, Any], store.fs.glob(f"{glob.escape(fixed)}/{each}", detail=True))
        found |= {name: _exact(store, name, info) for name, info in matches.items() if info["type"] != "directory"}
    # The folder of names is the last one without a mark, whatever the alternatives are.
    return fixed or "/", found


def _fixed_part(store: Store, path: str) -> tuple[str, str]:
    """The longest folder at the start of a glob that has no mark or that exists under its own name, and the rest."""
    parts = path.split("/")
    for i, part in enumerate(parts):
        is_last, has_mark = i == len(parts) - 1, any(mark in part for mark in "*?[{")
        if has_mark and (is_last or not store.fs.exists("/".join(parts[: i + 1]))):
            return "/".join(parts[:i]), "/".join(parts[i:])
    return "/".join(parts[:-1]), parts[-1]


def _expand_braces(pattern: str) -> list[str]:
    match = re.search(r"\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    heads = (pattern[: match.start()] + choice + pattern[match.end() :] for choice in match[1].split(","))
    return [each for head in heads for each in _expand_braces(head)]


def _relative(root: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The infos by name below `root`. A name is what follows the root, byte for byte; keys of folders are no files."""
    prefix = root.rstrip("/") + "/"
    return {
        path.removeprefix(prefix): info
        for path, info in found.items()
        if info.get("type") != "directory" and not path.endswith("/")
    }


def _without_others(store: Store, sizes: dict[str, int], left_out: Counter[str]) -> dict[str, int]:
    """The files without hidden ones, those of other programs, and those of outputs of this package.

    Raises:
        UserError: if the folder itself is such an output.
    """
    outputs = tuple(name.removesuffix(OUTPUT_MARK) for name in sizes if f"/{name}".endswith(f"/{OUTPUT_MARK}"))
    if "" in outputs:
        raise UserError(f"input.path {store.path} is the output of a job of this package; an input lies elsewhere")
    kept = {}
    for name, size in sizes.items():
        parts = name.split("/")
        if outputs and name.startswith(outputs):
            left_out[MINE] += 1
        elif any(part.startswith(".") and part not in (".", "..") for part in parts):  # a key may hold both
            left_out[HIDDEN] += 1
        # Spark, Hive and Delta name their own files so; cameras name pictures so.
        elif any(part.startswith("_") for part in parts) and not is_image(name):
            left_out[INTERNAL] += 1
        else:
            kept[name] = size
    return kept
