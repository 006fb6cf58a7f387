"""The demo corpus: whole or absent, the same every time, held out, and as hostile as promised."""

import io
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from demo import corpus
from demo.corpus import MAX_SCENES, SCHEMA, build_corpus, corpus_info
from demo.language import references
from demo.photos import broken_images, photographs
from demo.world import Scene, scene_at

SCENES = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_corpus(tmp_path_factory.mktemp("demo") / "corpus", scenes=SCENES)


@pytest.fixture(scope="module")
def rows(folder):
    return {path.name: pq.read_table(path).to_pylist() for path in sorted(folder.glob("*.parquet"))}


def scene_rows(rows):
    return [row for name, file in rows.items() if name.startswith("scenes") for row in file]


def test_all_files_share_the_hugging_face_image_schema_and_the_marker_counts_them(folder, rows):
    assert len([name for name in rows if name.startswith("scenes")]) >= 4
    for name in rows:
        assert pq.read_schema(folder / name).equals(SCHEMA)
    assert pa.types.is_struct(SCHEMA.field("image").type)
    assert json.loads(SCHEMA.metadata[b"huggingface"])["info"]["features"]["image"] == {"_type": "Image"}
    assert corpus_info(folder)["rows"] == {name: len(file) for name, file in rows.items()}
    assert len(scene_rows(rows)) == SCENES
    ids = [row["id"] for file in rows.values() for row in file]
    assert len(set(ids)) == len(ids)


def test_row_groups_vary_from_smaller_than_a_unit_to_a_whole_file(folder):
    files = [pq.ParquetFile(path).metadata for path in sorted(folder.glob("scenes-*.parquet"))]
    assert files[0].num_row_groups == 1
    assert files[-1].num_row_groups > 1


def test_a_scene_row_tells_what_its_image_shows(rows):
    formats = set()
    for number, row in enumerate(scene_rows(rows)):
        scene = Scene.from_dict(json.loads(row["scene"]))
        assert scene == scene_at("corpus", number)
        assert row["references"] == references(scene)
        assert {"exist", "where", "count", "bg"} <= {asked["task"] for asked in row["questions"]}
        image = Image.open(io.BytesIO(row["image"]["bytes"]))
        image.load()
        assert (image.size, image.mode) == ((224, 224), "RGB")
        assert row["image"]["path"].endswith({"PNG": ".png", "JPEG": ".jpg"}[image.format])
        formats.add(image.format)
    assert formats == {"PNG", "JPEG"}


def test_no_scene_of_the_corpus_is_a_training_scene(rows):
    held_out = {Scene.from_dict(json.loads(row["scene"])) for row in scene_rows(rows)}
    assert not held_out & {scene_at("train", index) for index in range(1000)}


def test_photographs_decode_and_cover_the_formats_and_modes_of_a_web_corpus(rows):
    assert len(rows["photos.parquet"]) >= 12
    seen = set()
    for row in rows["photos.parquet"]:
        image = Image.open(io.BytesIO(row["image"]["bytes"]))
        image.load()
        assert row["references"] == row["questions"] == []
        assert row["scene"] is None
        seen |= {image.format, image.mode}
        if "exif" in row["id"]:
            assert image.getexif()[0x0112] == 6
            assert image.height > image.width  # lies on its side until the tag is obeyed
    assert {"PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"} <= seen
    assert {"RGB", "RGBA", "CMYK", "P", "L", "1", "I;16"} <= seen
    assert any(getattr(Image.open(io.BytesIO(data)), "n_frames", 1) > 1 for data in photographs().values())


def test_broken_rows_are_broken_except_the_single_pixel(rows):
    by_kind = {row["id"].removeprefix("broken-"): row["image"] for row in rows["broken.parquet"]}
    assert by_kind.keys() == broken_images().keys()
    assert by_kind.pop("null") is None
    with Image.open(io.BytesIO(by_kind.pop("one_pixel")["bytes"])) as pixel:
        assert pixel.size == (1, 1)
    assert by_kind["zero_bytes"]["bytes"] == b""
    for image in by_kind.values():
        with pytest.raises((OSError, SyntaxError, ValueError, Image.DecompressionBombError)):
            Image.open(io.BytesIO(image["bytes"])).load()


def test_the_huge_header_claims_sixty_thousand_pixels_a_side(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with Image.open(io.BytesIO(broken_images()["huge_header"])) as image:
        assert image.size == (60_000, 60_000)


@pytest.mark.slow
def test_building_again_gives_the_same_bytes_and_another_seed_other_scenes(folder, tmp_path):
    again = build_corpus(tmp_path / "again", scenes=SCENES)
    for path in folder.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()
    other = build_corpus(tmp_path / "other", scenes=10, seed=1)
    first = pq.read_table(other / "scenes-00000.parquet").to_pylist()[0]
    assert Scene.from_dict(json.loads(first["scene"])) == scene_at("corpus", MAX_SCENES)


@pytest.mark.slow
def test_a_whole_corpus_is_used_again_and_another_one_replaced(tmp_path):
    folder = build_corpus(tmp_path / "corpus", scenes=10)
    before = (folder / "scenes-00000.parquet").stat().st_mtime_ns
    assert build_corpus(folder, scenes=10) == folder
    assert (folder / "scenes-00000.parquet").stat().st_mtime_ns == before
    (folder / "photos.parquet").unlink()
    assert (build_corpus(folder, scenes=10) / "photos.parquet").is_file()
    build_corpus(folder, scenes=12)
    assert corpus_info(folder)["scenes"] == 12
    assert os.listdir(tmp_path) == ["corpus"]


def test_a_build_that_dies_leaves_nothing_behind(tmp_path, monkeypatch):
    def die():
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "photographs", die)
    with pytest.raises(KeyboardInterrupt):
        build_corpus(tmp_path / "corpus", scenes=10)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"scenes": 3}, "scenes must be"), ({"seed": -1}, "seed must be"), ({"seed": 4096}, "seed must be")],
)
def test_sizes_and_seeds_out_of_range_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        build_corpus(tmp_path / "corpus", **settings)


def test_a_folder_with_other_content_is_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(ValueError, match="out must be"):
        build_corpus(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "dear"
