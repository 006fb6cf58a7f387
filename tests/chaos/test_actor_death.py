"""Processes that die in mid-unit: the job goes on; an image that kills its process every time is the only one to go.

Stages hold no models unless the name of the test says so.
"""

import hashlib
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jobs.verify import main as verify
from pipelines.config.load import load_config
from pipelines.output.span import SpanRow
from pipelines.run.job import Actors, Job, prepare
from pipelines.run.run import run_job
from pipelines.run.stages import Stages
from pipelines.stages.encode import Encoder
from pipelines.stages.read import ReadDecode
from pipelines.stages.unit_batch import UnitBatch
from tests.helpers import (
    QUICK,
    addresses,
    captions_of,
    fake_encoder,
    fake_generator,
    killing,
    light_stages,
    read_rows,
    run_captions,
    run_fake,
    write_corpus,
)

on_ray = partial(run_fake, on_ray=True)
pytestmark = [pytest.mark.chaos, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(600)]


@pytest.fixture
def images(scene_png: Callable[[int], bytes]) -> list[bytes]:
    return [scene_png(i) for i in range(20)]


@pytest.fixture
def arguments(tmp_path: Path, images: list[bytes]) -> list[str]:
    """20 rows in five units."""
    corpus = write_corpus(tmp_path / "in" / "a.parquet", images, rows_per_group=4)
    return [f"input.path={corpus}", f"output.path={tmp_path / 'out'}", "unit.images=4"]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def expected(images: Sequence[bytes], without: Sequence[int] = ()) -> list[tuple[str, int, str]]:
    """What fake stages caption."""
    rows = [(row, data) for row, data in enumerate(images) if row not in without]
    return [("a.parquet", row, f"{sha256(data)} describe the image .") for row, data in rows]


def assert_only_these_crashed(out: Path, rows: Sequence[int], images: Sequence[bytes]) -> None:
    rejected = {
        row["row"]: (row["id"], row["sha256"], row["stage"], row["reason"]) for row in read_rows(out, "quarantine")
    }
    assert rejected == {row: (f"row-{row}", sha256(images[row]), "process", "crash") for row in rows}
    assert addresses(out) == [("a.parquet", row) for row in range(len(images))]


