"""Local folders and S3 prefixes behind one small interface, picklable so that tasks can open them anywhere."""

import contextlib
import json
import os
import posixpath
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import fsspec
from botocore.exceptions import BotoCoreError
from fsspec.implementations.local import LocalFileSystem

THREADS, AHEAD = 16, 64

In = TypeVar("In")
Out = TypeVar("Out")

STORE_ERRORS = (OSError, ValueError, BotoCoreError)
"""What a store raises that is not there, not open to us or wrongly addressed. No answer and no credentials on S3 are
BotoCoreErrors; answers that refuse are OSErrors."""


@dataclass(frozen=True, slots=True)
class Store:
    """A folder: an absolute local path or `s3://bucket/prefix`, and how to reach it."""

    path: str
    endpoint_url: str | None = None
    anonymous: bool = False

    @property
    def is_s3(self) -> bool:
        return self.path.startswith("s3://")

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """The file system, without a listings cache: another process may write what this one lists."""
        if not self.is_s3:
            return LocalFileSystem()
        options: dict[str, Any] = {"anon": self.anonymous, "use_listings_cache": False}
        if self.endpoint_url:
            options["endpoint_url"] = self.endpoint_url
        return fsspec.filesystem("s3", **options)

    @property
    def root(self) -> str:
        """The path as the file system names it."""
        return self.path.removeprefix("s3://").rstrip("/") if self.is_s3 else self.path

    def join(self, *parts: str) -> str:
        return posixpath.join(self.root, *parts)

    def read(self, name: str) -> bytes:
        return cast(bytes, self.fs.cat_file(self.join(name)))

    def exists(self, name: str) -> bool:
        return self.fs.exists(self.join(name))

    def write(self, name: str, data: bytes) -> None:
        """Writes the object at once or not at all: one PUT on S3, temporary file and rename locally."""
        target = self.join(name)
        if self.is_s3:
            self.fs.pipe_file(target, data)
            return
        folder, leaf = posixpath.split(target)
        os.makedirs(folder, exist_ok=True)
        temporary = posixpath.join(folder, f".{leaf}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with open(temporary, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, target)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise

    def delete(self, name: str) -> None:
        """Removes the object; fine if there is none."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.join(name))

    def list(self, folder: str) -> dict[str, int]:
        """Name -> size in bytes of the objects directly in `folder`; empty if there is no such folder."""
        target = self.join(folder)
        try:
            entries = self.fs.ls(target, detail=True)
        except FileNotFoundError:
            return {}
        files = (e for e in entries if e["type"] == "file")
        return {
            posixpath.basename(e["name"]): e["size"] for e in files if not posixpath.basename(e["name"]).startswith(".")
        }

    def folders(self, folder: str) -> tuple[str, ...]:
        """Names of the folders directly in `folder`; empty if there is no such folder."""
        try:
            entries = self.fs.ls(self.join(folder), detail=True)
        except FileNotFoundError:
            return ()
        return tuple(posixpath.basename(e["name"].rstrip("/")) for e in entries if e["type"] == "directory")

    def remove(self, folder: str) -> None:
        """Removes a folder with everything in it; fine if there is none."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.join(folder), recursive=True)


def make_store(path: str, *, endpoint_url: str | None = None, anonymous: bool = False) -> Store:
    """A `Store` for `path`; local paths become absolute, since workers may run in another folder."""
    if path.startswith("s3://"):
        return Store(path.rstrip("/"), endpoint_url, anonymous)
    return Store(os.path.abspath(os.path.expanduser(path.removeprefix("file://"))))


def read_json(store: Store, name: str) -> Any:
    """The object's content; None if there is none, or a killed writer of another tool left half of one."""
    try:
        return json.loads(store.read(name))
    except (FileNotFoundError, ValueError):
        return None


def in_threads(call: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
    """`call` of each item, in the order of the items, THREADS at a time: a store's answers take longer to come than to
    read. At most AHEAD results wait for the caller, so that memory stays bounded.

    Raises:
        Exception: what `call` raises, when its item's turn comes; calls that have not begun are dropped.
    """
    waiting: deque[Future[Out]] = deque()
    pool = ThreadPoolExecutor(THREADS)
    try:
        for item in items:
            waiting.append(pool.submit(call, item))
            if len(waiting) >= AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
