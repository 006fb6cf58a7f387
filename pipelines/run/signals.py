"""Turns SIGTERM, which cluster schedulers send, into KeyboardInterrupt."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


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
