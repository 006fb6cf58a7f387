"""The folder that an export writes to: whole files only, and marks of the pieces that are finished."""

import contextlib
import hashlib
import json
import os
import posixpath
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from pipelines.errors import UserError
from pipelines.export.pieces import Piece
from pipelines.store import Store, in_threads

MARKS = ".export"
_UNFINISHED = f"{MARKS}/tmp"


@dataclass(frozen=True, slots=True)
class Target:
    """Writes files below a folder. A file appears under its name as a whole or not at all."""

    store: Store

    def begin(self) -> None:
        """Removes what a killed export left half written."""
        if self._is_local:
            shutil.rmtree(self.store.join(_UNFINISHED), ignore_errors=True)

    def write(self, name: str, data: bytes) -> None:
        """Writes a small file."""
        with self.stream(name) as stream:
            stream.write(data)

    def write_new(self, name: str, data: bytes, overwrite: bool) -> None:
        """Writes a small file into a folder of the user's.

        Raises:
            UserError: unless `overwrite`, if another file of that name is there.
        """
        if not overwrite:
            with contextlib.suppress(FileNotFoundError):
                if self.store.read(name) == data:
                    return
                raise UserError(
                    f"{self.store.join(name)} is there already and says something else; export.overwrite=true "
                    "replaces such files, export.path=FOLDER writes elsewhere"
                )
        self.write(name, data)

    @contextlib.contextmanager
    def stream(self, name: str) -> Iterator[IO[bytes]]:
        """A stream whose content becomes the file `name` when the block ends without an exception.

        A local file is renamed into its place. Any other store gets it in one upload from a temporary file.
        """
        target = self.store.join(name)
        if not self._is_local:
            with tempfile.NamedTemporaryFile() as spool:
                yield spool  # pyright: ignore[reportReturnType]
                spool.flush()
                self.store.fs.put_file(spool.name, target)
            return
        os.makedirs(self.store.join(_UNFINISHED), exist_ok=True)
        temporary = self.store.join(_UNFINISHED, uuid.uuid4().hex)
        with open(temporary, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())  # before the rename, else a power cut may leave an empty file by that name
        os.makedirs(posixpath.dirname(target), exist_ok=True)
        os.replace(temporary, target)

    def finished(self, pieces: Sequence[Piece], tidy: bool) -> set[str]:
        """Names of the pieces whose mark says that they are written, with the captions that they have now.

        With `tidy`, files of an earlier cut that no piece writes any more are removed, and their marks.
        """
        wanted = {_mark(piece): piece for piece in pieces}
        marks = set(self.store.list(MARKS))
        stale = sorted(marks - wanted.keys())
        current = {_hash(piece.name) for piece in pieces}
        for mark, content in zip(
            stale, in_threads(lambda name: self.store.read(f"{MARKS}/{name}"), stale), strict=True
        ):
            if mark.partition("-")[0] not in current:
                for name in json.loads(content)["shards"] if tidy else ():
                    self.store.delete(name)
            self.store.delete(f"{MARKS}/{mark}")
        return {wanted[mark].name for mark in marks & wanted.keys()}

    def finish(self, piece: Piece, shards: Sequence[str]) -> None:
        """Marks a piece as written. `shards` are files that belong to it alone."""
        described: dict[str, Any] = {"piece": piece.name, "shards": list(shards)}
        self.write(f"{MARKS}/{_mark(piece)}", json.dumps(described).encode())

    def close(self) -> None:
        """Removes the empty folder of unfinished files."""
        self.begin()

    @property
    def _is_local(self) -> bool:
        return "://" not in self.store.path


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:16]


def _mark(piece: Piece) -> str:
    """File of a piece's mark. Its name alone says which piece it is and what was written."""
    return f"{_hash(piece.name)}-{piece.stamp}.json"
