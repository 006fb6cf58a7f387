"""The gallery's corpus: a folder of Parquet files in the Hugging Face image layout; 512 scenes take about 10 seconds.

    python -m demo.gallery.corpus [--scenes 512] [--seed 0] [--out .cache/gallery_corpus]

The files are those of `demo.corpus`. `references` holds three long captions of a scene; one column more,
`short_reference`, its short one. A scene's JSON also says `width` and `height` in pixels.
"""

import json
import random
from pathlib import Path

import pyarrow as pa
from PIL import Image

from demo import corpus
from demo.gallery.language import long_references, questions, short_caption
from demo.gallery.render import render
from demo.gallery.world import scene_at

DEFAULT_FOLDER = Path(".cache/gallery_corpus")


def _scene_row(index: int) -> dict:
    scene = scene_at("corpus", index)
    name = f"gallery-{index:07d}"
    data, suffix = corpus.encode_image(Image.fromarray(render(scene).pixels), jpeg=index % 4 == 3)
    return {
        "id": name,
        "image": {"bytes": data, "path": f"{name}.{suffix}"},
        "references": long_references(scene),
        "questions": questions(scene, random.Random(scene.seed)),
        "scene": json.dumps({**scene.to_dict(), "width": scene.width, "height": scene.height}),
        "short_reference": short_caption(scene),
    }


def _schema() -> pa.Schema:
    """The first demo's columns and one more, which the metadata of Hugging Face `datasets` names too."""
    described = json.loads(corpus.SCHEMA.metadata[b"huggingface"])
    described["info"]["features"]["short_reference"] = {"dtype": "string", "_type": "Value"}
    schema = corpus.SCHEMA.append(pa.field("short_reference", pa.string()))
    return schema.with_metadata({"huggingface": json.dumps(described)})


GALLERY = corpus.World(version=2, schema=_schema(), scene_row=_scene_row)


if __name__ == "__main__":
    raise SystemExit(corpus.main(world=GALLERY, default_folder=DEFAULT_FOLDER))
