"""Whatever happened to an output before, the next start completes it: no row lost, none twice. Stages hold no models.

Their captions name the image's bytes and the prompt, so a caption in the wrong row would show.
"""

import hashlib
import random
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.verify import main as verify
from pipelines.config.load import load_config
from pipelines.errors import UserError
from pipelines.run.job import Actors, Job, prepare
from tests.helpers import (
    LOCAL,
    QUICK,
    addresses,
    captions_of,
    fake_encoder,
    fake_generator,
    read_rows,
    run_captions,
    run_fake,
    write_corpus,
)

FILES = {"a": (9, 3), "b": (3, 2), "sub/c": (20, 20), "sub/d": (8, 7)}  # rows, rows of a row group


@pytest.fixture(scope="module")
def images(scene_png: Callable[[int], bytes]) -> dict[str, list[bytes | None]]:
    """40 rows in four files; the second row of each is null, and every row of b."""
    numbers = iter(range(100))
    return {
        name: [None if row == 1 or name == "b" else scene_png(next(numbers)) for row in range(rows)]
        for name, (rows, _) in FILES.items()
    }


@pytest.fixture
def corpus(tmp_path: Path, images: dict[str, list[bytes | None]]) -> Path:
    for name, (_, group) in FILES.items():
        write_corpus(tmp_path / "in" / f"{name}.parquet", images[name], rows_per_group=group)
    return tmp_path / "in"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def complete(corpus: Path, out: Path, images: dict[str, list[bytes | None]]) -> Callable[[], None]:
    """Asserts that the output holds what it has to, by content, and that the proof agrees."""

    def check() -> None:
        expected = [
            (f"{name}.parquet", row, f"{hashlib.sha256(data).hexdigest()} describe the image .")
            for name, rows in images.items()
            for row, data in enumerate(rows)
            if data is not None
        ]
        assert captions_of(out) == sorted(expected)
        assert addresses(out) == sorted(
            (f"{name}.parquet", row) for name, rows in images.items() for row in range(len(rows))
        )
        assert verify([f"input.path={corpus}", f"output.path={out}"]) == 0

    return check


def planned(corpus: Path, out: Path, *more: str) -> Job:
    return prepare(
        load_config([*QUICK, LOCAL, f"input.path={corpus}", f"output.path={out}", *more]),
        Actors(fake_encoder(), fake_generator()),
    )


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_lost_units_are_done_again_whatever_the_unit_size(corpus: Path, out: Path, complete):
    """The first run is on Ray; those that find units lost ask nothing of it."""
    choice, paths = random.Random(0), (f"input.path={corpus}", f"output.path={out}")
    for images in (4, 6, 3):
        assert run_fake(*paths, f"unit.images={images}", on_ray=images == 4).code == 0
        complete()
        for part in choice.sample(sorted((out / "captions").iterdir()), k=4):
            part.unlink()  # as if it had never been committed; its quarantine object is an orphan now
        (out / "run.json").unlink()
    assert run_fake(*paths, "unit.images=40").code == 0
    complete()


def test_units_done_twice_are_the_same_objects(corpus: Path, out: Path, complete):
    """A driver that was thought dead and goes on, with the plan that it once made."""
    job = planned(corpus, out, "unit.images=5")
    assert run_captions(job).code == 0
    names = sorted(p.name for p in out.rglob("*.parquet"))
    assert run_captions(job).code == 0
    assert sorted(p.name for p in out.rglob("*.parquet")) == names
    complete()


def test_a_unit_of_nothing_but_rejects_is_committed(corpus: Path, out: Path):
    assert run_fake(f"input.path={corpus}/b.parquet", f"output.path={out}").code == 0
    (part,) = (out / "captions").iterdir()
    assert pq.read_metadata(part).num_rows == 0
    assert [row["reason"] for row in read_rows(out, "quarantine")] == ["missing"] * 3
    assert planned(corpus / "b.parquet", out).plan.spans == []


def test_an_object_that_cannot_be_written_stops_the_job_loudly_and_the_next_start_completes_it(
    corpus: Path, out: Path, complete
):
    units = planned(corpus, out, "unit.images=5").plan.units
    obstacle = out / "captions" / f"part-{units[2].name}.parquet"
    obstacle.mkdir(parents=True)
    outcome = run_fake(f"input.path={corpus}", f"output.path={out}", "unit.images=5")
    assert outcome.code == 1
    assert "write: IsADirectoryError" in outcome.message
    obstacle.rmdir()
    committed = {p.name for p in (out / "captions").iterdir()}
    assert committed == {f"part-{unit.name}.parquet" for unit in units} - {obstacle.name}, "all others are kept"
    assert run_fake(f"input.path={corpus}", f"output.path={out}", "unit.images=5").code == 0
    complete()


def test_a_corpus_that_has_changed_is_refused(corpus: Path, out: Path, images):
    assert run_fake(f"input.path={corpus}/a.parquet", f"output.path={out}").code == 0
    write_corpus(corpus / "a.parquet", images["a"][:5])
    with pytest.raises(UserError, match="captions of 1 files that this corpus does not have, or that changed"):
        planned(corpus / "a.parquet", out)


def test_foreign_objects_among_the_captions_are_refused(corpus: Path, out: Path):
    planned(corpus, out)
    (out / "captions").mkdir()
    (out / "captions" / "part-0.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"captions must hold nothing but .*part-0\.parquet"):
        planned(corpus, out)


def test_a_folder_of_image_files_that_has_grown_is_completed_without_doubles(tmp_path: Path, scene_png, out: Path):
    def add(numbers: range) -> None:
        for i in numbers:
            (tmp_path / "in" / f"{i:02d}.png").write_bytes(scene_png(i))

    (tmp_path / "in").mkdir()
    add(range(0, 10, 2))
    arguments = (f"input.path={tmp_path / 'in'}", f"output.path={out}", "unit.images=2")
    assert run_fake(*arguments).code == 0
    add(range(1, 10, 2))
    assert run_fake(*arguments).code == 0
    expected = [hashlib.sha256(scene_png(i)).hexdigest() for i in range(10)]
    assert captions_of(out) == [(f"{i:02d}.png", 0, f"{expected[i]} describe the image .") for i in range(10)]
    assert verify(list(arguments)) == 0


def test_captions_without_a_fingerprint_are_refused(corpus: Path, out: Path):
    assert run_fake(f"input.path={corpus}/b.parquet", f"output.path={out}").code == 0
    (out / "fingerprint.json").unlink()
    with pytest.raises(UserError, match=r"holds captions but no fingerprint\.json"):
        planned(corpus / "b.parquet", out)


def test_a_claim_without_captions_does_not_bind(corpus: Path, out: Path):
    """A run that ended before its first commit must not make the user choose another output."""
    planned(corpus, out, "prune.retention=0.2")
    job = planned(corpus, out, "prune.retention=0.3")
    assert job.output.path == str(out)
    assert job.described["prune.retention"] == 0.3
    assert planned(corpus, out, "prune.retention=0.3").fingerprint == job.fingerprint
