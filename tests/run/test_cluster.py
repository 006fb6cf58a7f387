"""An embedded Ray that does not come up in time, as on a machine that others keep busy."""

from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.config.keys import Config
from pipelines.errors import UserError
from pipelines.run import cluster
from pipelines.run.outcome import Cluster, read_cluster

SLOW = Exception("The current node timed out during startup. This could happen because ...")


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `_start` with a Ray that fails with each of the given errors in turn, and then starts; counts attempts."""

    def run(*errors: Exception) -> tuple[Cluster, int]:
        attempts = []

        def init(**_: object) -> SimpleNamespace:
            attempts.append(1)
            if len(attempts) <= len(errors):
                raise errors[len(attempts) - 1]
            return SimpleNamespace(dashboard_url="")

        monkeypatch.setattr(cluster.ray, "init", init)
        monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": 4.0})
        return cluster._start(Config(), None), len(attempts)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    return run


def test_a_ray_that_was_too_slow_is_started_again(start):
    assert start() == (Cluster("embedded", 4, 0), 1)
    assert start(SLOW, SLOW) == (Cluster("embedded", 4, 0), 3)


def test_one_that_never_starts_is_an_error_of_one_line(start):
    with pytest.raises(UserError, match="embedded Ray must start in 3 attempts of 30 s: The current node timed out"):
        start(SLOW, SLOW, SLOW)


def test_another_error_is_not_tried_again(start):
    with pytest.raises(RuntimeError, match="no room"):
        start(RuntimeError("no room on /dev/shm"))


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "No such file or directory", "/nobody/.ray"),
        PermissionError(13, "Permission denied", "/.ray"),
        OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /far"),
    ],
)
def test_a_place_that_ray_cannot_write_to_is_one_line_that_says_what_to_set(start, error):
    """What Ray 2.60 raises in a container without a home, and with a long TMPDIR."""
    with pytest.raises(UserError, match=r"could not start: .*HOME .* RAY_TMPDIR") as caught:
        start(error)
    assert len(str(caught.value).splitlines()) == 1
    assert str(error) in str(caught.value)


def test_a_cluster_is_numbers_in_the_record_and_one_line_for_people():
    found = Cluster("ray://host:10001", 16, 1.5, "http://host:8265")
    assert str(found) == "Ray cluster ray://host:10001: 16 CPUs, 1.5 GPUs, dashboard http://host:8265"
    assert found.machines == "Ray cluster ray://host:10001: 16 CPUs, 1.5 GPUs"
    assert read_cluster(found.to_dict()) == found
    assert [str(Cluster(address, 4, 0)) for address in ("embedded", "joined before", "none")] == [
        "embedded Ray: 4 CPUs, 0 GPUs", "this process's Ray: 4 CPUs, 0 GPUs", "this process: 4 CPUs, 0 GPUs"
    ]  # fmt: skip
    assert read_cluster("embedded Ray: 4 CPUs, 0 GPUs") is read_cluster(None) is None
