"""The dataflow, on one screen: spans -> read and decode -> encode and select -> generate -> commit.

One Ray Data row is one unit from end to end. Exceptions never leave a stage but travel in the row, so Ray sees a
failure only if a process dies. Ray retries the unit of a dead process `retries` times and then drops it from this pass
(`max_errored_blocks`). `isolate.py` finds the image that kills its process.
"""

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray.data

from pipelines.output.span import SpanRow
from pipelines.run.placement import SINK_CPUS, PlacementGroups, Stage, placers
from pipelines.run.pool_clock import POOL_CLOCK, PoolClock
from pipelines.run.watchdog import MAX_RESTARTS, PoolWatch
from pipelines.stages.read import Reader

ROW_IS_A_BLOCK = 1  # bytes; Ray closes a block after each row, so a stage never waits for, or loses, two units at once


def run_flow(
    spans: Sequence[SpanRow],
    *,
    read: Reader,
    encode: Stage | None,
    generate: Stage,
    sink: Callable[[dict[str, Any]], dict[str, Any]],
    retries: int,
    max_lost: int,
    no_progress_seconds: int,
    max_restarts: int | None = None,
    one_at_a_time: bool = False,
    clock: PoolClock | None = None,
) -> Iterator[dict[str, Any]]:
    """Runs the spans and yields one row for each unit once the unit is committed or fails: {"summary": JSON}.

    A unit whose process died `retries` + 1 times yields nothing.

    Args:
        encode: None if the generate stage takes the pixels.
        retries: further tries of a unit whose process died.
        max_lost: units that may die on every try before Ray ends the pass.
        no_progress_seconds: Ray ends the pass if no unit moves for so long.
        max_restarts: actors of a pool that may die without a finished unit in between; None is no limit.
        one_at_a_time: no second unit waits in an actor, so that the death of an actor loses one unit alone.
        clock: counts the actor-seconds of both pools.

    Raises:
        Exception: Ray's own, if an actor cannot start or one of these limits is passed.
    """
    if clock is not None:
        clock.follow({name: stage.actor for name, stage in (("encode", encode), ("generate", generate)) if stage})
    _set_context(max_lost, no_progress_seconds, max_restarts, clock)
    groups = PlacementGroups()
    num_units = sum(len(span.units) for span in spans)

    # Ray deprecates these remote options but has no named parameters for them yet. That is why Ray's version is pinned.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        dataset = ray.data.from_items([span.to_row() for span in spans], override_num_blocks=len(spans))
        dataset = dataset.flat_map(read, num_cpus=1, max_retries=retries)
        for stage, place in zip((encode, generate), placers(encode, generate, num_units, groups), strict=True):
            if stage is not None:
                dataset = dataset.map(stage.actor, **stage.remote(num_units, retries, one_at_a_time, place))
        dataset = dataset.map(sink, num_cpus=SINK_CPUS, max_retries=retries)
    rows = dataset.iter_rows()
    del dataset
    try:
        yield from rows
    finally:
        # Ray's executor leaves reference cycles that hold its actors. Until they are collected, an actor that Ray has
        # just restarted keeps its CPU or GPU, and the next pass may wait for that resource forever.
        del rows
        gc.collect()
        groups.remove()


def _set_context(max_lost: int, no_progress_seconds: int, max_restarts: int | None, clock: PoolClock | None) -> None:
    """Makes a context with the limits of this pass, and with its watchdog, the current one of Ray Data."""
    context = ray.data.DataContext.get_current().copy()
    context.max_errored_blocks = max_lost
    context.target_max_block_size = ROW_IS_A_BLOCK
    context.execution_options.preserve_order = False
    context.execution_no_progress_timeout_s = no_progress_seconds
    # The copy has the watchdog of the pass before. A class listed twice would watch, and count seconds, twice.
    others = [callback for callback in context.custom_execution_callback_classes if callback is not PoolWatch]
    context.custom_execution_callback_classes = [*others, PoolWatch]
    context.set_config(MAX_RESTARTS, max_restarts)
    context.set_config(POOL_CLOCK, clock)
    ray.data.DataContext._set_current(context)
