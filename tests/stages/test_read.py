"""Reading and decoding: the right bytes under the right address, whatever the layout; every fault is a row."""

import hashlib
import os
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import pipelines.corpus.formats.parquet
import pipelines.stages.read
from otprune.families.llava_next import Tiled
from pipelines.images.decode import decode_image
from pipelines.output.span import SpanRow
from pipelines.stages.read import fill_template
from pipelines.stages.unit_batch import UnitBatch
from tests.decoding import noise
from tests.hostile import encode, exif_rotated_jpeg
from tests.reading import LIMIT, SIDE, STRUCT, corpus_at, numbers_of, png, read, reader_of, reasons, spans_of, write

# Rows and layouts


@pytest.mark.parametrize("seed", range(8))
def test_every_row_comes_once_with_its_own_bytes_whatever_the_layout(seed, tmp_path):
    rng = random.Random(seed)
    layout = [rng.choice([0, 1, 2, 5, 30]) for _ in range(rng.randint(2, 6))] + [1]
    numbers = iter(range(sum(layout)))
    schema = pa.schema([("image", STRUCT), ("id", pa.string())])
    with pq.ParquetWriter(tmp_path / "a.parquet", schema) as writer:
        for rows in layout:
            batch = [{"image": {"bytes": png(i := next(numbers)), "path": None}, "id": f"n{i}"} for _ in range(rows)]
            writer.write_table(pa.Table.from_pylist(batch, schema), row_group_size=max(1, rows))
    works = read(tmp_path, num_images=rng.randint(1, 12))
    assert all(unit_batch.error is None for unit_batch in works)
    images = [image for unit_batch in works for image in unit_batch.images]
    assert sorted(image.row for image in images) == list(range(sum(layout)))
    for unit_batch in works:
        assert [image.row for image in unit_batch.images] == list(range(unit_batch.unit.start, unit_batch.unit.stop))
        assert numbers_of(unit_batch) == [image.row for image in unit_batch.images]
    assert all(image.id == f"n{image.row}" and image.source == "a.parquet" for image in images)
    assert all(image.sha256 == hashlib.sha256(png(image.row)).hexdigest() for image in images)


def test_large_read_batches_are_no_different_from_small_ones(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", [png(i) for i in range(50)], rows=20)
    before = [unit_batch.images for unit_batch in read(tmp_path, num_images=7)]
    monkeypatch.setattr(pipelines.corpus.formats.parquet, "BATCH_BYTES", 1)
    assert [unit_batch.images for unit_batch in read(tmp_path, num_images=7)] == before


def corrupt(path: Path, column: str, row_group: int) -> None:
    """Overwrites the pages of one column chunk."""
    footer = pq.read_metadata(path)
    index = next(i for i in range(footer.num_columns) if footer.schema.column(i).path == column)
    chunk = footer.row_group(row_group).column(index)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)


def test_columns_that_nobody_needs_are_not_read(tmp_path):
    path = write(tmp_path / "a.parquet", [png(0), png(1)], heavy=["x" * 1000, "y" * 1000], caption=["a", "b"])
    corrupt(path, "heavy", 0)
    corrupt(path, "caption", 0)  # references are read for sampled images alone
    (unit_batch,) = read(path)
    assert [image.row for image in unit_batch.images] == [0, 1]


def test_the_path_inside_a_hugging_face_struct_is_not_read(tmp_path):
    images = [{"bytes": png(i), "path": f"{i}.png"} for i in range(2)]
    path = write(tmp_path / "a.parquet", images, STRUCT)
    corrupt(path, "image.path", 0)
    (unit_batch,) = read(path)
    assert len(unit_batch.images) == 2


def test_an_unreadable_page_costs_the_rows_of_its_row_group_and_names_them(tmp_path):
    path = write(tmp_path / "a.parquet", [png(i) for i in range(12)], rows=4)
    corrupt(path, "image", 1)
    works = read(path, num_images=3)
    assert all(unit_batch.error is None for unit_batch in works)
    assert reasons(works) == dict.fromkeys(range(4, 8), "unreadable")
    assert [image.row for work in works for image in work.images] == [0, 1, 2, 3, 8, 9, 10, 11]
    details = [rejected.detail for work in works for rejected in work.rejected]
    assert all(detail.startswith("a.parquet, rows 4 to 7: ") for detail in details)


