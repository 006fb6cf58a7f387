"""The whole job on the same pictures in different containers: same captions, and nothing lost when it is resumed."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from demo.language import CAPTION_PROMPT
from jobs.caption_corpus import main
from jobs.verify import main as verify
from pipelines.errors import UserError
from tests.corpus.test_tar import shard
from tests.helpers import LOCAL, read_rows, run_fake, write_corpus

NUMBERS = range(6)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory, scene_png) -> dict[str, Path]:
    """The same six pictures as folders of files, Parquet, tar shards, a dataset folder and Arrow."""
    root = tmp_path_factory.mktemp("corpora")
    pictures = [scene_png(n) for n in NUMBERS]
    write_corpus(root / "parquet" / "a.parquet", pictures, rows_per_group=4)
    shard(root / "tar" / "0.tar", [(f"{n}.png", pictures[n]) for n in range(4)])
    shard(root / "tar" / "1.tar.gz", [(f"{n}.png", pictures[n]) for n in range(4, 6)], mode="w:gz")
    for folder in ("images", "imagefolder"):
        (root / folder).mkdir()
        for n in NUMBERS:
            (root / folder / f"{n}.png").write_bytes(pictures[n])
    (root / "imagefolder" / "metadata.csv").write_text("file_name\n" + "".join(f"{n}.png\n" for n in NUMBERS))
    (root / "arrow").mkdir()
    table = pa.table({"image": pictures})
    with pa.ipc.new_stream(root / "arrow" / "data.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return {name: root / name for name in ("parquet", "tar", "images", "imagefolder", "arrow")}


def test_every_format_gives_the_same_pictures_to_the_models(corpora, tmp_path):
    captions = {}
    for name, path in corpora.items():
        assert run_fake(f"input.path={path}", f"output.path={tmp_path / name}", "input.cache=null").code == 0
        captions[name] = sorted((row["sha256"], row["caption"]) for row in read_rows(tmp_path / name))
    assert len({sha256 for sha256, _ in captions["tar"]}) == len(NUMBERS)
    assert all(found == captions["tar"] for found in captions.values())


@pytest.mark.slow
def test_the_same_pictures_have_the_same_captions_in_every_format(corpora, tmp_path, demo_model, capsys):
    captions = {}
    for name, path in corpora.items():
        arguments = [LOCAL, "mlflow.enabled=false", "input.cache=null", f"input.path={path}", "run.samples=0"]
        arguments += [f"output.path={tmp_path / name}", f"model.path={demo_model}", f"prompt.template={CAPTION_PROMPT}"]
        assert main(arguments) == 0
        assert verify(arguments[2:4] + arguments[5:6]) == 0
        captions[name] = sorted((row["sha256"], row["caption"]) for row in read_rows(tmp_path / name))
    capsys.readouterr()
    assert len({sha256 for sha256, _ in captions["tar"]}) == len(NUMBERS)
    assert all(found == captions["tar"] for found in captions.values())


def test_shards_are_resumed_row_by_row_and_what_is_left_out_stands_in_run_json(corpora, tmp_path):
    arguments = [f"input.path={corpora['tar']}", f"output.path={tmp_path}/out", f"input.cache={tmp_path}/cache"]
    assert run_fake(*arguments, "unit.images=1", "input.limit=3").code == 0
    assert run_fake(*arguments, "unit.images=2").code == 0
    assert sorted(row["id"] for row in read_rows(tmp_path / "out")) == [str(n) for n in NUMBERS]
    (corpora["tar"] / "notes.txt").write_text("x")
    assert run_fake(*arguments[::2], f"output.path={tmp_path}/second").code == 0
    assert json.loads((tmp_path / "second" / "run.json").read_bytes())["left_out"] == {"files of no known kind": 1}


@pytest.mark.parametrize("allowed", [0.5, 1])
def test_a_run_that_rejects_most_of_its_images_stops_and_says_why(tmp_path, scene_png, allowed):
    write_corpus(tmp_path / "in" / "a.parquet", [None] * 290 + [scene_png(0)] * 10, rows_per_group=10)
    arguments = [f"input.path={tmp_path}/in", f"output.path={tmp_path}/out", f"faults.max_rejected={allowed}"]
    outcome = run_fake(*arguments, "unit.images=10")
    if allowed == 1:
        assert (outcome.code, len(read_rows(tmp_path / "out"))) == (0, 10)
        return
    assert outcome.code == 1
    assert "260 of 260 images are quarantined, more than faults.max_rejected=0.5" in outcome.message
    assert "with the reason missing, for example a.parquet row 0" in outcome.message
    assert len(read_rows(tmp_path / "out", "quarantine")) == 260
    assert run_fake(*arguments, "unit.images=10").code == 0  # the rest is less than a verdict needs
    assert len(read_rows(tmp_path / "out", "quarantine")) == 290
    assert len(read_rows(tmp_path / "out")) == 10
    again = run_fake(*arguments, "faults.redo=[missing]")
    assert (again.code, "with the reason missing, for example a.parquet row 0" in again.message) == (1, True)


def test_a_run_that_captions_nothing_fails_unless_its_images_are_a_handful(tmp_path):
    for number, code in ((8, 1), (7, 0)):
        write_corpus(tmp_path / f"{number}" / "a.parquet", [None] * number)
        outcome = run_fake(f"input.path={tmp_path}/{number}", f"output.path={tmp_path}/out{number}")
        assert outcome.code == code
        assert outcome.message.startswith("8 of 8 images are quarantined, " if code else "")


def test_the_output_is_not_the_folder_of_the_input(tmp_path, scene_png):
    (tmp_path / "0.png").write_bytes(scene_png(0))
    with pytest.raises(UserError, match=r"output\.path must be another folder than input\.path"):
        run_fake(f"input.path={tmp_path}", f"output.path={tmp_path}/")
