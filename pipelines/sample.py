"""Captioning a random sample of the corpus through the job's own stages, without writing anything to its output.

Units are drawn from equal stretches of the corpus in file order, one of each: so every large file is in the sample, and
of many small ones a share.
"""

import json
import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipelines.caption import Job, Stages, check_pruning, make_stages
from pipelines.plan import plan_everything
from pipelines.sink import Sink, encode_table, summarize, totals
from pipelines.source import SpanRow
from pipelines.work import Work, clean

MIN_UNITS = 12  # wanted in a sample, as intervals come from the differences between units


class SampleSink(Sink):
    """A sink that writes nothing; its summaries also say how many bytes it would have written."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        work, sizes = Work.from_row(row), (0, 0.0)
        if work.error is None:
            try:
                with work.timed("write"):
                    sizes = self._sizes(work)
            except Exception as error:
                work.error = f"write: {type(error).__name__}: {clean(str(error))}"
        more = {"output_bytes": sizes[0], "object_bytes": sizes[1]}
        return {"summary": json.dumps(summarize(work) | more)}

    def _sizes(self, work: Work) -> tuple[int, float]:
        """Bytes of all the unit's objects, and of its captions object what does not grow with the rows in it."""
        whole = {name: len(content) for name, content in self.objects(work).items()}
        rows = self.rows(work, **self.names)
        half = len(rows) // 2
        if not half:
            return sum(whole.values()), float(list(whole.values())[-1])
        metadata = {**totals(work), "sources": work.unit.sources}
        part, full = (len(encode_table(some, self.schema, metadata)) for some in (rows[:half], rows))
        return sum(whole.values()), max(0.0, full - (full - part) / (len(rows) - half) * len(rows))


def draw_units(job: Job, num_images: int, seed: int, *, shown: bool = False) -> list[SpanRow]:
    """Units with about `num_images` images in all; with `shown`, each image comes back as a sample for people."""
    config = job.config
    least = max(config.encode.batch_size, config.generate.batch_size)  # smaller units would not fill a batch
    size = min(config.unit.images, max(least, math.ceil(num_images / MIN_UNITS)))
    spans = plan_everything(job.corpus, job.fingerprint, num_images=size, limit=config.input.limit)
    units = [(unit, groups) for units, groups in spans for unit in units]
    count = min(len(units), math.ceil(num_images / size))
    rng = random.Random(seed)
    drawn = [units[rng.randrange(i * len(units) // count, (i + 1) * len(units) // count)] for i in range(count)]
    return [SpanRow((unit,), groups, unit.num_images if shown else 0) for unit, groups in drawn]


def run_sample(
    job: Job, spans: list[SpanRow], encoder: type, generator: type, *, method: str | None = None
) -> Iterator[dict[str, Any]]:
    """Summaries of the units as they come through, on the connected cluster; `method` in place of prune.method.

    A unit that fails, or whose process dies, does not come through.

    Raises:
        JobFailedError: if Ray gives up.
    """
    config = job.config
    if method is not None:
        config = replace(config, prune=replace(config.prune, method=method, settings={}))
        job = replace(job, config=config, pruning=check_pruning(config, job.model))
    stages = make_stages(job, encoder, generator)
    sink = SampleSink(
        store=job.output, fingerprint=job.fingerprint, model=config.model.path, method=config.prune.method
    )
    sampled = Stages(stages.read, stages.encode, stages.generate, sink)
    yield from (summary for summary in sampled.run(spans, config, False) if summary["error"] is None)