@pytest.mark.parametrize(
    ("change", "reason"), [("deleted", "fetch"), ("fewer rows", "unreadable"), ("text", "unreadable")]
)
def test_a_parquet_file_that_changes_after_planning_costs_its_own_rows(change, reason, tmp_path):
    path = write(tmp_path / "a.parquet", [png(i) for i in range(6)])
    corpus = corpus_at(path)
    (span,) = spans_of(corpus, num_images=3)
    path.unlink()
    if change == "fewer rows":
        write(path, [png(0), png(1)])
    elif change == "text":
        path.write_bytes(b"no Parquet any more")
    works = [UnitBatch.from_row(row) for row in reader_of(corpus)(span.to_row())]
    assert [unit_batch.error for unit_batch in works] == [None, None]
    assert reasons(works) == dict.fromkeys(range(6), reason)


def test_a_file_without_a_readable_footer_is_one_row_of_quarantine(tmp_path):
    write(tmp_path / "a.parquet", [png(0)])
    (tmp_path / "b.parquet").write_bytes(b"no Parquet at all")
    good, bad = read(tmp_path)
    assert numbers_of(good) == [0]
    assert [(r.source, r.row, r.reason) for r in bad.rejected] == [("b.parquet", 0, "unreadable")]


def test_text_that_is_no_utf_8_costs_its_own_row(tmp_path):
    def text(*values: bytes) -> pa.Array:
        return pa.Array.from_buffers(pa.string(), 3, pa.array(values, pa.binary()).buffers())

    title, ids = text(b"A", b"\xff", b"C"), text(b"x", b"y", b"z\xe4")
    path = write(tmp_path / "a.parquet", [png(0), png(1), png(2)], title=title, id=ids)
    (work,) = read(path, templates=("look at {title}",))
    assert [(image.id, image.prompts) for image in work.images] == [
        ("x", ["look at A"]),
        ("z\\xe4", ["look at C"]),
    ]
    assert [(r.row, r.reason, r.detail) for r in work.rejected] == [(1, "prompt", "column title is not UTF-8")]
    pq.write_table(pa.table({"url": text(b"0.png", b"\xff.png", b"2.png")}), path)
    (work,) = read(path)
    assert [r.detail for r in work.rejected if r.row == 1] == ["the address is not UTF-8"]


def test_a_value_above_max_bytes_is_never_copied(tmp_path):
    path = write(tmp_path / "a.parquet", [png(0), b"x" * (LIMIT + 1), png(2)])
    (work,) = read(path)
    assert reasons([work]) == {1: "too_large_bytes"}
    assert [r.sha256 for r in work.rejected] == [None]
    assert numbers_of(work) == [0, 2]


def test_units_of_a_span_come_one_by_one(tmp_path, monkeypatch):
    write(tmp_path / "a.parquet", [png(i) for i in range(40)])
    decoded = []
    decode = pipelines.stages.read.decode_image
    monkeypatch.setattr(pipelines.stages.read, "decode_image", lambda data, **k: decoded.append(1) or decode(data, **k))
    corpus = corpus_at(tmp_path)
    (span,) = spans_of(corpus, num_images=10)
    units = reader_of(corpus)(span.to_row())
    for num_units in (1, 2, 3):
        next(units)
        assert len(decoded) == 10 * num_units


# Sizes


def test_the_size_of_a_picture_is_that_of_the_upright_image(tmp_path):
    (tmp_path / "a.jpg").write_bytes(exif_rotated_jpeg(1))
    (tmp_path / "b.jpg").write_bytes(exif_rotated_jpeg(6))  # 64 x 48 pixels on its side
    (unit_batch,) = read(tmp_path)
    assert [image.sizes for image in unit_batch.images] == [[(48, 64)], [(64, 48)]]


