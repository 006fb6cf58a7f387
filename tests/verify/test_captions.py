"""An output that is right is proven so, and each way to be wrong is found. Outputs are written without a cluster."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from jobs.verify import main
from pipelines.output.plan import make_plan
from pipelines.output.unit import Unit, plan_images, unit_key
from tests.helpers import write_corpus
from tests.reading import corpus_at
from tests.verify.outputs import MINE, Output


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Ten rows in one file."""
    return write_corpus(tmp_path / "in" / "a.parquet", [b"x"] * 10, rows_per_group=5)


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output(tmp_path / "out")


@pytest.fixture
def unit(corpus: Path) -> Callable[[int, int], Unit]:
    key = unit_key(corpus_at(corpus).files, MINE)
    return lambda start, stop: Unit(key, start, stop, ("a.parquet",))


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    def run(*more: str) -> tuple[int, str]:
        code = main([f"input.path={tmp_path / 'in'}", f"output.path={tmp_path / 'out'}", *more])
        return code, capsys.readouterr().out

    return run


def test_a_whole_output_is_proven_and_counted(output, unit, check):
    output.commit(unit(0, 4), rejected=(1, 2))
    output.commit(unit(4, 10))
    code, text = check()
    assert code == 0
    assert "10 rows" in text
    assert "8 images, 16 captions in 2 parts" in text
    assert "2 images (missing 2)" in text


def test_rows_without_output_are_named(output, unit, check):
    output.commit(unit(0, 4))
    output.commit(unit(6, 8))
    code, text = check()
    assert code == 1
    assert "a.parquet: rows 4 to 5 have no output" in text
    assert "a.parquet: rows 8 to 9 have no output" in text
    assert "2 differences" in text


def test_a_limited_run_is_whole_up_to_its_limit(output, unit, check):
    output.commit(unit(0, 4))
    assert check("input.limit=4")[0] == 0
    assert check("input.limit=5")[0] == 1
    output.commit(unit(4, 10))
    assert check("input.limit=4")[0] == 0, "more than the limit asks for is no fault"


def test_overlapping_objects_are_found(output, unit, check):
    output.commit(unit(0, 6))
    output.commit(unit(4, 10))
    code, text = check()
    assert code == 1
    assert "rows 4 to 5 are in two parts" in text


def test_a_row_both_captioned_and_quarantined_is_found(output, unit, check):
    name = output.commit(unit(0, 10), rejected=(3,))
    rejected = output.store.read(f"quarantine/{name}")
    output.commit(unit(0, 10))
    output.store.write(f"quarantine/{name}", rejected)
    code, text = check()
    assert code == 1
    assert f"captions/{name} (a.parquet, rows 0 to 9): a.parquet row 3: 2 of 2 captions, 1 quarantine rows" in text


def test_a_row_with_one_of_two_prompts_is_found(output, unit, check):
    output.commit(unit(0, 10), prompts=1)
    code, text = check()
    assert code == 1
    assert "10 differences" in text
    assert "1 of 2 captions, 0 quarantine rows" in text


def test_missing_and_foreign_rows_inside_an_object_are_found(output, unit, check):
    output.commit(unit(0, 10), rows=[0, 1, 2, 3, 4, 5, 6, 7, 8, 11])
    code, text = check()
    assert code == 1
    assert "a.parquet row 9: 0 of 2 captions, 0 quarantine rows" in text
    assert "a.parquet row 11 does not belong" in text


def test_another_fingerprint_is_found(output, unit, check):
    output.commit(unit(0, 10), fingerprint="0123456789abcdef")
    code, text = check()
    assert code == 1
    assert f"its metadata must say fingerprint={MINE!r}, got '0123456789abcdef'" in text


def test_stray_and_damaged_objects_are_found(output, unit, check):
    whole = output.commit(unit(0, 5))
    damaged = output.commit(unit(5, 10))
    data = output.store.read(f"captions/{whole}")
    output.store.write(f"captions/{damaged}", data[: len(data) // 2])
    output.store.write("captions/notes.parquet", b"")
    output.store.write("captions/part-000000000000-000000000-000000005.parquet", data)
    output.store.write("quarantine/part-000000000000-000000007-000000008.parquet", data)
    code, text = check()
    assert code == 1
    assert f"{damaged} is damaged" in text
    assert "captions/notes.parquet is not a part of this job" in text
    assert "captions/part-000000000000-000000000-000000005.parquet is of a file that is not in the input" in text
    assert "quarantine/part-000000000000-000000007-000000008.parquet belongs to no part in captions" in text


def test_a_folder_of_image_files_is_proven_file_by_file(tmp_path, output, check):
    (tmp_path / "in").mkdir()
    for i in range(5):
        (tmp_path / "in" / f"{i}.png").write_bytes(b"x" * (i + 1))
    files = list(corpus_at(tmp_path / "in").files)
    units = plan_images(files, MINE, 2)
    for unit in units:
        output.commit(unit, files=True)
    assert check()[0] == 0
    output.store.delete(f"captions/part-{units[1].name}.parquet")
    (again,) = plan_images(files[:1], MINE, 1)
    output.commit(again, files=True)
    code, text = check()
    assert code == 1
    assert "2.png has no output" in text
    assert "3.png has no output" in text
    assert "0.png is in 2 parts" in text
    name = f"captions/part-{units[2].name}.parquet"
    output.store.write(name, output.store.read(name)[:99])
    left = output.store.read(f"captions/part-{units[0].name}.parquet")
    (foreign,) = plan_images([replace(files[0], size=99)], MINE, 1)  # before the file was changed
    output.commit(foreign, files=True)
    told = check("repair=true")[1].partition("repair: removed 2 parts")[2]
    assert f"part-{again.name}.parquet (0.png, row 0)" in told, "of two parts with a file, the smaller goes"
    assert f"part-{units[2].name}.parquet (1 image files)" in told
    assert output.store.exists(f"captions/part-{foreign.name}.parquet"), "its captions would be lost"
    output.store.delete(f"captions/part-{foreign.name}.parquet")
    plan = make_plan(corpus_at(tmp_path / "in"), output.store, MINE, num_images=2, limit=None, num_samples=0)
    for unit in plan.units:
        output.commit(unit, files=True)
    assert check()[0] == 0
    assert output.store.read(f"captions/part-{units[0].name}.parquet") == left


def test_what_is_no_output_or_no_input_exits_with_2(tmp_path, corpus, output, capsys):
    assert main([f"input.path={corpus}", f"output.path={tmp_path / 'nothing'}"]) == 2
    assert "found no fingerprint.json" in capsys.readouterr().err
    assert main([f"input.path={tmp_path / 'nothing'}", f"output.path={tmp_path / 'out'}"]) == 2
    assert "input.path" in capsys.readouterr().err
    assert main(["input.pth=x"]) == 2
    assert "did you mean input.path?" in capsys.readouterr().err


def test_an_image_that_is_another_now_is_found_by_reading_it_again(tmp_path, output, unit, check):
    """The key of a part holds the file's name, size and tag; images that rows name by address have none."""
    output.commit(unit(0, 5))
    output.commit(unit(5, 10))
    code, text = check("images=2")
    assert code == 1
    assert "(a.parquet, row 7): the image in the corpus is another" in text
    assert check()[0] == 0
