"""Folders behind one small interface: local, S3, Google Cloud, Azure, the hub and whatever else fsspec knows.

A `Store` can be pickled, so tasks open it on any node.
"""

import contextlib
import json
import os
import posixpath
import re
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, TypeVar, cast

import fsspec
from botocore.exceptions import BotoCoreError, ClientError
from fsspec.implementations.local import LocalFileSystem

from pipelines.errors import UserError
from pipelines.secrets import public, split_address

S3_CONNECTIONS = 64  # that a process may keep; botocore's own 10 would be the limit of its readers
STALL_SECONDS = 20  # without a byte of S3, after which a request is tried again
THREADS, AHEAD = 16, 64  # of `in_threads`: concurrent calls, and finished or pending results in memory

ALIASES = {"s3a": "s3", "s3n": "s3", "gcs": "gs"}  # other spellings of a scheme
MAIN_SCHEMES = ("s3", "gs", "az", "abfs", "hf", "https", "http", "file")  # the ones that messages name
EXTRAS = {
    "gs": "gcs",
    "az": "azure",
    "abfs": "azure",
    "abfss": "azure",
}  # scheme -> the extra that installs its library
OBJECT_STORES = ("s3", "gs", "az", "abfs", "abfss", "hf", "memory")  # a PUT there is atomic
READ_ONLY = ("http", "https")
CONFLICTS = ("PreconditionFailed", "412", "ConditionalRequestConflict", "409")  # S3's answers to a PUT that came late

In = TypeVar("In")
Out = TypeVar("Out")

STORE_ERRORS = (OSError, ValueError, BotoCoreError)
"""The errors of a store that does not exist, refuses access or has a wrong address. S3 raises BotoCoreError where the
server does not answer or credentials are missing, and OSError where the server refuses a request."""

WORLD = (OSError, BotoCoreError, ClientError)
"""The errors of disks, networks and stores, which are nobody's mistake in a program."""


@dataclass(frozen=True, slots=True)
class Store:
    """A folder, as an absolute local path or `scheme://...`, with the endpoint and the access to it.

    `path` and names of files may be shown. What opens doors stays in memory: `root` and `join` have it, for the file
    system alone.
    """

    path: str  # without userinfo and signature
    endpoint_url: str | None = field(default=None, repr=False)  # some hold keys
    anonymous: bool = False
    userinfo: str = field(default="", repr=False)  # `user:password` of the address
    query: str = field(default="", repr=False)  # that signs the address, as a presigned URL has it

    @property
    def scheme(self) -> str:
        """The scheme of the address in lower case; `file` for a local path."""
        return scheme_of(self.path) or "file"

    @property
    def is_s3(self) -> bool:
        return self.scheme == "s3"

    @property
    def is_local(self) -> bool:
        return self.scheme == "file"

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """The file system, without a cache of listings: other processes write into the folders that this one lists."""
        if self.is_local:
            return LocalFileSystem()
        options: dict[str, Any] = {"use_listings_cache": False}
        if self.is_s3:
            options["config_kwargs"] = {"max_pool_connections": S3_CONNECTIONS, "read_timeout": STALL_SECONDS}
        if self.scheme in ("s3", "az", "abfs", "abfss"):
            options["anon"] = self.anonymous
        elif self.scheme == "gs" and self.anonymous:
            options["token"] = "anon"
        if self.endpoint_url and self.scheme in ("s3", "gs"):
            options["endpoint_url"] = self.endpoint_url
        if self.is_s3:  # an S3 key may hold anything, so nothing else may look into the address
            return fsspec.filesystem("s3", **options)
        return fsspec.core.url_to_fs(self.address_with_user, **options)[0]

    @property
    def address_with_user(self) -> str:
        """`path` with its userinfo, which must not leave memory."""
        scheme, mark, rest = self.path.partition("://")
        return f"{scheme}{mark}{self.userinfo}@{rest}" if self.userinfo else self.path

    @property
    def root(self) -> str:
        """The path in the form that the file system takes: most addresses lose their scheme."""
        if self.is_local:
            return self.path
        if self.is_s3:
            return self.path.removeprefix("s3://").rstrip("/")
        return cast(str, type(self.fs)._strip_protocol(self.address_with_user)).rstrip("/")

    def join(self, *parts: str) -> str:
        """The path of `parts` below this folder, in the form that the file system takes.

        The parts are taken as they are, but for empty ones: an S3 key may hold `//`, `..` and any other bytes.
        """
        path = "/".join((self.root.rstrip("/"), *filter(None, parts)))
        return f"{path}?{self.query}" if self.query else path

    def address(self, root: str) -> str:
        """The `path` of another folder of this file system, given in the form that the file system takes."""
        if self.is_local or root.startswith(f"{self.scheme}://"):
            return split_address(root).public
        return f"{self.scheme}://{root.lstrip('/') if self.scheme == 'memory' else root}"

    def outlast(self, call: Callable[[], Out], *, writes: bool = False) -> Out:
        """`call()`, which asks this store something. A store with patience asks again while it is out of order.

        Args:
            writes: so a missing file is a fault of the store, and no answer.
        """
        del writes  # of those that override this
        return call()

    def forget(self) -> None:
        """Makes the next call open its connections anew, with the credentials of then."""
        if not self.is_local:
            type(self.fs).clear_instance_cache()

    def read(self, name: str) -> bytes:
        """The content of an object.

        Raises:
            FileNotFoundError: if there is no such object.
        """
        return self.outlast(lambda: cast(bytes, self.fs.cat_file(self.join(name))))

    def exists(self, name: str) -> bool:
        return self.outlast(lambda: self.fs.exists(self.join(name)))

    def write(self, name: str, data: bytes) -> None:
        """Writes the object atomically: by one PUT in an object store, by a temporary file and a rename elsewhere.

        A reader sees the whole object or none of it, also after a crash in the middle of a write.

        Raises:
            UserError: if the store can only be read.
        """
        self._check_writable()
        self.outlast(lambda: self._write(name, data), writes=True)

    def _write(self, name: str, data: bytes) -> None:
        target = self.join(name)
        if self.scheme in OBJECT_STORES:
            self.fs.pipe_file(target, data)
            return
        folder, temporary = _beside(target)
        if not self.is_local:
            fs = self.fs
            fs.makedirs(folder, exist_ok=True)
            fs.pipe_file(temporary, data)
            fs.mv(temporary, target)
            return
        os.makedirs(folder, exist_ok=True)
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

    def create(self, name: str, data: bytes) -> bool:
        """Writes the object as a whole unless there is one by that name. Returns whether it was written.

        Of several writers at once one alone succeeds in a local folder and in an object store with a conditional PUT.

        Raises:
            UserError: if the store can only be read.
        """
        self._check_writable()
        target = self.join(name)
        if not self.is_local:
            return _create(self.fs, target, data)
        folder, temporary = _beside(target)
        os.makedirs(folder, exist_ok=True)
        try:
            with open(temporary, "xb") as stream:
                stream.write(data)
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links; a reader may then meet an unfinished file
                with open(target, "xb") as stream:
                    stream.write(data)
        except FileExistsError:
            return False
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)
        return True

    def modified(self, name: str) -> datetime:
        """When the object was last written, by the clock of the store.

        Raises:
            FileNotFoundError: if there is no such object.
            NotImplementedError: if the store tells no times.
        """
        return self.fs.modified(self.join(name))

    def _check_writable(self) -> None:
        if self.scheme in READ_ONLY:
            raise UserError(f"{self.path} can only be read; results go to a local folder, s3://, gs://, az:// or hf://")

    def delete(self, name: str) -> None:
        """Removes the object. A missing object is no error."""
        with contextlib.suppress(FileNotFoundError):
            self.outlast(lambda: self.fs.rm_file(self.join(name)))

    def list(self, folder: str) -> dict[str, int]:
        """Maps the names of the objects directly in `folder` to their bytes; empty if the folder does not exist.

        Hidden files, whose names begin with a dot, are left out.
        """
        target = self.join(folder)
        try:
            entries = self.outlast(lambda: self.fs.ls(target, detail=True))
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


