"""The job as users start it on a cluster: `ray start --head`, then `ray job submit`, without and with token auth."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import addresses

REPOSITORY = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")
SECONDS = 120.0

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]


def free_ports(number: int) -> list[int]:
    """Different ports that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@contextlib.contextmanager
def head(folder: Path, environment: dict[str, str]) -> Iterator[tuple[str, str]]:
    """A head node of its own session and ports, which alone is ended; yields the addresses of dashboard and metrics."""
    names = ("port", "dashboard-port", "ray-client-server-port", "dashboard-agent-listen-port", "metrics-export-port")
    ports = dict(zip(names, free_ports(len(names)), strict=True))
    command = [str(RAY), "start", "--head", "--block", "--num-cpus=4", "--node-ip-address=127.0.0.1"]
    command += [f"--temp-dir={folder}", *(f"--{name}={port}" for name, port in ports.items())]
    with (folder / "head.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{ports['dashboard-port']}"
    try:
        wait_until_up(address, process, folder / "head.log")
        yield address, f"http://127.0.0.1:{ports['metrics-export-port']}/metrics"
    finally:
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_until_up(address: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/api/version", timeout=5).close()
            return
        except urllib.error.HTTPError:  # it answers; with token authentication it says 401 to us
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the head did not come up: {log.read_text()[-2000:]}")


def gauge_names(metrics: str) -> set[str]:
    """This package's gauges among what Prometheus would be told now."""
    try:
        with urllib.request.urlopen(metrics, timeout=5) as answer:
            lines = answer.read().decode().splitlines()
    except OSError:  # the agent is not up yet
        return set()
    return {line.partition("{")[0] for line in lines if line.startswith("ray_otprune_")}


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Ray's sockets need a short path."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="ray") as folder:
        yield Path(folder)


@pytest.mark.slow
@pytest.mark.parametrize("auth", ["token", pytest.param("disabled", marks=pytest.mark.long)])
def test_a_submitted_job_captions_its_corpus(auth, short_folder, tmp_path, scene_parquet):
    corpus = scene_parquet(tmp_path / "in" / "a.parquet", 8)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONPATH"}
    environment |= {"RAY_AUTH_MODE": auth, "RAY_USAGE_STATS_ENABLED": "0", "RAY_metrics_report_interval_ms": "500"}
    if auth == "token":
        token = tmp_path / "token"
        token.write_text("0123456789abcdef" * 4)
        environment["RAY_AUTH_TOKEN_PATH"] = str(token)
    job = [f"input.path={corpus}", f"output.path={tmp_path / 'out'}", "unit.images=4", "generate.max_new_tokens=8"]
    job += ["mlflow.enabled=false", "cost.usd_per_hour=1", "run.heartbeat_seconds=0.5"]
    log, gauges = tmp_path / "submit.log", set()
    with head(short_folder, environment) as (address, metrics):
        submit = [str(RAY), "job", "submit", f"--address={address}", "--working-dir=.", "--"]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                [*submit, sys.executable, "jobs/caption_corpus.py", *job],
                cwd=REPOSITORY,
                env=environment,
                stdout=stream,
                stderr=stream,
            )
        deadline = time.monotonic() + SECONDS
        while process.poll() is None and time.monotonic() < deadline:
            gauges |= gauge_names(metrics)
            time.sleep(0.5)
        process.kill()
        process.wait()
        if auth == "token":
            strangers = {k: v for k, v in environment.items() if k != "RAY_AUTH_TOKEN_PATH"} | {"HOME": str(tmp_path)}
            refused = subprocess.run(
                [str(RAY), "job", "list", f"--address={address}"], env=strangers, capture_output=True, timeout=SECONDS
            )
            assert refused.returncode != 0
    said = log.read_text()
    assert process.returncode == 0, said[-5000:]
    assert "8 captioned" in said
    assert "Ray cluster" in said
    assert {"ray_otprune_usd", "ray_otprune_done", "ray_otprune_images_per_second"} <= gauges
    assert addresses(tmp_path / "out") == [("a.parquet", row) for row in range(8)]
