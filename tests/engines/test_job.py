"""A whole job around an asynchronous generator without a model: an actor's units overlap, its deaths are bounded."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipelines.engines.registry import ENGINES
from pipelines.stages.unit_batch import Answer, UnitBatch
from tests.helpers import addresses, captions_of, read_rows, run_fake, write_corpus

on_ray = partial(run_fake, on_ray=True)
pytestmark = pytest.mark.usefixtures("ray_session")

IMAGES = 12
VLLM = ("engine.name=vllm", "unit.images=2", "engine.units_in_flight=3", "faults.retries=1")


@pytest.fixture
def corpus(tmp_path: Path, scene_png: Callable[[int], bytes], monkeypatch) -> Path:
    # vLLM need not be installed here
    monkeypatch.setitem(ENGINES, "vllm", replace(ENGINES["vllm"], check=lambda config: None))
    return write_corpus(tmp_path / "in" / "a.parquet", [scene_png(i) for i in range(IMAGES)])


def fake_async_generator(folder: Path, together: int = 1, deadly_after: int | None = None, victim: str = "") -> type:
    """Waits until so many units are in the actor at once; dies at a victim, or once so many units have been begun."""

    class FakeAsyncGenerator:
        def __init__(self, **_: object) -> None:
            (folder / f"start.{os.getpid()}").touch()
            self.inside, self.enough = 0, asyncio.Event()

        async def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
            unit_batch = UnitBatch.from_row(row)
            (folder / f"unit.{unit_batch.unit.name}").touch()
            begun = len(list(folder.glob("unit.*")))
            if victim in [image.sha256 for image in unit_batch.images] or (deadly_after and begun > deadly_after):
                os._exit(1)
            self.inside += 1
            if self.inside >= together:
                self.enough.set()
            await asyncio.wait_for(self.enough.wait(), 60)
            await asyncio.sleep(0.01)
            for image in unit_batch.images:
                texts = [f"{image.sha256} {prompt}" for prompt in image.prompts]
                image.answers = [Answer(text, 25, 31, 2, "stop") for text in texts]
            unit_batch.arrays = {}
            return unit_batch.to_row()

    return FakeAsyncGenerator


def starts(folder: Path) -> int:
    return len(list(folder.glob("start.*")))


def test_an_actor_works_on_several_units_at_once_and_each_comes_out_once(tmp_path, corpus):
    out = tmp_path / "out"
    generator = fake_async_generator(tmp_path, together=3)  # with fewer it would wait, and the job fail
    outcome = on_ray(f"input.path={corpus}", f"output.path={out}", *VLLM, generator=generator)
    assert (outcome.code, outcome.message) == (0, "")
    assert addresses(out) == [("a.parquet", row) for row in range(IMAGES)]
    assert len({caption for _, _, caption in captions_of(out)}) == IMAGES
    assert starts(tmp_path) == 1


@pytest.mark.slow
def test_an_image_that_kills_its_engine_is_quarantined_and_its_neighbours_are_not(tmp_path, corpus):
    out = tmp_path / "out"
    on_ray(f"input.path={corpus}", f"output.path={out}", *VLLM, generator=fake_async_generator(tmp_path))
    victim = next(row["sha256"] for row in read_rows(out) if row["row"] == 5)
    again = tmp_path / "again"
    generator = fake_async_generator(tmp_path, victim=victim)
    outcome = on_ray(f"input.path={corpus}", f"output.path={again}", *VLLM, generator=generator)
    assert outcome.code == 0
    assert [(row["row"], row["reason"]) for row in read_rows(again, "quarantine")] == [(5, "crash")]
    assert [row for _, row, _ in captions_of(again)] == [row for row in range(IMAGES) if row != 5]


@pytest.mark.slow
def test_an_engine_that_dies_again_and_again_fails_the_job_and_what_was_committed_stays(tmp_path, corpus):
    out = tmp_path / "out"
    generator = fake_async_generator(tmp_path, deadly_after=2)
    limit = ("engine.max_restarts=2", "faults.retries=30", "engine.units_in_flight=1")
    outcome = on_ray(f"input.path={corpus}", f"output.path={out}", *VLLM, *limit, generator=generator)
    assert outcome.code == 1
    assert "processes died one after the other, with no unit finished in between" in outcome.message
    assert outcome.message.endswith("everything committed is kept")
    assert len(addresses(out)) == 4
    assert starts(tmp_path) < 30  # of the 31 tries that each unit had
    outcome = on_ray(f"input.path={corpus}", f"output.path={out}", *VLLM, generator=fake_async_generator(tmp_path))
    assert outcome.code == 0
    assert addresses(out) == [("a.parquet", row) for row in range(IMAGES)]
