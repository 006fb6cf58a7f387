"""Captions a random sample of the corpus through the job's own stages, without a write to the output.

One unit is drawn from each of equal stretches of the corpus in file order. So every large file is in the sample, and a
share of many small files.
"""

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from pipelines.output.plan import plan_everything
from pipelines.output.span import SpanRow
from pipelines.preflight.dry_write import SampleSink
from pipelines.run.job import Job, check_pruning, with_pictures_of
from pipelines.run.stages import Stages, make_stages

MIN_UNITS = 12  # least units of a sample; the differences between units give the intervals


def draw_units(job: Job, num_images: int, seed: int, *, shown: bool = False) -> list[SpanRow]:
    """Draws units with about `num_images` images in all, as spans of one unit.

    Args:
        shown: whether the summaries bring back every image with its captions and a thumbnail.
    """
    config = job.config
    min_size = max(config.encode.batch_size, config.generate.batch_size)  # smaller units would not fill a batch
    size = min(config.unit.images, max(min_size, math.ceil(num_images / MIN_UNITS)))
    spans = plan_everything(job.corpus, job.fingerprint, num_images=size, limit=config.input.limit)
    units = [(unit, groups) for units, groups in spans for unit in units]
    count = min(len(units), math.ceil(num_images / size))
    rng = random.Random(seed)
    drawn = [units[rng.randrange(i * len(units) // count, (i + 1) * len(units) // count)] for i in range(count)]
    return [SpanRow((unit,), groups, unit.num_images if shown else 0) for unit, groups in drawn]


def run_sample(job: Job, spans: list[SpanRow], *, method: str | None = None) -> Iterator[dict[str, Any]]:
    """Captions the sample on the connected cluster and yields the summaries of its units, in order of completion.

    A unit that fails, or whose process dies, yields nothing.

    Args:
        method: replaces prune.method and its settings.

    Raises:
        JobFailedError: if Ray gives up.
    """
    config = job.config
    if method is not None:
        config = replace(config, prune=replace(config.prune, method=method, settings={}))
        checkpoint = with_pictures_of(config.prune, job.checkpoint)
        job = replace(job, config=config, checkpoint=checkpoint, pruning=check_pruning(config, checkpoint))
    stages = make_stages(job)
    sink = SampleSink(
        store=job.output, fingerprint=job.fingerprint, model=config.model.path, method=config.prune.method
    )
    sampled = Stages(stages.read, stages.encode, stages.generate, sink)
    yield from (summary for summary in sampled.run(spans, config, False) if summary["error"] is None)
