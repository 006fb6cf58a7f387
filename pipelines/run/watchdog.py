"""Ends a run that Ray would let wait without end, and says in one line what Ray says in forty.

Ray starts an actor again whenever its process dies, also one that never came up; and a pool whose actors are all dead,
because starting again raised, is waited for. Both would hold the cluster until `faults.no_progress_seconds`.

On the way it reports to the run's `PoolClock` for how long actors are held, and for how long they have work.
"""

import re
import time
from collections.abc import Sequence
from typing import Any

from ray._private.state import actors
from ray.actor import ActorHandle
from ray.core.generated.gcs_pb2 import ActorTableData  # pyright: ignore[reportAttributeAccessIssue] - generated
from ray.data._internal.execution.execution_callback import ExecutionCallback

from pipelines.run.pool_clock import POOL_CLOCK
from pipelines.text import clean

CHECK_SECONDS = 5.0
MAX_STARTS = 3  # processes of one actor that died before it was ready
MAX_RESTARTS = "max_restarts"  # key of the data context's own configuration: None, or a limit for each pool


class DeadActorsError(RuntimeError):
    """The actors of a stage cannot work any more, and starting them again does not help."""


class PoolWatch(ExecutionCallback):
    """Ray Data calls it at each step of its loop; what it raises ends the execution. It looks every CHECK_SECONDS."""

    def __init__(self) -> None:
        self._checked = self._counted = time.monotonic()
        self._since: dict[str, tuple[int, int]] = {}  # pool -> finished units, and deaths when the last one finished

    def on_execution_step(self, executor: Any) -> None:
        now = time.monotonic()
        due = now - self._checked >= CHECK_SECONDS
        limit = executor._data_context.get_config(MAX_RESTARTS, None)
        clock = executor._data_context.get_config(POOL_CLOCK, None)
        for operator in executor._topology:
            pool = getattr(operator, "_actor_pool", None)
            if pool is None:
                continue
            if due:
                check_pool(operator.name, list(pool._pending_actors.values()), list(pool._running_actors))
                if limit is not None:
                    self._check_deaths(operator, list(pool._running_actors), limit)
            if clock is not None and (stage := clock.stage_of(operator.name)):
                seconds, held = now - self._counted, pool.num_running_actors() + pool.num_pending_actors()
                clock.count(stage, held * seconds, pool.num_active_actors() * seconds)
        self._counted = now
        self._checked = now if due else self._checked

    def _check_deaths(self, operator: Any, running: Sequence[ActorHandle], limit: int) -> None:
        """Raises DeadActorsError if more than `limit` processes of the pool died since a unit last came through."""
        deaths = sum(actors(actor._actor_id.hex()).get("NumRestarts", 0) for actor in running)
        finished = operator.metrics.num_task_outputs_generated
        before, dead_then = self._since.get(operator.name, (-1, 0))
        if finished != before:
            self._since[operator.name] = (finished, deaths)
        elif deaths - dead_then > limit:
            raise DeadActorsError(
                f"{operator.name}: {deaths - dead_then} processes died one after the other, with no unit finished in "
                "between; the workers' logs say of what"
            )


def check_pool(name: str, pending: Sequence[ActorHandle], running: Sequence[ActorHandle]) -> None:
    """Looks at the actors of one pool: those that have never been ready, and those that have.

    Raises:
        DeadActorsError: if one dies each time it starts, or if all are dead for good.
    """
    for actor in pending:
        restarts = actors(actor._actor_id.hex()).get("NumRestarts", 0)
        if restarts >= MAX_STARTS:
            raise DeadActorsError(f"{name}: an actor's process died {restarts} times while it started")
    if running and not pending and all(actor._get_local_state() == ActorTableData.DEAD for actor in running):
        cause = actors(running[-1]._actor_id.hex())["DeathCause"]
        raise DeadActorsError(f"{name}: no actor is left, the last died of {_death(cause)}")


def cause_of(text: str) -> str:
    """One line for an error text of Ray: the exception at the end of its traceback if it holds one, else its first."""
    lines = [line for line in text.splitlines() if re.match(r"[\w.]+: \S", line)]
    return clean(lines[-1] if lines else text)


def _death(cause: Any) -> str:
    raised = cause.creation_task_failure_context.formatted_exception_string
    return cause_of(raised or cause.actor_died_error_context.error_message)
