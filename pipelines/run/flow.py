"""The dataflow, on one screen: spans -> read and decode -> encode and select -> generate -> commit.

One Ray Data row is one work unit from end to end. Exceptions never leave a stage (they travel in the row), so what
Ray sees fail is only a process that died: such a unit is tried `retries` more times, then dropped from this pass
(`max_errored_blocks`), and the driver isolates the guilty image.
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

ROW_IS_A_BLOCK = 1  # bytes: a block is closed after each row, so that no stage waits for, or loses, two units at once


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
    """Runs the spans and yields one `summary` row for each unit as it is committed or fails.

    A unit whose process died `retries` + 1 times yields nothing. With `one_at_a_time` no other unit waits in an actor
    that might die. Without `encode` the generator takes the pixels. `clock` counts the seconds of the actors.

    Raises:
        Ray's errors, if an actor cannot start, more than `max_lost` units died, nothing moved for
            `no_progress_seconds`, or more than `max_restarts` actors died without a finished unit in between.
    """
    context = ray.data.DataContext.get_current().copy()
    context.max_errored_blocks = max_lost
    context.target_max_block_size = ROW_IS_A_BLOCK
    context.execution_options.preserve_order = False
    context.execution_no_progress_timeout_s = no_progress_seconds
    others = [known for known in context.custom_execution_callback_classes if known is not PoolWatch]
    context.custom_execution_callback_classes = [*others, PoolWatch]
    context.set_config(MAX_RESTARTS, max_restarts)
    if clock is not None:
        clock.follow({name: each.actor for name, each in (("encode", encode), ("generate", generate)) if each})
    context.set_config(POOL_CLOCK, clock)
    ray.data.DataContext._set_current(context)
    groups = PlacementGroups()
    num_units = sum(len(span.units) for span in spans)

    with warnings.catch_warnings():  # the retry options have no named parameters yet; hence the pinned Ray
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
        # The executor ends in reference cycles. Until they are collected, an actor that Ray has just restarted keeps
        # its CPU or GPU, and the next pass may wait for it without end.
        del rows
        gc.collect()
        groups.remove()
