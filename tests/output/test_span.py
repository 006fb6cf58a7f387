"""What a read task is told: the row groups that hold its rows and no others, in few bytes whatever the file's size."""

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.corpus.file import CorpusFile, ReadRange, RowGroups, covering
from pipelines.corpus.formats.parquet import row_batches
from pipelines.output.span import SpanRow, with_row_groups
from pipelines.output.unit import Unit, plan_rows
from pipelines.store import Store


def spans_of(file: CorpusFile, num_images: int) -> list[SpanRow]:
    planned = with_row_groups(file, plan_rows(file, "f", num_images, file.num_rows, []))
    return [SpanRow(units, groups, 0) for units, groups in planned]


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 7, 100, 1000, 100_000])
def test_a_span_of_a_file_of_a_million_rows_grows_with_its_units_alone(rows):
    file = CorpusFile("a.parquet", 10**11, (rows,) * (1_000_000 // rows))
    assert all(len(span.to_row()["span"]) < 900 + 20 * len(span.units) for span in spans_of(file, 128))


@pytest.mark.parametrize("seed", range(40))
def test_a_range_is_covered_by_the_row_groups_that_hold_its_rows_and_no_others(seed):
    rng = random.Random(seed)
    groups = (*rng.choices([0, 1, 2, 9], k=rng.randint(1, 9)), 1)
    offsets = tuple(range(0, 10 * len(groups) + 1, 10))
    file = CorpusFile("a.lines", 1, groups, offsets)
    group_of = [i for i, rows in enumerate(groups) for _ in range(rows)]
    start = rng.randrange(file.num_rows)
    stop = rng.randint(start + 1, file.num_rows)
    first, last = group_of[start], group_of[stop - 1]
    expected = RowGroups(first, group_of.index(first), groups[first : last + 1], offsets[first : last + 2])
    assert list(covering(file, [(start, stop)])) == [expected]


@pytest.mark.parametrize("seed", range(8))
def test_each_span_and_each_unit_of_it_reads_exactly_its_rows(seed, tmp_path):
    """A unit by itself, too: a retry of one unit keeps the row groups of its span."""
    rng = random.Random(seed)
    layout = [rng.choice([0, 1, 3, 20, 90]) for _ in range(8)] + [1]
    with pq.ParquetWriter(tmp_path / "a.parquet", pa.schema([("x", pa.int64())])) as writer:
        for i, rows in enumerate(layout):
            numbers = pa.array(range(sum(layout[:i]), sum(layout[: i + 1])), pa.int64())
            writer.write_table(pa.table({"x": numbers}), row_group_size=max(1, rows))
    spans = spans_of(CorpusFile("a.parquet", 1, tuple(layout)), rng.randint(1, 9))

    def read(rows: ReadRange) -> list[tuple[int, int]]:
        batches = row_batches(Store(str(tmp_path)), rows, ["x"])
        return [(row + i, x) for row, batch in batches for i, x in enumerate(batch.column("x").to_pylist())]

    for span in spans:
        assert read(span.rows) == [(row, row) for row in range(span.rows.start, span.rows.stop)]
        for unit in span.units:
            alone = SpanRow((unit,), span.row_groups, 0)
            assert read(alone.rows) == [(row, row) for row in range(unit.start, unit.stop)]
    assert sum(span.rows.stop - span.rows.start for span in spans) == sum(layout)


def test_a_span_survives_its_trip_through_a_row():
    unit = Unit("0123456789ab", 5, 9, ("a.lines",))
    for groups in (RowGroups(), RowGroups(2, 4, (3, 3), (40, 70, 100))):
        span = SpanRow((unit,), groups, 3)
        assert SpanRow.from_row(span.to_row()) == span
