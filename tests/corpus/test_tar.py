"""WebDataset shards: samples are found, planned, read and committed once, and damage costs its own members alone."""

import gzip
import hashlib
import io
import json
import logging
import os
import random
import tarfile
from pathlib import Path

import pytest

from pipelines.corpus.find import Corpus, find_corpus
from pipelines.corpus.format import Record
from pipelines.corpus.formats import tar_index
from pipelines.corpus.formats.tar_samples import split_name
from pipelines.corpus.ranged import RangedStream
from pipelines.errors import UserError
from pipelines.output.plan import make_plan
from pipelines.store import Store, make_store
from tests.corpus.test_formats import caption
from tests.helpers import read_rows
from tests.reading import png, spans_of

BLOCK = 512


def find(
    path: Path | str,
    image="auto",
    key="auto",
    references="auto",
    templates=("look",),
    cache=None,
    format="auto",
    allow_paths=(),
) -> Corpus:
    return find_corpus(
        make_store(str(path)),
        image_column=image,
        id_column=key,
        reference_column=references,
        templates=templates,
        cache=cache,
        format=format,
        allow_paths=allow_paths,
    )


def shard(path: Path, members: list[tuple[str, bytes]], **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, options.pop("mode", "w"), **options) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def samples(numbers, digits: int = 4) -> list[tuple[str, bytes]]:
    kinds = (("png", png), ("json", lambda n: json.dumps({"year": n, "caption": f"n {n}"}).encode()))
    return [(f"{n:0{digits}d}.{suffix}", make(n)) for n in numbers for suffix, make in kinds]


def records(corpus: Corpus, num_images: int = 100, max_bytes: int = 10**6, references=False) -> list[Record]:
    return [
        record
        for span in spans_of(corpus, num_images)
        for record in corpus.format.records(
            corpus.store, span.rows, corpus.columns, max_bytes=max_bytes, with_references=references
        )
    ]


def ids(corpus: Corpus, num_images: int = 100) -> list[str]:
    return [record.id for record in records(corpus, num_images)]


@pytest.fixture
def small_groups(monkeypatch):
    """A reader may start at every fourth row."""
    monkeypatch.setattr(tar_index, "GROUP_ROWS", 4)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_samples_are_rows_with_their_keys_columns_and_references(tmp_path, small_groups, suffix):
    shard(tmp_path / f"a{suffix}", samples(range(10)), mode="w" if suffix == ".tar" else "w:gz")
    corpus = find(tmp_path, templates=("of {year}",))
    assert corpus.format.name == "tar"
    assert corpus.num_rows == 10
    assert corpus.files[0].row_groups == ((4, 4, 2) if suffix == ".tar" else (10,))
    for num_images in (1, 3, 100):
        got = records(corpus, num_images, references=True)
        assert [(r.id, r.row, r.data) for r in got] == [(f"{n:04d}", n, png(n)) for n in range(10)]
        assert [(r.fields, r.references) for r in got] == [({"year": n}, [f"n {n}"]) for n in range(10)]
    assert corpus.format.references(corpus.store, corpus.files[0], corpus.columns, [2, 7]) == {2: ["n 2"], 7: ["n 7"]}


