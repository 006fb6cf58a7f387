"""The sink: quarantine first, then the one object that commits; the columns that readers rely on; nothing twice."""

import io
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.output.reader import METADATA_KEY, read_totals
from pipelines.output.schema import CAPTIONS, QUARANTINE, REASONS
from pipelines.output.unit import Unit
from pipelines.stages.unit_batch import Answer, Image, Rejected, Sample, UnitBatch
from pipelines.stages.write import Sink, summarize
from pipelines.store import Store

UNIT = Unit("0123456789ab", 10, 13, ("a.parquet",))
NAME = "part-0123456789ab-000000010-000000013.parquet"


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(str(tmp_path / "out"))


@pytest.fixture
def sink(store) -> Sink:
    return Sink(store=store, fingerprint="f" * 16, model="some/model", method="otprune")


@pytest.fixture
def operations(monkeypatch) -> list[str]:
    """What the store was asked to do, in order."""
    log: list[str] = []
    write, delete = Store.write, Store.delete
    monkeypatch.setattr(Store, "write", lambda self, name, data: (log.append(f"write {name}"), write(self, name, data)))
    monkeypatch.setattr(Store, "delete", lambda self, name: (log.append(f"delete {name}"), delete(self, name)))
    return log


def answer(text: str, tokens: int = 5, finish: str = "stop") -> Answer:
    return Answer(text, num_kept_tokens=25, num_prompt_tokens=31, num_generated_tokens=tokens, finish_reason=finish)


def image(row: int, *answers: Answer, sample: Sample | None = None) -> Image:
    prompts = [f"prompt {i}" for i in range(len(answers))]
    more = {"num_visual_tokens": 256, "references": ["a reference"], "sample": sample}
    return Image(f"id{row}", "a.parquet", row, f"sha{row}", prompts, answers=list(answers), **more)


def rejected(row: int, reason: str = "truncated", sha256: str | None = "sha") -> Rejected:
    return Rejected(f"id{row}", "a.parquet", row, sha256, reason, "some detail")


def unit_batch(*rejects: Rejected) -> UnitBatch:
    rows = {10, 11, 12} - {r.row for r in rejects}
    return UnitBatch(
        UNIT,
        images=[image(row, answer(f"caption {row}")) for row in sorted(rows)],
        rejected=list(rejects),
        seconds={"read": 0.5, "generate": 2.0},
    )


def run(sink: Sink, unit: UnitBatch) -> dict:
    return json.loads(sink(unit.to_row())["summary"])


def read(store: Store, folder: str) -> pa.Table:
    return pq.read_table(io.BytesIO(store.read(f"{folder}/{NAME}")))


def test_captions_have_exactly_the_promised_columns(sink, store):
    run(sink, unit_batch())
    table = read(store, "captions")
    assert [(field.name, str(field.type)) for field in table.schema] == [
        ("id", "string"),
        ("source", "string"),
        ("row", "int64"),
        ("caption", "string"),
        ("prompt", "string"),
        ("model", "string"),
        ("method", "string"),
        ("num_visual_tokens", "int32"),
        ("num_kept_tokens", "int32"),
        ("num_prompt_tokens", "int32"),
        ("num_generated_tokens", "int32"),
        ("finish_reason", "string"),
        ("sha256", "string"),
        ("num_attempts", "int32"),
    ]
    assert table.to_pylist()[1] == {
        "id": "id11",
        "source": "a.parquet",
        "row": 11,
        "caption": "caption 11",
        "prompt": "prompt 0",
        "model": "some/model",
        "method": "otprune",
        "num_visual_tokens": 256,
        "num_kept_tokens": 25,
        "num_prompt_tokens": 31,
        "num_generated_tokens": 5,
        "finish_reason": "stop",
        "sha256": "sha11",
        "num_attempts": 1,
    }


def test_quarantine_has_exactly_the_promised_columns(sink, store):
    run(sink, unit_batch(rejected(10, "missing", None), rejected(12, "crash")))
    table = read(store, "quarantine")
    names = ["id", "source", "row", "sha256", "stage", "reason", "detail"]
    assert [(f.name, str(f.type)) for f in table.schema] == [(n, "int64" if n == "row" else "string") for n in names]
    first = {"id": "id10", "source": "a.parquet", "row": 10, "sha256": None, "detail": "some detail"}
    assert table.to_pylist()[0] == first | {"reason": "missing", "stage": "decode"}
    assert table["stage"].to_pylist() == ["decode", "process"]


def test_every_row_is_in_exactly_one_of_the_two(sink, store):
    run(sink, unit_batch(rejected(11)))
    assert read(store, "captions")["row"].to_pylist() == [10, 12]
    assert read(store, "quarantine")["row"].to_pylist() == [11]


def test_an_image_with_several_prompts_has_a_row_for_each(sink, store):
    unit = UnitBatch(UNIT, images=[image(10, answer("one"), answer("two")), image(11, answer("three"), answer("four"))])
    run(sink, unit)
    rows = [(r["row"], r["prompt"], r["caption"]) for r in read(store, "captions").to_pylist()]
    assert rows == [
        (10, "prompt 0", "one"),
        (10, "prompt 1", "two"),
        (11, "prompt 0", "three"),
        (11, "prompt 1", "four"),
    ]


