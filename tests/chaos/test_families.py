"""A job of a family, killed in its middle and resumed, has the rows of one that nobody disturbed, each exactly once.

Three families by default, which stand for pictures of free size, with DeepStack, and in tiles with labels. All of them:

    .venv/bin/python -m pytest -m slow tests/chaos/test_families.py --every-family -s
"""

from pathlib import Path

import pytest

from jobs.caption_corpus import main
from tests.chaos.families import arguments_of, killed_and_resumed, rows_of, write_photographs
from tests.tiny import MAKERS

pytestmark = [pytest.mark.slow, pytest.mark.chaos, pytest.mark.timeout(900)]

USUAL = ("qwen3_vl", "internvl", "smolvlm")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("family", MAKERS if metafunc.config.getoption("--every-family") else USUAL)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photographs(tmp_path_factory.mktemp("in") / "a.parquet")


def test_a_job_of_the_family_is_killed_and_resumed(family: str, corpus: Path, tmp_path: Path):
    model = MAKERS[family](tmp_path / "model")
    assert main(arguments_of(model, corpus, tmp_path / "whole")) == 0
    shown = killed_and_resumed(model, corpus, tmp_path / "out")
    assert shown.rows == rows_of(tmp_path / "whole")
    assert len({row["caption"] for row in shown.rows}) > 12, "captions tell the pictures apart"
    print(f"\n{family}, transformers: {shown}")
