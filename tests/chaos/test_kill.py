"""A driver killed at random moments, and resumed: nothing lost, nothing twice, the same captions. Locally and on S3."""

import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import QUICK, Driver, addresses, captions_of, s3_server, write_corpus

from jobs.verify import main as verify
from pipelines.storage import Store

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]  # five drivers in a row, each with its own Ray

ROWS, UNIT = 64, 4
KILLS = 3


@pytest.fixture(scope="module", params=["local", "s3"])
def places(request, tmp_path_factory, scene_png: Callable[[int], bytes]) -> Iterator[tuple[list[str], Callable]]:
    """Arguments that name a corpus of 64 rows, three of them broken, and a function that names an output."""
    folder = tmp_path_factory.mktemp(request.param)
    images: list[bytes | None] = [scene_png(i % 16) for i in range(ROWS)]
    images[5], images[30], images[31] = None, b"", b"not an image"
    file = write_corpus(folder / "in" / "a.parquet", images, rows_per_group=16)
    common = [*QUICK, f"unit.images={UNIT}", "generate.batch_size=1"]  # slowly, so that there is time to kill it
    if request.param == "local":
        yield (
            [*common, f"input.path={file}"],
            lambda name: ([f"output.path={folder / name}"], Store(str(folder / name))),
        )
        return
    with s3_server("images", "captions") as address:
        Store("s3://images", address).write("corpus/a.parquet", Path(file).read_bytes())
        yield (
            [*common, "input.path=s3://images/corpus", f"input.endpoint_url={address}"],
            lambda name: (
                [f"output.path=s3://captions/{name}", f"output.endpoint_url={address}"],
                Store(f"s3://captions/{name}", address),
            ),
        )


def test_a_driver_killed_three_times_ends_with_the_captions_of_one_that_was_not(places, tmp_path):
    arguments, output_at = places
    whole_arguments, whole = output_at("whole")
    with Driver(tmp_path / "whole.log", *arguments, *whole_arguments) as driver:
        assert driver.wait() == 0, driver.text()

    killed_arguments, killed = output_at("killed")
    moments = random.Random(7)
    for kill in range(KILLS):
        with Driver(tmp_path / f"{kill}.log", *arguments, *killed_arguments) as driver:
            done = len(killed.list("captions"))
            driver.wait_for_commits(killed, done + moments.randint(1, 3))
            if kill == 1:  # the driver alone: Ray has to notice and end the actors that could still write
                driver.process.kill()
                wait_until_nothing_can_write(driver)
            else:
                driver.kill()
        assert len(killed.list("captions")) < ROWS // UNIT, "nothing was left to resume"
    with Driver(tmp_path / "last.log", *arguments, *killed_arguments) as driver:
        assert driver.wait() == 0, driver.text()

    assert addresses(killed) == [("a.parquet", row) for row in range(ROWS)]
    assert captions_of(killed) == captions_of(whole)
    assert len(captions_of(killed)) == ROWS - 3
    assert verify([*arguments, *killed_arguments]) == 0


def wait_until_nothing_can_write(driver: Driver) -> None:
    """Ray's agents outlive a killed driver by minutes; its workers must not."""
    end = time.monotonic() + 60
    while any(process.name().startswith("ray::Map") for process in driver.members()):
        assert time.monotonic() < end, driver.members()
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_driver_that_is_asked_to_stop_exits_130_and_is_resumed(number, tmp_path, scene_png):
    corpus = write_corpus(tmp_path / "in" / "a.parquet", [scene_png(i % 16) for i in range(32)], rows_per_group=8)
    output = Store(str(tmp_path / "out"))
    arguments = [*QUICK, f"input.path={corpus}", f"output.path={output.path}", "unit.images=2", "generate.batch_size=1"]
    with Driver(tmp_path / "stopped.log", *arguments) as driver:
        driver.wait_for_commits(output, 1)
        driver.process.send_signal(number)
        assert driver.wait() == 130, driver.text()
        assert "resumes" in driver.text()
    assert 1 <= len(output.list("captions")) < 16
    with Driver(tmp_path / "resumed.log", *arguments) as driver:
        assert driver.wait() == 0, driver.text()
    assert addresses(output) == [("a.parquet", row) for row in range(32)]
