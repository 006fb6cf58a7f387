"""Exports: every caption under its image's name, once, in the same bytes however often the export was killed."""

import http.server
import io
import json
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.export import main
from pipelines.export.target import MARKS, Target
from pipelines.store import Store
from tests.export.committed import PROMPTS, caption_of, commit, sha
from tests.helpers import s3_server, write_corpus
from tests.hostile import encode, picture

IMAGES = [encode(picture(8 + i, 8), "JPEG" if i % 2 else "PNG") for i in range(10)]
COLUMNS = {"title": pa.array([f"title {i}" for i in range(10)]), "score": pa.array([i / 10 for i in range(10)])}

Export = Callable[..., int]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten image files, two of which differ only in their suffix."""
    for i, data in enumerate(IMAGES):
        file = tmp_path / "in" / ("deep" if i > 5 else "") / f"{i}.v1.{'jpg' if i % 2 else 'png'}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    (tmp_path / "in" / "1.v1.png").write_bytes(IMAGES[0])
    return tmp_path / "in"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Ten rows in one Parquet file, of which row 4 is null, and four in another."""
    write_corpus(tmp_path / "in" / "a.parquet", [None if i == 4 else d for i, d in enumerate(IMAGES)], 4, **COLUMNS)
    write_corpus(tmp_path / "in" / "sub" / "b.parquet", IMAGES[:4], 4, **{k: v[:4] for k, v in COLUMNS.items()})
    return tmp_path / "in"


@pytest.fixture
def export(tmp_path: Path) -> Export:
    def run(kind: str, *more: str, to: str | None = "to") -> int:
        path = [f"export.path={tmp_path / to}"] if to else []
        where = [f"input.path={tmp_path / 'in'}", f"output.path={tmp_path / 'out'}"]
        return main([*where, *path, f"export.format={kind}", "export.threads=1", *more])

    return run


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder by its relative name."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def seen(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(folder).items() if not name.startswith(MARKS)}


def members(data: bytes) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(data)) as shard:
        return {m.name: stream.read() for m in shard.getmembers() if (stream := shard.extractfile(m))}


# Files beside the images


def test_texts_stand_beside_their_images_and_leave_them_alone(folder, tmp_path, export):
    before = files(folder)
    commit(folder, tmp_path / "out", rejected=[("deep/7.v1.jpg", 0)])
    assert export("txt", to=None) == 0
    after = seen(folder)
    assert {name: after[name] for name in before} == before
    assert (folder / "2.v1.txt").read_text() == caption_of(IMAGES[2])
    assert (folder / "2.v1.caption_2.txt").read_text() == caption_of(IMAGES[2], PROMPTS[1])
    assert (folder / "1.v1.jpg.txt").read_text() == caption_of(IMAGES[1]), "1.v1.png is another image"
    assert (folder / "1.v1.png.txt").read_text() == caption_of(IMAGES[0])
    assert not (folder / "deep" / "7.v1.txt").exists(), "a rejected image has no caption"
    assert len(after) == len(before) + 2 * 10


def test_a_file_of_the_users_own_is_never_replaced_unasked(folder, tmp_path, export, capsys):
    commit(folder, tmp_path / "out")
    (folder / "3.v1.txt").write_text("my own words")
    assert export("txt", to=None) == 2
    assert "3.v1.txt is there already" in capsys.readouterr().err
    assert (folder / "3.v1.txt").read_text() == "my own words"
    assert export("txt", "export.overwrite=true", to=None) == 0
    assert (folder / "3.v1.txt").read_text() == caption_of(IMAGES[3])


