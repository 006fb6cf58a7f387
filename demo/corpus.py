"""The demo corpus: a folder of Parquet files in the Hugging Face image layout; 512 scenes take about 6 seconds.

    python -m demo.corpus [--scenes 512] [--seed 0] [--out .cache/demo_corpus]

    scenes-00000.parquet ...  held-out scenes (PNG, every fourth JPEG), row groups of 5 to 256 rows
    photos.parquet            real photographs in many formats and colour modes; no references
    broken.parquet            images that decoding must survive: truncated, empty, null, text, a 60,000 x 60,000 header
    _corpus.json              version, seed and row counts; written last, so it marks a complete folder

Columns: `id` string; `image` struct<bytes: binary, path: string>; `references` list<string>, four for a scene;
`questions` list<struct<task, question, answer>>; `scene` string, the scene as JSON (null in photos and broken).

Scenes come from the "corpus" split of `demo.world`, whose seeds training never draws. A complete folder of the same
version, seed and size is reused. Otherwise the corpus is built in a folder beside it and renamed into place, so a
killed build leaves nothing that looks like a corpus.
"""

import argparse
import io
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from demo.language import questions, references
from demo.photos import broken_images, photographs
from demo.render import render
from demo.world import SPLIT_SIZE, scene_at

DEFAULT_FOLDER = Path(".cache/demo_corpus")
MARKER = "_corpus.json"
MAX_SCENES = 1 << 20  # each corpus seed owns this many scene numbers
NUM_SEEDS = SPLIT_SIZE // MAX_SCENES
SCENE_FILES = [(0.30, 256), (0.55, 64), (0.75, 33), (0.90, 16), (1.00, 5)]  # (share up to here, rows per row group)
MIN_SCENES = 10  # with fewer scenes, a file would be empty

_TEXT = pa.string()
_FEATURES = {  # the metadata of Hugging Face `datasets`, which makes `image` an image column there
    "id": {"dtype": "string", "_type": "Value"},
    "image": {"_type": "Image"},
    "references": {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"},
    "questions": {
        "feature": {name: {"dtype": "string", "_type": "Value"} for name in ("task", "question", "answer")},
        "_type": "List",
    },
    "scene": {"dtype": "string", "_type": "Value"},
}
SCHEMA = pa.schema(
    [
        ("id", _TEXT),
        ("image", pa.struct([("bytes", pa.binary()), ("path", _TEXT)])),
        ("references", pa.list_(_TEXT)),
        ("questions", pa.list_(pa.struct([("task", _TEXT), ("question", _TEXT), ("answer", _TEXT)]))),
        ("scene", _TEXT),
    ],
    metadata={"huggingface": json.dumps({"info": {"features": _FEATURES}})},
)


@dataclass(frozen=True, slots=True)
class World:
    """What a corpus is made of: its files' columns, and the row of a held-out scene by its number."""

    version: int  # raise it when the content of a corpus changes
    schema: pa.Schema
    scene_row: Callable[[int], dict]


def build_corpus(
    folder: Path = DEFAULT_FOLDER, *, scenes: int = 512, seed: int = 0, world: World | None = None
) -> Path:
    """Build the corpus, or reuse a complete one; returns the folder. Same bytes for the same library versions.

    Raises:
        ValueError: if scenes is outside [10, 2**20], the seed outside [0, 4096), or the folder holds something else.
    """
    folder = Path(folder)
    if not MIN_SCENES <= scenes <= MAX_SCENES:
        raise ValueError(f"scenes must be in [{MIN_SCENES}, {MAX_SCENES}], got {scenes}")
    if not 0 <= seed < NUM_SEEDS:
        raise ValueError(f"seed must be in [0, {NUM_SEEDS}), got {seed}")
    world = world or SHAPES
    plan = {"version": world.version, "seed": seed, "scenes": scenes}
    if _is_built(folder, plan):
        return folder
    if corpus_info(folder) is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"out must be a new or empty folder or a demo corpus, got {folder} with other content")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        fresh = Path(scratch) / "corpus"
        fresh.mkdir()
        rows = _write_files(fresh, world, scenes=scenes, first=seed * MAX_SCENES)
        (fresh / MARKER).write_text(json.dumps({**plan, "rows": rows}, indent=2) + "\n")
        if not _is_built(folder, plan):  # another process may have finished first: its readers keep their files
            _swap_in(fresh, folder, Path(scratch) / "old")
    return folder


