"""The plan of a run: the rows of the corpus that have no committed output yet, cut into units."""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from pipelines.corpus.file import CorpusFile, RowGroups
from pipelines.corpus.find import Corpus
from pipelines.errors import UserError
from pipelines.output.changes import OnChanged, settle_changes
from pipelines.output.reader import OutputReader
from pipelines.output.redo import plan_redo
from pipelines.output.schema import CAPTIONS_FOLDER
from pipelines.output.span import SpanRow, with_row_groups
from pipelines.output.unit import Unit, parse_part, plan_images, plan_rows, unit_key
from pipelines.store import Store

logger = logging.getLogger(__name__)

CHOICES = "choose another output.path, or input.on_changed=skip or redo"


@dataclass(frozen=True, slots=True)
class Plan:
    """The spans to do, and the progress of earlier runs."""

    spans: list[SpanRow]
    committed: frozenset[str]  # names of the parts of captions that are already in the output
    num_rows: int  # rows of the corpus up to input.limit
    num_done: int  # rows that committed parts account for

    @property
    def units(self) -> list[Unit]:
        return [unit for span in self.spans for unit in span.units]


def make_plan(
    corpus: Corpus,
    output: Store,
    fingerprint: str,
    *,
    num_images: int,
    limit: int | None,
    num_samples: int,
    tidy: bool = True,
    redo: Collection[str] = (),
    on_changed: OnChanged = "refuse",
) -> Plan:
    """Plans units of at most `num_images` images for those of the first `limit` rows that have no output yet.

    The plan marks `num_samples` images, spread over its spans, for the report. With `tidy` it removes the quarantine
    parts that belong to no unit; without `tidy` it only reads the output. Quarantined rows for a reason in `redo` are
    planned again. `on_changed` is as the key says.

    Raises:
        UserError: if the output holds captions of files that this corpus lacks or that have changed and `on_changed` is
            `refuse`, or a reason is unknown.
    """
    committed = staying = committed_parts(output, CAPTIONS_FOLDER)
    left_out: frozenset[str] = frozenset()
    if on_changed != "refuse":
        left_out, committed, staying = settle_changes(corpus, output, fingerprint, committed, on_changed, tidy=tidy)
    plan = _plan_images if corpus.format.one_image_a_file else _plan_rows
    spans, num_rows = plan(corpus, output, fingerprint, num_images, limit, committed, left_out)
    spans += plan_redo(corpus, output, fingerprint, redo, committed)
    planned = [unit for units, _ in spans for unit in units]
    if tidy:
        delete_orphans(output, staying, planned)
    todo = sum(unit.num_images for unit in planned)
    return Plan(_with_samples(spans, num_samples), staying, num_rows, num_rows - todo)


def plan_everything(corpus: Corpus, fingerprint: str, *, num_images: int, limit: int | None) -> "Spans":
    """Spans of units for the first `limit` rows of the corpus. No output is looked at."""
    plan = _plan_images if corpus.format.one_image_a_file else _plan_rows
    return plan(corpus, corpus.store, fingerprint, num_images, limit, frozenset(), frozenset())[0]


def delete_orphans(output: Store, committed: frozenset[str], planned: Sequence[Unit]) -> None:
    """Removes the quarantine parts of units that are neither committed nor planned under the same name.

    The quarantine parts of planned units stay. The commit of such a unit rewrites or removes its quarantine part, and
    another driver on the same output may be about to commit the unit.
    """
    keep = committed | {unit.part for unit in planned}
    for name in output.list("quarantine"):
        if name.startswith("part-") and name not in keep:
            output.delete(f"quarantine/{name}")


def committed_parts(output: Store, folder: str) -> frozenset[str]:
    """Names of the parts in a folder of the output; each commits a unit.

    Raises:
        UserError: if another Parquet file lies in the folder.
    """
    names = frozenset(name for name in output.list(folder) if name.endswith(".parquet"))
    for name in names:
        try:
            parse_part(name)
        except ValueError as error:
            raise UserError(f"{output.path}/{folder} must hold nothing but {folder} of this job: {error}") from error
    return names


