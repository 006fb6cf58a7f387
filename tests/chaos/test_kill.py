"""A driver killed at random moments, and resumed: nothing lost, nothing twice, the same captions. Locally and on S3.

Drivers that are to be killed are processes with a Ray of their own; the runs beside them share the session's.
"""

import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from jobs.caption_corpus import main
from jobs.verify import main as verify
from pipelines.store import Store
from tests.helpers import QUICK, Driver, addresses, captions_of, s3_server, write_corpus

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.usefixtures("ray_session"), pytest.mark.timeout(900)]

ROWS, BROKEN = 60, (5, 30, 31)
UNITS = 32  # three row groups of 16 rows and one of 12, two rows a unit
SLOWLY = (*QUICK, "unit.images=2", "generate.batch_size=1", "generate.max_new_tokens=24")  # so that it can be hit


@dataclass(frozen=True)
class Place:
    """A corpus, and an output of its own."""

    arguments: list[str]
    output: Store


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, scene_png: Callable[[int], bytes]) -> Path:
    """60 rows, three of them broken, in row groups of several units."""
    images: list[bytes | None] = [scene_png(i) for i in range(ROWS)]
    for row, broken in zip(BROKEN, (None, b"", b"this is no image"), strict=True):
        images[row] = broken
    return write_corpus(tmp_path_factory.mktemp("corpus") / "a.parquet", images, rows_per_group=16)


@pytest.fixture(scope="module")
def in_one_go(corpus: Path, tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> list[tuple[str, int, str]]:
    """(source, row, caption) of a run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert main([*SLOWLY, f"input.path={corpus}", f"output.path={out}"]) == 0
    captions = captions_of(out)
    assert [row for _, row, _ in captions] == [row for row in range(ROWS) if row not in BROKEN]
    return captions


@pytest.fixture(params=[pytest.param("local", marks=pytest.mark.long), "s3"])
def place(request: pytest.FixtureRequest, corpus: Path, tmp_path: Path) -> Iterator[Place]:
    if request.param == "local":
        yield Place([f"input.path={corpus}", f"output.path={tmp_path / 'out'}"], Store(str(tmp_path / "out")))
        return
    with s3_server("images", "captions") as address:
        Store("s3://images", address).write("corpus/a.parquet", corpus.read_bytes())
        arguments = [f"input.endpoint_url={address}", f"output.endpoint_url={address}"]
        arguments += ["input.path=s3://images/corpus", "output.path=s3://captions/out"]
        yield Place(arguments, Store("s3://captions/out", address))


def test_a_driver_killed_twice_ends_with_the_captions_of_one_that_was_not(place, in_one_go, tmp_path):
    """Each driver commits something before it is killed, in the middle of whatever it is doing then."""
    moments = random.Random(7)
    for kill in range(2):
        before = len(place.output.list("captions"))
        with Driver(tmp_path / f"{kill}.log", *SLOWLY, *place.arguments) as driver:
            driver.wait_for_commits(place.output, before + moments.randint(1, 4))
            time.sleep(moments.uniform(0, 0.3))
            driver.kill(everything=kill == 0)  # then the driver alone, whose actors have to end by themselves
        assert len(place.output.list("captions")) < UNITS, "nothing was left to resume"
        assert not place.output.exists("run.json")
    assert main([*SLOWLY, *place.arguments]) == 0
    assert captions_of(place.output) == in_one_go
    assert addresses(place.output) == [("a.parquet", row) for row in range(ROWS)]
    assert verify(place.arguments) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_a_driver_that_is_asked_to_stop_exits_130_and_is_resumed(number, corpus, in_one_go, tmp_path):
    output = Store(str(tmp_path / "out"))
    arguments = [*SLOWLY, f"input.path={corpus}", f"output.path={output.path}"]
    with Driver(tmp_path / "stopped.log", *arguments) as driver:
        driver.wait_for_commits(output, 1)
        driver.process.send_signal(number)
        assert driver.wait() == 130, driver.text()
        assert "interrupted; the same command resumes" in driver.text()
        # A signal may meet a destructor of Ray's, which Python reports and ignores; there is no other traceback.
        *before_each, _ = driver.text().split("Traceback (most recent call last)")
        assert all(text.rstrip().splitlines()[-1].startswith("Exception ignored in") for text in before_each)
    assert 1 <= len(output.list("captions")) < UNITS
    assert output.exists("run.json")
    assert main(arguments) == 0
    assert captions_of(output) == in_one_go
    assert addresses(output) == [("a.parquet", row) for row in range(ROWS)]
