"""What test files share: one embedded Ray for the session, the demo model, small corpora of demo scenes."""

import os

# Before anything imports ray or torch. Without token files in the home folder, without telemetry, without the network,
# and with one thread a process: the stages are processes of their own, and the machine may be small.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import importlib.util
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from demo.corpus import SCHEMA
from demo.language import references
from demo.render import render
from demo.world import scene_at

REPOSITORY = Path(__file__).resolve().parent.parent

# Their own environment has vLLM (`make test-vllm`). Without it, this very folder would be found under that name.
found = importlib.util.find_spec("vllm")
collect_ignore = [] if found and found.origin else ["vllm"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--every-family", action="store_true", help="kill and resume a job of every family, not only of the usual ones"
    )


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Folder of the trained demo checkpoint."""
    return REPOSITORY / "demo" / "checkpoint"


@pytest.fixture(scope="session")
def scene_pixels() -> np.ndarray:
    """The first six held-out demo scenes as uint8 [6, 224, 224, 3]."""
    return np.stack([render(scene_at("corpus", index)).pixels for index in range(6)])


@pytest.fixture(scope="session")
def scene_png() -> Callable[[int], bytes]:
    """Bytes of the PNG of a held-out demo scene, by its number; drawn once a session."""
    drawn: dict[int, bytes] = {}

    def png(index: int) -> bytes:
        if index not in drawn:
            pixels = render(scene_at("corpus", index)).pixels
            Image.fromarray(pixels).save(stream := io.BytesIO(), "PNG", compress_level=1)
            drawn[index] = stream.getvalue()
        return drawn[index]

    return png


@pytest.fixture(scope="session")
def scene_parquet(scene_png) -> Callable[..., Path]:
    """`scene_parquet(path, n, row_group_size=16, start=0)` writes scenes [start, start + n) as the demo does.

    Hugging Face image structs, ids `scene-0000000` ..., four references a row. Returns the path; makes its folder.
    """

    def write(path: Path, n: int, *, row_group_size: int = 16, start: int = 0) -> Path:
        rows = [scene_row(index, scene_png(index)) for index in range(start, start + n)]
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows, SCHEMA), path, row_group_size=row_group_size)
        return path

    return write


def scene_row(index: int, png: bytes) -> dict:
    scene = scene_at("corpus", index)
    name = f"scene-{index:07d}"
    return {
        "id": name,
        "image": {"bytes": png, "path": f"{name}.png"},
        "references": references(scene),
        "questions": [],
        "scene": json.dumps(scene.to_dict()),
    }


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """An embedded Ray that jobs in this process join (`connected`); started once, on first use.

    Ray gives itself 30 s to start, which a busy machine may exceed: three attempts, as the job itself makes them.
    """
    import ray

    for attempts_left in (2, 1, 0):
        try:
            ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
            break
        except Exception as error:
            if "timed out during startup" not in str(error) or not attempts_left:
                raise
    yield
    ray.shutdown()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Marks the tests on Ray, which `make test` runs in one process, after all others.

    Two embedded Rays on two cores take the processors from each other: each test would last three times as long.
    """
    if "ray_session" in getattr(item, "fixturenames", ()):
        item.add_marker(pytest.mark.on_ray)
