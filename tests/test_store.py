"""One interface to folders and to S3: objects appear whole or not at all, and what others write is seen at once."""

import os
import pickle
import threading
import time

import pytest

from pipelines import store as storage
from pipelines.store import AHEAD, STORE_ERRORS, Store, in_threads, make_store
from tests.helpers import s3_server


@pytest.fixture(scope="module")
def s3_address():
    with pytest.MonkeyPatch.context() as patch, s3_server("bucket") as address:
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        yield address


@pytest.fixture(params=["local", "s3"])
def store(request, tmp_path) -> Store:
    if request.param == "local":
        return Store(str(tmp_path / "out"))
    return Store(f"s3://bucket/{request.node.name}", request.getfixturevalue("s3_address"))


def test_what_is_written_is_read_listed_and_deleted(store):
    assert store.list("captions") == {}
    assert not store.exists("captions/a")
    store.write("captions/a", b"one")
    store.write("captions/b", b"")
    store.write("run.json", b"x" * 100_000)
    assert store.read("captions/a") == b"one"
    assert store.read("captions/b") == b""
    assert store.list("captions") == {"a": 3, "b": 0}
    assert store.exists("captions/a")
    store.delete("captions/a")
    assert store.list("captions") == {"b": 0}
    assert len(store.read("run.json")) == 100_000


def test_a_second_write_replaces_the_first(store):
    store.write("a", b"a longer first")
    store.write("a", b"second")
    assert store.read("a") == b"second"


def test_deleting_what_is_not_there_is_fine_and_reading_it_is_not(store):
    store.delete("absent")
    store.delete("no/such/folder")
    with pytest.raises(FileNotFoundError):
        store.read("absent")


def test_a_listing_is_of_one_folder_and_without_hidden_names(store):
    for name in ("captions/a", "captions/.a.1234.tmp", "captions/deeper/b", "captionsx/c", "d"):
        store.write(name, b"1")
    assert store.list("captions") == {"a": 1}
    assert store.list("caption") == {}


def test_a_store_travels_to_tasks_and_sees_at_once_what_others_write(store):
    other = pickle.loads(pickle.dumps(store))
    assert other == store
    assert other.list("captions") == {}  # nothing of this may be remembered
    assert not other.exists("captions/a")
    store.write("captions/a", b"1")
    assert other.list("captions") == {"a": 1}
    assert other.exists("captions/a")
    other.delete("captions/a")
    assert store.list("captions") == {}


def test_names_with_spaces_and_accents_are_names(store):
    store.write("captions/a b \u00e4#%.txt", b"1")
    assert store.list("captions") == {"a b \u00e4#%.txt": 1}
    assert store.read("captions/a b \u00e4#%.txt") == b"1"


def test_writers_of_one_name_leave_one_whole_object(store):
    contents = [bytes([65 + i]) * 50_000 for i in range(6)]
    threads = [threading.Thread(target=store.write, args=("captions/a", content)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.read("captions/a") in contents
    assert store.list("captions") == {"a": 50_000}


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_local_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch, broken):
    store = Store(str(tmp_path))
    store.write("a", b"first")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(storage.os, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        store.write("a", b"second")
    assert os.listdir(tmp_path) == ["a"]
    assert store.read("a") == b"first"


def test_a_store_that_cannot_be_written_raises_what_callers_expect(tmp_path, s3_address):
    (tmp_path / "file").write_bytes(b"")
    for store in (Store(str(tmp_path / "file")), Store("s3://no-such-bucket/x", s3_address)):
        with pytest.raises(STORE_ERRORS):
            store.write("captions/a", b"1")
    with pytest.raises(STORE_ERRORS):
        Store("s3://bucket/x", "not an address").write("a", b"1")


def test_paths_become_absolute_and_keep_their_meaning(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert make_store("runs/x/").path == str(tmp_path / "runs" / "x")
    assert make_store("~/out").path == "/home/someone/out"
    assert make_store("file:///data/out").path == "/data/out"
    assert make_store("s3://bucket/deep/out/").path == "s3://bucket/deep/out"
    store = make_store("s3://bucket/deep", endpoint_url="http://x", anonymous=True)
    assert (store.root, store.join("captions", "a"), store.is_s3) == ("bucket/deep", "bucket/deep/captions/a", True)
    assert (store.endpoint_url, store.anonymous) == ("http://x", True)


def test_calls_in_threads_answer_in_order_and_stay_few_ahead_of_the_caller():
    called, answers = [], 0

    def call(item: int) -> int:
        called.append(item)
        time.sleep(0.001 * (item % 3))  # a later call may end first
        return item

    for answer in in_threads(call, range(500)):
        assert answer == answers
        answers += 1
        assert len(called) <= answers + AHEAD
    assert answers == 500


def test_the_first_item_whose_call_fails_ends_the_calls():
    called = []

    def call(item: int) -> int:
        called.append(item)
        if item == 3:
            raise OSError("gone")
        return item

    found = in_threads(call, range(10_000))
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="gone"):
        next(found)
    assert len(called) <= 3 + AHEAD
