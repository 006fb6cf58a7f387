"""The watch of Ray's head: it interrupts a run whose head is gone, and leaves one alone whose head comes back."""

import socket
import time

import pytest

from pipelines.run.signals import HeadWatch, answers, interruptible


@pytest.fixture
def head():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def test_a_head_that_is_gone_interrupts_the_main_thread(head, caplog):
    address, said = head.getsockname(), []
    with interruptible(), HeadWatch(address, said.append, seconds=0.2, every=0.05, grace=0.3) as watch:
        time.sleep(0.3)
        assert answers(address)
        head.close()
        with pytest.raises(KeyboardInterrupt):
            time.sleep(60)
        assert said == []
        deadline = time.monotonic() + 60
        while not said and time.monotonic() < deadline:  # as a main thread that does not heed the interrupt
            time.sleep(0.05)
    assert watch.lost.startswith("Ray's head is lost: it has not answered for ")
    assert said == [watch.lost]
    assert [text.partition(" since")[0] for text in caplog.messages] == ["Ray's head does not answer; waiting"]


def test_a_head_that_comes_back_in_time_interrupts_nothing(head):
    address = head.getsockname()
    with interruptible(), HeadWatch(address, print, seconds=60, every=0.02) as watch:
        head.close()
        time.sleep(0.2)
        with socket.create_server(address):
            time.sleep(0.2)
    assert watch.lost == ""


def test_without_a_head_nothing_is_watched():
    with HeadWatch(None, print, seconds=0.0, every=0.01) as watch:
        time.sleep(0.05)
    assert watch.lost == ""
    assert answers(None)
