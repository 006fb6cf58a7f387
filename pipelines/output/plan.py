"""What is left to do: the corpus minus what the output already holds."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.corpus.file import CorpusFile, RowGroups
from pipelines.corpus.find import Corpus
from pipelines.errors import UserError
from pipelines.output.reader import OutputReader
from pipelines.output.schema import CAPTIONS_FOLDER
from pipelines.output.span import SpanRow, with_row_groups
from pipelines.output.unit import Unit, parse_part, plan_images, plan_rows, unit_key
from pipelines.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """`spans` are to be done; `committed` names the captions objects that are there already."""

    spans: list[SpanRow]
    committed: frozenset[str]
    num_rows: int  # of the corpus, as far as input.limit lets us go
    num_done: int  # rows that the committed objects account for

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
) -> Plan:
    """Spans of units of at most `num_images` for the rows that have no output yet, the first `limit` rows at most.

    `num_samples` images, spread over the plan, are marked for the report. With `tidy`, quarantine objects that belong
    to no unit are removed; without, the output is only read.

    Raises:
        UserError: if the output holds captions of files that this corpus does not have or that have changed.
    """
    committed = committed_parts(output, CAPTIONS_FOLDER)
    plan = _plan_images if corpus.format.one_image_a_file else _plan_rows
    spans, num_rows = plan(corpus, output, fingerprint, num_images, limit, committed)
    planned = [unit for units, _ in spans for unit in units]
    if tidy:
        delete_orphans(output, committed, planned)
    todo = sum(unit.num_images for unit in planned)
    return Plan(_with_samples(spans, num_samples), committed, num_rows, num_rows - todo)


def plan_everything(corpus: Corpus, fingerprint: str, *, num_images: int, limit: int | None) -> "Spans":
    """Units of all rows, whatever any output holds."""
    plan = _plan_images if corpus.format.one_image_a_file else _plan_rows
    return plan(corpus, corpus.store, fingerprint, num_images, limit, frozenset())[0]


def delete_orphans(output: Store, committed: frozenset[str], planned: Sequence[Unit]) -> None:
    """Removes quarantine objects whose unit was never committed and is not planned as it was.

    Those of planned units stay: committing a unit rewrites or removes them, and another driver on the same output may
    be about to.
    """
    keep = committed | {unit.part for unit in planned}
    for name in output.list("quarantine"):
        if name.startswith("part-") and name not in keep:
            output.delete(f"quarantine/{name}")


def committed_parts(output: Store, folder: str) -> frozenset[str]:
    """Names of the objects that commit units.

    Raises:
        UserError: if something else lies among them.
    """
    names = frozenset(name for name in output.list(folder) if name.endswith(".parquet"))
    for name in names:
        try:
            parse_part(name)
        except ValueError as error:
            raise UserError(f"{output.path}/{folder} must hold nothing but {folder} of this job: {error}") from error
    return names


Spans = list[tuple[tuple[Unit, ...], RowGroups]]
"""Units that one task reads, and the row groups that hold their rows."""


def _plan_rows(
    corpus: Corpus, output: Store, fingerprint: str, num_images: int, limit: int | None, committed: frozenset[str]
) -> tuple[Spans, int]:
    done = done_ranges(corpus.files, output, fingerprint, committed, CAPTIONS_FOLDER)
    spans, num_rows = [], 0
    for file in corpus.files:
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
    """Unit key of each file -> the ranges of its rows that are committed.

    Raises:
        UserError: if there are objects of other files.
    """
    done: dict[str, list[tuple[int, int]]] = {unit_key([file], fingerprint): [] for file in files}
    strangers = set()
    for key, start, stop in map(parse_part, committed):
        done[key].append((start, stop)) if key in done else strangers.add(key)
    if strangers:
        raise UserError(
            f"{output.path} holds {folder} of {len(strangers)} files that this corpus does not have, or that changed; "
            "choose another output.path"
        )
    return done


def _plan_images(
    corpus: Corpus, output: Store, fingerprint: str, num_images: int, limit: int | None, committed: frozenset[str]
) -> tuple[Spans, int]:
    files = list(corpus.files[:limit])
    units = plan_images(files, fingerprint, num_images)
    names = {unit.part for unit in units}
    if committed - names:  # other unit sizes, a folder that has grown, isolated images: ask the objects themselves
        done = _committed_images(corpus, output, fingerprint, sorted(committed))
    else:
        done = {source for unit in units if unit.part in committed for source in unit.sources}
    by_name = {file.source: file for file in files}
    left: list[Unit] = []
    for unit in units:
        missing: list[CorpusFile] = [by_name[source] for source in unit.sources if source not in done]
        left += [unit] if len(missing) == unit.num_images else plan_images(missing, fingerprint, num_images)
    return [((unit,), RowGroups()) for unit in left], len(files)


def _committed_images(corpus: Corpus, output: Store, fingerprint: str, committed: list[str]) -> set[str]:
    """Image files that the committed objects account for, as their metadata says.

    Raises:
        UserError: if an object's files are all there but have changed, or if the corpus has none of them all.
    """
    by_name = {file.source: file for file in corpus.files}
    done: set[str] = set()
    for name, totals in zip(committed, OutputReader(output).totals(committed), strict=True):
        sources = totals["sources"]
        files = [by_name[source] for source in sources if source in by_name]
        if len(files) == len(sources) and unit_key(files, fingerprint) != parse_part(name)[0]:
            raise UserError(
                f"{output.path} holds captions of images that have changed since, in {sources[0]} ... "
                f"{sources[-1]}; choose another output.path"
            )
        done.update(sources)
    if not done & by_name.keys():
        raise UserError(
            f"{output.path} holds captions of images that are not in this corpus; choose another output.path"
        )
    return done


def _with_samples(spans: Spans, num_samples: int) -> list[SpanRow]:
    """Marks as many images as wanted, in spans spread evenly over the plan."""
    wanted = [0] * len(spans)
    for i in range(num_samples if spans else 0):
        wanted[i * len(spans) // num_samples if num_samples < len(spans) else i % len(spans)] += 1
    return [SpanRow(units, groups, n) for (units, groups), n in zip(spans, wanted, strict=True)]
