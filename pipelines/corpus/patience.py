"""Waits, within bounds, for a network, a store or credentials that are out of order as a whole."""

import logging
import random
from time import monotonic, sleep

from pipelines.corpus.fault import FetchFault, OutageError

logger = logging.getLogger(__name__)

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
            logger.warning("%s: %s; waiting up to %g s", self.what, fault.detail, self.seconds)
        if now >= self._ends:
            raise OutageError(f"{self.what}: {fault.detail}, for {self.seconds:g} s")
        upper = max(self._longest, fault.retry_after or 0.0)
        self._longest = min(LONGEST_WAIT, 2 * self._longest)
        sleep(min(self._ends - now, upper * random.uniform(0.5, 1.0)))
