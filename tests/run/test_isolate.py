"""Units that did not come through: the one guilty image is found, or the job stops; driven by a flow without Ray."""

import hashlib
import json
from collections.abc import Callable, Iterator

import pytest

from pipelines.corpus.find import Corpus
from pipelines.errors import JobFailedError
from pipelines.output.plan import make_plan
from pipelines.output.reader import read_totals
from pipelines.output.span import SpanRow
from pipelines.output.unit import Unit
from pipelines.run.isolate import run_with_isolation
from pipelines.stages.unit_batch import Answer, Image, UnitBatch
from pipelines.stages.write import Sink
from pipelines.store import Store
from tests.helpers import read_rows
from tests.reading import corpus_at, png, reader_of, write

FINGERPRINT = "0123456789abcdef"
Address = tuple[str, int]


def addresses(unit: Unit) -> list[Address]:
    if len(unit.sources) == 1 and unit.sources[0].endswith(".parquet"):
        return [(unit.sources[0], row) for row in range(unit.start, unit.stop)]
    return [(source, 0) for source in unit.sources]


class Flow:
    """Commits units like the real one; `fate` says "died", an error, or None for a unit's images and its try."""

    def __init__(self, fate: Callable[[set[Address], int], str | None]):
        self.fate = fate
        self.passes: list[tuple[list[list[Address]], bool]] = []

    def __call__(self, spans: list[SpanRow], alone: bool, sink: Sink) -> Iterator[dict]:
        units = [unit for span in spans for unit in span.units]
        self.passes.append(([addresses(unit) for unit in units], alone))
        for unit in units:
            outcome = self.fate(set(addresses(unit)), len(self.passes))
            if outcome == "died":
                sink.store.write(f"quarantine/part-{unit.name}.parquet", b"written before it could commit")
                continue
            answer = Answer("c", 1, 2, 3, "stop")
            images = [
                Image(f"{source}#{row}", source, row, "0" * 64, ["p"], answers=[answer])
                for source, row in addresses(unit)
            ]
            yield json.loads(sink(UnitBatch(unit, images=images, error=outcome).to_row())["summary"])


class Lagging(Store):
    """A store whose lists are of long ago."""

    def list(self, folder: str) -> dict[str, int]:
        return {}


class Scene:
    """A corpus of 12 images (or `count`) in units of 4, and a run over it."""

    def __init__(self, tmp_path, kind: str, count: int = 12):
        folder = tmp_path / "in"
        folder.mkdir()
        if kind == "parquet":
            write(folder / "a.parquet", [png(i) for i in range(count)], rows=6)
        else:
            for i in range(count):
                (folder / f"{i:02d}.png").write_bytes(png(i))
        self.kind = kind
        self.corpus: Corpus = corpus_at(folder)
        self.sink = Sink(store=Store(str(tmp_path / "out")), fingerprint=FINGERPRINT, model="m", method="none")

    def address(self, number: int) -> Address:
        return ("a.parquet", number) if self.kind == "parquet" else (f"{number:02d}.png", 0)

    def spans(self) -> list[SpanRow]:
        store = self.sink.store
        return make_plan(self.corpus, store, FINGERPRINT, num_images=4, limit=None, num_samples=0).spans

    def run(self, fate, max_isolated: int = 100) -> tuple[list[dict], Flow]:
        flow = Flow(fate)
        files = {file.source: file for file in self.corpus.files}
        summaries = run_with_isolation(
            self.spans(), flow, read=reader_of(self.corpus), sink=self.sink, files=files, max_isolated=max_isolated
        )
        return list(summaries), flow

    def rows(self, folder: str) -> list[dict]:
        return read_rows(self.sink.store, folder)

    def captioned(self) -> list[Address]:
        return sorted((row["source"], row["row"]) for row in self.rows("captions"))


@pytest.fixture(params=["parquet", "files"])
def scene(request, tmp_path) -> Scene:
    return Scene(tmp_path, request.param)


def test_a_run_without_faults_is_one_pass(scene):
    summaries, flow = scene.run(lambda images, attempt: None)
    assert len(flow.passes) == 1
    assert flow.passes[0][1] is False
    assert sum(summary["images_captioned"] for summary in summaries) == 12
    assert scene.captioned() == [scene.address(i) for i in range(12)]


def test_only_the_image_that_kills_its_process_is_quarantined(scene):
    guilty = scene.address(6)
    summaries, flow = scene.run(lambda images, attempt: "died" if guilty in images else None)
    assert scene.captioned() == [scene.address(i) for i in range(12) if i != 6]
    (row,) = scene.rows("quarantine")
    sha256 = hashlib.sha256(png(6)).hexdigest()
    assert (row["source"], row["row"], row["sha256"]) == (*guilty, sha256)
    assert (row["reason"], row["stage"]) == ("crash", "process")
    assert row["id"] == ("a.parquet#6" if scene.kind == "parquet" else guilty[0])
    assert sum(summary["images_captioned"] for summary in summaries) == 11
    assert sum(summary["images_quarantined"] for summary in summaries) == 1
    assert [(len(units), alone) for units, alone in flow.passes][1:] == [(1, True), (len(flow.passes[1][0][0]), True)]
    assert all(len(unit) == 1 for unit in flow.passes[2][0])
    assert scene.spans() == []  # the next start has nothing to do