def corpus_info(folder: Path) -> dict | None:
    """The marker of a complete corpus (version, seed, scenes, `rows` {file: count}), or None."""
    marker = Path(folder) / MARKER
    return json.loads(marker.read_text()) if marker.is_file() else None


def _is_built(folder: Path, plan: dict) -> bool:
    info = corpus_info(folder)
    if info is None or {key: info.get(key) for key in plan} != plan:
        return False
    return all((folder / name).is_file() for name in info["rows"])


def _swap_in(fresh: Path, folder: Path, old: Path) -> None:
    """Rename the fresh folder into place. If another process does so first, its corpus stays."""
    if folder.exists():
        os.replace(folder, old)
    try:
        os.replace(fresh, folder)
    except OSError:
        if corpus_info(folder) is None:
            raise
        shutil.rmtree(fresh)


def _write_files(folder: Path, world: World, *, scenes: int, first: int) -> dict[str, int]:
    """Write every file; returns {file name: rows}."""
    start, rows = 0, {}
    for number, (share, group) in enumerate(SCENE_FILES):
        stop = round(share * scenes)
        path = folder / f"scenes-{number:05d}.parquet"
        rows[path.name] = _write(
            path, world.schema, (world.scene_row(first + index) for index in range(start, stop)), group
        )
        start = stop
    photos = (_bare_row(f"photo-{Path(name).stem}", name, data) for name, data in photographs().items())
    broken = (_bare_row(f"broken-{kind}", f"{kind}.jpg", data) for kind, data in broken_images().items())
    rows["photos.parquet"] = _write(folder / "photos.parquet", world.schema, photos, 4)
    rows["broken.parquet"] = _write(folder / "broken.parquet", world.schema, broken, 16)
    return rows


def _write(path: Path, schema: pa.Schema, rows: Iterator[dict], group: int) -> int:
    """Stream rows into row groups of `group` rows; returns the number of rows."""
    count, batch = 0, []
    with pq.ParquetWriter(path, schema) as writer:
        for row in rows:
            batch.append(row)
            count += 1
            if len(batch) == group:
                writer.write_table(pa.Table.from_pylist(batch, schema))
                batch = []
        if batch:
            writer.write_table(pa.Table.from_pylist(batch, schema))
    return count


def _scene_row(index: int) -> dict:
    scene = scene_at("corpus", index)
    name = f"scene-{index:07d}"
    data, suffix = encode_image(Image.fromarray(render(scene).pixels), jpeg=index % 4 == 3)
    return {
        "id": name,
        "image": {"bytes": data, "path": f"{name}.{suffix}"},
        "references": references(scene),
        "questions": questions(scene, random.Random(scene.seed)),
        "scene": json.dumps(scene.to_dict()),
    }


def encode_image(image: Image.Image, *, jpeg: bool) -> tuple[bytes, str]:
    buffer = io.BytesIO()
    if jpeg:
        image.save(buffer, "JPEG", quality=92, subsampling=0)
        return buffer.getvalue(), "jpg"
    image.save(buffer, "PNG", compress_level=1)  # pixel noise does not compress; higher levels only cost time
    return buffer.getvalue(), "png"


def _bare_row(name: str, path: str, data: bytes | None) -> dict:
    """A row without references, questions and what else only scenes have. Without `data`, the image is null."""
    image = None if data is None else {"bytes": data, "path": path}
    return {"id": name, "image": image, "references": [], "questions": [], "scene": None}


SHAPES = World(version=3, schema=SCHEMA, scene_row=_scene_row)


def main(argv: list[str] | None = None, *, world: World = SHAPES, default_folder: Path = DEFAULT_FOLDER) -> int:
    parser = argparse.ArgumentParser(description="Build a demo corpus, or reuse a complete one.")
    parser.add_argument("--scenes", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=default_folder)
    arguments = parser.parse_args(argv)
    try:
        folder = build_corpus(arguments.out, scenes=arguments.scenes, seed=arguments.seed, world=world)
    except ValueError as problem:
        parser.error(str(problem))
    info = corpus_info(folder)
    assert info is not None
    for name, count in info["rows"].items():
        print(f"{count:6d}  {folder / name}")
    print(f"{sum(info['rows'].values()):6d}  rows in {folder} (seed {info['seed']}, version {info['version']})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
