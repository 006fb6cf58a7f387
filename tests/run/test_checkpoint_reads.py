"""A job reads its checkpoint's configuration once, its tokenizer besides, and a progress point reads nothing."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from otprune.models import check_weights, prompts, read_checkpoint
from pipelines.config.load import load_config
from pipelines.output.totals import Totals
from pipelines.run import pruning
from pipelines.run.job import Job, prepare
from pipelines.run.metrics import prefill_tflops
from pipelines.run.stages import make_stages
from tests.helpers import DEMO


class Opened:
    """Files that this process opens, while it is told to look."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.looks = False
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple) -> None:
        if self.looks and event == "open" and isinstance(arguments[0], str):
            self.paths.append(arguments[0])


@pytest.fixture(scope="module")
def hook() -> Opened:
    return Opened()  # Python has no way to take an audit hook off again


@pytest.fixture
def opened(hook) -> Iterator[list[str]]:
    hook.paths.clear()
    hook.looks = True
    yield hook.paths
    hook.looks = False


@pytest.fixture
def prepared(tmp_path: Path, scene_parquet, demo_model, monkeypatch) -> Callable[..., Job]:
    corpus = scene_parquet(tmp_path / "in" / "a.parquet", 4)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 4.0})
    check_weights(read_checkpoint(str(demo_model)))  # once a process, so it is no part of what is counted

    def make(*arguments: str) -> Job:
        paths = (f"input.path={corpus}", f"output.path={tmp_path / 'out'}")
        return prepare(load_config([*DEMO, *paths, *arguments]))

    return make


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("prune.method=fastv",),
        ("prune.method=m3", "prune.settings.grid=4"),
        ("engine.name=vllm", "prune.method=none", "ray.address=ray://head:10001"),  # which may have vLLM
    ],
)
def test_the_configuration_is_opened_once_on_the_way_to_the_stages_and_by_the_tokenizer(
    prepared, opened, demo_model, arguments
):
    pruning.count_text.cache_clear()
    pruning.prompter_of.cache_clear()
    make_stages(prepared(*arguments))
    of_job = opened.count(str(demo_model / "config.json"))
    opened.clear()
    prompts.AutoTokenizer.from_pretrained(demo_model)
    assert of_job == 1 + opened.count(str(demo_model / "config.json"))


@pytest.mark.parametrize("method", ["otprune", "fastv"])
def test_a_progress_point_opens_no_file_of_the_checkpoint(prepared, opened, demo_model, method):
    job = prepared(f"prune.method={method}")
    opened.clear()
    assert prefill_tflops(job, Totals()) > 0
    assert not [path for path in opened if path.startswith(str(demo_model))]
