"""Waits, within bounds, for a network, a store or credentials that are out of order as a whole."""

import logging
import random
import sys
from time import monotonic, sleep

from pipelines.corpus.fault import FetchFault, OutageError

logger = logging.getLogger(__name__)

ANNOUNCED = "otprune: what is waited for"  # key in the key-value store of Ray's head
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds; the waits double, and half of each is random


class Patience:
    """How long one reader waits in one outage, from its first fault on; 0 seconds wait for nothing."""

    def __init__(self, seconds: float, what: str):
        self.seconds, self.what = seconds, what
        self._ends: float | None = None
        self._longest = FIRST_WAIT

    def wait(self, fault: FetchFault) -> None:
        """Sleeps before the next try. The first wait says in the log what is waited for.

        Raises:
            OutageError: if patience is over.
        """
        now = monotonic()
        if self._ends is None:
            self._ends = now + self.seconds
            announce(f"{self.what}: {fault.detail}; waiting up to {self.seconds:g} s")
        if now >= self._ends:
            raise OutageError(f"{self.what}: {fault.detail}, for {self.seconds:g} s")
        upper = max(self._longest, fault.retry_after or 0.0)
        self._longest = min(LONGEST_WAIT, 2 * self._longest)
        sleep(min(self._ends - now, upper * random.uniform(0.5, 1.0)))


def announce(text: str) -> None:
    """Says in the log what is waited for, and leaves it for the driver, which does not see the logs of tasks."""
    logger.warning("%s", text)
    ray = sys.modules.get("ray")  # a process without Ray loads none for this
    if ray is not None and ray.is_initialized():
        ray.experimental.internal_kv._internal_kv_put(ANNOUNCED, text, overwrite=True)


def take_announcement() -> str:
    """The newest text that a task has announced since the last call; empty if there is none. For the driver."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return ""
    text = ray.experimental.internal_kv._internal_kv_get(ANNOUNCED)
    if text:
        ray.experimental.internal_kv._internal_kv_del(ANNOUNCED)
    return (text or b"").decode()
