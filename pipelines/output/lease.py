"""One output, one writer: a driver holds a lease on its output, and renews it, for as long as it works.

    driver/<term>.json    who holds the output, or held it last; the highest term counts

Taking the output is creating the next term, which of several drivers only one can do: a conditional PUT in an object
store, a hard link in a local folder. A driver that ends writes `released` into its term. One that was killed leaves its
term behind: the next driver takes over at once if the process is gone from this machine, else once the lease is
`LOST_AFTER` seconds old. The age is the store's: it wrote both the lease and the probe that the lease is compared with.
While a lease is young, the next driver watches it, so it learns within a beat whether the holder lives.

The lease saves the work of two drivers. That no row is written twice does not hang on it: the units of both have the
same names (`unit.py`).
"""

import json
import logging
import os
import platform
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from pipelines.errors import UserError
from pipelines.store import STORE_ERRORS, Store
from pipelines.text import clean

logger = logging.getLogger(__name__)

FOLDER = "driver"
RENEW_SECONDS = 10.0  # least seconds between two beats: each costs an object store a LIST and a PUT
LOST_AFTER = 60.0  # least age of a lease whose driver counts as dead
BEATS = 4  # beats that a driver may miss
SETTLE_SECONDS = 3.0  # in a store without a conditional PUT, until a lease that somebody else writes over ours shows
JOIN_SECONDS = 30.0  # longest wait for a beat that is on its way to a slow store


@dataclass(frozen=True, slots=True)
class Holder:
    """The content of a lease."""

    owner: str  # random
    host: str
    machine: str  # what process ids belong to: one boot of one machine, and there one namespace of processes
    pid: int
    started: str  # UTC
    renewed: str  # UTC, by the holder's clock: for people alone
    beat: int  # counts the renewals
    every: float  # seconds between two beats
    released: bool = False

    @property
    def lost_after(self) -> float:
        """Age in seconds at which the holder counts as dead."""
        return max(LOST_AFTER, BEATS * self.every)

    @property
    def is_gone(self) -> bool:
        """Whether the process ran here and ended; False if that cannot be known."""
        if self.machine != machine():
            return False
        try:
            return psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.started}"


