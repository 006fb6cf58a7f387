"""The cost of every run of an output, stored beside the output, so that the dollars of a killed driver still count.

runs/<run>.json    one object for each run, rewritten every few seconds of the run: dollars, seconds, node-seconds
"""

import json
import logging
import secrets
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from pipelines.store import Store, in_threads, write_json
from pipelines.text import clean

logger = logging.getLogger(__name__)

FOLDER = "runs"


@dataclass(slots=True)
class Spent:
    """Sums over the runs of an output. `usd` is the sum over runs with a price; `unpriced` counts the other runs."""

    runs: int = 0
    unpriced: int = 0
    usd: float = 0.0
    wall_seconds: float = 0.0
    node_seconds: Counter[str] = field(default_factory=Counter)

    def add(self, usd: float | None, wall_seconds: float, node_seconds: dict[str, float]) -> None:
        self.runs += 1
        self.unpriced += usd is None
        self.usd += usd or 0.0
        self.wall_seconds += wall_seconds
        self.node_seconds.update(node_seconds)

    def to_dict(self) -> dict[str, Any]:
        return {name: dict(v) if isinstance(v := getattr(self, name), Counter) else v for name in self.__slots__}


def new_run() -> str:
    """A new name for a run. Names sort by start (UTC); a random ending keeps runs of the same second apart."""
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def record_run(store: Store, run: str, usd: float | None, wall_seconds: float, node_seconds: dict[str, float]) -> str:
    """Writes the cost of a run so far over the record that the run wrote before. Returns the name of the record."""
    record = {"usd": usd, "wall_seconds": wall_seconds, "node_seconds": node_seconds}
    name = f"{FOLDER}/{run}.json"
    write_json(store, name, record)
    return name


def read_spent(store: Store) -> Spent:
    """The cost of all runs of an output. Logs and skips unreadable records."""
    names = [name for name in store.list(FOLDER) if name.endswith(".json")]
    spent = Spent()
    for name, content in zip(names, in_threads(lambda name: store.read(f"{FOLDER}/{name}"), names), strict=True):
        try:
            spent.add(**json.loads(content))
        except (ValueError, TypeError) as error:  # not JSON, or not the arguments of `Spent.add`
            logger.warning(
                "%s/%s/%s is not a record of a run and does not count: %s",
                store.path,
                FOLDER,
                name,
                clean(str(error)),
            )
    return spent