def _beside(target: str) -> tuple[str, str]:
    """The folder of a file, and a name in it for what is not yet that file."""
    folder, leaf = posixpath.split(target)
    # The leading dot hides an unfinished file from `list`; the random part keeps two writers apart.
    return folder, posixpath.join(folder, f".{leaf}.{uuid.uuid4().hex[:8]}.tmp")


def _create(fs: fsspec.AbstractFileSystem, target: str, data: bytes) -> bool:
    """Asks a remote store for a conditional PUT, or for a plain one where its library knows no other."""
    try:
        fs.pipe_file(target, data, mode="create")
    except FileExistsError:
        return False
    except TypeError:  # the library does not know the argument
        if fs.exists(target):
            return False
        fs.pipe_file(target, data)
    except OSError as error:
        response = getattr(error.__cause__, "response", None) or {}
        if response.get("Error", {}).get("Code") in CONFLICTS:
            return False
        raise
    return True


def scheme_of(address: str) -> str:
    """The scheme of an address in lower case, in its usual spelling; empty for a path."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", address)
    return ALIASES.get(match[1].lower(), match[1].lower()) if match else ""


def make_store(path: str, *, endpoint_url: str | None = None, anonymous: bool = False) -> Store:
    """A `Store` for `path`. Local paths become absolute, because workers run in another working folder.

    Raises:
        UserError: if the scheme is unknown, or the library that opens it is not installed.
    """
    scheme = scheme_of(path)
    if scheme in ("", "file", "local"):
        return Store(os.path.abspath(os.path.expanduser(path.partition("://")[2] if scheme else path)))
    check_scheme(path)
    rest = path.partition("://")[2]
    address = split_address(f"{scheme}://{rest}")
    return Store(address.public.rstrip("/"), endpoint_url, anonymous, address.userinfo, address.query)


def check_scheme(address: str) -> None:
    """Refuses an address that no installed library opens.

    Raises:
        UserError: with the schemes that are known, or the package to install.
    """
    if problem := scheme_problem(scheme_of(address)):
        raise UserError(f"{address}: {problem}")


def scheme_problem(scheme: str) -> str:
    """Why no address of this scheme can be opened: an unknown scheme, or a library to install. Empty if one can."""
    try:
        fsspec.get_filesystem_class(scheme)
    except ValueError:
        known = ", ".join(f"{name}://" for name in MAIN_SCHEMES)
        return f"the scheme must be one of {known} or another of fsspec's, got {scheme}://"
    except ImportError as error:
        extra = f"pip install 'otprune[{EXTRAS[scheme]}]'" if scheme in EXTRAS else str(error)
        return f"the library that opens {scheme}:// is not installed: {extra}"
    return ""


def read_json(store: Store, name: str) -> Any:
    """The parsed content of a JSON object; None if missing or not JSON, such as the half of a killed writer."""
    try:
        return json.loads(store.read(name))
    except (FileNotFoundError, ValueError):
        return None


def write_json(store: Store, name: str, record: Any) -> None:
    """Writes a record for people and programs to read; secrets in it are hidden."""
    store.write(name, json.dumps(public(record), indent=1).encode())


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
