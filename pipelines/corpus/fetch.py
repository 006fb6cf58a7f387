"""Fetches the files that records name: several at a time from every kind of store, with retries and bounded memory.

Everything runs as coroutines on the event loop that fsspec keeps for the process, so that connections are kept alive
from unit to unit. Results come in the order of the records.

A fetch has one deadline for everything: look-up, connection, headers, body, and further tries. It is tried again after
a passing fault (429, 5xx, a reset, a cut body), after a random part of a time that doubles ("full jitter"), and not
before the time that the server asks for. Time in which a fetch waits for its turn or for memory does not count.
"""

import asyncio
import atexit
import os
import random
import stat
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from time import monotonic
from typing import IO, Any, cast
from urllib.parse import urlsplit

from botocore.exceptions import BotoCoreError, ClientError
from fsspec.asyn import get_loop

from pipelines.config.keys import InputConfig
from pipelines.corpus.addresses import Allowed, Stored, locate
from pipelines.corpus.fault import FetchFault, fault_of
from pipelines.corpus.format import InStore, Record
from pipelines.corpus.web import Web
from pipelines.images.decode import Reject
from pipelines.store import Store

HELD_BYTES = 128 * 2**20  # of files that are fetched, or being fetched, and not yet decoded
FIRST_WAIT, LONGEST_WAIT = 0.5, 8.0  # seconds; the upper ends of the random waits before the second try and later ones
SILENT_TRIES, SILENT_SECONDS = 16, 60.0  # a host that so often in a row gave no answer is not asked for so long
HOSTS = 10_000  # hosts that are remembered
CLOSE_SECONDS = 5.0  # longest wait for connections to close as the process ends


@dataclass(frozen=True, slots=True)
class FetchSettings:
    """How files are fetched. Each value is a key of the configuration."""

    threads: int = 16  # fetches at a time
    per_host: int = 8  # of them, from one host of the web
    timeout: float = 30.0  # seconds for one file, tries and waits included
    retries: int = 4  # further tries
    allowed: Allowed = Allowed()


def fetch_settings(config: InputConfig) -> FetchSettings:
    """How files that are named by address, or are one image each, are fetched."""
    return FetchSettings(
        threads=config.fetch_threads,
        per_host=config.fetch_per_host,
        timeout=config.fetch_timeout,
        retries=config.fetch_retries,
        allowed=Allowed(config.allow_private, tuple(config.allow_paths)),
    )


Fetched = bytes | FetchFault | Reject | None


