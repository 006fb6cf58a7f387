"""How many images a second one driver can move: the dataflow with stages that do nothing, by size of unit.

    python -m benchmarks.ceiling [--units 1 16 128 512] [--seconds 20] [--spans 1000 10000]

Each stage makes the metadata that a real one would and no arrays; one encode and one generate actor. The first part
runs as many units as fit in the time. The second part starts flows of many spans of one unit, and measures the seconds
until the first units are done, and the driver's memory. Prints JSON as the last line.
"""

import argparse
import json
import time
from collections.abc import Iterator
from itertools import islice
from typing import Any

import psutil
import ray

from pipelines.corpus.file import RowGroups
from pipelines.output.span import SpanRow
from pipelines.output.unit import Unit
from pipelines.run.flow import run_flow
from pipelines.run.placement import Stage
from pipelines.stages.unit_batch import Answer, Image, UnitBatch
from pipelines.stages.write import summarize

SPAN_UNITS = 8


class Same:
    """An actor that does nothing."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return row


class Read:
    """The units of a span with images that are answered already, so that the stages after it have their metadata."""

    def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
        answer = Answer("a dog on a red chair", 56, 70, 8, "stop")
        for unit in SpanRow.from_row(row).units:
            rows = range(unit.start, unit.stop)
            images = [
                Image(f"a.parquet#{i}", "a.parquet", i, "0" * 64, ["p"], [(336, 336)], [answer], 576) for i in rows
            ]
            yield UnitBatch(unit, images=images).to_row()

    def identify(self, span: SpanRow) -> dict[str, Any]:
        raise NotImplementedError


def sink(row: dict[str, Any]) -> dict[str, Any]:
    return {"summary": json.dumps(summarize(UnitBatch.from_row(row)))}


def spans_of(num_spans: int, num_images: int, units: int = SPAN_UNITS) -> list[SpanRow]:
    spans = []
    for span in range(num_spans):
        first = span * units
        ranges = ((i * num_images, (i + 1) * num_images) for i in range(first, first + units))
        spans.append(SpanRow(tuple(Unit("0" * 12, a, b, ("a.parquet",)) for a, b in ranges), RowGroups(), 0))
    return spans


def flow(spans: list[SpanRow]) -> Iterator[dict[str, Any]]:
    stage = Stage(actor=Same, arguments={}, min_actors=1, max_actors=1, num_cpus=0.1, num_gpus=0)
    return run_flow(
        spans,
        read=Read(),
        encode=stage,
        generate=stage,
        sink=sink,
        retries=1,
        max_lost=0,
        no_progress_seconds=120,
    )


def measure(num_images: int, seconds: float) -> dict[str, float]:
    """Units and images a second, from the first finished unit on."""
    rows, done = flow(spans_of(2000, num_images)), 0
    next(rows)
    began = time.perf_counter()
    for _ in rows:
        done += 1
        if time.perf_counter() - began > seconds:
            break
    rate = done / (time.perf_counter() - began)
    rows.close()  # pyright: ignore[reportAttributeAccessIssue] - a generator
    return {
        "unit_images": num_images,
        "units_per_second": round(rate, 1),
        "images_per_second": round(rate * num_images),
    }


def start_up(num_spans: int) -> dict[str, float]:
    """Seconds to the first finished units of a flow of many spans, and the driver's memory above that without."""
    process, before, began = psutil.Process(), psutil.Process().memory_info().rss, time.perf_counter()
    spans = spans_of(num_spans, 128, 1)
    rows = flow(spans)
    list(islice(rows, 10))
    seconds, mib = time.perf_counter() - began, (process.memory_info().rss - before) / 2**20
    rows.close()  # pyright: ignore[reportAttributeAccessIssue] - a generator
    return {"spans": num_spans, "seconds_to_first_units": round(seconds, 1), "driver_mib": round(mib)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, nargs="*", default=[1, 16, 128, 512])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--spans", type=int, nargs="*", default=[1000, 10_000])
    options = parser.parse_args()
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    ray.data.DataContext.get_current().enable_progress_bars = False
    report = []
    for num_images in options.units:
        report.append(measure(num_images, options.seconds))
        print(report[-1], flush=True)
    for num_spans in options.spans:
        report.append(start_up(num_spans))
        print(report[-1], flush=True)
    print(json.dumps(report))


if __name__ == "__main__":
    main()
