"""Input and output on S3: an in-memory server on localhost, stages without models."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.caption_corpus import main
from jobs.verify import main as verify
from pipelines.store import Store
from tests.helpers import QUICK, addresses, captions_of, read_rows, run_fake, s3_server, write_corpus


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    with s3_server("images", "captions") as address:
        yield address


@pytest.fixture(scope="module")
def corpus(s3: str, tmp_path_factory: pytest.TempPathFactory, scene_png: Callable[[int], bytes]) -> str:
    """s3://images/corpus: two files with 14 rows, one of them null."""
    folder = tmp_path_factory.mktemp("corpus")
    images: list[bytes | None] = [scene_png(i) for i in range(14)]
    images[5] = None
    store = Store("s3://images/corpus", s3)
    for name, part in (("a", images[:9]), ("deep/er/b", images[9:])):
        store.write(f"{name}.parquet", write_corpus(folder / "x.parquet", part, rows_per_group=5).read_bytes())
    return store.path


def where(s3: str, name: str) -> tuple[list[str], Store]:
    """Arguments for an output of its own, and the output."""
    path = f"s3://captions/{name}"
    return [f"input.endpoint_url={s3}", f"output.endpoint_url={s3}", f"output.path={path}"], Store(path, s3)


@pytest.mark.usefixtures("ray_session")
def test_a_corpus_on_s3_is_captioned_onto_s3_and_resumed(s3: str, corpus: str, scene_png, capsys):
    arguments, output = where(s3, "whole")
    arguments.append(f"input.path={corpus}")
    assert run_fake(*arguments, "unit.images=3", "input.limit=7").code == 0
    assert len(addresses(output)) == 7
    assert run_fake(*arguments, "unit.images=4", on_ray=True).code == 0
    sha256 = [hashlib.sha256(scene_png(i)).hexdigest() for i in range(14)]
    expected = [("a.parquet", i, sha256[i]) for i in range(9) if i != 5]
    expected += [("deep/er/b.parquet", i, sha256[9 + i]) for i in range(5)]
    assert captions_of(output) == [(source, row, f"{sha} describe the image .") for source, row, sha in expected]
    assert [(row["row"], row["reason"]) for row in read_rows(output, "quarantine")] == [(5, "missing")]
    assert verify(arguments) == 0
    assert output.exists("run.json")
    assert output.exists("report.html")
    capsys.readouterr()
    assert main([*QUICK, *arguments]) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.slow
def test_lost_objects_are_done_again(s3: str, corpus: str):
    arguments, output = where(s3, "lost")
    arguments.append(f"input.path={corpus}")
    assert run_fake(*arguments, "unit.images=3").code == 0
    before = captions_of(output)
    for name in sorted(output.list("captions"))[1::2]:
        output.delete(f"captions/{name}")
    output.delete("run.json")
    assert run_fake(*arguments, "unit.images=3").code == 0
    assert captions_of(output) == before
    assert verify(arguments) == 0


def test_a_glob_of_image_files_is_read_without_credentials(s3: str, scene_png):
    store = Store("s3://images/files", s3)
    for i in range(5):
        store.write(f"{i % 2}/{i}.png", scene_png(i))
        store.fs.chmod(store.join(f"{i % 2}/{i}.png"), acl="public-read")
    arguments, output = where(s3, "files")
    arguments += ["input.path=s3://images/files/*/*.png", "input.anonymous=true"]
    assert run_fake(*arguments).code == 0
    captioned = [(source, row) for source, row, _ in captions_of(output)]
    assert captioned == [("0/0.png", 0), ("0/2.png", 0), ("0/4.png", 0), ("1/1.png", 0), ("1/3.png", 0)]
    assert verify(arguments) == 0


def test_images_named_by_uris_are_fetched_and_missing_ones_quarantined(s3: str, scene_png, tmp_path: Path):
    """Absolute s3:// addresses and ones relative to the corpus."""
    store = Store("s3://images/uris", s3)
    for i in range(4):
        store.write(f"pictures/{i}.png", scene_png(i))
    uris = [
        "s3://images/uris/pictures/0.png",
        "pictures/1.png",
        "pictures/absent.png",
        "s3://images/uris/pictures/2.png",
    ]
    pq.write_table(pa.table({"image_url": [*uris, None, "s3://nowhere/3.png"]}), tmp_path / "u.parquet")
    store.write("u.parquet", (tmp_path / "u.parquet").read_bytes())
    arguments, output = where(s3, "uris")
    arguments.append("input.path=s3://images/uris/*.parquet")
    assert run_fake(*arguments).code == 0
    captioned = {row["row"]: row["sha256"] for row in read_rows(output)}
    assert captioned == {row: hashlib.sha256(scene_png(i)).hexdigest() for row, i in ((0, 0), (1, 1), (3, 2))}
    reasons = {row["row"]: row["reason"] for row in read_rows(output, "quarantine")}
    assert reasons == {2: "fetch", 4: "missing", 5: "fetch"}
