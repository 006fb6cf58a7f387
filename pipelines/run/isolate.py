"""What happens to units that did not come through: find the one image to blame, or stop loudly.

A pass leaves out units whose process died on every try, and units that failed by an error. Each is tried alone once
more; one that still dies is tried image by image, one at a time in an actor, so that a death has one cause. Only an
image that kills its process even then is quarantined. Errors that stay, or deaths without end, are not the images'
fault: the job stops, and everything committed is kept.
"""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field

from pipelines.errors import JobFailedError
from pipelines.output.plan import delete_orphans
from pipelines.output.span import SpanRow
from pipelines.output.unit import split_unit
from pipelines.stages.read import Reader
from pipelines.stages.unit_batch import Rejected, UnitBatch
from pipelines.stages.write import Sink, summarize

Run = Callable[[list[SpanRow], bool], Iterator[dict]]
"""(spans, one at a time) -> summaries of the units that came through or failed by an error."""


@dataclass(slots=True)
class Missing:
    """Units without a captions object after a pass, as spans of one unit: those that died, those that failed."""

    died: list[SpanRow] = field(default_factory=list)
    failed: list[SpanRow] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def run_with_isolation(
    spans: list[SpanRow],
    run: Run,
    *,
    read: Reader,
    sink: Sink,
    sizes: dict[str, int],
    max_isolated: int,
) -> Iterator[dict]:
    """Runs all spans, then isolates what is missing; yields the summary of every unit that is committed.

    Args:
        sizes: source -> bytes of every file in the corpus.

    Raises:
        JobFailedError: if more than `max_isolated` units failed, if one fails by an error even alone, or if not one of
            several isolated images came through.
    """
    first = yield from _attempt(spans, run, sink, max_isolated, alone=False)
    again = yield from _attempt(first.failed + first.died, run, sink, max_isolated, alone=True)
    _stop_on_errors(again)
    images = [
        SpanRow((unit,), span.row_groups, 0)
        for span in again.died
        for unit in split_unit(span.units[0], sizes, sink.fingerprint)
    ]
    if images:  # their units' quarantine, written before the process died, must not count beside their own
        committed = frozenset(sink.store.list(sink.folder))
        delete_orphans(sink.store, committed, [image.units[0] for image in images])
    last = yield from _attempt(images, run, sink, max_isolated, alone=True)
    _stop_on_errors(last)
    if len(last.died) == len(images) > 1:
        raise JobFailedError(
            f"its process died on each of {len(images)} images tried alone: the images are not to blame"
        )
    for span in last.died:
        yield _quarantine(span, read, sink)


def _attempt(
    spans: list[SpanRow], run: Run, sink: Sink, max_isolated: int, *, alone: bool
) -> Generator[dict, None, Missing]:
    """Yields summaries of committed units; returns what is missing."""
    if not spans:
        return Missing()
    errors: dict[str, str] = {}
    for summary in run(spans, alone):
        if summary["error"] is None:
            yield summary
            continue
        errors[summary["unit"]] = summary["error"]
        if len(errors) > max_isolated:
            raise JobFailedError(
                f"more than faults.max_isolated={max_isolated} work units failed, the last by {summary['error']}"
            )
    committed = frozenset(sink.store.list(sink.folder))
    missing = Missing(errors=list(errors.values()))
    for span in spans:
        for unit in span.units:
            if unit.part not in committed:
                group = missing.failed if unit.name in errors else missing.died
                group.append(SpanRow((unit,), span.row_groups, 0))
    return missing


def _stop_on_errors(missing: Missing) -> None:
    if missing.failed:
        raise JobFailedError(f"{len(missing.failed)} work units failed even alone, the first by {missing.errors[0]}")


def _quarantine(span: SpanRow, read: Reader, sink: Sink) -> dict:
    """Commits a unit of one image, of which nothing ever came back, as quarantined."""
    identity = read.identify(span)
    rejected = Rejected(**identity, reason="crash", detail="the process that worked on this image died on every try")
    unit_batch = UnitBatch(span.units[0], rejected=[rejected])
    sink.commit(unit_batch)
    return summarize(unit_batch)
