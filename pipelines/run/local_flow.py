"""The flow of `ray.address=none`: the same stages one after the other in this process, so that breakpoints work.

Nothing is isolated here: a process that dies is the driver, and what it had committed is all that stays.
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
    """As `run_flow`, with one actor for each stage and one unit at a time; retries and limits have no meaning here.

    A stage whose `__call__` is a coroutine runs on one event loop that lives as long as the flow.

    Raises:
        What a stage raises.
    """
    counted, clock = time.perf_counter(), clock or PoolClock()
    stages = [(name, stage) for name, stage in (("encode", encode), ("generate", generate)) if stage is not None]
    actors = {name: stage.actor(**stage.arguments) for name, stage in stages}
    with asyncio.Runner() as runner:
        for span in spans:
            for row in read(span.to_row()):
                worked = {}
                for name, actor in actors.items():
                    began = time.perf_counter()
                    result = actor(row)
                    row = runner.run(result) if inspect.iscoroutine(result) else result
                    worked[name] = time.perf_counter() - began
                now, before = time.perf_counter(), counted
                for name, active in worked.items():
                    clock.count(name, now - before, active)
                counted = now
                yield sink(row)
