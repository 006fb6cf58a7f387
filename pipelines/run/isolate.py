"""Isolates the image that kills its process, or stops the job if no single image is the cause.

A first pass leaves units without a commit: units whose process died on every try, and units that failed by an error.
    1. Every such unit is tried again, alone in its actor.
    2. A unit whose process dies again is split into units of one image. Each is tried alone, so a death has one cause.
    3. An image whose process dies even then is quarantined.
    4. The parts of the images, which lie in a folder of this driver's own until then, are joined to the unit's part.
The captions only ever hold whole units, so a driver that isolates a unit and one that does it whole write one object.
An error that stays, or a death of every single image, is not the fault of an image: the job stops, and every committed
part stays.
"""

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from uuid import uuid4

from pipelines.corpus.fault import NOT_SHARED, OUTAGE
from pipelines.corpus.file import CorpusFile
from pipelines.errors import JobFailedError
from pipelines.output.span import SpanRow
from pipelines.output.unit import split_unit
from pipelines.stages.read import Reader
from pipelines.stages.unit_batch import Rejected, UnitBatch
from pipelines.stages.write import Sink

ISOLATED = "isolated"  # folder of the output with the parts of single images, until they are joined

Run = Callable[[list[SpanRow], bool, Sink], Iterator[dict]]
"""(spans, one at a time, sink) -> summaries of the units that were committed or failed by an error."""


@dataclass(slots=True)
class Missing:
    """Units without a committed part after a pass, as spans of one unit each."""

    died: list[SpanRow] = field(default_factory=list)  # their process died on every try
    failed: list[SpanRow] = field(default_factory=list)  # by an error
    errors: list[str] = field(default_factory=list)  # of the failed units, each with its file and rows


def run_with_isolation(
    spans: list[SpanRow],
    run: Run,
    *,
    read: Reader,
    sink: Sink,
    files: Mapping[str, CorpusFile],
    max_isolated: int,
) -> Iterator[dict]:
    """Runs all spans, then isolates the missing units. Yields the summary of every unit that is committed.

    Args:
        files: every file of the corpus by its name.
        max_isolated: units that may fail by an error in one pass.

    Raises:
        JobFailedError: if more than `max_isolated` units fail, if a unit fails by an error even alone, if nothing
            answers where the corpus lies, or if the process dies on every one of several isolated images.
    """
    first = yield from _attempt(spans, run, sink, max_isolated, alone=False)
    second = yield from _attempt(first.failed + first.died, run, sink, max_isolated, alone=True)
    _stop_on_errors(second)
    yield from _isolate(second.died, run, read, sink, files, max_isolated)


def _isolate(
    spans: list[SpanRow], run: Run, read: Reader, sink: Sink, files: Mapping[str, CorpusFile], max_isolated: int
) -> Iterator[dict]:
    """Tries the images of units one by one, and commits each unit. Yields the summaries of the units.

    Args:
        spans: of one unit each.
    """
    if not spans:
        return
    images = [split_unit(span.units[0], files, sink.fingerprint) for span in spans]
    singles = [
        SpanRow((unit,), span.row_groups, 0) for span, units in zip(spans, images, strict=True) for unit in units
    ]
    folder = f"{ISOLATED}/{uuid4().hex[:12]}"
    sink.store.remove(ISOLATED)  # what a killed driver left
    aside = sink.at(replace(sink.store, path=f"{sink.store.path}/{folder}"))
    try:
        single = _result(_attempt(singles, run, aside, max_isolated, alone=True))
        _stop_on_errors(single)
        if len(single.died) == len(singles) > 1:
            raise JobFailedError(
                f"its process died on each of {len(singles)} images tried alone: the images are not to blame"
            )
        for span in single.died:
            _quarantine(span, read, aside)
        for span, units in zip(spans, images, strict=True):
            yield sink.join(span.units[0], units, aside)
    finally:
        sink.store.remove(ISOLATED)


def _attempt(
    spans: list[SpanRow], run: Run, sink: Sink, max_isolated: int, *, alone: bool
) -> Generator[dict, None, Missing]:
    """Runs one pass. Yields the summaries of committed units and returns the missing units."""
    if not spans:
        return Missing()
    errors: dict[str, str] = {}
    where = {unit.name: unit.where for span in spans for unit in span.units}
    for summary in run(spans, alone, sink):
        if summary["error"] is None:
            del where[summary["unit"]]
            yield summary
            continue
        if summary["error"].startswith(OUTAGE):
            raise JobFailedError(f"{summary['error']}; the same command resumes")
        if summary["error"].startswith(NOT_SHARED):
            raise JobFailedError(summary["error"].removeprefix(NOT_SHARED))
        errors[summary["unit"]] = f"{where[summary['unit']]}, by {summary['error']}"
        if len(errors) > max_isolated:
            raise JobFailedError(
                f"more than faults.max_isolated={max_isolated} work units failed, the last of {errors[summary['unit']]}"
            )
    missing = Missing(errors=list(errors.values()))
    if not where:
        return missing
    # Of a unit without a summary the store decides: a process may die after its commit and before its summary arrives.
    # A unit with one is not looked up, because what a store lists may lag behind what it holds.
    committed = frozenset(sink.store.list(sink.folder))
    for span in spans:
        for unit in span.units:
            # Rows that were tried again and killed their process stay in quarantine, so they are not missing.
            if unit.name not in where:
                continue
            if unit.part not in committed or (unit.redo and unit.name in errors):
                group = missing.failed if unit.name in errors else missing.died
                group.append(SpanRow((unit,), span.row_groups, 0))
    return missing


def _stop_on_errors(missing: Missing) -> None:
    if missing.failed:
        raise JobFailedError(f"{len(missing.failed)} work units failed even alone, the first of {missing.errors[0]}")


def _result(attempt: Generator[dict, None, Missing]) -> Missing:
    """Runs a pass to its end. Its summaries are of no unit of the plan, so nobody counts them."""
    while True:
        try:
            next(attempt)
        except StopIteration as stop:
            return stop.value


def _quarantine(span: SpanRow, read: Reader, sink: Sink) -> None:
    """Commits a unit of one image, whose process died on every try, with this image in quarantine."""
    identity = read.identify(span)
    rejected = Rejected(**identity, reason="crash", detail="the process that worked on this image died on every try")
    sink.commit(UnitBatch(span.units[0], rejected=[rejected]))