def test_json_of_rows_goes_to_a_mirror_and_can_hold_what_was_rejected(table, tmp_path, export):
    commit(table, tmp_path / "out")
    assert export("json", "export.rejected=keep", "export.name=id") == 0
    written = {name: json.loads(data) for name, data in seen(tmp_path / "to").items()}
    assert set(written) == {f"a/row-{i}.json" for i in range(10)} | {f"sub/b/row-{i}.json" for i in range(4)}
    assert written["a/row-4.json"] | {"caption_sha256": ""} == {
        "id": "row-4", "source": "a.parquet", "row": 4, "caption_error": "missing", "caption_sha256": "",
    }  # fmt: skip
    whole = written["sub/b/row-2.json"]
    assert (whole["caption"], whole["caption_2"]) == tuple(caption_of(IMAGES[2], prompt) for prompt in PROMPTS)
    assert whole["caption_2_prompt"] == PROMPTS[1]
    assert (whole["caption_model"], whole["caption_method"], whole["caption_retention"]) == ("a/model", "otprune", 0.25)


def test_ids_that_repeat_are_not_taken_for_names(tmp_path, export, capsys):
    pq.write_table(pa.table({"id": ["x", "x"], "image": IMAGES[:2]}), _file(tmp_path / "in" / "a.parquet"))
    commit(tmp_path / "in", tmp_path / "out")
    assert export("txt", "export.name=id") == 2
    assert "got x twice" in capsys.readouterr().err
    assert export("txt") == 0
    assert set(seen(tmp_path / "to")) >= {"a/000000000.txt", "a/000000001.txt"}


# Tar shards


def test_a_tar_shard_holds_image_text_and_json_under_one_key(folder, tmp_path, export):
    commit(folder, tmp_path / "out", rejected=[("deep/7.v1.jpg", 0)])
    assert export("tar", "export.shard_images=6") == 0
    shards = seen(tmp_path / "to")
    assert list(shards) == ["00000.tar", "00001.tar"]
    held = members(shards["00000.tar"]) | members(shards["00001.tar"])
    assert held["2_v1.png"] == IMAGES[2], "a dot in a name would end the key"
    assert held["2_v1.txt"].decode() == caption_of(IMAGES[2])
    assert json.loads(held["2_v1.json"])["source"] == "2.v1.png"
    assert (held["1_v1.jpg"], held["1_v1_2.png"]) == (IMAGES[1], IMAGES[0])
    assert not [name for name in held if name.startswith("deep/7")]
    assert len(held) == 4 * 10


def test_rows_become_shards_of_their_file(table, tmp_path, export):
    commit(table, tmp_path / "out")
    assert export("tar", "export.shard_images=6") == 0
    shards = seen(tmp_path / "to")
    assert list(shards) == ["a-00000.tar", "a-00001.tar", "sub/b.tar"]
    assert members(shards["a-00001.tar"])["000000007.txt"].decode() == caption_of(IMAGES[7])
    assert members(shards["a-00000.tar"])["000000003.jpg"] == IMAGES[3]
    assert "000000004.json" not in members(shards["a-00000.tar"])


def test_webdataset_reads_the_shards(table, tmp_path, export):
    webdataset = pytest.importorskip("webdataset")
    commit(table, tmp_path / "out")
    assert export("tar", "export.name=id", "export.shard_images=6") == 0
    shards = sorted(map(str, (tmp_path / "to").rglob("*.tar")))
    samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil").rename(image="jpg;png"))
    assert len(samples) == 13
    first = next(sample for sample in samples if sample["__key__"].endswith("row-3"))
    assert first["txt"] == caption_of(IMAGES[3])
    assert first["json"]["id"] == "row-3"
    assert first["image"].size == (11, 8)


# Parquet


def test_parquet_keeps_every_row_and_column_and_adds_the_captions(table, tmp_path, export):
    commit(table, tmp_path / "out")
    assert export("parquet") == 0
    assert list(seen(tmp_path / "to")) == ["a.parquet", "sub/b.parquet"]
    for name in ("a.parquet", "sub/b.parquet"):
        source, got = pq.read_table(table / name), pq.read_table(tmp_path / "to" / name)
        assert got.select(source.column_names).equals(source)
    frame = pd.read_parquet(tmp_path / "to" / "a.parquet")
    assert frame["caption"].tolist()[:4] == [caption_of(data) for data in IMAGES[:4]]
    assert frame["caption_2"].tolist()[5:] == [caption_of(data, PROMPTS[1]) for data in IMAGES[5:]]
    assert frame["caption"].isna().tolist() == [i == 4 for i in range(10)]
    assert frame["caption_error"][4] == "missing"
    assert frame["caption_finish_reason"][0] == "stop"
    assert frame["caption_sha256"][0] == sha(IMAGES[0])
    assert export("parquet", "export.rejected=drop", to="fewer") == 0
    assert pq.read_table(tmp_path / "fewer" / "a.parquet")["id"].to_pylist() == [
        f"row-{i}" for i in range(10) if i != 4
    ]


