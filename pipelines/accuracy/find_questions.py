"""Finds the questions of an evaluation, and plans the units that are left to answer. Runs once, on the driver.

The driver reads the Parquet footers and the few columns that identify questions. So it reports a faulty file before a
cluster starts, a limit takes whole scoring groups, and the number of expected answers is known.
"""

import posixpath
from collections import defaultdict
from collections.abc import Iterator, Sequence
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
from pipelines.corpus.formats.parquet import read_footer
from pipelines.errors import UserError
from pipelines.output.plan import Plan, committed_parts, delete_orphans, done_ranges
from pipelines.output.schema import PREDICTIONS_FOLDER
from pipelines.output.span import SpanRow, with_row_groups
from pipelines.output.unit import Unit, plan_rows, unit_key
from pipelines.store import STORE_ERRORS, Store, in_threads


@dataclass(slots=True)
class Questions:
    """All questions of an evaluation: where the files hold them, and how many there are. Sources are in `store`."""

    store: Store
    files: list[CorpusFile] = field(default_factory=list)  # those with at least one row
    readers: dict[str, QuestionFile] = field(default_factory=dict)  # source -> the reading stage's view of the file
    num_by_row: dict[str, np.ndarray] = field(default_factory=dict)  # source -> number of questions of each row
    wanted: dict[str, frozenset[str]] = field(default_factory=dict)  # benchmark with a limit -> scoring groups to ask
    num_by_benchmark: dict[str, int] = field(default_factory=dict)


def find_questions(store: Store, benches: Sequence[Benchmark], limit: int | None) -> Questions:
    """The questions of `benches` below `store`, the folder that holds their data sets.

    With a `limit`, a benchmark asks so many questions, and a few more if its last scoring group needs them.
    Benchmarks that read the same files form one group, so that an image of several benchmarks is encoded once.

    Raises:
        UserError: if there are no files, a file is damaged, a column is missing or of a wrong type, an image is
            missing, or an id appears twice. The message names the benchmark.
    """
    questions = Questions(store)
    by_files: dict[tuple[str, str], list[Benchmark]] = defaultdict(list)
    for bench in benches:
        by_files[bench.repo, bench.files].append(bench)
    for group in by_files.values():
        _add_group(questions, group, limit)
    return questions


def plan_questions(questions: Questions, output: Store, fingerprint: str, num_images: int) -> Plan:
    """Plans the units without committed predictions: at most `num_images` rows each, at least one question.

    The plan counts questions where the caption job's counts rows. Quarantine parts of units that are neither committed
    nor planned are deleted.
    """
    committed = committed_parts(output, PREDICTIONS_FOLDER)
    done = done_ranges(questions.files, output, fingerprint, committed, PREDICTIONS_FOLDER)
    spans, num_left = [], 0
    for file in questions.files:
        num_by_row = questions.num_by_row[file.source]
        ranges = done[unit_key([file], fingerprint)]
        for units, groups in with_row_groups(file, plan_rows(file, fingerprint, num_images, file.num_rows, ranges)):
            # A unit without questions ends the span: no stage reads its rows, and no part of it is expected.
            for has_questions, run in groupby(units, key=lambda unit: bool(num_by_row[unit.start : unit.stop].any())):
                if has_questions:
                    spans.append(SpanRow(tuple(run), groups, 0))
                    num_left += sum(int(num_by_row[unit.start : unit.stop].sum()) for unit in spans[-1].units)
    delete_orphans(output, committed, [unit for span in spans for unit in span.units])
    num_questions = sum(questions.num_by_benchmark.values())
    return Plan(spans, committed, num_questions, num_questions - num_left)


def first_spans(questions: Questions, num_rows: int) -> list[SpanRow]:
    """The first `num_rows` rows of all files, as one span a file: a sample of the questions' images."""
    spans = []
    for file in questions.files:
        rows = min(num_rows, file.num_rows)
        if rows:
            unit = Unit("0" * 12, 0, rows, (file.source,))  # nothing of it is committed, so any key will do
            [(units, groups)] = with_row_groups(file, [[unit]])
            spans.append(SpanRow(units, groups, 0))
        num_rows -= rows
    return spans


