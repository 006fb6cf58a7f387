"""What an evaluation asks: the benchmarks' files, their questions and the units of work. Runs once, on the driver.

Reads the footers and the few columns that identify questions, so that everything wrong with a benchmark's files is said
before a cluster starts, a limit can take whole scoring groups, and the number of answers to expect is known.
"""

import posixpath
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.accuracy.read_questions import QuestionFile
from pipelines.benchmarks import Benchmark, Key, whole_groups
from pipelines.benchmarks.columns import IMAGE, check_schema
from pipelines.corpus.file import CorpusFile
from pipelines.corpus.parquet import FOOTER_THREADS, read_footer
from pipelines.errors import UserError
from pipelines.output.plan import Plan, committed_parts, delete_orphans, done_ranges
from pipelines.output.schema import PREDICTIONS_FOLDER
from pipelines.output.span import SpanRow, with_row_groups
from pipelines.output.unit import Unit, plan_rows, unit_key
from pipelines.store import STORE_ERRORS, Store


@dataclass(slots=True)
class Asked:
    """All questions of an evaluation; sources are relative to `store`."""

    store: Store
    files: list[CorpusFile] = field(default_factory=list)
    readers: dict[str, QuestionFile] = field(default_factory=dict)  # by source
    per_row: dict[str, np.ndarray] = field(default_factory=dict)  # source -> questions of each row
    wanted: dict[str, frozenset[str]] = field(default_factory=dict)  # benchmark with a limit -> scoring groups
    questions: dict[str, int] = field(default_factory=dict)  # of each benchmark


def find_questions(store: Store, benches: Sequence[Benchmark], limit: int | None) -> Asked:
    """The questions of `benches` in the folder that holds their data sets, `limit` or a few more of each.

    Benchmarks that read the same files are asked together, so that an image of several is encoded once.

    Raises:
        UserError: no files, a damaged file, a missing column or a wrong type, a missing image, an id that appears
            twice; it names the benchmark.
    """
    asked = Asked(store)
    together: dict[tuple[str, str], list[Benchmark]] = defaultdict(list)
    for bench in benches:
        together[bench.repo, bench.files].append(bench)
    for group in together.values():
        _add_group(asked, group, limit)
    return asked


def plan_questions(asked: Asked, output: Store, fingerprint: str, num_images: int) -> Plan:
    """Spans of units of at most `num_images` rows that hold questions and have no predictions yet; counts questions."""
    committed = committed_parts(output, PREDICTIONS_FOLDER)
    done = done_ranges(asked.files, output, fingerprint, committed, PREDICTIONS_FOLDER)
    spans, num_left = [], 0
    for file in asked.files:
        per_row = asked.per_row[file.source]
        ranges = done[unit_key([file], fingerprint)]
        for units, groups in with_row_groups(file, plan_rows(file, fingerprint, num_images, file.num_rows, ranges)):
            for has_questions, some in groupby(units, key=lambda unit: bool(per_row[unit.start : unit.stop].any())):
                if has_questions:
                    spans.append(SpanRow(tuple(some), groups, 0))
                    num_left += sum(int(per_row[unit.start : unit.stop].sum()) for unit in spans[-1].units)
    delete_orphans(output, committed, [unit for span in spans for unit in span.units])
    num_questions = sum(asked.questions.values())
    return Plan(spans, committed, num_questions, num_questions - num_left)


def first_spans(asked: Asked, num_rows: int) -> list[SpanRow]:
    """The first rows of the first files, `num_rows` in all: a sample of the questions' images."""
    spans = []
    for file in asked.files:
        rows = min(num_rows, file.num_rows)
        if rows:
            [(units, groups)] = with_row_groups(file, [[Unit("0" * 12, 0, rows, (file.source,))]])
            spans.append(SpanRow(units, groups, 0))
        num_rows -= rows
    return spans


def _add_group(asked: Asked, group: list[Benchmark], limit: int | None) -> None:
    """Adds benchmarks that read the same files."""
    store, sizes = asked.store, _find(asked.store, group[0], group[0].files)
    footers = _parallel(lambda name: read_footer(store, name), sizes)
    for name, footer in zip(sizes, footers, strict=True):
        for bench in group:
            with _naming(name):
                bench.check_schema(footer.schema.to_arrow_schema())
    files = [
        CorpusFile(name, size, tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups)))
        for (name, size), footer in zip(sizes.items(), footers, strict=True)
    ]
    first_rows = [0, *accumulate(sum(file.row_groups) for file in files)]
    columns = list(dict.fromkeys(column for bench in group for column in bench.key_columns))
    tables = _parallel(lambda name: _read(store, name, columns), sizes)
    image_files = tuple(_image_files(store, group[0]))
    names = tuple(bench.name for bench in group)
    for file, first_row, table in zip(files, first_rows, tables, strict=False):
        if table.num_rows:
            asked.files.append(file)
            asked.readers[file.source] = QuestionFile(names, first_row, image_files)
            asked.per_row[file.source] = np.zeros(table.num_rows, np.int64)
    for bench in group:
        keys: dict[str, list[list[Key]]] = {}
        for file, first_row, table in zip(files, first_rows, tables, strict=False):
            with _naming(file.source):
                keys[file.source] = bench.keys_by_row(table, first_row)
        _check_images_are_there(store, bench, image_files, keys)
        _take(asked, bench, keys, limit)
        for file, footer in zip(files, footers, strict=True):
            _check_no_null_images(bench, file.source, footer, keys[file.source])


