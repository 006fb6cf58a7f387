"""Local folders and S3 prefixes behind one small interface. A `Store` can be pickled, so tasks open it on any node."""

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

S3_CONNECTIONS = 64  # that a process may keep; botocore's own 10 would be the limit of its readers
THREADS, AHEAD = 16, 64  # of `in_threads`: concurrent calls, and finished or pending results in memory

In = TypeVar("In")
Out = TypeVar("Out")

STORE_ERRORS = (OSError, ValueError, BotoCoreError)
"""The errors of a store that does not exist, refuses access or has a wrong address. S3 raises BotoCoreError where the
server does not answer or credentials are missing, and OSError where the server refuses a request."""


@dataclass(frozen=True, slots=True)
class Store:
    """A folder, as an absolute local path or `s3://bucket/prefix`, with the endpoint and the access to it."""

    path: str
    endpoint_url: str | None = None
    anonymous: bool = False

    @property
    def is_s3(self) -> bool:
        return self.path.startswith("s3://")

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """The file system, without a cache of listings: other processes write into the folders that this one lists."""
        if not self.is_s3:
            return LocalFileSystem()
        options: dict[str, Any] = {
            "anon": self.anonymous,
            "use_listings_cache": False,
            "config_kwargs": {"max_pool_connections": S3_CONNECTIONS},
        }
        if self.endpoint_url:
            options["endpoint_url"] = self.endpoint_url
        return fsspec.filesystem("s3", **options)

    @property
    def root(self) -> str:
        """The path in the form that the file system takes: S3 paths lose their `s3://`."""
        return self.path.removeprefix("s3://").rstrip("/") if self.is_s3 else self.path

    def join(self, *parts: str) -> str:
        """The path of `parts` below this folder, in the form that the file system takes."""
        return posixpath.join(self.root, *parts)

    def read(self, name: str) -> bytes:
        """The content of an object.

        Raises:
            FileNotFoundError: if there is no such object.
        """
        return cast(bytes, self.fs.cat_file(self.join(name)))

    def exists(self, name: str) -> bool:
        return self.fs.exists(self.join(name))

    def write(self, name: str, data: bytes) -> None:
        """Writes the object atomically: by one PUT on S3, by a temporary file and a rename locally.

        A reader sees the whole object or none of it, also after a crash in the middle of a write.
        """
        target = self.join(name)
        if self.is_s3:
            self.fs.pipe_file(target, data)
            return
        folder, leaf = posixpath.split(target)
        os.makedirs(folder, exist_ok=True)
        # The leading dot hides an unfinished file from `list`; the random part keeps two writers apart.
        temporary = posixpath.join(folder, f".{leaf}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            with open(temporary, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())  # before the rename, else a power cut may leave an empty file by that name
            os.replace(temporary, target)
        except BaseException:
            if os.path.exists(temporary):
                os.unlink(temporary)
            raise

    def delete(self, name: str) -> None:
        """Removes the object. A missing object is no error."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.join(name))

    def list(self, folder: str) -> dict[str, int]:
        """Maps the names of the objects directly in `folder` to their bytes; empty if the folder does not exist.

        Hidden files, whose names begin with a dot, are left out.
        """
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
        """Names of the folders directly in `folder`; empty if `folder` does not exist."""
        try:
            entries = self.fs.ls(self.join(folder), detail=True)
        except FileNotFoundError:
            return ()
        return tuple(posixpath.basename(e["name"].rstrip("/")) for e in entries if e["type"] == "directory")

    def remove(self, folder: str) -> None:
        """Removes a folder with everything in it. A missing folder is no error."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm(self.join(folder), recursive=True)


def make_store(path: str, *, endpoint_url: str | None = None, anonymous: bool = False) -> Store:
    """A `Store` for `path`. Local paths become absolute, because workers run in another working folder."""
    if path.startswith("s3://"):
        return Store(path.rstrip("/"), endpoint_url, anonymous)
    return Store(os.path.abspath(os.path.expanduser(path.removeprefix("file://"))))


def read_json(store: Store, name: str) -> Any:
    """The parsed content of a JSON object; None if missing or not JSON, such as the half of a killed writer."""
    try:
        return json.loads(store.read(name))
    except (FileNotFoundError, ValueError):
        return None


def in_threads(call: Callable[[In], Out], items: Iterable[In]) -> Iterator[Out]:
    """Yields `call(item)` for each item, in the order of the items, with THREADS calls at a time.

    Threads help because a store's latency exceeds the time to read its answer. At most AHEAD results are pending or
    waiting for the caller, so that memory stays bounded.

    Raises:
        Exception: the error of a call, when the turn of its item comes. Calls that have not begun are dropped.
    """
    waiting: deque[Future[Out]] = deque()
    pool = ThreadPoolExecutor(THREADS)
    try:
        for item in items:
            waiting.append(pool.submit(call, item))
            if len(waiting) >= AHEAD:  # take no further item before the caller has taken a result
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
