"""What is left to do: the corpus minus what the output already holds."""

import logging
from collections import defaultdict
from dataclasses import dataclass

import pyarrow.parquet as pq

from pipelines.corpus import Corpus
from pipelines.settings import UserError
from pipelines.source import SpanRow
from pipelines.storage import Store
from pipelines.units import CorpusFile, Unit, parse_part, plan_images, plan_rows, unit_key

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
    corpus: Corpus, output: Store, fingerprint: str, *, num_images: int, limit: int | None, num_samples: int
) -> Plan:
    """Spans of units of at most `num_images` for the rows that have no output yet, the first `limit` rows at most.

    `num_samples` images, spread over the plan, are marked for the report.

    Raises:
        UserError: if the output holds parts of Parquet files that this corpus does not have.
    """
    committed = frozenset(name for name in output.list("captions") if name.endswith(".parquet"))
    delete_orphans(output, committed)
    plan = _plan_parquet if corpus.columns else _plan_images
    spans, num_rows = plan(corpus, output, fingerprint, num_images, limit, committed)
    todo = sum(unit.num_images for units, _ in spans for unit in units)
    return Plan(_with_samples(spans, num_samples), committed, num_rows, num_rows - todo)


def delete_orphans(output: Store, committed: frozenset[str]) -> None:
    """Removes quarantine objects without a captions object: their unit was never committed and will be done again."""
    for name in output.list("quarantine"):
        if name not in committed:
            output.delete(f"quarantine/{name}")


Spans = list[tuple[list[Unit], tuple[int, ...]]]  # units that one task reads, and the row groups of their file


def _plan_parquet(
    corpus: Corpus, output: Store, fingerprint: str, num_images: int, limit: int | None, committed: frozenset[str]
) -> tuple[Spans, int]:
    done = defaultdict(list)
    for key, start, stop in map(parse_part, committed):
        done[key].append((start, stop))
    keys = {unit_key([file], fingerprint) for file in corpus.files}
    if strangers := set(done) - keys:
        raise UserError(
            f"{output.path} holds captions of {len(strangers)} files that this corpus does not have, or that changed; "
            "choose another output.path"
        )
    spans, num_rows = [], 0
    for file in corpus.files:
        stop = file.num_rows if limit is None else min(file.num_rows, limit - num_rows)
        if stop <= 0:
            break
        ranges = done[unit_key([file], fingerprint)]
        spans += [(units, file.row_groups) for units in plan_rows(file, fingerprint, num_images, stop, ranges)]
        num_rows += stop
    return spans, num_rows


def _plan_images(
    corpus: Corpus, output: Store, fingerprint: str, num_images: int, limit: int | None, committed: frozenset[str]
) -> tuple[Spans, int]:
    files = list(corpus.files[:limit])
    by_name = {file.source: file for file in files}
    units = plan_images(files, fingerprint, num_images)
    names = {f"part-{unit.name}.parquet" for unit in units}
    if committed - names:  # other unit sizes, a folder that has grown, isolated images: ask the objects themselves
        done = set().union(*(_sources(output, name) for name in committed))
    else:
        done = {source for unit in units if f"part-{unit.name}.parquet" in committed for source in unit.sources}
    left: list[Unit] = []
    for unit in units:
        missing: list[CorpusFile] = [by_name[source] for source in unit.sources if source not in done]
        left += [unit] if len(missing) == unit.num_images else plan_images(missing, fingerprint, num_images)
    return [([unit], ()) for unit in left], len(files)


def _sources(output: Store, name: str) -> set[str]:
    with output.fs.open(output.join("captions", name), "rb") as stream:
        sources = set(pq.read_table(stream, columns=["source"])["source"].to_pylist())
    if output.exists(f"quarantine/{name}"):
        with output.fs.open(output.join("quarantine", name), "rb") as stream:
            sources |= set(pq.read_table(stream, columns=["source"])["source"].to_pylist())
    return sources


def _with_samples(spans: Spans, num_samples: int) -> list[SpanRow]:
    """Marks as many images as wanted, in spans spread evenly over the plan."""
    wanted = [0] * len(spans)
    for i in range(num_samples if spans else 0):
        wanted[i * len(spans) // num_samples if num_samples < len(spans) else i % len(spans)] += 1
    return [SpanRow(tuple(units), groups, n) for (units, groups), n in zip(spans, wanted, strict=True)]