def test_pictures_of_a_unit_may_have_frames_of_different_sizes(tmp_path):
    tiled = Tiled(side=SIDE, grid_side=2, resolutions=((8, 16), (16, 16), (24, 8)), background=(0, 0, 0))
    shapes = [(16, 16), (8, 16), (30, 10), (9, 200), (16, 16)]
    path = write(tmp_path / "a.parquet", [None, *(encode(noise(w, h, h), "PNG") for h, w in shapes), b""])
    corpus = corpus_at(path)
    (span,) = spans_of(corpus)
    (unit_batch,) = (UnitBatch.from_row(row) for row in reader_of(corpus, geometry=tiled)(span.to_row()))
    assert [image.sizes for image in unit_batch.images] == [[shape] for shape in shapes[:3] + shapes[4:]]
    assert reasons([unit_batch]) == {0: "missing", 4: "too_small", 6: "empty"}
    rows = unit_batch.arrays["pixels"].rows()
    assert len({len(row) for row in rows}) == 3
    limits = {"max_bytes": LIMIT, "max_pixels": 10**6, "min_side": 2}
    for image, row in zip(unit_batch.images, rows, strict=True):
        ((height, width),) = image.sizes
        alone = decode_image(encode(noise(width, height, height), "PNG"), geometry=tiled, **limits)
        np.testing.assert_array_equal(row.reshape(tiled.frame((height, width)).shape), alone.pixels)


# Images that are not there or not images


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), STRUCT])
def test_null_and_empty_and_broken_images_are_rejected_in_place(tmp_path, kind):
    images = [png(0), None, b"", b"text, not an image", png(4)]
    if kind == STRUCT:
        images = [None if data is None else {"bytes": data, "path": "x"} for data in images]
        images.append({"bytes": None, "path": "x"})
    path = write(tmp_path / "a.parquet", images, kind, rows=2)
    works = read(path, num_images=4)
    missing = {5: "missing"} if kind == STRUCT else {}
    assert reasons(works) == {1: "missing", 2: "empty", 3: "unsupported_format"} | missing
    kept = [(image.row, number) for w in works for image, number in zip(w.images, numbers_of(w), strict=True)]
    assert kept == [(0, 0), (4, 4)]
    shas = {r.row: r.sha256 for unit_batch in works for r in unit_batch.rejected}
    assert shas[1] is None
    assert shas[2] == hashlib.sha256(b"").hexdigest()


def test_a_unit_without_one_good_image_still_has_pixels_of_the_right_type(tmp_path):
    (unit_batch,) = read(write(tmp_path / "a.parquet", [None, b"x"]))
    pixels = unit_batch.arrays["pixels"]
    assert (len(pixels), pixels.values.shape, pixels.values.dtype) == (0, (0,), np.uint8)
    assert unit_batch.error is None


# Keys, references, prompts


@pytest.mark.parametrize(
    ("ids", "expected"),
    [(["x", None], ["x", "a.parquet#1"]), ([70, 71], ["70", "71"]), (None, ["a.parquet#0", "a.parquet#1"])],
)
def test_ids_come_from_the_corpus_or_are_row_addresses(tmp_path, ids, expected):
    path = write(tmp_path / "a.parquet", [png(0), None], **({} if ids is None else {"id": ids}))
    (unit_batch,) = read(path)
    assert [unit_batch.images[0].id, unit_batch.rejected[0].id] == expected


@pytest.mark.parametrize(
    ("captions", "expected"),
    [(["one", "two", "three"], ["one"]), ([["a", "b"], [], []], ["a", "b"]), ([None, "two", None], [])],
)
def test_sampled_images_carry_their_references(tmp_path, captions, expected):
    path = write(tmp_path / "a.parquet", [png(i) for i in range(3)], caption=captions)
    (unit_batch,) = read(path, samples=1)
    assert unit_batch.images[0].references == expected
    assert [image.sampled for image in unit_batch.images] == [True, False, False]
    assert [image.references for image in unit_batch.images[1:]] == [[], []]


def test_samples_are_good_images_of_the_first_unit_of_a_span(tmp_path):
    path = write(tmp_path / "a.parquet", [None, *(png(i) for i in range(1, 9))])
    first, second, third = read(path, num_images=3, samples=2)
    assert [image.row for image in first.images if image.sampled] == [1, 2]
    assert not any(image.sampled for unit_batch in (second, third) for image in unit_batch.images)