def test_isolating_ends_in_the_unit_as_it_was_planned(scene):
    """So a driver that isolates a unit and one that does it whole write one object; nothing else is left."""
    planned = {unit.part for span in scene.spans() for unit in span.units}
    guilty = scene.address(6)
    summaries, _ = scene.run(lambda images, attempt: "died" if guilty in images else None)
    assert set(scene.sink.store.list("captions")) == planned
    assert {summary["unit"] for summary in summaries} == {name[5:-8] for name in planned}
    [name] = scene.sink.store.list("quarantine")
    totals = read_totals(scene.sink.store, name)
    captioned = 2 if scene.kind == "parquet" else 3  # of a unit's images all but one
    assert (totals["images_captioned"], totals["images_quarantined"], totals["reasons"]) == (captioned, 1, {"crash": 1})
    assert (totals["prompt_tokens"], totals["generated_tokens"]) == (captioned * 2, captioned * 3)
    assert not scene.sink.store.exists("isolated")


def test_a_unit_that_was_reported_is_not_looked_for_in_a_list_that_lags(scene):
    scene.sink = scene.sink.at(Lagging(scene.sink.store.path))
    _, flow = scene.run(lambda images, attempt: None)
    assert len(flow.passes) == 1
    first = scene.address(0)
    scene.sink.store.remove("captions")
    _, flow = scene.run(lambda images, attempt: "died" if first in images and attempt == 1 else None)
    assert [len(units) for units, _ in flow.passes] == [4 if scene.kind == "parquet" else 3, 1]


def test_several_killers_in_several_units_are_each_found(scene):
    guilty = {scene.address(i) for i in (0, 5, 6, 11)}
    scene.run(lambda images, attempt: "died" if guilty & images else None)
    assert {(row["source"], row["row"]) for row in scene.rows("quarantine")} == guilty
    assert len(scene.captioned()) == 8


def test_a_unit_that_died_by_its_neighbour_is_done_whole_the_second_time(scene):
    first = scene.address(0)
    _, flow = scene.run(lambda images, attempt: "died" if first in images and attempt == 1 else None)
    assert len(scene.captioned()) == 12
    assert [alone for _, alone in flow.passes] == [False, True]
    assert scene.sink.store.list("quarantine") == {}  # nor is there what the dead process left


def test_an_error_that_passes_is_no_failure(scene):
    first = scene.address(0)
    _, flow = scene.run(lambda images, attempt: "write: OSError: busy" if first in images and attempt == 1 else None)
    assert len(scene.captioned()) == 12
    assert len(flow.passes[1][0]) == 1


def test_an_error_that_stays_stops_the_job_and_keeps_what_is_committed(scene):
    guilty = scene.address(0)
    with pytest.raises(
        JobFailedError, match=r"1 work units failed even alone, the first of .*, by read: OSError: bad sector"
    ):
        scene.run(lambda images, attempt: "read: OSError: bad sector" if guilty in images else None)
    assert len(scene.captioned()) >= 6
    assert guilty not in scene.captioned()
    scene.run(lambda images, attempt: None)  # the next start completes it
    assert scene.captioned() == [scene.address(i) for i in range(12)]


def test_when_every_image_kills_its_process_the_images_are_not_to_blame(scene):
    with pytest.raises(JobFailedError, match="died on each of 12 images tried alone: the images are not to blame"):
        scene.run(lambda images, attempt: "died")
    assert scene.captioned() == []
    scene.run(lambda images, attempt: None)  # on a machine that works
    assert len(scene.captioned()) == 12
    assert scene.sink.store.list("quarantine") == {}  # nothing is left of what the dead processes wrote


def test_a_flow_that_gives_up_ends_the_job(scene):
    def give_up(images, attempt):
        raise JobFailedError("Ray gave up")

    with pytest.raises(JobFailedError, match="Ray gave up"):
        scene.run(give_up)


def test_more_failed_units_than_allowed_stop_the_job_at_once(scene):
    tries = []

    def fail(images, attempt):
        tries.append(images)
        return "encode: RuntimeError: wrong driver"

    with pytest.raises(
        JobFailedError, match=r"more than faults\.max_isolated=1 work units failed, the last of .*, by encode: "
    ):
        scene.run(fail, max_isolated=1)
    assert len(tries) == 2  # and not the third unit


def test_as_many_failed_units_as_allowed_are_tried_again(scene):
    _, flow = scene.run(lambda images, attempt: "write: OSError" if attempt == 1 else None, max_isolated=4)
    assert len(scene.captioned()) == 12
    assert len(flow.passes) == 2


@pytest.mark.parametrize("kind", ["parquet", "files"])
def test_the_only_image_of_a_corpus_may_be_the_killer(tmp_path, kind):
    scene = Scene(tmp_path, kind, count=1)
    scene.run(lambda images, attempt: "died")
    assert [row["reason"] for row in scene.rows("quarantine")] == ["crash"]
