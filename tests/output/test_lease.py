"""One output, one writer: who may take an output, and what a driver notices whose output was taken."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest

from pipelines.errors import UserError
from pipelines.output.lease import LOST_AFTER, Holder, Lease, machine, other_holder, release_all, take_lease
from pipelines.store import Store
from tests.helpers import s3_server

DEAD = 2**22 + 1  # above the largest process id of Linux
ELSEWHERE = Holder("a", "other", "another machine", 1, "2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z", 3, 0.2)


@pytest.fixture
def output(tmp_path) -> Iterator[Store]:
    yield Store(str(tmp_path / "out"))
    release_all()


def leave(output: Store, holder: Holder, age: float = 0.0, term: int = 7) -> str:
    """A lease that another driver wrote `age` seconds ago."""
    name = f"driver/{term:06d}.json"
    output.write(name, json.dumps(asdict(holder)).encode())
    os.utime(output.join(name), (time.time() - age,) * 2)
    return name


def held(output: Store) -> dict:
    [name] = output.list("driver")
    return json.loads(output.read(f"driver/{name}"))


def test_an_output_is_held_until_it_is_released(output):
    lease = take_lease(output)
    content = held(output)
    assert (content["host"], content["pid"], content["released"]) == (socket.gethostname(), os.getpid(), False)
    assert take_lease(output) is lease  # a process is one writer
    assert other_holder(output) is None
    lease.release()
    assert held(output)["released"] is True
    assert take_lease(output) is not lease
    assert list(output.list("driver")) == ["000002.json"]


def test_a_living_driver_of_this_machine_is_not_disturbed(output):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        leave(output, replace(ELSEWHERE, machine=machine(), pid=other.pid))
        began = time.monotonic()
        with pytest.raises(UserError, match=rf"another driver, process {other.pid} on other, since 2026-\S+: wait for"):
            take_lease(output)
        assert time.monotonic() - began < 5
        assert other_holder(output) is not None
        other.communicate(b"\n")


def test_a_killed_driver_of_this_machine_is_replaced_at_once(output):
    leave(output, replace(ELSEWHERE, machine=machine(), pid=DEAD))
    assert other_holder(output) is None
    began = time.monotonic()
    assert take_lease(output).term == 8
    assert time.monotonic() - began < 5


def test_a_killed_driver_of_another_machine_is_replaced_when_its_lease_is_old(output):
    leave(output, ELSEWHERE, age=LOST_AFTER + 5)
    assert take_lease(output).term == 8
    release_all()
    leave(output, ELSEWHERE, age=LOST_AFTER - 1, term=9)
    began = time.monotonic()
    assert take_lease(output).term == 10
    assert 0.5 < time.monotonic() - began < 10


def test_a_driver_of_another_machine_that_beats_is_not_disturbed(output):
    """Neither clock counts: its own says another year."""
    leave(output, ELSEWHERE, age=5)
    beat = threading.Timer(0.5, lambda: leave(output, replace(ELSEWHERE, beat=4)))
    beat.start()
    with pytest.raises(UserError, match="another driver, process 1 on other"):
        take_lease(output)
    beat.join()


def test_of_writers_that_create_an_object_at_once_one_succeeds(output):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda i: output.create("x", b"%d" % i), range(8)))
    assert sum(made) == 1
    assert output.read("x") == b"%d" % made.index(True)
    assert list(output.list("")) == ["x"]


@pytest.mark.slow
def test_of_drivers_that_start_at_once_one_gets_the_output(tmp_path):
    """Each in a process of its own, over what a dead one left."""
    output = Store(str(tmp_path / "out"))
    code = (
        "import sys, time; from pipelines.output.lease import take_lease; from pipelines.store import Store\n"
        "input()\ntry: take_lease(Store(sys.argv[1])); print('held', flush=True)\n"
        "except Exception as error: print(type(error).__name__, flush=True)\n"
        "input()"
    )
    leave(output, replace(ELSEWHERE, machine=machine(), pid=DEAD))
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    drivers = [subprocess.Popen([sys.executable, "-c", code, output.path], **pipes) for _ in range(4)]
    for driver in drivers:
        assert driver.stdin is not None
        driver.stdin.write("\n")
        driver.stdin.flush()
    with ThreadPoolExecutor(len(drivers)) as pool:
        answers = list(pool.map(lambda driver: driver.stdout.readline().strip(), drivers))
    for driver in drivers:
        driver.communicate("\n")
    assert sorted(answers) == ["UserError"] * 3 + ["held"]


def test_a_driver_that_lost_its_output_knows_and_leaves_it_alone(output):
    here = replace(ELSEWHERE, machine=machine(), pid=os.getpid(), every=0.05)
    lease = Lease(output, 1, here)
    until(lambda: output.list("driver") and held(output)["beat"] > here.beat)
    leave(output, replace(ELSEWHERE, owner="b"), term=2)
    until(lambda: lease.lost)
    assert "taken over by another driver, process 1 on other" in lease.lost
    lease.release()
    assert json.loads(output.read("driver/000002.json"))["released"] is False


def test_a_store_that_fails_for_a_while_does_not_lose_the_output(output, tmp_path):
    lease = Lease(output, 1, replace(ELSEWHERE, every=0.05))
    until(lambda: output.list("driver"))
    (tmp_path / "out" / "driver").rename(tmp_path / "aside")
    (tmp_path / "out" / "driver").write_bytes(b"")  # nothing can be written below a file
    time.sleep(0.3)
    (tmp_path / "out" / "driver").unlink()
    (tmp_path / "aside").rename(tmp_path / "out" / "driver")
    beat = held(output)["beat"]
    until(lambda: held(output)["beat"] > beat)
    assert not lease.lost
    lease.release()


def test_what_is_no_lease_holds_nothing(output):
    output.write("driver/000003.json", b"[]")
    output.write("driver/notes.txt", b"")
    assert take_lease(output).term == 4
    assert sorted(output.list("driver")) == ["000004.json", "notes.txt"]


@pytest.mark.slow
def test_an_object_store_gives_the_output_to_one_driver():
    """Its conditional PUT decides, and its own times tell the age of a lease."""
    with s3_server("out") as address:
        store = Store("s3://out/a", address)
        assert store.create("x", b"1") is True
        assert store.create("x", b"2") is False
        assert store.read("x") == b"1"
        store.write("driver/000007.json", json.dumps(asdict(ELSEWHERE)).encode())
        beat = threading.Timer(
            0.5, lambda: store.write("driver/000007.json", json.dumps(asdict(replace(ELSEWHERE, beat=4))).encode())
        )
        beat.start()
        with pytest.raises(UserError, match="another driver"):
            take_lease(store)
        beat.join()
        store.write("driver/000007.json", json.dumps(asdict(replace(ELSEWHERE, released=True))).encode())
        assert take_lease(store).term == 8
        release_all()
        assert json.loads(store.read("driver/000008.json"))["released"] is True


def until(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