class Lease:
    """A held lease, which a thread renews until `release`.

    `lost` says who took the output meanwhile, if anybody.
    """

    def __init__(self, store: Store, term: int, holder: Holder):
        self.store, self.term, self.holder = store, term, holder
        self.lost = ""
        self._on_lost: Callable[[], None] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="lease", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Stops renewing and tells the next driver that the output is free. A second call does nothing."""
        if self._stop.is_set():
            return
        if _HELD.get(_key(self.store)) is self:
            del _HELD[_key(self.store)]
        self._stop.set()
        self._thread.join(JOIN_SECONDS)
        try:
            if not self._is_lost():
                self._write(released=True)
        except Exception as error:  # a lost store: the lease runs out by itself
            logger.warning("%s/%s: %s: %s", self.store.path, FOLDER, type(error).__name__, clean(str(error)))

    @contextmanager
    def watched(self, on_lost: Callable[[], None]) -> Iterator[None]:
        """Calls `on_lost`, in the thread of the lease, once the output is taken by another driver during the block."""
        self._on_lost = on_lost
        try:
            yield
        finally:
            self._on_lost = None

    def _work(self) -> None:
        warned = False
        while not self._stop.wait(self.holder.every):
            try:
                if self._is_lost():
                    if (on_lost := self._on_lost) is not None:
                        on_lost()
                    return
                self._write(beat=self.holder.beat + 1)
            except Exception as error:  # a store that does not answer is waited for; it refuses others as well
                if not warned:
                    logger.warning("%s/%s: %s: %s", self.store.path, FOLDER, type(error).__name__, clean(str(error)))
                warned = True

    def _is_lost(self) -> bool:
        term, holder = _newest(self.store)
        if holder is not None and holder.owner != self.holder.owner and term >= self.term:
            self.lost = f"output.path {self.store.path} was taken over by another driver, {holder}: this one stops"
        return bool(self.lost)

    def _write(self, **changed: Any) -> None:
        self.holder = replace(self.holder, renewed=_now(), **changed)
        self.store.write(_name(self.term), _encode(self.holder))


_HELD: dict[tuple[str, str | None], Lease] = {}  # a process is one writer, however often it asks


def take_lease(store: Store, every: float = RENEW_SECONDS) -> Lease:
    """The lease of this process on the output. Waits for as long as it takes to tell whether another holder lives.

    Args:
        every: seconds between two beats; at least RENEW_SECONDS count.

    Raises:
        UserError: if another driver holds the output and lives.
        OSError: if the store fails.
    """
    held = _HELD.get(_key(store))
    if held is None or held.lost:
        every = max(RENEW_SECONDS, every)
        here = Holder(uuid.uuid4().hex, socket.gethostname(), machine(), os.getpid(), _now(), _now(), 0, every)
        held = _HELD[_key(store)] = Lease(store, _take(store, here), here)
    return held


def release_all() -> None:
    """Releases what this process still holds: its job ended before it ran, or by an error."""
    for lease in list(_HELD.values()):
        lease.release()


def other_holder(store: Store) -> Holder | None:
    """Who else seems to write the output, at one look that writes nothing: for a line of a job that only reads."""
    try:
        term, holder = _newest(store)
        if holder is None or holder.released or holder.is_gone:
            return None
        age = time.time() - store.modified(_name(term)).timestamp()
    except (*STORE_ERRORS, NotImplementedError):  # the job that reads will say what is wrong
        return None
    ours = (holder.machine, holder.pid) == (machine(), os.getpid())
    return holder if age < holder.lost_after and not ours else None


def _take(store: Store, here: Holder) -> int:
    """Creates the next term, and returns it."""
    while True:
        term, holder = _newest(store)
        if holder is not None and not holder.released:
            _wait_for_its_end(store, term, holder)
        term += 1
        exclusive = _create(store, term, here)
        if exclusive is None:
            continue  # another driver was faster
        if not exclusive:
            logger.info(
                "%s has no conditional PUT: looking again in %g s whether another driver took it at the same moment",
                store.path,
                SETTLE_SECONDS,
            )
            time.sleep(SETTLE_SECONDS)
        if _newest(store) == (term, here):
            for name in store.list(FOLDER):
                if 0 < _term(name) < term:
                    store.delete(f"{FOLDER}/{name}")
            return term


def _create(store: Store, term: int, here: Holder) -> bool | None:
    """Creates a term. Returns None if another driver has it, else whether the store keeps others from writing it."""
    content = _encode(here)
    if not store.create(_name(term), content):
        ours = _newest(store) == (term, here)  # the store's answer to a first try was lost
        return True if ours else None
    return store.is_local or not store.create(_name(term), content)


def _wait_for_its_end(store: Store, term: int, holder: Holder) -> None:
    """Returns once the lease is free or its holder counts as dead.

    Raises:
        UserError: if the holder lives.
    """
    refused = UserError(
        f"output.path {store.path} is being written by another driver, {holder}: wait for its end or end it, and run "
        "the same command again; or choose another output.path"
    )
    if holder.is_gone:
        logger.info("output.path %s: its driver is gone (%s); going on in its place", store.path, holder)
        return
    age = _age(store, term) or 0.0
    if age <= holder.lost_after and holder.machine == machine():
        raise refused
    end = time.monotonic() + holder.lost_after - age
    if time.monotonic() < end:
        logger.info(
            "output.path %s: its driver (%s) last wrote %.0f s ago; waiting up to %.0f s for a sign of life",
            store.path,
            holder,
            age,
            end - time.monotonic(),
        )
    while time.monotonic() < end:
        time.sleep(min(1.0, holder.every / 4))
        newest, now = _newest(store)
        if newest != term or now is None or now.released:
            return
        if now.beat != holder.beat:
            raise refused
    logger.warning("output.path %s: its driver is silent (%s); taking over", store.path, holder)


def _newest(store: Store) -> tuple[int, Holder | None]:
    """The highest term, with its content; None if that is no lease, and term 0 if there is none."""
    names = [name for name in store.list(FOLDER) if _term(name)]
    if not names:
        return 0, None
    newest = max(names, key=_term)
    for _ in range(2):
        try:
            content = json.loads(store.read(f"{FOLDER}/{newest}"))
            return _term(newest), Holder(**{name: content[name] for name in Holder.__slots__})
        except FileNotFoundError:  # deleted since the list, by the holder of a higher term
            return _newest(store)
        except (ValueError, TypeError, LookupError):
            time.sleep(0.5)  # without hard links, a reader may meet the half of a lease
    logger.warning("%s/%s/%s is not a lease and does not count", store.path, FOLDER, newest)
    return _term(newest), None


def _age(store: Store, term: int) -> float | None:
    """Seconds since a term was written, by the clock of the store; None if the store tells no times."""
    probe = f"{FOLDER}/.{uuid.uuid4().hex[:8]}.now"
    try:
        store.write(probe, b"")
        return (store.modified(probe) - store.modified(_name(term))).total_seconds()
    except (FileNotFoundError, NotImplementedError):
        return None
    finally:
        store.delete(probe)


def machine() -> str:
    """What the process ids that this process sees belong to."""
    parts = [socket.gethostname(), platform.system()]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(os.readlink(path) if os.path.islink(path) else Path(path).read_text().strip())
        except OSError:  # not Linux
            parts.append("")
    return " ".join(parts)


def _term(name: str) -> int:
    """The term of an object in the folder; 0 if it is no lease."""
    stem, _, ending = name.partition(".")
    return int(stem) if ending == "json" and stem.isdigit() else 0


def _name(term: int) -> str:
    return f"{FOLDER}/{term:06d}.json"


def _key(store: Store) -> tuple[str, str | None]:
    return store.path, store.endpoint_url


def _encode(holder: Holder) -> bytes:
    return json.dumps(asdict(holder), indent=1).encode()


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
