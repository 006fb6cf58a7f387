"""A corpus that lost or changed files since they were captioned: noticed at equal size, and settled by a key."""

import base64
import json
import os
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.errors import UserError
from tests.corpus.test_tar import shard
from tests.helpers import captions_of, read_rows, run_fake
from tests.reading import png, write


@pytest.fixture(params=["parquet", "images", "tar", "arrow", "jsonl"])
def scene(request, tmp_path: Path):
    """A corpus of three files that was captioned once, and functions that caption it again and change a file."""
    folder = tmp_path / "in"
    folder.mkdir()

    def put(name: str, number: int) -> None:
        if request.param == "parquet":
            write(folder / f"{name}.parquet", [png(number), b"no image"])
            return
        path = folder / f"{name}.{'png' if request.param == 'images' else request.param}"
        if request.param == "images":
            path.write_bytes(png(number))
        elif request.param == "tar":
            shard(path, [("0.png", png(number))])
        elif request.param == "arrow":
            table = pa.table({"image": [png(number)]})
            with pa.ipc.new_stream(path, table.schema) as writer:
                writer.write_table(table)
        else:
            address = "data:image/png;base64," + base64.b64encode(png(number)).decode()
            path.write_text(json.dumps({"url": address}))
        os.utime(path, (number, number))

    def run(*arguments: str, images: int = 1):
        return run_fake(f"input.path={folder}", f"output.path={tmp_path / 'out'}", f"unit.images={images}", *arguments)

    for i, name in enumerate("abc"):
        put(name, i + 1)
    assert run().code == 0
    return put, run, folder, tmp_path / "out"


def rows(output: Path) -> dict[str, str]:
    """Caption by file."""
    captions = captions_of(output)
    assert len(captions) == len({source for source, _, _ in captions})
    return {source[0]: caption for source, _, caption in captions}


def test_another_content_of_equal_size_is_noticed_and_refused(scene):
    put, run, folder, output = scene
    before, size = rows(output), {path.name: path.stat().st_size for path in folder.iterdir()}
    put("b", 9)
    assert {path.name: path.stat().st_size for path in folder.iterdir()} == size
    with pytest.raises(UserError, match=r"input\.on_changed=skip or redo"):
        run()
    assert rows(output) == before


def test_what_changed_is_left_out_or_captioned_again(scene):
    put, run, _, output = scene
    before, rejected = rows(output), len(read_rows(output, "quarantine"))
    put("b", 9)
    put("d", 4)
    assert run("input.on_changed=skip").code == 0
    after = rows(output)
    assert {name: after[name] for name in "abc"} == before
    assert set(after) == set("abcd")
    new_rejected = rejected // 3
    assert len(read_rows(output, "quarantine")) == rejected + new_rejected
    assert run("input.on_changed=redo").code == 0
    redone = rows(output)
    assert {name: redone[name] for name in "acd"} == {name: after[name] for name in "acd"}
    assert redone["b"] != after["b"]
    assert len(read_rows(output, "quarantine")) == rejected + new_rejected
    assert "nothing to do" in run().message  # nothing differs any more


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["skip", "redo"])
def test_captions_of_what_is_lost_are_kept(scene, choice):
    put, run, folder, output = scene
    before, rejected = rows(output), len(read_rows(output, "quarantine"))
    next(path for path in folder.iterdir() if path.name.startswith("a.")).unlink()
    put("d", 4)
    assert run(f"input.on_changed={choice}").code == 0
    after = rows(output)
    assert {name: after[name] for name in "abc"} == before
    assert set(after) == set("abcd")
    assert len(read_rows(output, "quarantine")) == rejected + rejected // 3
