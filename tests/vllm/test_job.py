"""The whole job with vLLM: killed, resumed, its engine killed, and still every caption once and word for word."""

import contextlib
import time
from pathlib import Path

import psutil
import pytest

from pipelines.stages.unit_batch import UnitBatch
from pipelines.store import Store
from tests.helpers import DEMO, Driver, addresses, captions_of
from tests.vllm.engines_on_demo import SMALL, answers, kept, unit

IMAGES = 64
SLOW = ("engine.kwargs.max_num_seqs=2", "engine.units_in_flight=2", "unit.images=2")
PLAIN = ("mlflow.enabled=false", "run.samples=0", "faults.no_progress_seconds=400")


@pytest.mark.timeout(2400)
def test_killed_resumed_and_with_its_engine_killed_it_says_what_transformers_says(
    tmp_path: Path, scene_parquet, encoded, transformers_engine
):
    corpus, out = scene_parquet(tmp_path / "in" / "a.parquet", IMAGES), tmp_path / "out"
    arguments = (*DEMO, *SMALL, *SLOW, *PLAIN, f"input.path={corpus}", f"output.path={out}")
    store = Store(str(out))
    with Driver(tmp_path / "first.log", *arguments) as driver:
        driver.wait_for_commits(store, 3, 800)
        engine = engine_of(driver)
        driver.kill(everything=False)
        engine.wait(60)  # nobody else ends it
    committed = len(store.list("captions"))
    assert 3 <= committed < IMAGES // 2
    with Driver(tmp_path / "second.log", *arguments) as driver:
        driver.wait_for_commits(store, committed + 3, 800)
        engine_of(driver).kill()
        assert driver.wait(800) == 0, driver.text()
    assert addresses(store) == [("a.parquet", row) for row in range(IMAGES)]
    unit_batch = UnitBatch.from_row(transformers_engine(unit(kept(encoded(range(IMAGES)), 0.098)).to_row()))
    expected = [("a.parquet", row, done[0].caption) for row, done in enumerate(answers(unit_batch))]
    assert captions_of(store) == expected


@pytest.mark.timeout(900)
def test_an_engine_that_cannot_start_fails_the_job_at_once(tmp_path: Path, scene_parquet):
    corpus = scene_parquet(tmp_path / "in" / "a.parquet", 4)
    arguments = (*DEMO, *SMALL, *PLAIN, f"input.path={corpus}", f"output.path={tmp_path / 'out'}")
    with Driver(tmp_path / "log", *arguments, "engine.kwargs.dtype=nonsense") as driver:
        assert driver.wait(800) == 1, driver.text()
    assert "nonsense" in driver.text()


def engine_of(driver: Driver, seconds: float = 30) -> psutil.Process:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:  # on a busy machine a look at a process may fail, or miss it
        for process in driver.members():
            with contextlib.suppress(psutil.Error):
                if "EngineCore" in process.name() + " ".join(process.cmdline()):
                    return process
        time.sleep(0.2)
    raise AssertionError(f"no engine among {driver.members()}")