def test_a_column_of_the_corpus_is_never_replaced(tmp_path, export, capsys):
    write_corpus(tmp_path / "in" / "a.parquet", IMAGES[:2], caption=["old", "older"])
    commit(tmp_path / "in", tmp_path / "out")
    assert export("parquet") == 2
    assert "export.column=new_caption" in capsys.readouterr().err
    assert export("parquet", "export.column=new") == 0
    got = pq.read_table(tmp_path / "to" / "a.parquet")
    assert got["caption"].to_pylist() == ["old", "older"]
    assert got["new"].to_pylist() == [caption_of(data) for data in IMAGES[:2]]


def test_captions_of_addresses_go_into_their_table(tmp_path, export):
    pq.write_table(
        pa.table({"url": ["https://x.org/a.jpg", "https://x.org/b.jpg"]}), _file(tmp_path / "in" / "a.parquet")
    )
    commit(tmp_path / "in", tmp_path / "out", by_address=True)
    assert export("parquet") == 0
    assert pq.read_table(tmp_path / "to" / "a.parquet").column_names[:2] == ["url", "caption"]


# Images behind addresses


@pytest.mark.parametrize("name", ["metadata.csv", "a.csv"])
def test_pictures_that_rows_name_stand_in_the_shards(tmp_path, export, capsys, name):
    for i in range(10):
        _file(tmp_path / "in" / "x" / "deep" / f"{i}.img.jpg").write_bytes(IMAGES[i])
    lines = ["file_name", *(f"deep/{i}.img.jpg" for i in range(10))]
    (tmp_path / "in" / "x" / name).write_text("\n".join(lines))
    given = [] if name == "metadata.csv" else ["input.format=csv"]
    commit(tmp_path / "in", tmp_path / "out", rejected=[(f"x/{name}", 7)], format="auto" if not given else "csv")
    assert export("tar", "export.shard_images=6", *given) == 0
    shards = seen(tmp_path / "to")
    stem = name.partition(".")[0]
    assert list(shards) == [f"x/{stem}-00000.tar", f"x/{stem}-00001.tar"]
    held = members(shards[f"x/{stem}-00000.tar"]) | members(shards[f"x/{stem}-00001.tar"])
    assert (held["000000003.jpg"], held["000000008.png"]) == (IMAGES[3], IMAGES[8])
    assert held["000000008.txt"].decode() == caption_of(IMAGES[8])
    assert len(held) == 4 * 9
    assert export("dataset", *given, to="set") == 0
    got = pq.read_table(tmp_path / "set" / "data" / "train-00000-of-00001.parquet")
    assert [image["bytes"] for image in got["image"].to_pylist()] == [d for i, d in enumerate(IMAGES) if i != 7]


@pytest.mark.parametrize("kept", ["drop", "keep"])
def test_what_is_gone_from_the_web_costs_its_own_row_and_a_server_that_fails_its_piece(tmp_path, export, caplog, kept):
    files = {"/same": b"fetched", "/other": b"changed", "/down": b""}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if files.get(self.path) else 503 if self.path in files else 404)
            self.end_headers()
            self.wfile.write(files.get(self.path, b""))

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        urls = [f"http://127.0.0.1:{server.server_port}{name}" for name in ("/same", "/gone", "/other", "/down")]
        pq.write_table(pa.table({"url": urls}), _file(tmp_path / "in" / "a.parquet"))
        commit(tmp_path / "in", tmp_path / "out", by_address=True)
        more = ["input.allow_private=true", "input.fetch_retries=0", f"export.rejected={kept}"]
        assert export("dataset", *more) == 1
        assert "row 3 cannot be fetched now: HTTP status 503" in caplog.text
        files["/down"] = b"fetched"
        assert export("dataset", *more) == 0
        server.shutdown()
    assert "2 images are gone from the web or have changed" in caplog.text
    got = pq.read_table(tmp_path / "to" / "data" / "train-00000-of-00001.parquet").to_pylist()
    images = {row["row"]: row["image"] and row["image"]["bytes"] for row in got}
    assert images == {0: b"fetched", 3: b"fetched", **({1: None, 2: None} if kept == "keep" else {})}
    assert all(row["caption"] == caption_of(b"fetched") for row in got)