Spans = list[tuple[tuple[Unit, ...], RowGroups]]
"""For each read task its units, and the row groups that hold the units' rows."""


def _plan_rows(
    corpus: Corpus,
    output: Store,
    fingerprint: str,
    num_images: int,
    limit: int | None,
    committed: frozenset[str],
    left_out: frozenset[str],
) -> tuple[Spans, int]:
    done = done_ranges(corpus.files, output, fingerprint, committed, CAPTIONS_FOLDER)
    spans, num_rows = [], 0
    for file in corpus.files:
        if file.source in left_out:
            continue
        stop = file.num_rows if limit is None else min(file.num_rows, limit - num_rows)
        if stop <= 0:
            break
        ranges = done[unit_key([file], fingerprint)]
        spans += with_row_groups(file, plan_rows(file, fingerprint, num_images, stop, ranges))
        num_rows += stop
    return spans, num_rows


def done_ranges(
    files: Sequence[CorpusFile], output: Store, fingerprint: str, committed: frozenset[str], folder: str
) -> dict[str, list[tuple[int, int]]]:
    """The committed ranges of rows [start, stop) of each file, by the file's unit key.

    Raises:
        UserError: if there are parts of other files.
    """
    done: dict[str, list[tuple[int, int]]] = {unit_key([file], fingerprint): [] for file in files}
    unknown = set()
    for key, start, stop in map(parse_part, committed):
        done[key].append((start, stop)) if key in done else unknown.add(key)
    if unknown:
        raise UserError(
            f"{output.path} holds {folder} of {len(unknown)} files that this corpus does not have, or that changed; "
            f"{CHOICES}"
        )
    return done


def _plan_images(
    corpus: Corpus,
    output: Store,
    fingerprint: str,
    num_images: int,
    limit: int | None,
    committed: frozenset[str],
    left_out: frozenset[str],
) -> tuple[Spans, int]:
    files = list(corpus.files[:limit])
    units = plan_images(files, fingerprint, num_images)
    names = {unit.part for unit in units}
    # Part names tell all if every one is planned. They do not after another unit size, or in a folder that has grown:
    # then the sources stand in the metadata of each part, which costs a read a part.
    if committed - names:
        done = _committed_images(corpus, output, fingerprint, sorted(committed))
    else:
        done = {source for unit in units if unit.part in committed for source in unit.sources}
    done |= left_out
    by_name = {file.source: file for file in files}
    remaining: list[Unit] = []
    for unit in units:
        missing: list[CorpusFile] = [by_name[source] for source in unit.sources if source not in done]
        remaining += [unit] if len(missing) == unit.num_images else plan_images(missing, fingerprint, num_images)
    return [((unit,), RowGroups()) for unit in remaining], len(by_name.keys() - left_out)


def _committed_images(corpus: Corpus, output: Store, fingerprint: str, committed: list[str]) -> set[str]:
    """Names of the image files that committed parts account for, read from the parts' metadata.

    Raises:
        UserError: if all files of a part are in the corpus but have changed, or if the corpus has no file of any part.
    """
    by_name = {file.source: file for file in corpus.files}
    done: set[str] = set()
    for name, totals in zip(committed, OutputReader(output).totals(committed), strict=True):
        sources = totals["sources"]
        files = [by_name[source] for source in sources if source in by_name]
        if len(files) == len(sources) and unit_key(files, fingerprint) != parse_part(name)[0]:
            raise UserError(
                f"{output.path} holds captions of images that have changed since, in {sources[0]} ... "
                f"{sources[-1]}; {CHOICES}"
            )
        done.update(sources)
    if not done & by_name.keys():
        raise UserError(
            f"{output.path} holds captions of images that are not in this corpus; choose another output.path"
        )
    return done


def _with_samples(spans: Spans, num_samples: int) -> list[SpanRow]:
    """Spans with `num_samples` images to sample, spread evenly over the plan."""
    samples = [0] * len(spans)  # of each span
    for i in range(num_samples if spans else 0):
        samples[i * len(spans) // num_samples if num_samples < len(spans) else i % len(spans)] += 1
    return [SpanRow(units, groups, n) for (units, groups), n in zip(spans, samples, strict=True)]
