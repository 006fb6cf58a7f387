"""Waits, within bounds, for a network, a store or credentials that are out of order as a whole."""

import json
import logging
import random
import sys
import threading
import time
from dataclasses import asdict, dataclass
from time import monotonic, sleep

from pipelines.corpus.fault import FetchFault, OutageError

logger = logging.getLogger(__name__)

ANNOUNCED = "otprune: what is waited for"  # key in the key-value store of Ray's head
FIRST_WAIT, LONGEST_WAIT = 1.0, 30.0  # seconds; the waits double, and half of each is random


@dataclass(frozen=True, slots=True)
class Wait:
    """What is waited for, since when and until when, in Unix seconds. `str` gives a line for people."""

    what: str
    since: float
    until: float

    def __str__(self) -> str:
        since, until = (time.strftime("%H:%M:%S", time.gmtime(at)) for at in (self.since, self.until))
        return f"{self.what}; waiting since {since} until {until} UTC"


class Patience:
    """How long one reader or writer waits in one outage, from its first fault on; 0 seconds wait for nothing."""

    def __init__(self, seconds: float, what: str):
        self.seconds, self.what = seconds, what
        self._ends: float | None = None
        self._longest = FIRST_WAIT
        self._lock = threading.Lock()  # threads may wait for one store together

    def wait(self, fault: FetchFault) -> None:
        """Sleeps before the next try. The first wait says in the log what is waited for.

        Raises:
            OutageError: if patience is over.
        """
        now = monotonic()
        with self._lock:
            if self._ends is None:
                self._ends = now + self.seconds
                if self.seconds:
                    announce(Wait(f"{self.what}: {fault.detail}", time.time(), time.time() + self.seconds))
        if now >= self._ends:
            raise OutageError(f"{self.what}: {fault.detail}, for {self.seconds:g} s")
        upper = max(self._longest, fault.retry_after or 0.0)
        self._longest = min(LONGEST_WAIT, 2 * self._longest)
        sleep(min(self._ends - now, upper * random.uniform(0.5, 1.0)))


def announce(wait: Wait) -> None:
    """Says in the log what is waited for. A task leaves it for the driver, which does not see logs of tasks."""
    logger.warning("%s", wait)
    ray = sys.modules.get("ray")  # a process without Ray loads none for this
    if ray is not None and ray.is_initialized() and ray._private.worker.global_worker.mode == ray.WORKER_MODE:
        ray.experimental.internal_kv._internal_kv_put(ANNOUNCED, json.dumps(asdict(wait)), overwrite=True)


def take_announcement() -> Wait | None:
    """The newest wait that a task has announced since the last call. For the driver."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    text = ray.experimental.internal_kv._internal_kv_get(ANNOUNCED)
    if not text:
        return None
    ray.experimental.internal_kv._internal_kv_del(ANNOUNCED)
    return Wait(**json.loads(text))