# A dataset folder


def test_a_dataset_folder_has_a_card_and_says_what_its_columns_are(table, tmp_path, export):
    commit(table, tmp_path / "out")
    assert export("dataset", "export.shard_images=6", "export.license=cc0-1.0") == 0
    names = list(seen(tmp_path / "to"))
    assert names == ["README.md", *(f"data/train-{i:05d}-of-00003.parquet" for i in range(3))]
    _, front, body = (tmp_path / "to" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "cc0-1.0"
    assert PROMPTS[1] in body
    got = pa.concat_tables(pq.read_table(tmp_path / "to" / name) for name in names[1:])
    assert got["image"].to_pylist()[3]["bytes"] == IMAGES[3]
    assert got["id"].to_pylist() == [f"row-{i}" for i in (0, 1, 2, 3, 5, 6, 7, 8, 9, 0, 1, 2, 3)]
    features = json.loads(got.schema.metadata[b"huggingface"])["info"]["features"]
    assert set(features) == set(got.column_names)
    assert features["image"] == {"_type": "Image"}


def test_datasets_reads_the_folder(folder, tmp_path, export):
    """`datasets` caps fsspec, so it is no dependency. To run this:

    pip install --target DIR --no-deps datasets dill multiprocess xxhash; PYTHONPATH=DIR pytest tests/export -k datasets
    """
    datasets = pytest.importorskip("datasets")
    commit(folder, tmp_path / "out")
    assert export("dataset", "export.shard_images=6") == 0
    rows = datasets.load_dataset(str(tmp_path / "to"), split="train", cache_dir=str(tmp_path / "cache"))
    assert len(rows) == 11
    by_id = {row["id"]: row for row in rows}
    assert by_id["3.v1.jpg"]["caption"] == caption_of(IMAGES[3])
    assert by_id["3.v1.jpg"]["image"].size == (11, 8)


def test_a_card_that_somebody_has_written_stays(table, tmp_path, export):
    commit(table, tmp_path / "out")
    assert export("dataset", "export.images=false") == 0
    assert "image" not in pq.read_schema(tmp_path / "to" / "data" / "train-00000-of-00002.parquet").names
    (tmp_path / "to" / "README.md").write_text("mine")
    assert export("dataset", "export.images=false") == 0
    assert (tmp_path / "to" / "README.md").read_text() == "mine"


def test_a_push_sends_the_folder_without_the_marks(table, tmp_path, export, monkeypatch, capsys):
    import huggingface_hub

    calls = []

    class Hub:
        def create_repo(self, name, **options):
            return f"https://hub/{name}"

        def upload_folder(self, **options):
            calls.append(options)

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    commit(table, tmp_path / "out")
    assert export("dataset", "export.hub=me/set") == 0
    assert "https://hub/me/set" in capsys.readouterr().out
    assert calls[0]["folder_path"] == str(tmp_path / "to")
    assert calls[0]["allow_patterns"] == ["data/*", "README.md"]


# Exactly once


@pytest.mark.parametrize("kind", ["json", "tar", "parquet", "dataset"])
def test_a_killed_export_goes_on_and_ends_in_the_same_bytes(kind, table, tmp_path, export, monkeypatch):
    commit(table, tmp_path / "out")
    assert export(kind, "export.shard_images=2", to="whole") == 0
    finish, finished = Target.finish, []

    def die(self, piece, shards):
        if len(finished) == 1:  # the second piece is written and not yet marked
            raise KeyboardInterrupt
        finished.append(piece.name)
        finish(self, piece, shards)

    monkeypatch.setattr(Target, "finish", die)
    assert export(kind, "export.shard_images=2") == 130
    assert len(finished) == 1
    (tmp_path / "to" / MARKS / "tmp").mkdir(exist_ok=True)
    (tmp_path / "to" / MARKS / "tmp" / "half").write_bytes(b"what a killed process leaves")
    monkeypatch.setattr(
        Target, "finish", lambda self, piece, shards: (finished.append(piece.name), finish(self, piece, shards))
    )
    assert export(kind, "export.shard_images=2") == 0
    assert len(finished) == len(set(finished)), "a finished piece is not written again"
    assert files(tmp_path / "to") == files(tmp_path / "whole")


def test_an_output_that_has_grown_is_exported_where_it_grew(table, tmp_path, export):
    commit(table, tmp_path / "out", limit=6)
    assert export("parquet") == 0
    assert export("tar", "export.shard_images=3", to="tar") == 0
    early = pd.read_parquet(tmp_path / "to" / "a.parquet")
    assert early["caption_error"].dropna().tolist() == ["missing"] + ["not_done"] * 4
    first = (tmp_path / "tar" / "a-00000.tar").stat().st_ino
    commit(table, tmp_path / "out")
    assert export("parquet") == 0
    assert export("tar", "export.shard_images=3", to="tar") == 0
    assert pd.read_parquet(tmp_path / "to" / "a.parquet")["caption_error"].dropna().tolist() == ["missing"]
    assert (tmp_path / "tar" / "a-00000.tar").stat().st_ino == first, "a shard whose captions are the same stays"
    assert export("tar", "export.shard_images=6", to="tar") == 0
    assert list(seen(tmp_path / "tar")) == ["a-00000.tar", "a-00001.tar", "sub/b.tar"], "shards of the old cut are gone"


def test_another_image_than_the_captioned_one_stops_its_shard_alone(folder, tmp_path, export, capsys):
    commit(folder, tmp_path / "out")
    size = (folder / "5.v1.jpg").stat().st_size
    (folder / "5.v1.jpg").write_bytes(IMAGES[5][:-1] + b"\0")
    assert (folder / "5.v1.jpg").stat().st_size == size
    assert export("tar", "export.shard_images=3") == 1
    assert "5.v1.jpg row 0 has another image" in capsys.readouterr().err
    assert len(seen(tmp_path / "to")) == 3


def test_what_does_not_fit_is_one_line_and_code_2(table, folder, tmp_path, export, capsys):
    assert export("parquet") == 2
    assert "output.path must be the output of a caption job" in capsys.readouterr().err
    commit(tmp_path / "in", tmp_path / "out")
    assert export("txt", to=None) == 2
    assert "export.path must name a folder" in capsys.readouterr().err
    assert export("parquet", to="out") == 2
    assert "export.path must differ from output.path" in capsys.readouterr().err
    assert export("tar", "export.hub=me/set") == 2
    assert "export.hub pushes export.format=dataset" in capsys.readouterr().err


def test_from_s3_to_s3(tmp_path):
    with s3_server("images", "captions", "exports") as address:
        corpus, output, target = (
            Store(path, address) for path in ("s3://images/c", "s3://captions/c", "s3://exports/c")
        )
        file = write_corpus(tmp_path / "a.parquet", IMAGES, 4)
        corpus.write("a.parquet", file.read_bytes())
        commit(corpus, output)
        where = [f"input.path={corpus.path}", f"output.path={output.path}", f"export.path={target.path}"]
        where += [f"{room}.endpoint_url={address}" for room in ("input", "output", "export")]
        for _ in range(2):
            assert main([*where, "export.format=tar"]) == 0
        assert list(target.list("")) == ["a.tar"]
        assert members(target.read("a.tar"))["000000003.txt"].decode() == caption_of(IMAGES[3])


def _file(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
