"""The embedded Ray obeys the process that started it alone: whoever reaches its ports without its token is refused."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

OWNER = """
import sys
import ray
from pipelines.config.keys import Config, RayConfig
from pipelines.run import cluster
cluster._start_embedded(Config(ray=RayConfig(num_cpus=2, object_store_mb=80)), None)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
STRANGER = """
import os, sys
import ray
ray.init(address=sys.argv[1], log_to_driver=False)
print(ray.get(ray.remote(lambda: "obeyed").remote(), timeout=60))
"""


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    home.mkdir(exist_ok=True)
    return kept | {"HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0"} | more


@pytest.mark.slow
@pytest.mark.on_ray
def test_a_stranger_without_the_token_is_refused(tmp_path):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER],
        env=environment(tmp_path / "owner"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert owner.stdin is not None
    assert owner.stdout is not None
    try:
        address = owner.stdout.readline().strip()
        assert ":" in address
        for home, mode, obeyed in (
            ("owner", "token", True),
            ("stranger", "token", False),
            ("stranger", "disabled", False),
        ):
            run = subprocess.run(
                [sys.executable, "-c", STRANGER, address],
                env=environment(tmp_path / home, RAY_AUTH_MODE=mode),
                capture_output=True,
                text=True,
                timeout=120,
            )
            assert ("obeyed" in run.stdout) == obeyed, (home, mode, run.stderr[-500:])
    finally:
        owner.stdin.close()
        owner.wait(60)
