"""The heartbeat of a run: a thread of the driver that reports the state of the run every few seconds.

Each beat polls the nodes of the cluster, so that the dollars follow nodes that join and leave. Then the beat sets Ray's
gauges and writes two objects beside the captions:

    heartbeat.json     state, progress, rates, dollars and time of the newest run
    runs/<run>.json    cost of this run so far; the objects of all runs add up to the cost of the output

A store that refuses a write is logged once and never ends the run.
"""

import json
import logging
import threading
import time
from typing import Any

from ray.util.metrics import Gauge

from pipelines.corpus.patience import take_announcement
from pipelines.dollars.account import Account
from pipelines.dollars.ledger import record_run
from pipelines.output.patient import without_patience
from pipelines.run.job import Job
from pipelines.run.progress import Progress
from pipelines.run.resources import cluster_nodes, is_local
from pipelines.run.signals import answers, head_address
from pipelines.text import clean

logger = logging.getLogger(__name__)

FILE = "heartbeat.json"
JOIN_SECONDS = 30.0  # longest wait for a write that is on its way to a slow store
STATES = {0: "done", 3: "gate failed", 4: "capped", 130: "interrupted"}  # by exit code; others failed
GAUGES = {
    "images_per_second": "Images captioned a second in the last minute.",
    "tokens_per_second": "Tokens generated a second in the last minute.",
    "done": "Images (or questions) of the output that are done.",
    "quarantined": "Images of this run that are quarantined.",
    "usd": "Dollars of this run so far.",
    "usd_to_finish": "Dollars to the end of the plan at the rate of the last minute.",
}


class Heartbeat:
    """Context manager whose thread beats from the start to the end of the block. `finish` writes the final state."""

    def __init__(self, job: Job, run: str, progress: Progress, account: Account):
        self.job, self.run, self.progress, self.account = job, run, progress, account
        self.every = job.config.run.heartbeat_seconds
        self.started = time.time()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="heartbeat", daemon=True)
        self._gauges: dict[str, Gauge] = {}
        self._warned: set[str] = set()
        self._waits: dict[str, float] = {}  # what is waited for: until when
        self._written = False

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(JOIN_SECONDS if answers(head_address()) else 1.0)  # it may wait for a head that is gone

    def leave_witness(self) -> str:
        """Writes an object that only this run writes, and returns its name."""
        meter = self.account.meter
        return record_run(self.job.output, self.run, meter.usd, meter.elapsed, meter.node_seconds)

    def finish(self, code: int, message: str) -> None:
        """Writes the final state of a run that has ended. A run that never beat writes nothing."""
        self._stop.set()  # no beat may follow, also if the block has not ended
        if self._written:
            self._write(STATES.get(code, "failed"), message)

    def content(self, state: str, message: str) -> dict[str, Any]:
        """The content of heartbeat.json."""
        progress, account = self.progress, self.account
        rates = progress.rates(recent=True)
        return {
            "run": self.run,
            "state": state,
            "message": message,
            "started": _iso(self.started),
            "updated": _iso(time.time()),
            "counted": progress.counted,
            "rows": progress.num_rows,
            "done": progress.num_done + progress.count,
            "done_by_this_run": progress.count,
            "quarantined": progress.totals.images_quarantined,
            **rates,
            "elapsed_seconds": progress.elapsed,
            "seconds_to_finish": progress.seconds_left,
            "usd": progress.usd,
            "usd_per_hour": account.meter.usd_per_hour,
            "usd_to_finish": progress.usd_left,
            "usd_of_output": account.usd_of_output,
            "earlier_runs": account.earlier.runs,
            "node_seconds": account.meter.node_seconds,
            "nodes_without_price": dict(account.meter.unpriced),
        }

    def _work(self) -> None:
        while True:
            self._write("running", "")
            if self._stop.wait(self.every):
                return
            self.look(joined=True)
            self._hand_on()

    def look(self, *, joined: bool = False) -> None:
        """Polls the nodes of the cluster and logs the prices of new ones.

        With `joined`, the new nodes joined during the run; a node without a price is then a warning. The nodes of the
        first poll are left to `check_prices`.
        """
        try:
            for held_node in self.account.meter.poll(cluster_nodes(self.job.config)):
                price = held_node.price
                if self.account.meter.tariff.usd_per_hour is not None:
                    continue
                if price.usd_per_hour is not None:
                    logger.info("node %s at $%g an hour", price.name, price.usd_per_hour)
                elif joined:
                    logger.warning("not in the dollars: a node that joined, %s: %s", price.name, price.problem)
        except Exception as error:  # Ray's head may not answer for a moment; the known nodes stay on the bill
            self._warn("the cluster's nodes", error)

    def _hand_on(self) -> None:
        """Logs what read tasks wait for. Several tasks wait for the same, so it is said once."""
        try:
            if (wait := take_announcement()) and wait.since > self._waits.get(wait.what, 0.0):
                self._waits[wait.what] = wait.until
                logger.warning("%s", wait)
        except Exception as error:  # Ray's head may not answer for a moment
            self._warn("the messages of tasks", error)

    def _write(self, state: str, message: str) -> None:
        content, meter = self.content(state, message), self.account.meter
        if state == "running" and not is_local(self.job.config):
            self._set_gauges(content)
        try:
            output = without_patience(self.job.output)  # the next beat tries again
            record_run(output, self.run, meter.usd, meter.elapsed, meter.node_seconds)
            output.write(FILE, json.dumps(content, indent=1).encode())
            self._written = True
        except Exception as error:  # no failed write may end the captioning
            self._warn(FILE, error)

    def _set_gauges(self, content: dict[str, Any]) -> None:
        try:
            for name, description in GAUGES.items():
                gauge = self._gauges.get(name) or self._gauges.setdefault(
                    name, Gauge(f"otprune_{name}", description, ("run",))
                )
                if content[name] is not None:
                    gauge.set(content[name], {"run": self.run})
        except Exception as error:  # such as under Ray Client, which has no metrics
            self._warn("Ray's gauges", error)

    def _warn(self, what: str, error: Exception) -> None:
        """Logs the first failure of each kind; a failure every few seconds would fill the log."""
        if what not in self._warned:
            logger.warning("%s: %s: %s; the job goes on", what, type(error).__name__, clean(str(error)))
            self._warned.add(what)


def _iso(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
