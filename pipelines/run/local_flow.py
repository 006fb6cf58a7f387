"""The flow of `ray.address=none`: the same stages, one after the other in this process, so that breakpoints work.

No image is isolated here: an image that kills its process kills the driver, and only the committed parts stay.
"""

import asyncio
import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipelines.output.span import SpanRow
from pipelines.run.placement import Stage
from pipelines.run.pool_clock import PoolClock
from pipelines.stages.read import Reader


def local_flow(
    spans: Sequence[SpanRow],
    *,
    read: Reader,
    encode: Stage | None,
    generate: Stage,
    sink: Callable[[dict[str, Any]], dict[str, Any]],
    clock: PoolClock | None = None,
    **_: Any,
) -> Iterator[dict[str, Any]]:
    """As `run_flow`, with one actor for each stage and one unit at a time. Retries and limits have no meaning here.

    Stages whose `__call__` is a coroutine share one event loop that lives as long as the flow.

    Raises:
        Exception: the error of a stage.
    """
    counted_until, clock = time.perf_counter(), clock or PoolClock()
    stages = [(name, stage) for name, stage in (("encode", encode), ("generate", generate)) if stage is not None]
    actors = {name: stage.actor(**stage.arguments) for name, stage in stages}
    with asyncio.Runner() as runner:
        for span in spans:
            for row in read(span.to_row()):
                active_seconds = {}
                for name, actor in actors.items():
                    began = time.perf_counter()
                    result = actor(row)
                    row = runner.run(result) if inspect.iscoroutine(result) else result
                    active_seconds[name] = time.perf_counter() - began
                now = time.perf_counter()
                for name, active in active_seconds.items():
                    clock.count(name, now - counted_until, active)  # both actors are held all the time
                counted_until = now
                yield sink(row)