class Budget:
    """The bytes that the fetches of one call may hold. The fetch whose turn it is may always go on."""

    def __init__(self, limit: int):
        self.limit, self.held, self.turn = limit, 0, 0
        self._changed = asyncio.Condition()

    def has_room(self, index: int, num_bytes: int) -> bool:
        """Whether fetch `index` may hold further bytes."""
        return index <= self.turn or self.held + num_bytes <= self.limit

    async def take(self, index: int, num_bytes: int) -> None:
        """Waits until fetch `index` may hold further bytes."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.has_room(index, num_bytes))
            self.held += num_bytes

    async def free(self, num_bytes: int, turn: int | None = None) -> None:
        """Gives bytes back, and says whose turn it is now."""
        async with self._changed:
            self.held -= num_bytes
            self.turn = self.turn if turn is None else turn
            self._changed.notify_all()


@dataclass(slots=True)
class Host:
    """What a process knows of a host of the web."""

    free: asyncio.Semaphore
    silent: int = 0  # requests in a row without an answer
    silent_until: float = 0.0  # of the clock `monotonic`
    fault: FetchFault | None = None  # the newest


class Fetcher:
    """Fetches files for all readers of a process with the same settings; `fetcher_of` makes one."""

    def __init__(self, store: Store, settings: FetchSettings, max_bytes: int):
        self.store, self.settings, self.max_bytes = store, settings, max_bytes
        self.answered: dict[bool, str | InStore] = {}  # by `is_web`, the newest target that was fetched
        self._web = Web(settings.allowed)
        self._slots = asyncio.Semaphore(settings.threads)
        self._hosts: OrderedDict[str, Host] = OrderedDict()

    def load(self, records: Iterable[Record]) -> Iterator[tuple[Record, Fetched]]:
        """Yields each record with its file, or with the fault; records that hold their image go through.

        Memory holds HELD_BYTES and one file more, and as many records as are fetched ahead.
        """
        loop, budget = get_loop(), Budget(HELD_BYTES)
        waiting: deque[tuple[int, Record, Future[Fetched] | None]] = deque()
        ahead = 1

        def first() -> tuple[Record, Fetched]:
            index, record, future = waiting.popleft()
            if future is None:
                return record, cast("bytes | Reject | None", record.data)
            if not future.done():
                asyncio.run_coroutine_threadsafe(budget.free(0, index), loop).result()
            result = future.result()
            if isinstance(result, bytes):  # now the caller's, who holds one at a time
                asyncio.run_coroutine_threadsafe(budget.free(len(result), index + 1), loop).result()
            return record, result

        try:
            for index, record in enumerate(records):
                future = None
                if isinstance(record.data, str | InStore):
                    ahead = 4 * self.settings.threads
                    future = asyncio.run_coroutine_threadsafe(self._fetch(record.data, index, budget), loop)
                waiting.append((index, record, future))
                if len(waiting) >= ahead:
                    yield first()
            while waiting:
                yield first()
        finally:
            for _, _, future in waiting:
                if future is not None:
                    future.cancel()

    def fetch(self, target: str | InStore) -> Fetched:
        """One file."""
        return next(self.load([Record("", "", 0, target)]))[1]

    def forget(self) -> None:
        """Forgets which hosts were silent, and opens connections to stores anew, with the credentials of now."""
        for host in self._hosts.values():
            host.silent, host.silent_until = 0, 0.0
        self.store.forget()

    async def close(self) -> None:
        """Closes the connections to the web."""
        await self._web.close()

    async def _fetch(self, target: str | InStore, index: int, budget: Budget) -> Fetched:
        """A file, or why there is none. Tries again after passing faults while there is time."""
        spent, fault = 0.0, FetchFault("TimeoutError", passing=True, answered=False)
        try:
            source = target if isinstance(target, InStore) else locate(target, self.store, self.settings.allowed)
        except FetchFault as refused:
            return refused
        for attempt in range(self.settings.retries + 1):
            host = self._host(source) if isinstance(source, str) else None
            # The host first: who waits for it keeps nobody else from a fetch.
            async with _Slots([self._slots] if host is None else [host.free, self._slots]) as slots:
                began = monotonic()
                if host is not None and began < host.silent_until:
                    return host.fault or fault
                holder = _Holder(budget, index, slots)
                try:
                    async with asyncio.timeout(self.settings.timeout - spent) as holder.deadline:
                        data = await self._read(source, holder.grow)
                    self.answered[is_web(target)] = target
                    _note(host, None)
                    if len(data) <= self.max_bytes:
                        return data
                    await holder.drop()
                    return Reject("too_large_bytes", f"more than {self.max_bytes} bytes")
                except (OSError, ValueError, BotoCoreError, ClientError) as error:  # TimeoutError is an OSError
                    fault = fault_of(error)
                    await holder.drop()
                    _note(host, fault)
                except BaseException:
                    await holder.drop()
                    raise
                spent += monotonic() - began - holder.waited
            wait = max(random.uniform(0, min(LONGEST_WAIT, FIRST_WAIT * 2**attempt)), fault.retry_after or 0.0)
            spent += wait
            if not fault.passing or spent >= self.settings.timeout or attempt == self.settings.retries:
                break
            await asyncio.sleep(wait)
        return fault

    async def _read(self, source: str | Stored | InStore, grow: Callable[[int], Awaitable[None]]) -> bytes:
        """The first `max_bytes` + 1 bytes of a file."""
        if isinstance(source, str):
            return await self._web.get(source, self.max_bytes, grow)
        store = self.store if isinstance(source, InStore) else source.store
        path = store.join(source.name) if isinstance(source, InStore) else source.path
        if store.is_local:
            size = await asyncio.to_thread(regular_size, path, self.store.root)
            await grow(min(size, self.max_bytes + 1))
            return await asyncio.to_thread(read_regular, path, self.max_bytes + 1)
        data = await _cat(store.fs, path, self.max_bytes + 1)
        await grow(len(data))
        return data

    def _host(self, url: str) -> Host | None:
        try:
            name = urlsplit(url).hostname or ""
        except ValueError:
            return None
        host = self._hosts.pop(name, None) or Host(asyncio.Semaphore(self.settings.per_host))
        self._hosts[name] = host
        if len(self._hosts) > HOSTS:
            self._hosts.popitem(last=False)
        return host


class _Slots:
    """Waits for its semaphores in turn, and holds them until the block ends or `leave` is called."""

    def __init__(self, semaphores: list[asyncio.Semaphore]):
        self._semaphores = semaphores
        self._held: list[asyncio.Semaphore] = []

    async def __aenter__(self) -> "_Slots":
        try:
            for semaphore in self._semaphores:
                await semaphore.acquire()
                self._held.append(semaphore)
        except BaseException:  # cancelled while it waited
            self.leave()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Lets others have what is held."""
        while self._held:
            self._held.pop().release()


