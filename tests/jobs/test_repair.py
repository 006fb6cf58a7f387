"""A job whose model loops: killed while it tries captions again, and resumed. No row is lost, none comes twice."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.caption_corpus import main
from jobs.verify import main as verify
from pipelines.store import Store
from tests.helpers import DEMO, addresses, read_rows, write_corpus
from tests.looping import make_looping

IMAGES = 8
PLAIN = ("ray.address=none", "mlflow.enabled=false", "unit.images=2", "generate.max_new_tokens=64")

KILLED = """
import os, signal, sys
from jobs.caption_corpus import main
from pipelines.engines.repair import Ladder

sampling = Ladder.sampling

def killing(ladder, attempt):
    if attempt == 2:  # in the middle of a ladder
        os.kill(os.getpid(), signal.SIGKILL)
    return sampling(ladder, attempt)

Ladder.sampling = killing
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_kill_in_the_middle_of_the_ladder_neither_loses_nor_doubles_a_row(demo_model, scene_png, tmp_path: Path):
    model = make_looping(demo_model, tmp_path / "model", end=0.25)
    corpus = write_corpus(tmp_path / "in" / "a.parquet", [scene_png(i) for i in range(IMAGES)])
    arguments = [*DEMO, *PLAIN, f"model.path={model}", f"input.path={corpus}"]
    assert main([*arguments, f"output.path={tmp_path / 'whole'}"]) == 0
    whole = Store(str(tmp_path / "whole"))

    killed = [*arguments, f"output.path={tmp_path / 'killed'}"]
    done = subprocess.run([sys.executable, "-c", KILLED, *killed], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr
    output = Store(str(tmp_path / "killed"))
    assert not output.exists("run.json")
    assert len(output.list("captions")) < IMAGES // 2

    assert main(killed) == 0
    assert addresses(output) == [("a.parquet", row) for row in range(IMAGES)]
    assert read_rows(output) == read_rows(whole)
    assert verify([f"input.path={corpus}", f"output.path={output.path}"]) == 0

    rows, totals = read_rows(whole), json.loads(whole.read("run.json"))["totals"]
    retried = [row for row in rows if row["num_attempts"] > 1]
    assert totals["retried"] == len(retried) > 0
    assert totals["repaired"] == sum(row["finish_reason"] == "stop" for row in retried) > 0
    assert totals["finished_by_loop"] == sum(row["finish_reason"] == "loop" for row in rows)
    assert totals["retry_tokens"] > 0
    assert "captions repaired" in whole.read("report.html").decode()
