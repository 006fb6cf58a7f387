"""The dataflow, on one screen: spans -> read and decode -> encode and select -> generate -> commit.

One Ray Data row is one work unit from end to end. Exceptions never leave a stage (they travel in the row), so what
Ray sees fail is only a process that died: such a unit is tried `retries` more times, then dropped from this pass
(`max_errored_blocks`), and the driver isolates the guilty image.
"""

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray.data
from ray.data import ActorPoolStrategy

from pipelines.source import Reader, SpanRow
from pipelines.watch import PoolWatch

ROW_IS_A_BLOCK = 1  # bytes: a block is closed after each row, so that no stage waits for, or loses, two units at once

SINK_CPUS = 0.25  # it mostly waits for the store


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """An actor stage: its class, constructor arguments and pool."""

    actor: type
    arguments: dict[str, Any]
    min_actors: int
    max_actors: int
    num_cpus: float
    num_gpus: float
    accelerator: str | None = None

    def remote(self, num_units: int, retries: int, one_at_a_time: bool) -> dict[str, Any]:
        """Keyword arguments of `Dataset.map`: never more actors than units, and one unit waits in each actor while
        another is worked on."""
        pool = ActorPoolStrategy(
            min_size=min(self.min_actors, num_units),
            max_size=min(self.max_actors, num_units),
            max_tasks_in_flight_per_actor=1 if one_at_a_time else 2,
        )
        return {
            "fn_constructor_kwargs": self.arguments,
            "compute": pool,
            "num_cpus": self.num_cpus,
            "num_gpus": self.num_gpus,
            "max_task_retries": retries,
            **({"accelerator_type": self.accelerator} if self.accelerator else {}),
        }


def run_flow(
    spans: Sequence[SpanRow],
    *,
    read: Reader,
    encode: Stage,
    generate: Stage,
    sink: Callable[[dict[str, Any]], dict[str, Any]],
    retries: int,
    max_lost: int,
    no_progress_seconds: int,
    one_at_a_time: bool = False,
) -> Iterator[dict[str, Any]]:
    """Runs the spans and yields one `summary` row for each unit as it is committed or fails.

    A unit whose process died `retries` + 1 times yields nothing. With `one_at_a_time` no other unit waits in an actor
    that might die.

    Raises:
        Ray's errors, if an actor cannot start, more than `max_lost` units died, or nothing moved for
            `no_progress_seconds`.
    """
    context = ray.data.DataContext.get_current().copy()
    context.max_errored_blocks = max_lost
    context.target_max_block_size = ROW_IS_A_BLOCK
    context.execution_options.preserve_order = False
    context.execution_no_progress_timeout_s = no_progress_seconds
    others = [known for known in context.custom_execution_callback_classes if known is not PoolWatch]
    context.custom_execution_callback_classes = [*others, PoolWatch]
    ray.data.DataContext._set_current(context)
    num_units = sum(len(span.units) for span in spans)

    with warnings.catch_warnings():  # the retry options have no named parameters yet; hence the pinned Ray
        warnings.simplefilter("ignore", DeprecationWarning)
        dataset = (
            ray.data.from_items([span.to_row() for span in spans], override_num_blocks=len(spans))
            .flat_map(read, num_cpus=1, max_retries=retries)
            .map(encode.actor, **encode.remote(num_units, retries, one_at_a_time))
            .map(generate.actor, **generate.remote(num_units, retries, one_at_a_time))
            .map(sink, num_cpus=SINK_CPUS, max_retries=retries)
        )
    rows = dataset.iter_rows()
    del dataset
    try:
        yield from rows
    finally:
        # The executor ends in reference cycles. Until they are collected, an actor that Ray has just restarted keeps
        # its CPU or GPU, and the next pass may wait for it without end.
        del rows
        gc.collect()
