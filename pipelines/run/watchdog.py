"""Ends a run that Ray would let hang, and shortens Ray's error texts of forty lines to one.

Ray restarts an actor whenever its process dies, even an actor that never came up. Ray also waits for a pool whose
actors are all dead because their restart raised. Both would hold the cluster until `faults.no_progress_seconds`.

The watchdog also counts, for the `PoolClock` of the run, how long actors are held and how long they have work.
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
    """The actors of a stage are dead, and restarting them does not help."""


class PoolWatch(ExecutionCallback):
    """A callback that Ray Data runs at each step of its loop; an exception here ends the execution.

    The clock counts at every step. The actors are checked every CHECK_SECONDS, because each check asks Ray's head.
    """

    def __init__(self) -> None:
        self._checked = self._counted = time.monotonic()
        self._since: dict[str, tuple[int, int]] = {}  # pool -> (finished units, deaths when the last of them finished)

    def on_execution_step(self, executor: Any) -> None:
        """Checks and counts the actor pools of the executor.

        Raises:
            DeadActorsError: as of `check_pool`, or if more processes of a pool died in a row than its limit.
        """
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
        """Raises DeadActorsError if more than `limit` processes of the pool died since a unit was last finished."""
        deaths = sum(actors(actor._actor_id.hex()).get("NumRestarts", 0) for actor in running)
        finished = operator.metrics.num_task_outputs_generated
        finished_before, deaths_before = self._since.get(operator.name, (-1, 0))
        if finished != finished_before:
            self._since[operator.name] = (finished, deaths)
        elif deaths - deaths_before > limit:
            raise DeadActorsError(
                f"{operator.name}: {deaths - deaths_before} processes died one after the other, with no unit finished "
                "in between; the logs of the workers name the cause"
            )


def check_pool(name: str, pending: Sequence[ActorHandle], running: Sequence[ActorHandle]) -> None:
    """Checks the actors of one pool.

    Args:
        name: of the pool's operator, for the message.
        pending: actors that are not ready yet.
        running: actors that have been ready.

    Raises:
        DeadActorsError: if the process of a pending actor died MAX_STARTS times, or if all actors are dead for good.
    """
    for actor in pending:
        restarts = actors(actor._actor_id.hex()).get("NumRestarts", 0)
        if restarts >= MAX_STARTS:
            raise DeadActorsError(f"{name}: an actor's process died {restarts} times while it started")
    if running and not pending and all(actor._get_local_state() == ActorTableData.DEAD for actor in running):
        cause = actors(running[-1]._actor_id.hex())["DeathCause"]
        raise DeadActorsError(f"{name}: no actor is left, the last died of {_cause_of_death(cause)}")


def cause_of(text: str) -> str:
    """One line of an error text of Ray: the last exception of its traceback if it has one, else its first line."""
    lines = [line for line in text.splitlines() if re.match(r"[\w.]+: \S", line)]
    return clean(lines[-1] if lines else text)


def _cause_of_death(cause: Any) -> str:
    """One line of Ray's record of a dead actor: the error of its constructor if that raised, else Ray's own message."""
    raised = cause.creation_task_failure_context.formatted_exception_string
    return cause_of(raised or cause.actor_died_error_context.error_message)
