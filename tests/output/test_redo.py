"""Quarantined rows that are tried again: what was captioned stays, and no row is ever in neither place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.verify import main as verify
from pipelines.corpus.file import CorpusFile
from pipelines.corpus.find import Corpus
from pipelines.corpus.formats.images import FORMAT as IMAGES
from pipelines.errors import UserError
from pipelines.output.plan import make_plan
from pipelines.output.reader import OutputReader
from pipelines.output.unit import Unit
from pipelines.stages.unit_batch import Answer, Image, Rejected, UnitBatch
from pipelines.stages.write import Sink
from pipelines.store import Store, read_json
from tests.helpers import addresses, captions_of, read_rows, run_fake
from tests.reading import png

FINGERPRINT = "0123456789abcdef"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Ten addresses of files, of which 2, 3 and 7 are not there, and 9 is no image."""
    pq.write_table(pa.table({"url": [f"{i}.png" for i in range(10)]}), tmp_path / "a.parquet", row_group_size=5)
    for i in set(range(10)) - {2, 3, 7}:
        (tmp_path / f"{i}.png").write_bytes(b"no image" if i == 9 else png(i))
    return tmp_path


def test_rows_are_tried_again_by_reason_and_the_rest_of_their_unit_stays(corpus, tmp_path):
    output = tmp_path / "out"
    arguments = [f"input.path={corpus}/a.parquet", f"output.path={output}", "unit.images=5"]
    assert run_fake(*arguments).code == 0
    first = captions_of(output)
    assert [row for _, row, _ in first] == [0, 1, 4, 5, 6, 8]
    for i in (2, 7):
        (corpus / f"{i}.png").write_bytes(png(i))
    assert "nothing to do" in run_fake(*arguments).message
    outcome = run_fake(*arguments, "faults.redo=[fetch]")
    assert (outcome.metrics["images_captioned"], outcome.metrics["images_quarantined"]) == (2, 1)
    assert [row for _, row, _ in captions_of(output)] == [0, 1, 2, 4, 5, 6, 7, 8]
    assert set(first) < set(captions_of(output))
    assert {row["row"]: row["reason"] for row in read_rows(output, "quarantine")} == {
        3: "fetch",
        9: "unsupported_format",
    }
    totals = read_json(Store(str(output)), "run.json")["totals"]
    assert (totals["images_captioned"], totals["images_quarantined"], totals["captions"]) == (8, 2, 8)
    assert totals["reasons"] == {"fetch": 1, "unsupported_format": 1}
    assert verify(arguments) == 0
    (corpus / "3.png").write_bytes(png(3))
    assert run_fake(*arguments, "faults.redo=[fetch]").code == 0
    assert len(addresses(output)) == 10
    assert len(list(Store(str(output)).list("quarantine"))) == 1
    assert verify(arguments) == 0


def test_the_attempts_of_a_further_try_are_counted(tmp_path):
    scene = Scene(tmp_path)
    (unit,) = scene.units("unavailable")
    batch = scene.batch(unit, {2: "unavailable"})
    batch.images[0].answers = [Answer("c", 1, 2, 3, "stop", num_attempts=2, num_discarded_tokens=7)]
    batch.images[0].crop_tokens = {"tiles": 5}
    scene.sink.commit(batch)
    (unit,) = scene.units("unavailable")
    batch = scene.batch(unit, {})
    batch.images[0].answers = [Answer("c", 1, 2, 3, "loop", num_attempts=2, num_discarded_tokens=4)]
    scene.sink.commit(batch)
    (totals,) = OutputReader(scene.output).totals()
    assert (totals["finished_by_loop"], totals["retried"], totals["repaired"]) == (1, 2, 1)
    assert (totals["retry_tokens"], totals["crop_tokens"]) == (11, {"tiles": 5})


def test_an_unknown_reason_is_refused(corpus, tmp_path):
    with pytest.raises(UserError, match=r"faults\.redo must hold reasons of the quarantine \(.*\), got 'fech'"):
        run_fake(f"input.path={corpus}", f"output.path={tmp_path / 'out'}", "faults.redo=[fech]")


class Scene:
    """Six image files in one unit; 1, 2 and 4 are in quarantine, 4 for a reason of its own."""

    def __init__(self, folder: Path):
        self.output = Store(str(folder / "out"))
        self.sink = Sink(store=self.output, fingerprint=FINGERPRINT, model="m", method="none")
        files = tuple(CorpusFile(f"{i}.png", 100 + i) for i in range(6))
        self.corpus = Corpus(Store("/nowhere"), files, IMAGES)
        self.sink.commit(self.batch(*self.units(), {1: "unavailable", 2: "unavailable", 4: "empty"}))

    def units(self, *redo: str) -> list[Unit]:
        options: dict[str, Any] = {"num_images": 6, "limit": None, "num_samples": 0, "redo": redo}
        return make_plan(self.corpus, self.output, FINGERPRINT, **options).units

    def batch(self, unit: Unit, fates: dict[int, str]) -> UnitBatch:
        """The unit, of whose files those in `fates` are rejected."""
        work = UnitBatch(unit)
        for i in unit.redo or range(6):
            if i in fates:
                work.rejected.append(Rejected(f"{i}", f"{i}.png", 0, None, fates[i], ""))
            else:
                work.images.append(Image(f"{i}", f"{i}.png", 0, "0", ["p"], answers=[Answer("c", 1, 2, 3, "stop")]))
        return work

    def state(self) -> tuple[str, str]:
        """The numbers of the files that are captioned, and of those in quarantine."""
        parts = [read_rows(self.output, folder) for folder in ("captions", "quarantine")]
        return tuple("".join(row["id"] for row in rows) for rows in parts)  # type: ignore[return-value]


def test_a_unit_of_image_files_is_restricted_to_the_rows_that_are_tried_again(tmp_path):
    scene = Scene(tmp_path)
    assert scene.units() == []
    (unit,) = scene.units("unavailable")
    assert (unit.redo, unit.num_images) == ((1, 2), 2)
    scene.sink.commit(scene.batch(unit, {2: "unavailable"}))
    assert scene.state() == ("0135", "24")
    (totals,) = OutputReader(scene.output).totals()
    assert (totals["images_captioned"], totals["reasons"]) == (4, {"unavailable": 1, "empty": 1})
    assert (totals["captions"], totals["generated_tokens"]) == (4, 12)


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_job_that_dies_between_its_writes_loses_nothing_and_the_next_mends_it(tmp_path, writes, monkeypatch):
    scene = Scene(tmp_path)
    (unit,) = scene.units("unavailable")

    def dying(write: Callable) -> Callable:
        left = [writes]

        def call(self, name, data):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            write(self, name, data)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Store, "write", dying(Store.write))
        if writes < 2:
            with pytest.raises(KeyboardInterrupt):
                scene.sink.commit(scene.batch(unit, {}))
        else:
            scene.sink.commit(scene.batch(unit, {}))
    captioned, quarantined = scene.state()
    assert set(captioned) | set(quarantined) == set("012345")
    for again in scene.units("unavailable"):
        scene.sink.commit(scene.batch(again, {}))
    assert scene.state() == ("01235", "4")


def test_a_further_try_that_fares_worse_takes_nothing_away(tmp_path):
    """A task that Ray runs twice may fetch an image once and miss it the second time."""
    scene = Scene(tmp_path)
    (unit,) = scene.units("unavailable")
    scene.sink.commit(scene.batch(unit, {}))
    scene.sink.commit(scene.batch(unit, {1: "unavailable", 2: "unavailable"}))
    assert scene.state() == ("01235", "4")
