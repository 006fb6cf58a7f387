"""Corpora at every kind of address: names are what follows the address, byte for byte."""

import functools
import hashlib
import http.server
import sys
import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.corpus.find import Corpus, find_corpus
from pipelines.errors import UserError
from pipelines.stages.unit_batch import UnitBatch
from pipelines.store import Store, make_store
from tests.corpus.test_tar import find, records, samples, shard
from tests.helpers import s3_server
from tests.reading import png, reader_of, spans_of

KEYS = ("a.png", "/b.png", "x/../c.png", "./d.png", "e f%20g#h?i+j&k.png", "*[l]{m,n}.png", "o\u00e4.png", "p//q.png")


def fetched(corpus: Corpus) -> list[int]:
    """The numbers of the images."""
    rows = [row for span in spans_of(corpus) for row in reader_of(corpus)(span.to_row())]
    known = {hashlib.sha256(png(number)).hexdigest(): number for number in range(20)}
    return [known[image.sha256] for row in rows for image in UnitBatch.from_row(row).images]


def test_no_byte_of_a_key_is_changed(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    with s3_server("images") as address:
        store = Store("s3://images/deep", address)
        for number, key in enumerate(KEYS):
            store.write(key, png(number))
        corpus = find_at("s3://images/deep/", address)
        assert {file.source: file.size for file in corpus.files} == {
            key: len(png(number)) for number, key in enumerate(KEYS)
        }
        assert sorted(fetched(corpus)) == list(range(len(KEYS)))
        one = find_at("S3A://images/deep/x/../c.png", address)
        assert ([file.source for file in one.files], one.store.path) == (["c.png"], "s3://images/deep/x/..")
        assert fetched(one) == [2]


def find_at(path: str, endpoint: str) -> Corpus:
    store = make_store(path, endpoint_url=endpoint)
    return find_corpus(store, image_column="auto", id_column="auto", reference_column="auto", templates=("x",))


class Hub(MemoryFileSystem):
    """What huggingface_hub's file system shares with others: paths without the scheme, and its own constructor."""

    protocol = "hf"
    store: dict = {}  # noqa: RUF012 - as of its class
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("hf://").strip("/")


@pytest.fixture
def hub(monkeypatch):
    monkeypatch.setitem(sys.modules["fsspec.registry"].__dict__["_registry"], "hf", Hub)
    Hub.store.clear()
    return Hub()


def test_a_dataset_of_the_hub_is_a_corpus_by_its_id(hub, tmp_path):
    table = pa.table({"image": [png(1), png(2)]})
    pq.write_table(table, tmp_path / "a.parquet")
    for name in ("data/train-0.parquet", "data/test-0.parquet"):
        hub.pipe_file(f"datasets/someone/pictures/{name}", (tmp_path / "a.parquet").read_bytes())
    hub.pipe_file("datasets/someone/pictures/README.md", b"card")
    hub.pipe_file("datasets/someone/other/a.parquet", b"")
    corpus = find("hf://datasets/someone/pictures")
    assert corpus.store.path == "hf://datasets/someone/pictures"
    assert [file.source for file in corpus.files] == ["data/test-0.parquet", "data/train-0.parquet"]
    assert corpus.left_out == {"files of no known kind": 1}
    assert [record.data for record in records(corpus)] == [png(1), png(2)] * 2
    [one] = find("hf://datasets/someone/pictures/data/test-*.parquet").files
    assert one.source == "test-0.parquet"


def test_one_name_of_a_web_server_is_a_corpus(tmp_path):
    shard(tmp_path / "a.tar", samples(range(3)))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    handler.log_message = lambda *_: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        corpus = find(f"http://127.0.0.1:{server.server_port}/a.tar")
        server.shutdown()
    assert ([file.source for file in corpus.files], corpus.num_rows) == (["a.tar"], 3)


@pytest.mark.parametrize("address", ["gs://bucket/x", "az://container/x"])
def test_a_scheme_whose_library_is_missing_names_what_to_install(address, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(UserError, match=r"is not installed: pip install 'otprune\[(gcs|azure)\]'"):
        make_store(address)


def test_an_unknown_scheme_names_the_known_ones():
    with pytest.raises(UserError, match=r"the scheme must be one of s3://, gs://, .* got what://"):
        make_store("what://x/y")


def test_what_can_only_be_read_is_never_written_to():
    with pytest.raises(UserError, match=r"^https://host/out can only be read"):
        make_store("https://host/out").write("a", b"")


@pytest.mark.parametrize("path", ["memory://a/b", "memory://a/b/"])
def test_a_store_of_another_scheme_writes_lists_and_deletes(path):
    store = make_store(path)
    store.write("captions/x", b"1")
    assert (store.list("captions"), store.read("captions/x"), store.folders("")) == ({"x": 1}, b"1", ("captions",))
    store.delete("captions/x")
    assert store.list("captions") == {}