def _take(asked: Asked, bench: Benchmark, keys: dict[str, list[list[Key]]], limit: int | None) -> None:
    """Counts the benchmark's questions, up to the limit, in `asked`."""
    flat = [key for rows in keys.values() for row in rows for key in row]
    if not flat:
        raise UserError(f"benchmark {bench.name!r} must have questions, found none in {', '.join(keys)}")
    seen: set[str] = set()
    for key in flat:
        if key.question_id in seen:
            raise UserError(f"benchmark {bench.name!r}: question ids must be unique, got {key.question_id!r} twice")
        seen.add(key.question_id)
    if limit is not None:
        asked.wanted[bench.name] = frozenset(flat[i].group_id for i in whole_groups(flat, limit))
    wanted = asked.wanted.get(bench.name)
    asked.questions[bench.name] = 0
    for source, rows in keys.items():
        if rows:
            counts = [sum(wanted is None or key.group_id in wanted for key in row) for row in rows]
            asked.per_row[source] += counts
            asked.questions[bench.name] += sum(counts)


def _check_images_are_there(store: Store, bench: Benchmark, files: Sequence[str], keys: dict) -> None:
    """Raises UserError if a question is about an image that the second table does not have."""
    if bench.image_table is None:
        return
    ids = {key for name in files for key in _read(store, name, ["id"])["id"].to_pylist()}
    for source, rows in keys.items():
        for number, key in ((number, key) for number, row in enumerate(rows) for key in row):
            if key.image_id not in ids:
                raise UserError(
                    f"{source}: benchmark {bench.name!r}, row {number}: column {bench.image_table.lookup!r} must name "
                    f"one of the {len(ids)} images in {', '.join(files)}, got {key.image_id!r}"
                )


def _check_no_null_images(bench: Benchmark, source: str, footer: pq.FileMetaData, rows: list[list[Key]]) -> None:
    """Raises UserError where the footer says that images are missing; the reader finds those that it leaves open."""
    leaves = {f"{name}.bytes": name for name, column in bench.columns.items() if column == IMAGE}
    start = 0
    for group in (footer.row_group(i) for i in range(footer.num_row_groups)):
        stop = start + group.num_rows
        chunks = [chunk for i in range(group.num_columns) if (chunk := group.column(i)).path_in_schema in leaves]
        for chunk in chunks:
            nulls = chunk.statistics.null_count if chunk.statistics and chunk.statistics.has_null_count else 0
            if nulls and all(rows[start:stop]):
                name = leaves[chunk.path_in_schema]
                raise UserError(
                    f"{source}: benchmark {bench.name!r}: column {name!r} must hold an image in every row, "
                    f"got {nulls} without in rows {start} to {stop - 1}"
                )
        start = stop


def _image_files(store: Store, bench: Benchmark) -> Iterator[str]:
    """Files of the second table, checked."""
    if bench.image_table is not None:
        for name in _find(store, bench, bench.image_table.files):
            with _naming(name):
                schema = read_footer(store, name).schema.to_arrow_schema()
                check_schema(bench.name, bench.image_table.columns, schema)
            yield name


def _find(store: Store, bench: Benchmark, pattern: str) -> dict[str, int]:
    """Sorted sources and sizes of a benchmark's files."""
    try:
        found = cast(dict[str, Any], store.fs.glob(store.join(bench.repo, pattern), detail=True))
    except STORE_ERRORS as error:
        raise UserError(f"input.path {store.path} cannot be listed: {error}") from error
    if not found:
        raise UserError(
            f"benchmark {bench.name!r}: input.path must be the folder that holds "
            f"{posixpath.join(bench.repo, pattern)}, found no such file in {store.path}"
        )
    return {posixpath.relpath(path, store.root): found[path]["size"] for path in sorted(found)}


def _read(store: Store, name: str, columns: list[str]) -> pa.Table:
    with store.fs.open(store.join(name), "rb") as stream:
        return pq.read_table(stream, columns=columns)


def _parallel(call: Callable[[str], Any], names: dict[str, int]) -> list[Any]:
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        return list(pool.map(call, names))


@contextmanager
def _naming(source: str) -> Iterator[None]:
    """A benchmark's ValueError becomes the user's, with the file."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