def test_a_worker_that_does_not_see_what_the_driver_wrote_writes_nothing(sink, store):
    sink.witness = "runs/1.json"
    error = run(sink, unit_batch(rejected(11)))["error"]
    assert error.startswith("output: output.path must be a folder that the driver and all workers share, ")
    assert f"got {store.path}, and the worker on " in error
    assert store.list("captions") == store.list("quarantine") == {}
    store.write(sink.witness, b"{}")
    assert run(sink, unit_batch(rejected(11)))["error"] is None


def test_quarantine_is_written_before_the_one_object_that_commits(sink, operations):
    run(sink, unit_batch(rejected(11)))
    assert operations == [f"write quarantine/{NAME}", f"write captions/{NAME}"]


def test_a_unit_of_nothing_but_rejects_is_committed_too(sink, store):
    run(sink, unit_batch(rejected(10), rejected(11), rejected(12)))
    assert read(store, "captions").num_rows == 0
    assert read(store, "captions").schema.equals(CAPTIONS)
    assert read_totals(store, NAME)["images_quarantined"] == 3


def test_quarantine_of_a_try_that_never_committed_is_removed(sink, store):
    store.write(f"quarantine/{NAME}", b"of a try that died: a download timed out, this time it did not")
    run(sink, unit_batch())
    assert store.list("quarantine") == {}
    assert store.list("captions").keys() == {NAME}


def test_written_twice_is_written_once(sink, store):
    for _ in range(2):
        run(sink, unit_batch(rejected(11)))
    assert store.list("captions").keys() == store.list("quarantine").keys() == {NAME}
    assert read(store, "captions")["row"].to_pylist() == [10, 12]


def test_what_cannot_be_written_is_not_committed_and_the_driver_is_told(sink, store, monkeypatch):
    write = Store.write

    def refuse(self, name, data):
        if name.startswith("captions/"):
            raise PermissionError("read-only\nreally")
        write(self, name, data)

    monkeypatch.setattr(Store, "write", refuse)
    summary = run(sink, unit_batch(rejected(11)))
    assert summary == {"unit": UNIT.name, "error": "write: PermissionError: read-only"}
    assert store.list("captions") == {}


def test_a_unit_that_failed_writes_nothing(sink, operations):
    summary = run(sink, UnitBatch(UNIT, error="encode: gone"))
    assert summary == {"unit": UNIT.name, "error": "encode: gone"}
    assert operations == []


def test_a_missing_caption_or_an_unknown_reason_fails_the_unit_instead_of_losing_a_row(sink, store):
    unit = unit_batch()
    unit.images[0].answers = []
    assert run(sink, unit)["error"].startswith("write: ValueError")
    assert run(sink, unit_batch(rejected(11, "bad luck")))["error"].startswith("write: KeyError")
    assert store.list("captions") == {}


def test_totals_stand_in_the_metadata_and_in_the_summary(sink, store):
    unit = UnitBatch(
        UNIT,
        images=[
            image(10, answer("a", 5), answer("b", 64, "length")),
            image(13, replace(answer("c", 7), num_attempts=3, num_discarded_tokens=128)),
            image(14, replace(answer("d", 64, "loop"), num_attempts=4, num_discarded_tokens=192)),
        ],
        rejected=[rejected(11), rejected(12, "empty")],
        seconds={"read": 0.5, "decode": 0.25},
    )
    summary = run(sink, unit)
    expected = {
        "images_captioned": 3,
        "images_quarantined": 2,
        "captions": 4,
        "prompt_tokens": 124,
        "generated_tokens": 140,
        "finished_by_length": 1,
        "finished_by_loop": 1,
        "retried": 2,
        "repaired": 1,
        "retry_tokens": 320,
        "reasons": {"truncated": 1, "empty": 1},
    }
    stored = read_totals(store, NAME)
    assert expected.items() <= summary.items()
    assert expected.items() <= stored.items()
    assert stored["seconds"] == {"read": 0.5, "decode": 0.25}
    assert (stored["unit"], stored["fingerprint"], stored["sources"]) == (UNIT.name, "f" * 16, ["a.parquet"])
    assert METADATA_KEY in read(store, "captions").schema.metadata


def test_only_sampled_images_go_back_to_the_driver():
    sample = Sample(jpeg="abc", width=224, height=168, kept=[1, 2], rows=3, columns=4)
    unit = UnitBatch(UNIT, images=[image(10, answer("a")), image(11, answer("b"), sample=sample)])
    (shown,) = summarize(unit)["samples"]
    assert shown == {
        "id": "id11",
        "source": "a.parquet",
        "row": 11,
        "references": ["a reference"],
        "captions": [
            {
                "caption": "b",
                "num_kept_tokens": 25,
                "num_prompt_tokens": 31,
                "num_generated_tokens": 5,
                "finish_reason": "stop",
                "num_attempts": 1,
                "num_discarded_tokens": 0,
            }
        ],
        "prompts": ["prompt 0"],
        "jpeg": "abc",
        "width": 224,
        "height": 168,
        "kept": [1, 2],
        "rows": 3,
        "columns": 4,
    }


def test_every_reason_belongs_to_a_stage():
    assert set(REASONS.values()) == {"read", "decode", "encode", "generate", "process"}
    assert QUARANTINE.names[-3:] == ["stage", "reason", "detail"]
