"""Files that somebody made to harm whoever reads them: nothing of theirs runs, and no memory but theirs is read."""

import struct
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.corpus.find import Corpus
from pipelines.errors import UserError
from pipelines.stages.unit_batch import UnitBatch
from tests.reading import corpus_at, png, reader_of, reasons, spans_of

PICKLED = "ray.data.arrow_pickled_object"
ran: list[bytes] = []


class Stranger(pa.ExtensionType):
    """A registered type that notes when pyarrow asks it to read its description."""

    def __init__(self, storage: pa.DataType, description: bytes = b"[]"):
        self.description = description
        super().__init__(storage, "tests.stranger")

    def __arrow_ext_serialize__(self) -> bytes:
        return self.description

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> "Stranger":
        ran.append(serialized)
        return cls(storage_type, serialized)


@pytest.fixture
def stranger():
    pa.register_extension_type(Stranger(pa.binary()))
    ran.clear()
    yield
    pa.unregister_extension_type("tests.stranger")


def write_parquet(path: Path, table: pa.Table) -> None:
    pq.write_table(table, path.with_suffix(".parquet"))


def write_arrow(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_stream(path.with_suffix(".arrow"), table.schema) as writer:
        writer.write_table(table)


def table_with(name: str, kind: pa.DataType, description: bytes = b"", *, nested: str = "") -> pa.Table:
    """Three pictures, and titles whose field says that they are of the extension type `name`."""
    metadata = {"ARROW:extension:name": name, "ARROW:extension:metadata": description}
    title, value = pa.field("title", kind, metadata=metadata), b"text"
    if nested == "struct":
        title, value = pa.field("title", pa.struct([title])), {"title": value}
    elif nested == "list":
        title, value = pa.field("title", pa.list_(title)), [value]
    schema = pa.schema([pa.field("image", pa.binary()), title])
    return pa.Table.from_pylist([{"image": png(n), "title": value} for n in range(3)], schema)


def read(corpus: Corpus, template: str = "{title}") -> list[UnitBatch]:
    reader = reader_of(corpus, (template,))
    return [UnitBatch.from_row(row) for span in spans_of(corpus, 3) for row in reader(span.to_row())]


@pytest.mark.parametrize("write", [write_parquet, write_arrow])
@pytest.mark.parametrize("nested", ["", "struct", "list"])
@pytest.mark.parametrize("name", [PICKLED, "arrow.py_extension_type", "ray.data.arrow_tensor"])
def test_columns_of_pickled_objects_are_refused_with_file_and_column(tmp_path, write: Callable, nested, name):
    write(tmp_path / "a", table_with(name, pa.large_binary(), b"\x80\x05pickle", nested=nested))
    with pytest.raises(UserError, match=r"^a\.\w+: column title.* must hold data, got pickled Python objects \(type "):
        corpus_at(tmp_path)


@pytest.mark.parametrize("write", [write_parquet, write_arrow])
def test_other_extension_types_are_read_as_what_they_store(tmp_path, write: Callable, stranger):
    write(tmp_path / "a", table_with("tests.stranger", pa.string()))
    units = read(corpus_at(tmp_path, ("{title}",)))
    assert [image.prompts for unit_batch in units for image in unit_batch.images] == [["text"]] * 3
    assert ran == []


@pytest.mark.parametrize("write", [write_parquet, write_arrow])
def test_a_file_whose_columns_became_pickled_objects_is_not_read(tmp_path, write: Callable):
    write(tmp_path / "a", table_with("tests.unknown", pa.large_binary(), b"x" * 30))
    corpus = corpus_at(tmp_path, ("{title}",))
    write(tmp_path / "a", table_with(PICKLED, pa.large_binary(), b"x" * 28))
    assert reasons(read(corpus)) == dict.fromkeys(range(3), "unreadable")


def test_a_second_schema_in_a_footer_is_not_believed(tmp_path, stranger):
    """pyarrow takes one of two values under one key."""
    table = table_with("tests.stranger", pa.binary())
    write_parquet(tmp_path / "a", table)
    stored = (tmp_path / "a.parquet").read_bytes()
    write_parquet(tmp_path / "a", table.replace_schema_metadata({"ARROW-schema": "QUJD"}))
    twice = (tmp_path / "a.parquet").read_bytes().replace(b"ARROW-schema", b"ARROW:schema")
    for content in (stored, twice):
        (tmp_path / "a.parquet").write_bytes(content)
        ran.clear()
        corpus_at(tmp_path)
        assert ran == []


def test_more_rows_than_a_file_can_have_are_no_rows(tmp_path, caplog):
    pq.write_table(pa.table({"image": pa.array([png(0)])}), tmp_path / "a.parquet")
    table = pa.table({"image": pa.nulls(2_000_000, pa.binary())})
    pq.write_table(table, tmp_path / "b.parquet", row_group_size=2_000_000, max_rows_per_page=2_000_000)
    corpus = corpus_at(tmp_path)
    assert [file.num_rows for file in corpus.files] == [1, 1]
    assert "cannot hold 2000000 rows" in caplog.text


def forge(content: bytes, old: int, new: int, form: str = "<q") -> bytes:
    """The content with the last number `old` replaced."""
    place = content.rindex(struct.pack(form, old))
    packed = struct.pack(form, new)
    return content[:place] + packed + content[place + len(packed) :]


def test_arrow_batches_are_believed_within_their_bytes(tmp_path):
    images = [png(n) for n in range(77)]
    write_arrow(tmp_path / "a", pa.table({"image": pa.array(images)}))
    whole, end = (tmp_path / "a.arrow").read_bytes(), sum(map(len, images))

    def reads(content: bytes) -> list[str]:
        (tmp_path / "a.arrow").write_bytes(content)
        return list(reasons(read(corpus_at(tmp_path), "look")).values())

    assert reads(whole) == []
    assert set(reads(forge(whole, end, 2**30, "<i"))) == {"unreadable"}
    place = whole.index(struct.pack("<3i", 0, len(images[0]), 2 * len(images[0])))
    inner = struct.pack("<3i", 0, 2**30, 2 * len(images[0]))
    assert set(reads(whole[:place] + inner + whole[place + 12 :])) == {"unreadable"}


@pytest.mark.parametrize("length", [-4, 2**31 - 1])
def test_arrow_messages_have_a_length_within_the_file(tmp_path, length):
    write_arrow(tmp_path / "a", pa.table({"image": pa.array([png(0)])}))
    whole = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(whole[:4] + struct.pack("<i", length) + whole[8:])
    with pytest.raises(UserError, match="is not a readable Arrow file: it is cut"):
        corpus_at(tmp_path)