def test_prompts_are_filled_from_columns_and_a_null_is_rejected_as_prompt(tmp_path):
    path = write(tmp_path / "a.parquet", [png(0), png(1), png(2)], title=["A", "B {x}", None], year=[1, 2, 3])
    templates = ("{title} of {year}", "what is {{this}} ?")
    (unit_batch,) = read(path, templates=templates)
    assert [image.prompts for image in unit_batch.images] == [
        ["A of 1", "what is {this} ?"],
        ["B {x} of 2", "what is {this} ?"],  # braces in the data are text
    ]
    assert [(r.row, r.reason, r.detail) for r in unit_batch.rejected] == [(2, "prompt", "column title is null")]


def test_a_template_without_columns_is_its_text():
    assert fill_template("say {{it}}", {}) == "say {it}"


# Folders of image files


@pytest.fixture
def folder(tmp_path) -> Path:
    for i in range(5):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    return tmp_path


def test_image_files_are_their_own_ids(folder):
    first, second = read(folder, num_images=3)
    assert [(i.id, i.source, i.row) for i in first.images] == [(f"{n}.png", f"{n}.png", 0) for n in range(3)]
    assert numbers_of(second) == [3, 4]
    assert second.images[0].sha256 == hashlib.sha256(png(3)).hexdigest()


def test_a_file_that_vanished_or_grew_too_large_is_rejected_and_the_rest_is_read(folder):
    corpus = corpus_at(folder)
    (span,) = spans_of(corpus)
    (folder / "1.png").unlink()
    (folder / "2.png").write_bytes(b"x" * (LIMIT + 1))
    (unit_batch,) = (UnitBatch.from_row(row) for row in reader_of(corpus)(span.to_row()))
    assert {r.source: r.reason for r in unit_batch.rejected} == {"1.png": "fetch", "2.png": "too_large_bytes"}
    assert [image.source for image in unit_batch.images] == ["0.png", "3.png", "4.png"]


def test_an_image_is_identified_without_being_decoded(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pipelines.stages.read, "decode_image", None)
    corpus = corpus_at(folder)
    span = spans_of(corpus, num_images=1)[3]
    sha256 = hashlib.sha256(png(3)).hexdigest()
    assert reader_of(corpus).identify(span) == {"id": "3.png", "source": "3.png", "row": 0, "sha256": sha256}
    (tmp_path / "sub").mkdir()
    corpus = corpus_at(write(tmp_path / "sub" / "a.parquet", [png(0), None, png(2)], id=["x", "y", "z"]))
    spans = spans_of(corpus, num_images=1)
    identities = [
        reader_of(corpus).identify(SpanRow((unit,), span.row_groups, 0)) for span in spans for unit in span.units
    ]
    assert [(i["id"], i["row"], i["sha256"] is None) for i in identities] == [
        ("x", 0, False),
        ("y", 1, True),
        ("z", 2, False),
    ]


# What travels


def test_spans_and_work_survive_their_trip_through_a_row(tmp_path):
    path = write(tmp_path / "a.parquet", [png(i) for i in range(9)] + [None], rows=10)
    corpus = corpus_at(path)
    for span in spans_of(corpus, num_images=4, samples=2):
        assert SpanRow.from_row(span.to_row()) == span
        for row in reader_of(corpus)(span.to_row()):
            again = UnitBatch.from_row(row).to_row()
            assert again["meta"] == row["meta"]
            assert set(again) == set(row) == {"meta", "pixels", "pixels.lengths"}
            assert all(np.array_equal(again[name], row[name]) for name in ("pixels", "pixels.lengths"))


def test_seconds_of_reading_and_decoding_are_noted(tmp_path):
    (unit_batch,) = read(write(tmp_path / "a.parquet", [png(0)]))
    assert set(unit_batch.seconds) == {"read", "decode"}
    assert all(value > 0 for value in unit_batch.seconds.values())


def test_a_reader_keeps_no_file_open(tmp_path):
    write(tmp_path / "a.parquet", [png(i) for i in range(4)])
    read(tmp_path)
    opened = [os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    assert not [name for name in opened if name.startswith(str(tmp_path))]