class _Holder:
    """The bytes of one try in the budget.

    While it waits for memory, its deadline moves, and others have its slots: one of them may be the fetch whose turn it
    is, for which all memory waits.
    """

    def __init__(self, budget: Budget, index: int, slots: _Slots):
        self.budget, self.index, self.slots = budget, index, slots
        self.held, self.waited = 0, 0.0
        self.deadline: asyncio.Timeout | None = None

    async def grow(self, num_bytes: int) -> None:
        began, when = monotonic(), self.deadline.when() if self.deadline else None
        if not self.budget.has_room(self.index, num_bytes):
            self.slots.leave()
            if self.deadline:
                self.deadline.reschedule(None)
        await self.budget.take(self.index, num_bytes)
        self.held += num_bytes
        self.waited += (waited := monotonic() - began)
        if self.deadline and when is not None:
            self.deadline.reschedule(when + waited)

    async def drop(self) -> None:
        await self.budget.free(self.held)
        self.held = 0


def is_web(target: str | InStore) -> bool:
    """Whether a target is on the web, and not in a store: one may be out of order without the other."""
    return isinstance(target, str) and target[:8].lower().startswith(("http://", "https://"))


def _note(host: Host | None, fault: FetchFault | None) -> None:
    """Counts the requests in a row that a host did not answer."""
    if host is None:
        return
    host.silent, host.fault = 0 if fault is None or fault.answered else host.silent + 1, fault
    if host.silent >= SILENT_TRIES:
        host.silent, host.silent_until = 0, monotonic() + SILENT_SECONDS


async def _cat(fs: Any, path: str, num_bytes: int) -> bytes:
    """The first bytes of a file, by one request."""
    try:
        if fs.async_impl:
            return await fs._cat_file(path, start=0, end=num_bytes)
        return await asyncio.to_thread(fs.cat_file, path, start=0, end=num_bytes)
    except OSError as error:
        if "InvalidRange" in str(getattr(error.__cause__, "response", "")):
            return b""  # an empty object has no first byte to ask for
        raise


def regular_size(path: str, root: str = "/") -> int:
    """The bytes of a local file.

    Raises:
        FetchFault: if it is no regular file: opening a pipe would wait for a writer, and a device does as it likes. Or
            if the folder `root` of the corpus is gone as well, as after a lost mount.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError as error:
        if root.startswith("/") and not os.path.isdir(root):
            raise FetchFault("the folder of the corpus is gone", passing=True, answered=False) from error
        raise
    if not stat.S_ISREG(found.st_mode):
        raise FetchFault("not a regular file")
    return found.st_size


def read_regular(path: str, num_bytes: int) -> bytes:
    """The first bytes of a local file; errors as of `regular_size`."""
    with open_regular(path) as stream:
        return stream.read(num_bytes)


@contextmanager
def open_regular(path: str) -> Iterator[IO[bytes]]:
    """A local file as a stream; errors as of `regular_size`."""
    # Without O_NONBLOCK, the opening of a pipe that has just taken the file's place would wait.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
        if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
            raise FetchFault("not a regular file")
        yield stream


def fetcher_of(store: Store, settings: FetchSettings, max_bytes: int) -> Fetcher:
    """The fetcher of this process, whose connections and whose knowledge of hosts outlive a read task."""
    return _fetchers(store, settings, max_bytes, os.getpid())


@cache
def _fetchers(store: Store, settings: FetchSettings, max_bytes: int, process: int) -> Fetcher:
    fetcher = Fetcher(store, settings, max_bytes)
    atexit.register(_close, fetcher, process)
    return fetcher


def _close(fetcher: Fetcher, process: int) -> None:
    if os.getpid() == process:
        asyncio.run_coroutine_threadsafe(fetcher.close(), get_loop()).result(CLOSE_SECONDS)