@pytest.mark.parametrize("seed", range(3))
def test_a_corpus_of_shards_is_committed_row_by_row_once_after_interruptions(tmp_path, small_groups, seed):
    rng, output = random.Random(seed), Store(str(tmp_path / "out"))
    for i in range(3):
        shard(tmp_path / "in" / f"{i}.tar", samples(range(10 * i, 10 * i + 7)))
    corpus = find(tmp_path / "in", cache=Store(str(tmp_path / "cache")))
    for _ in range(3):
        plan = make_plan(corpus, output, "0123456789abcdef", num_images=rng.randint(1, 5), limit=None, num_samples=0)
        caption(corpus, output, rng.sample(plan.spans, k=len(plan.spans) // 2))
    caption(
        corpus, output, make_plan(corpus, output, "0123456789abcdef", num_images=4, limit=None, num_samples=0).spans
    )
    expected = [(f"{i}.tar", row, f"{10 * i + row:04d}", 10 * i + row) for i in range(3) for row in range(7)]
    assert sorted((row["source"], row["row"], row["id"], row["sha256"]) for row in read_rows(output)) == [
        (source, row, key, hashlib.sha256(png(n)).hexdigest()) for source, row, key, n in expected
    ]


def test_the_bytes_of_a_unit_are_its_own(tmp_path, small_groups):
    path = shard(tmp_path / "a.tar", samples(range(12)))
    corpus = find(tmp_path)
    begin, end = corpus.files[0].offsets[1:3]
    whole = path.read_bytes()
    path.write_bytes(b"?" * begin + whole[begin:end] + b"?" * (len(whole) - end))
    span = spans_of(corpus, 4)[1]
    got = corpus.format.records(corpus.store, span.rows, corpus.columns, max_bytes=10**6, with_references=False)
    assert [(record.row, record.data) for record in got] == [(n, png(n)) for n in range(4, 8)]


@pytest.mark.parametrize("layout", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_foreign_names_are_keys(tmp_path, small_groups, layout):
    long = "folder/" * 12 + "p" * 60 if layout == tarfile.USTAR_FORMAT else "folder/" * 40 + "p" * 150
    names = [f"{long}{n}" if n % 2 else f"\u00e4 {n} #%?" for n in range(6)]
    shard(tmp_path / "a.tar", [(f"{name}.png", png(n)) for n, name in enumerate(names)], format=layout)
    assert ids(find(tmp_path), 4) == names


def test_sparse_members_are_read_whole(tmp_path):
    data = png(3) + b"\0" * 2**18  # bytes after a picture's end do no harm
    (tmp_path / "0.png").write_bytes(b"")
    with open(tmp_path / "0.png", "r+b") as stream:
        stream.write(png(3))
        stream.truncate(len(data))
    os.system(f"cd {tmp_path} && tar --sparse --format=gnu -cf a.tar 0.png && rm 0.png")
    [record] = records(find(tmp_path))
    assert record.data == data


def test_what_is_no_sample_is_counted(tmp_path, caplog):
    members = [
        ("0.jpg", png(0)),
        ("0.seg.png", png(90)),
        ("._0.jpg", b"x"),
        ("__meta__/x.txt", b"x"),
        ("README", b"x"),
        ("1.txt", b"no image"),
        ("dir/_DSC0002.JPG", png(2)),
    ]
    path = shard(tmp_path / "a.tar", members)
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("3.png")
        link.type, link.linkname = tarfile.SYMTYPE, "0.jpg"
        archive.addfile(link)
    with caplog.at_level(logging.WARNING):
        corpus = find(tmp_path)
    assert [(record.id, record.data) for record in records(corpus)] == [("0", png(0)), ("dir/_DSC0002", png(2))]
    assert corpus.left_out == {
        "further images of a sample (input.image_column chooses)": 1,
        "members of tar files that belong to no sample": 3,
        "samples without an image": 1,
        "links and other special members of tar files": 1,
    }
    assert "1 samples without an image" in caplog.text
    chosen = find(tmp_path, image="seg.png")
    assert [(record.id, record.data) for record in records(chosen)] == [("0", png(90))]


def test_a_repeated_member_begins_a_sample_of_its_own_so_that_no_image_is_lost(tmp_path):
    shard(tmp_path / "a.tar", [("0.png", png(0)), ("0.png", png(1)), ("1.png", png(2)), ("0.png", png(3))])
    assert [(r.id, r.row, r.data) for r in records(find(tmp_path))] == [
        (key, row, png(row)) for row, key in enumerate(("0", "0", "1", "0"))
    ]


@pytest.mark.parametrize("num_images", [2, 100])
def test_damage_costs_its_own_members(tmp_path, small_groups, num_images):
    path = shard(tmp_path / "a.tar", samples(range(12)))
    with tarfile.open(path) as archive:
        offsets = {member.name: member.offset for member in archive.getmembers()}
    data = bytearray(path.read_bytes())
    for name in ("0002.png", "0007.json"):  # no header, and one whose checksum is wrong
        data[offsets[name] : offsets[name] + 100] = b"\xff" * 100
    path.write_bytes(data)
    corpus = find(tmp_path)
    assert ids(corpus, num_images) == [f"{n:04d}" for n in range(12) if n != 2]
    assert corpus.left_out == {"damaged stretches of tar files": 2, "samples without an image": 1}


def test_an_archive_after_another_is_read_and_one_that_is_cut_loses_its_end(tmp_path):
    first, second = (
        shard(tmp_path / name, samples(numbers)) for name, numbers in (("a", range(3)), ("b", range(3, 6)))
    )
    joined = first.read_bytes() + second.read_bytes()
    first.unlink(), second.unlink()
    (tmp_path / "both.tar").write_bytes(joined)
    assert ids(find(tmp_path)) == [f"{n:04d}" for n in range(6)]
    assert find(tmp_path).left_out == {}
    with tarfile.open(tmp_path / "both.tar") as archive:
        last = archive.getmembers()[-2]
    (tmp_path / "both.tar").write_bytes(joined[: last.offset_data + 20])
    got = records(find(tmp_path))
    assert [record.id for record in got] == ["0000", "0001", "0002"]
    assert getattr(got[-1].data, "reason", None) == "truncated"


@pytest.mark.parametrize("kept", [0.45, 0.95])
def test_a_compressed_shard_that_is_cut_keeps_what_comes_before(tmp_path, kept):
    images = [(f"{n}.png", random.Random(n).randbytes(20_000)) for n in range(10)]
    path = shard(tmp_path / "a.tar.gz", images, mode="w:gz")
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    corpus = find(tmp_path)
    got = records(corpus, 3)
    assert len(got) == corpus.num_rows == int(kept * 10) + 1
    assert all(record.data == data for record, (_, data) in zip(got[:-1], images, strict=False))
    assert getattr(got[-1].data, "reason", None) == "truncated"
    assert corpus.left_out == {"compressed tar files that are cut or damaged": 1}


def test_images_above_the_limit_are_not_read(tmp_path):
    shard(tmp_path / "a.tar", [("0.png", b"x" * 5000), ("1.png", png(1))])
    big, small = records(find(tmp_path), max_bytes=4000)
    assert (getattr(big.data, "reason", None), small.data) == ("too_large_bytes", png(1))


def test_files_that_are_no_tar_files_are_counted_and_alone_they_are_refused(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"<html>503</html>" * 200)
    (tmp_path / "b.tar").write_bytes(b"")
    with pytest.raises(UserError, match=r"must hold images, found none in 2 tar files, 2 files that are no tar files"):
        find(tmp_path)
    shard(tmp_path / "c.tar", samples([1]))
    assert find(tmp_path).left_out == {"files that are no tar files": 2, "tar files without images": 2}


def test_img2datasets_output_is_its_tars_and_never_its_addresses(tmp_path, write_parquet):
    shard(tmp_path / "00000.tar", samples(range(3)))
    (tmp_path / "00000_stats.json").write_text("{}")
    write_parquet(tmp_path / "00000.parquet", url=["http://nowhere.invalid/x.jpg"])
    corpus = find(tmp_path)
    assert (corpus.format.name, corpus.num_rows) == ("tar", 3)
    assert corpus.left_out == {"Parquet files beside the tar files": 1, "files of no known kind": 1}
    write_parquet(tmp_path / "others.parquet", url=["http://nowhere.invalid/x.jpg"])
    with pytest.raises(UserError, match=r"because of 00000.*set input\.format=tar or input\.format=parquet"):
        find(tmp_path)


@pytest.fixture
def write_parquet():
    import pyarrow as pa
    import pyarrow.parquet as pq

    return lambda path, **columns: pq.write_table(pa.table(columns), path)


def test_columns_that_no_sample_has_are_refused(tmp_path):
    shard(tmp_path / "a.tar", samples(range(2)))
    with pytest.raises(UserError, match="uses the column 'nope'; the samples have __key__, year, caption, json"):
        find(tmp_path, templates=("{nope}",))
    with pytest.raises(UserError, match=r"input\.id_column must be none, auto or one of __key__, year"):
        find(tmp_path, key="nope")
    with pytest.raises(UserError, match=r"input\.reference_column must be none, auto or one of caption, json"):
        find(tmp_path, references="nope")
    corpus = find(tmp_path, key="year", templates=("{__key__} {year}",))
    assert [(r.id, r.fields) for r in records(corpus)] == [
        (str(n), {"__key__": f"{n:04d}", "year": n}) for n in range(2)
    ]
    assert [record.id for record in records(find(tmp_path, key="none"))] == ["a.tar#0", "a.tar#1"]


def test_a_second_plan_reads_no_shard_that_has_not_changed(tmp_path, monkeypatch, small_groups):
    cache = Store(str(tmp_path / "cache"))
    for i in range(3):
        shard(tmp_path / "in" / f"{i}.tar", samples(range(5)))
    first = find(tmp_path / "in", cache=cache)
    indexed, real = [], tar_index.index_shard
    monkeypatch.setattr(tar_index, "index_shard", lambda store, name, *a: indexed.append(name) or real(store, name, *a))
    assert find(tmp_path / "in", cache=cache) == first
    assert indexed == []
    status = (tmp_path / "in" / "1.tar").stat()
    shard(tmp_path / "in" / "1.tar", samples(range(5, 10)))  # of the same size
    os.utime(tmp_path / "in" / "1.tar", ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert find(tmp_path / "in", cache=cache).num_rows == 15
    assert indexed == ["1.tar"]
    find(tmp_path / "in", cache=cache, image="png")  # other images, so another index
    assert len(indexed) == 4


def test_a_cache_that_cannot_be_used_costs_a_warning(tmp_path, caplog):
    shard(tmp_path / "in" / "a.tar", samples([1]))
    (tmp_path / "file").write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert find(tmp_path / "in", cache=Store(str(tmp_path / "file"))).num_rows == 1
    assert "input.cache" in caplog.text


@pytest.mark.parametrize(
    ("name", "key", "suffix"),
    [
        ("a/001.seg.PNG", "a/001", "seg.png"),
        ("./001.jpg", "001", "jpg"),
        ("a.b/001.jpg", "a.b/001", "jpg"),
        ("_DSC1.jpg", "_DSC1", "jpg"),
        ("a/.hidden.jpg", "", ""),
        ("README", "", ""),
        ("__meta__/a.jpg", "", ""),
    ],
)
def test_the_key_of_a_member_ends_at_the_first_dot_of_its_base_name(name, key, suffix):
    assert split_name(name) == (key, suffix)


@pytest.mark.parametrize("seed", range(3))
def test_a_ranged_stream_reads_what_the_file_holds(seed, monkeypatch):
    from pipelines.corpus import ranged

    for name, value in (("SMALL_BYTES", 7), ("LARGE_BYTES", 31), ("FAR_BYTES", 11)):
        monkeypatch.setattr(ranged, name, value)
    rng = random.Random(seed)
    data, store = rng.randbytes(500), make_store(f"memory://ranged{seed}")
    store.write("a", data)
    stream = RangedStream(store, "a", 20, 450)
    for _ in range(200):
        position, size = rng.randint(20, 460), rng.randint(0, 90)
        stream.seek(position)
        assert stream.read(size) == data[position : min(position + size, 450)]
        assert stream.tell() == max(position, min(position + size, 450))


def test_shards_of_an_object_store_are_read_by_ranges(tmp_path, small_groups):
    store = make_store("memory://shards")
    store.write("a.tar", shard(tmp_path / "a.tar", samples(range(9))).read_bytes())
    store.write("b.tar.gz", gzip.compress(shard(tmp_path / "b", samples(range(9, 12))).read_bytes()))
    corpus = find("memory://shards")
    assert corpus.store.path == "memory://shards"
    assert [record.data for record in records(corpus, 4)] == [png(n) for n in range(12)]