def test_actors_killed_from_outside_in_mid_unit_lose_and_double_nothing(tmp_path, arguments, images):
    """SIGKILL, as the kernel sends it when memory runs out, to an encoder at its first, third and fourth unit."""
    marks = tmp_path / "marks"
    marks.mkdir()
    killed = []

    def kill() -> None:
        for count in (1, 3, 4):
            while len(begun := sorted(marks.iterdir(), key=lambda p: p.stat().st_mtime_ns)) < count:
                time.sleep(0.02)
            time.sleep(0.1)
            killed.append(pid := int(begun[-1].suffix[1:]))
            os.kill(pid, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    outcome = on_ray(*arguments, encoder=fake_encoder(marks, seconds=0.6))
    killer.join(1)
    assert outcome.code == 0, outcome.message
    assert len(set(killed)) == 3, "three processes died"
    assert captions_of(tmp_path / "out") == expected(images)
    assert read_rows(tmp_path / "out", "quarantine") == []
    assert verify(arguments) == 0


@pytest.mark.slow
def test_of_images_that_kill_their_encoder_every_time_each_one_is_quarantined_and_no_other(tmp_path, arguments, images):
    """Two in one unit, one in another, two actors, the default number of tries."""
    victims = [5, 6, 16]
    encoder = killing(fake_encoder(), {sha256(images[row]) for row in victims})
    outcome = on_ray(*arguments, "encode.actors=2", "encode.num_cpus=0.5", encoder=encoder)
    assert outcome.code == 0, outcome.message
    assert outcome.metrics["quarantined/crash"] == 3
    assert_only_these_crashed(tmp_path / "out", victims, images)
    assert captions_of(tmp_path / "out") == expected(images, victims)
    assert verify(arguments) == 0


@pytest.mark.slow
@pytest.mark.long
def test_an_image_that_kills_its_generator_is_isolated_too(tmp_path, arguments, images):
    generator = killing(fake_generator(), {sha256(images[9])})
    outcome = on_ray(*arguments, "generate.actors=2", "generate.num_cpus=0.5", "faults.retries=1", generator=generator)
    assert outcome.code == 0, outcome.message
    assert_only_these_crashed(tmp_path / "out", [9], images)
    assert captions_of(tmp_path / "out") == expected(images, [9])


def deadly_reader(victim: bytes) -> type:
    """A reader whose task dies when it comes to an image. The driver, which only identifies images, lives."""

    class DeadlyReader:
        def __init__(self, reader: ReadDecode):
            self.reader = reader

        def identify(self, span: SpanRow) -> dict[str, Any]:
            return self.reader.identify(span)

        def __call__(self, row: dict[str, Any]) -> Iterator[dict[str, Any]]:
            whole = self.reader.format

            def records(*arguments: Any, **options: Any) -> Iterator[Any]:
                for record in whole.records(*arguments, **options):
                    if record.data == victim:
                        os._exit(1)
                    yield record

            self.reader.format = replace(whole, records=records)
            yield from self.reader(row)

    return DeadlyReader


@pytest.mark.slow
def test_an_image_that_kills_its_decoder_is_isolated_from_all_units_of_its_task(tmp_path, images):
    """One row group larger than a unit: five units share one read task."""
    corpus = write_corpus(tmp_path / "in" / "a.parquet", images, rows_per_group=20)
    arguments = [f"input.path={corpus}", f"output.path={tmp_path / 'out'}", "unit.images=4", "faults.retries=1"]

    def deadly_stages(job: Job) -> Stages:
        stages = light_stages(job)
        return replace(stages, read=deadly_reader(images[10])(stages.read))

    job = prepare(load_config([*QUICK, *arguments]), Actors(fake_encoder(), fake_generator()))
    outcome = run_captions(job, stages=deadly_stages)
    assert outcome.code == 0, outcome.message
    assert_only_these_crashed(tmp_path / "out", [10], images)
    assert captions_of(tmp_path / "out") == expected(images, [10])


@pytest.mark.slow
@pytest.mark.long
def test_an_image_that_kills_the_real_encoder_is_isolated_among_real_captions(tmp_path, arguments, images):
    job = prepare(load_config([*QUICK, *arguments, "input.limit=8", "faults.retries=0"]))
    outcome = run_job(replace(job, actors=Actors(encode=killing(Encoder, {sha256(images[2])}))))
    assert outcome.code == 0, outcome.message
    assert_only_these_crashed(tmp_path / "out", [2], images[:8])
    assert all(row["caption"] for row in read_rows(tmp_path / "out"))


@pytest.mark.slow
def test_when_every_image_dies_the_job_fails_and_keeps_its_commits(tmp_path, arguments, images):
    assert on_ray(*arguments, "input.limit=12").code == 0
    started = time.monotonic()
    encoder = killing(fake_encoder(), {sha256(data) for data in images})
    outcome = on_ray(*arguments, "faults.retries=0", encoder=encoder)
    assert outcome.code == 1
    assert "its process died on each of 8 images tried alone: the images are not to blame" in outcome.message
    assert time.monotonic() - started < 150
    assert captions_of(tmp_path / "out") == expected(images[:12])
    assert read_rows(tmp_path / "out", "quarantine") == []
    assert on_ray(*arguments).code == 0, "once the cause is gone the same command completes the output"
    assert captions_of(tmp_path / "out") == expected(images)


@pytest.mark.slow
def test_more_dead_units_than_allowed_stop_the_job(tmp_path, arguments, images):
    encoder = killing(fake_encoder(), {sha256(data) for data in images[4:]})
    outcome = on_ray(*arguments, "faults.retries=0", "faults.max_isolated=1", encoder=encoder)
    assert outcome.code == 1
    assert "Ray gave up" in outcome.message
    assert set(captions_of(tmp_path / "out")) <= set(expected(images[:4]))


@pytest.mark.slow
def test_a_model_that_breaks_after_it_was_checked_stops_the_job(tmp_path, arguments, demo_model):
    """The real actors raise while they load it."""
    model = shutil.copytree(demo_model, tmp_path / "model")
    job = prepare(load_config([*QUICK, *arguments, f"model.path={model}"]))
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100_000])
    started = time.monotonic()
    outcome = run_job(job)
    assert outcome.code == 1
    assert "Ray gave up: ActorDiedError" in outcome.message
    assert f"{weights} must be a whole safetensors file" in outcome.message, "it says what is wrong"
    assert time.monotonic() - started < 100
    assert read_rows(tmp_path / "out") == []


@pytest.mark.slow
def test_an_actor_whose_process_dies_whenever_it_starts_stops_the_job(tmp_path, arguments):
    """As for want of memory: no exception, just a dead process, which Ray starts again without end."""

    class Stillborn(fake_encoder()):
        def __init__(self, **_: object) -> None:
            os._exit(1)

    started = time.monotonic()
    outcome = on_ray(*arguments, encoder=Stillborn)
    assert outcome.code == 1
    assert re.search(r"Map\(Stillborn\): an actor's process died \d+ times while it started", outcome.message)
    assert time.monotonic() - started < 100, "long before faults.no_progress_seconds"


@pytest.mark.slow
def test_an_actor_that_cannot_start_again_stops_the_job_and_keeps_its_commits(tmp_path, arguments, images):
    """Its process dies at the third unit, and by then the weights are gone. Ray would wait for the dead pool."""
    marks = tmp_path / "marks"
    marks.mkdir()

    class Once(fake_generator()):
        def __init__(self, **_: object) -> None:
            if any(marks.iterdir()):
                raise FileNotFoundError("the weights are gone")

        def __call__(self, row: dict) -> dict:
            (marks / UnitBatch.from_row(row).unit.name).touch()
            if len(list(marks.iterdir())) == 3:
                os._exit(1)
            return super().__call__(row)

    started = time.monotonic()
    outcome = on_ray(*arguments, generator=Once)
    assert outcome.code == 1
    assert "no actor is left, the last died of FileNotFoundError: the weights are gone" in outcome.message
    assert time.monotonic() - started < 100, "long before faults.no_progress_seconds"
    assert 0 < len(addresses(tmp_path / "out")) < 20
    assert set(captions_of(tmp_path / "out")) <= set(expected(images))
