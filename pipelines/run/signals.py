"""What interrupts a run as Ctrl-C does: SIGTERM, which cluster schedulers send, and the loss of Ray's head.

Without its head, Ray would end the driver's process after a minute, without an exception or a word.
"""

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import ray

from pipelines.corpus.patience import Wait

logger = logging.getLogger(__name__)

CHECK_SECONDS = 2.0
LOST_SECONDS = 20.0  # without an answer; Ray itself ends the process after 60, and the report takes some of them
GRACE_SECONDS = 15.0  # for the main thread to leave what it waits for: it may be a call of Ray that never returns
CONNECT_SECONDS = 5.0

Address = tuple[str, int]


@contextmanager
def interruptible() -> Iterator[None]:
    """Makes SIGTERM raise KeyboardInterrupt in the block, as Ctrl-C does.

    Callers enter this context once more after Ray has started, because Ray then installs a handler that aborts the
    process.
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(
            signal.SIGTERM, before or signal.SIG_DFL
        )  # None: the handler before was not installed from Python


def interrupt_main() -> None:
    """Ends the main thread's `interruptible` block as SIGTERM would, from another thread."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)


def head_address() -> Address | None:
    """Where the head of the Ray of this process listens; None without Ray, and under Ray Client, which says nothing."""
    if not ray.is_initialized():
        return None
    try:
        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        return host.strip("[]"), int(port)
    except (AttributeError, ValueError):
        return None


def answers(address: Address | None) -> bool:
    """Whether a head takes connections; True where there is no address to ask."""
    if address is None:
        return True
    try:
        socket.create_connection(address, CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


class HeadWatch:
    """Context manager that interrupts the main thread, as SIGTERM does, once the head is gone for `seconds`.

    `lost` then says so. It is empty while the head answers, or comes back in time. If the block does not end within
    `grace` seconds of that, `last_words` are called in the watch's own thread. The watch asks `every` so many seconds;
    without an address, or in another thread than the main one, it does nothing.
    """

    def __init__(
        self,
        address: Address | None,
        last_words: Callable[[str], None],
        *,
        seconds: float = LOST_SECONDS,
        every: float = CHECK_SECONDS,
        grace: float = GRACE_SECONDS,
    ):
        self.address, self.last_words = address, last_words
        self.seconds, self.every, self.grace, self.lost = seconds, every, grace, ""
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="head", daemon=True)

    def __enter__(self) -> "HeadWatch":
        if self.address is not None and threading.current_thread() is threading.main_thread():
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()

    def _work(self) -> None:
        since: float | None = None
        while not self._stop.wait(self.every):
            if answers(self.address):
                since = None
                continue
            now = time.time()
            if since is None:
                since = now
                logger.warning("%s", Wait("Ray's head does not answer", now, now + self.seconds))
            if now - since >= self.seconds:
                self.lost = f"Ray's head is lost: it has not answered for {now - since:.0f} s"
                interrupt_main()
                if not self._stop.wait(self.grace):
                    self.last_words(self.lost)
                return