def _add_group(questions: Questions, group: list[Benchmark], limit: int | None) -> None:
    """Adds the questions of benchmarks that read the same files."""
    store, sizes = questions.store, _find_files(questions.store, group[0], group[0].files)
    footers = list(in_threads(lambda name: read_footer(store, name), sizes))
    for name, footer in zip(sizes, footers, strict=True):
        for bench in group:
            with _user_error_about(name):
                bench.check_schema(footer.schema.to_arrow_schema())
    files = [
        CorpusFile(name, size, tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups)))
        for (name, size), footer in zip(sizes.items(), footers, strict=True)
    ]
    first_rows = [0, *accumulate(sum(file.row_groups) for file in files)]  # one more than files: the total is last
    columns = list(dict.fromkeys(column for bench in group for column in bench.key_columns))
    tables = list(in_threads(lambda name: _read(store, name, columns), sizes))
    image_files = tuple(_image_files(store, group[0]))
    names = tuple(bench.name for bench in group)
    for file, first_row, table in zip(files, first_rows, tables, strict=False):
        if table.num_rows:
            questions.files.append(file)
            questions.readers[file.source] = QuestionFile(names, first_row, image_files)
            questions.num_by_row[file.source] = np.zeros(table.num_rows, np.int64)
    for bench in group:
        keys: dict[str, list[list[Key]]] = {}
        for file, first_row, table in zip(files, first_rows, tables, strict=False):
            with _user_error_about(file.source):
                keys[file.source] = bench.keys_by_row(table, first_row)
        _check_images_are_there(store, bench, image_files, keys)
        _count(questions, bench, keys, limit)
        for file, footer in zip(files, footers, strict=True):
            _check_no_null_images(bench, file.source, footer, keys[file.source])


def _count(questions: Questions, bench: Benchmark, keys: dict[str, list[list[Key]]], limit: int | None) -> None:
    """Adds the benchmark's questions, up to the limit, to the counts. `keys`: source -> keys of each row."""
    flat = [key for rows in keys.values() for row in rows for key in row]
    if not flat:
        raise UserError(f"benchmark {bench.name!r} must have questions, found none in {', '.join(keys)}")
    ids: set[str] = set()
    for key in flat:
        if key.question_id in ids:
            raise UserError(f"benchmark {bench.name!r}: question ids must be unique, got {key.question_id!r} twice")
        ids.add(key.question_id)
    if limit is not None:
        questions.wanted[bench.name] = frozenset(flat[i].group_id for i in whole_groups(flat, limit))
    wanted = questions.wanted.get(bench.name)
    questions.num_by_benchmark[bench.name] = 0
    for source, rows in keys.items():
        if rows:
            counts = [sum(wanted is None or key.group_id in wanted for key in row) for row in rows]
            questions.num_by_row[source] += counts
            questions.num_by_benchmark[bench.name] += sum(counts)


def _check_images_are_there(store: Store, bench: Benchmark, files: Sequence[str], keys: dict) -> None:
    """Raises UserError if the benchmark has a second table and this table lacks the image of a question."""
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
    """Raises UserError if the footer counts null images among rows that all hold questions.

    A footer without statistics, or a row group with rows that nobody asks about, proves nothing: there the reading
    stage finds the missing image.
    """
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
                    f"got {nulls} missing in rows {start} to {stop - 1}"
                )
        start = stop


def _image_files(store: Store, bench: Benchmark) -> Iterator[str]:
    """The files of the benchmark's second table, after a check of their columns; none without a second table."""
    if bench.image_table is not None:
        for name in _find_files(store, bench, bench.image_table.files):
            with _user_error_about(name):
                schema = read_footer(store, name).schema.to_arrow_schema()
                check_schema(bench.name, bench.image_table.columns, schema)
            yield name


def _find_files(store: Store, bench: Benchmark, pattern: str) -> dict[str, int]:
    """Source -> size in bytes of a benchmark's files, sorted by source."""
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


@contextmanager
def _user_error_about(source: str) -> Iterator[None]:
    """Turns a ValueError of a benchmark into a UserError that names the file."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{source}: {error}") from error
