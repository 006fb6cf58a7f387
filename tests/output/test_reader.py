"""Reading parts: all of them, in order, few at a time, with what is damaged as a value or as an error."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.output.parts import encode_table
from pipelines.output.reader import DamagedPart, OutputReader, Part, read_totals
from pipelines.store import Store

ROWS = pa.schema([("source", pa.string()), ("row", pa.int64()), ("caption", pa.string())])
REJECTED = pa.schema([("id", pa.string()), ("reason", pa.string())])


def name_of(number: int) -> str:
    return f"part-{number:012x}-000000000-000000002.parquet"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """100 parts of two rows, written last to first; the second has a quarantine."""
    store = Store(str(tmp_path))
    for number in reversed(range(100)):
        rows = [{"source": f"{number}.parquet", "row": row, "caption": "a dog"} for row in range(2)]
        store.write(f"captions/{name_of(number)}", encode_table(rows, ROWS, {"images_captioned": number}))
    rejected = encode_table([{"id": "x", "reason": "empty"}], REJECTED, {})
    store.write(f"quarantine/{name_of(1)}", rejected)
    store.write("captions/notes.txt", b"no part")
    return store


def test_all_parts_come_in_the_order_of_their_names(store: Store):
    reader = OutputReader(store)
    assert reader.names() == [name_of(number) for number in range(100)]
    assert [each["images_captioned"] for each in reader.totals()] == list(range(100))
    tables = list(reader.tables(["row", "source"]))
    assert [table.column_names for table in tables] == [["row", "source"]] * 100
    assert [table["source"][0].as_py() for table in tables] == [f"{number}.parquet" for number in range(100)]
    assert pa.concat_tables(reader.tables(None)).column_names == ROWS.names  # metadata that differs is left out


def test_the_caller_may_name_the_parts(store: Store):
    wanted = [name_of(number) for number in (7, 3)]
    assert [each["images_captioned"] for each in OutputReader(store).totals(wanted)] == [7, 3]


def test_no_folder_has_no_parts(store: Store):
    reader = OutputReader(store, "predictions")
    assert reader.names() == list(reader.totals()) == list(reader.tables(None)) == []


def test_a_part_holds_its_totals_its_rows_and_its_quarantine(store: Store):
    first, second = OutputReader(store).parts(["row"], ["reason"], [name_of(0), name_of(1)])
    assert isinstance(first, Part)
    assert (first.totals, first.quarantine) == ({"images_captioned": 0}, None)
    assert isinstance(second, Part)
    assert (second.name, second.rows["row"].to_pylist()) == (name_of(1), [0, 1])
    assert second.quarantine is not None
    assert second.quarantine.to_pylist() == [{"reason": "empty"}]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"PAR1 no more", "ArrowInvalid"),
        (encode_table([{"id": "x"}], pa.schema([("id", pa.string())]), {}), "ArrowInvalid"),  # no such column
        (None, "FileNotFoundError"),
    ],
)
def test_damage_is_a_value_among_parts_and_an_error_elsewhere(store: Store, content: bytes | None, error: str):
    damaged = store.join("captions", name_of(2))
    store.delete(f"captions/{name_of(2)}") if content is None else Path(damaged).write_bytes(content)
    reader, names = OutputReader(store), [name_of(number) for number in range(4)]
    found = list(reader.parts(["row"], ["reason"], names))
    assert [isinstance(part, Part) for part in found] == [True, True, False, True]
    assert isinstance(found[2], DamagedPart)
    assert str(found[2]).startswith(f"{name_of(2)} is damaged: {error}: ")
    with pytest.raises((pa.ArrowException, OSError)):
        list(reader.tables(["row"], names))


def test_parquet_without_totals_is_damaged(store: Store):
    import pyarrow.parquet as pq

    path = store.join("captions", name_of(5))
    pq.write_table(pa.table({"row": [0]}), path)
    [part] = OutputReader(store).parts(["row"], ["reason"], [name_of(5)])
    assert isinstance(part, DamagedPart)
    with pytest.raises((TypeError, KeyError)):
        read_totals(store, name_of(5))
    pq.write_table(pa.table({"row": [0]}).replace_schema_metadata({"otprune": json.dumps({"units": 1})}), path)
    assert read_totals(store, name_of(5)) == {"units": 1}


def test_whole_parts_hold_every_column_and_a_part_that_did_not_come_is_no_damaged_one(store: Store):
    reader, names = OutputReader(store), [name_of(0), name_of(1)]
    first, second = reader.whole(names, {name_of(1)})
    assert isinstance(first, Part)
    assert isinstance(second, Part)
    assert (first.rows.column_names, first.quarantine) == (ROWS.names, None)
    assert second.quarantine is not None
    store.write(f"quarantine/{name_of(1)}", b"PAR1")
    _, second = reader.whole(names, {name_of(1)})
    assert "quarantine: ArrowInvalid" in str(second)
    with pytest.raises(FileNotFoundError):
        list(reader.whole([name_of(0), name_of(500)], ()))
