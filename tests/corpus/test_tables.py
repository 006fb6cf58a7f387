"""Tables of addresses and of images in other files than Parquet: JSONL, CSV, dataset folders, Arrow, Hive folders."""

import base64
import json
import os
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.corpus.format import Record
from pipelines.corpus.formats import lines
from pipelines.errors import UserError
from pipelines.images.decode import Reject
from pipelines.stages.unit_batch import UnitBatch
from pipelines.store import Store
from tests.corpus.test_tar import find, records
from tests.reading import STRUCT, numbers_of, png, reader_of, reasons, spans_of


def pictures(folder: Path, numbers) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        (folder / f"{number}.png").write_bytes(png(number))


def read(corpus, templates=("look",)) -> list[UnitBatch]:
    reader = reader_of(corpus, templates)
    return [UnitBatch.from_row(row) for span in spans_of(corpus, 3) for row in reader(span.to_row())]


def numbers(corpus) -> list[int]:
    return [number for unit_batch in read(corpus) for number in numbers_of(unit_batch)]


@pytest.fixture
def small_groups(monkeypatch):
    monkeypatch.setattr(lines, "GROUP_ROWS", 4)


def jsonl(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.mark.parametrize("store", ["local", "memory"])
@pytest.mark.parametrize("num_images", [1, 3, 100])
def test_jsonl_rows_have_addresses_ids_columns_and_references(tmp_path, small_groups, num_images, store):
    rows = [{"url": f"http://h/{n}.png", "id": n, "title": f"t\u00e4{n}", "captions": [f"c{n}"]} for n in range(10)]
    content = b"\xef\xbb\xbf" + jsonl(rows[:5]) + b"\n\r\n" + jsonl(rows[5:])[:-1]
    if store == "local":
        (tmp_path / "a.jsonl").write_bytes(content)
        corpus = find(tmp_path, templates=("{title}",))
    else:
        from pipelines.store import make_store

        make_store("memory://jsonl").write("a.jsonl", content)
        corpus = find("memory://jsonl", templates=("{title}",))
    assert (corpus.format.name, corpus.files[0].row_groups) == ("jsonl", (4, 4, 2))
    assert records(corpus, num_images, references=True) == [
        Record(str(n), "a.jsonl", n, f"http://h/{n}.png", {"title": f"t\u00e4{n}"}, [f"c{n}"]) for n in range(10)
    ]
    assert corpus.format.references(corpus.store, corpus.files[0], corpus.columns, [1, 9]) == {1: ["c1"], 9: ["c9"]}


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.csv", ";"), ("a.tsv", "\t")])
@pytest.mark.parametrize("num_images", [2, 100])
def test_csv_rows_may_hold_marks_quotes_and_line_ends(tmp_path, small_groups, name, mark, num_images):
    titles = [f'one{mark} "two"\nthree {n}' for n in range(9)]
    cells = [[f"http://h/{n}.png", f"k{n}", '"' + title.replace('"', '""') + '"'] for n, title in enumerate(titles)]
    text = "\r\n".join(mark.join(row) for row in [["url", "key", "title"], *cells, []])
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    corpus = find(tmp_path, templates=("{title}",))
    assert records(corpus, num_images) == [
        Record(f"k{n}", name, n, f"http://h/{n}.png", {"title": title}) for n, title in enumerate(titles)
    ]


def test_lines_that_are_no_rows_miss_their_image_and_nothing_else(tmp_path, small_groups):
    good = jsonl([{"file_name": "1.png"}])
    (tmp_path / "a.jsonl").write_bytes(good + b'{"file_name": \n[1]\n\xff\xfe\n{"file_name": null}\n' + good)
    pictures(tmp_path, [1])
    corpus = find(tmp_path, format="jsonl")
    assert corpus.num_rows == 6
    found = read(corpus)
    assert [number for unit_batch in found for number in numbers_of(unit_batch)] == [1, 1]
    assert reasons(found) == dict.fromkeys((1, 2, 3, 4), "missing")
    (tmp_path / "b.csv").write_bytes(b"file_name,title\n1.png,x\n1.png\n1.png,a,b\n1.png,y\n")
    assert [record.data for record in records(find(tmp_path, format="csv"))] == ["1.png", None, None, "1.png"]


@pytest.mark.parametrize("kind", ["jsonl", "csv"])
def test_a_second_plan_reads_no_list_that_has_not_changed(tmp_path, monkeypatch, small_groups, kind):
    pictures(tmp_path / "in", range(9))
    for name in "ab":
        rows = [{"path": f"{n}.png", "title": f"{name}{n}"} for n in range(9)]
        text = (
            jsonl(rows)
            if kind == "jsonl"
            else "\n".join(["path,title", *(",".join(r.values()) for r in rows)]).encode()
        )
        (tmp_path / "in" / f"{name}.{kind}").write_bytes(text)
    cache, indexed, real = Store(str(tmp_path / "cache")), [], lines.index_lines
    monkeypatch.setattr(lines, "index_lines", lambda store, name, size: indexed.append(name) or real(store, name, size))

    def corpus():
        return find(tmp_path / "in", format=kind, cache=cache, templates=("{title}",))

    first = corpus()
    assert (corpus(), indexed) == (first, [f"a.{kind}", f"b.{kind}"])
    assert [record.fields["title"] for record in records(first)] == [f"{name}{n}" for name in "ab" for n in range(9)]
    file = tmp_path / "in" / f"b.{kind}"
    file.write_bytes(file.read_bytes().replace(b"b3", b"c3"))  # of the same size
    os.utime(file, ns=(0, 1))
    assert corpus().num_rows == 18
    assert indexed == [f"a.{kind}", f"b.{kind}", f"b.{kind}"]


def test_addresses_are_relative_to_their_file_or_to_the_corpus(tmp_path):
    for folder, base in (("own", "own/lists"), ("root", "root")):
        pictures(tmp_path / base / "img", [1, 2])
        (tmp_path / folder / "lists").mkdir(exist_ok=True)
        (tmp_path / folder / "lists" / "a.jsonl").write_bytes(jsonl([{"path": f"img/{n}.png"} for n in (2, 1)]))
        assert numbers(find(tmp_path / folder, format="jsonl")) == [2, 1]


def test_a_list_of_addresses_beside_pictures_is_asked_for_and_a_list_of_labels_is_not(tmp_path):
    pictures(tmp_path, range(3))
    (tmp_path / "labels.csv").write_text("class,count\na,1\n")
    corpus = find(tmp_path)
    assert (corpus.format.name, corpus.num_rows) == ("images", 3)
    assert corpus.left_out == {"CSV files beside the image files": 1}
    (tmp_path / "urls.csv").write_text("url,count\nhttp://h/1.png,1\n")
    with pytest.raises(UserError, match=r"two ways.*set input\.format=images or input\.format=csv"):
        find(tmp_path)
    assert find(tmp_path, format="images").num_rows == 3


def test_a_table_of_web_addresses_beside_pictures_is_never_guessed_into_a_download(tmp_path):
    pictures(tmp_path, range(3))
    pq.write_table(pa.table({"url": [None, "http://h/1.png"]}), tmp_path / "00000.parquet")
    with pytest.raises(UserError, match=r"set input\.format=parquet or input\.format=images"):
        find(tmp_path)
    pq.write_table(pa.table({"url": ["1.png"]}), tmp_path / "00000.parquet")
    assert numbers(find(tmp_path)) == [1]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_dataset_folder_reads_each_metadata_file_beside_its_pictures(tmp_path, kind):
    for split, chosen in (("test", [5, 4]), ("train", [1, 3, 2])):
        pictures(tmp_path / split / "in", [*chosen, 99])
        rows = {"file_name": [f"in/{n}.png" for n in chosen], "caption": [f"c{n}" for n in chosen]}
        path = tmp_path / split / f"metadata.{kind}"
        if kind == "parquet":
            pq.write_table(pa.table(rows), path)
        elif kind == "csv":
            path.write_text("\n".join(["file_name,caption", *map(",".join, zip(*rows.values(), strict=True))]))
        else:
            path.write_bytes(jsonl([dict(zip(rows, row, strict=True)) for row in zip(*rows.values(), strict=True)]))
    corpus = find(tmp_path, templates=("{caption}",))
    assert corpus.format.name == "imagefolder"
    assert corpus.left_out == {"image files that rows may name": 7}
    assert [record.fields["caption"] for record in records(corpus)] == ["c5", "c4", "c1", "c3", "c2"]
    works = read(corpus, ("{caption}",))
    assert [number for unit_batch in works for number in numbers_of(unit_batch)] == [5, 4, 1, 3, 2]


def test_a_picture_that_changes_beside_its_metadata_changes_that_metadata_alone(tmp_path):
    for split in ("test", "train"):
        pictures(tmp_path / split / "in", range(2))
        (tmp_path / split / "metadata.csv").write_text("file_name\nin/0.png\nin/1.png\n")
    before = {file.source: file.tag for file in find(tmp_path).files}
    os.utime(tmp_path / "test" / "in" / "0.png", ns=(0, 1))
    after = {file.source: file.tag for file in find(tmp_path).files}
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == ["test/metadata.csv"]


@pytest.mark.parametrize("rows_a_batch", [2, 100])
@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_arrow_streams_and_files_are_read_batch_by_batch(tmp_path, new, rows_a_batch):
    table = pa.table(
        {
            "image": pa.array([{"bytes": png(n), "path": None} for n in range(7)], STRUCT),
            "id": [f"k{n}" for n in range(7)],
            "caption": [f"c{n}" for n in range(7)],
        }
    )
    (tmp_path / "train").mkdir()
    with new(tmp_path / "train" / "data-0.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=rows_a_batch)
    (tmp_path / "train" / "cache-1.arrow").write_bytes(b"anything")
    (tmp_path / "train" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    corpus = find(tmp_path)
    assert (corpus.format.name, corpus.num_rows) == ("arrow", 7)
    assert corpus.left_out["caches of the datasets library"] == 1
    for num_images in (1, 3, 100):
        got = records(corpus, num_images, references=True)
        assert [(r.id, r.row, r.data, r.references) for r in got] == [(f"k{n}", n, png(n), [f"c{n}"]) for n in range(7)]
    assert corpus.format.references(corpus.store, corpus.files[0], corpus.columns, [6, 0]) == {0: ["c0"], 6: ["c6"]}


@pytest.mark.parametrize("cut", [3, 100, 400])
def test_an_arrow_file_that_is_cut_is_named(tmp_path, cut):
    table = pa.table({"image": [png(n) for n in range(9)]})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    (tmp_path / "a.arrow").write_bytes((tmp_path / "a.arrow").read_bytes()[:cut])
    with pytest.raises(UserError, match=r"^a\.arrow is not a readable Arrow file: "):
        find(tmp_path)


def test_arrow_dictionaries_are_refused(tmp_path):
    table = pa.table({"image": [png(0)], "id": pa.array(["a"]).dictionary_encode()})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match="columns with dictionaries are not read here"):
        find(tmp_path)


def test_columns_in_folder_names_are_columns(tmp_path):
    for year in (2024, 2025):
        (tmp_path / f"year={year}" / "city=S%C3%A3o").mkdir(parents=True)
        pq.write_table(pa.table({"image": [png(0)]}), tmp_path / f"year={year}" / "city=S%C3%A3o" / "a.parquet")
    corpus = find(tmp_path, templates=("{year} {city}",))
    assert [record.fields for record in records(corpus)] == [
        {"year": "2024", "city": "S\u00e3o"},
        {"year": "2025", "city": "S\u00e3o"},
    ]


def test_types_that_read_alike_are_one_corpus(tmp_path):
    swapped = pa.struct([("path", pa.string()), ("bytes", pa.large_binary())])
    image = [{"bytes": png(1), "path": "x"}]
    kinds = (
        (STRUCT, pa.array(["a"]), pa.array([1], pa.int32())),
        (swapped, pa.array(["b"], pa.large_string()), pa.array([2], pa.int64())),
        (STRUCT, pa.array(["c"]).dictionary_encode(), pa.array([None], pa.null())),
    )
    for number, (kind, key, count) in enumerate(kinds):
        table = pa.table({"image": pa.array(image, kind), "id": key, "n": count})
        pq.write_table(table, tmp_path / f"{number}.parquet")
    pq.write_table(pa.table({"image": pa.array(image, STRUCT)}), tmp_path / "3.parquet")
    corpus = find(tmp_path, templates=("{n}",))
    assert [(r.id, r.data, r.fields["n"]) for r in records(corpus)] == [
        ("a", png(1), 1),
        ("b", png(1), 2),
        ("c", png(1), None),
        ("3.parquet#0", png(1), None),
    ]


def test_structs_without_bytes_are_fetched_from_their_paths(tmp_path):
    pictures(tmp_path / "train" / "img", range(3))
    rows = [{"bytes": None, "path": f"img/{n}.png"} for n in range(3)] + [{"bytes": png(7), "path": "gone.png"}]
    pq.write_table(pa.table({"image": pa.array(rows, STRUCT)}), tmp_path / "train" / "a.parquet")
    assert numbers(find(tmp_path)) == [0, 1, 2, 7]


@pytest.mark.parametrize(
    ("values", "ids"),
    [
        (pa.array(["a", "b"]).dictionary_encode(), ["a", "b"]),
        (pa.array(["a", "b"]).cast(pa.string_view()), ["a", "b"]),
        (pa.array([b"k", b"\xff" * 16], pa.binary()), ["k", "ffffffff-ffff-ffff-ffff-ffffffffffff"]),
        (pa.array([1, 2], pa.uint8()), ["1", "2"]),
    ],
)
@pytest.mark.parametrize("name", ["id", "ID"])
def test_ids_of_any_exact_type_name_the_captions(tmp_path, values, ids, name):
    pq.write_table(pa.table({"image": [png(0), png(1)], name: values}), tmp_path / "a.parquet")
    assert [record.id for record in records(find(tmp_path))] == ids


def test_ids_that_cannot_name_captions_are_said(tmp_path, caplog):
    pq.write_table(pa.table({"image": [png(0)], "id": [[1]]}), tmp_path / "a.parquet")
    assert [record.id for record in records(find(tmp_path))] == ["a.parquet#0"]
    assert "ids are file#row: the column id of type list" in caplog.text


def test_addresses_written_as_bytes_are_addresses(tmp_path):
    pictures(tmp_path, range(2))
    pq.write_table(pa.table({"url": [b"1.png", b"0.png"]}), tmp_path / "a.parquet")
    assert numbers(find(tmp_path)) == [1, 0]


@pytest.mark.parametrize("name", ["part-00000", "a.pq", "a.parquet.gzip", "a.snappy.parquet"])
def test_parquet_files_have_many_names(tmp_path, name):
    pq.write_table(pa.table({"image": [png(0)]}), tmp_path / name)
    (tmp_path / "notes").write_bytes(b"some text here")
    assert find(tmp_path).num_rows == find(tmp_path / name).num_rows == 1


def test_globs_have_braces_and_folders_may_have_brackets(tmp_path):
    pictures(tmp_path / "set [1]", range(5))
    assert find(tmp_path / "set [1]" / "{1,3}.png").num_rows == 2
    assert [file.source for file in find(f"{tmp_path}/set [1]/*.png").files] == [f"{n}.png" for n in range(5)]


def test_links_are_followed_once_and_only_to_where_they_may_lead(tmp_path):
    pictures(tmp_path / "real", [1])
    pictures(tmp_path / "in" / "own", [2])
    inside = tmp_path / "in"
    os.symlink(tmp_path / "real", inside / "linked")
    os.symlink(tmp_path / "real" / "1.png", inside / "file.png")
    os.symlink(inside, inside / "loop")
    for name in ("a", "b"):  # each of the two leads to both again
        os.symlink(inside / "own", inside / "own" / name)
    os.symlink("2.png", inside / "own" / "3.png")
    os.mkfifo(inside / "pipe.png")
    os.symlink(inside / "pipe.png", inside / "link to a pipe.png")
    os.symlink("/dev/zero", inside / "zero.png")
    corpus = find(inside)
    assert [file.source for file in corpus.files] == ["own/2.png", "own/3.png"]
    assert corpus.left_out == {
        "links to a folder that is read already": 3,
        "links out of the corpus, which input.allow_paths allows": 3,
        "neither files nor folders": 2,
    }
    corpus = find(inside, allow_paths=[str(tmp_path / "real")])
    assert [file.source for file in corpus.files] == ["file.png", "linked/1.png", "own/2.png", "own/3.png"]
    assert [file.source for file in find(inside / "*.png", allow_paths=[str(tmp_path)]).files] == ["file.png"]
    with pytest.raises(UserError, match=r"found nothing at .*, 2 links out of the corpus.*, 2 neither files nor"):
        find(inside / "*.png")


def test_an_earlier_output_is_no_part_of_the_input(tmp_path):
    pictures(tmp_path, range(2))
    (tmp_path / "out" / "captions").mkdir(parents=True)
    for name in ("fingerprint.json", "captions/part-0.parquet"):
        (tmp_path / "out" / name).write_bytes(b"{}")
    corpus = find(tmp_path)
    assert (corpus.num_rows, corpus.left_out) == (2, {"files of an earlier output": 2})
    with pytest.raises(UserError, match="is the output of a job of this package"):
        find(tmp_path / "out")


@pytest.mark.parametrize("seed", range(2))
def test_every_file_is_in_the_corpus_or_counted(tmp_path, seed):
    rng = random.Random(seed)
    kinds = ("png", "JPG", "txt", "tar.part", "", "csv.bak")
    names = {
        f"{rng.choice(['', 'a/', '_a/', '.a/', 'b c/'])}{rng.choice(['', '_', '.', '#?% '])}{i}.{rng.choice(kinds)}"
        for i in range(40)
    }
    for name in names | {"x.png"}:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    corpus = find(tmp_path)
    assert corpus.format.name == "images"
    assert len(corpus.files) + sum(corpus.left_out.values()) == len(names | {"x.png"})
    assert {f.source for f in corpus.files} >= {
        n for n in names if "/_" in f"/{n}" and n.endswith("png") and n[0] != "."
    }


def test_addresses_that_hold_their_image_are_decoded_and_text_that_is_no_address_is_said(tmp_path):
    text = base64.b64encode(png(3)).decode()
    urls = [
        "data:image/png;base64," + text,
        "data:,%41b",
        "x" * 2000,
        "data:image/png;base64,AAAAA",
        "",
        None,
        "S3A://b/x",
    ]
    pq.write_table(pa.table({"url": urls}), tmp_path / "a.parquet")
    got = [record.data for record in records(find(tmp_path))]
    assert got[:2] + got[4:] == [png(3), b"Ab", None, None, "s3://b/x"]
    details = [each.detail for each in got if isinstance(each, Reject)]
    assert details[0] == "2000 characters without a scheme such as https:// or data: are no address"
    assert len(details) == 2


def test_text_that_is_not_utf_8_costs_its_row_only_where_the_prompt_needs_it(tmp_path):
    broken = pa.array([b"ok", b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"image": [png(0), png(1)], "id": broken, "title": broken}), tmp_path / "a.parquet")
    assert [(r.id, r.data) for r in records(find(tmp_path))] == [("ok", png(0)), ("\\xff", png(1))]
    [good, bad] = records(find(tmp_path, templates=("{title}",)))
    assert (good.data, bad.data.reason, bad.data.detail) == (png(0), "prompt", "column title is not UTF-8")
