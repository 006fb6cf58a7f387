"""Small corpora of images that tell their number by their colour, and the first stage run on them without a cluster."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from otprune.families import Geometry
from otprune.families.llava import Square
from pipelines.corpus.addresses import Allowed
from pipelines.corpus.fetch import FetchSettings
from pipelines.corpus.file import RowGroups
from pipelines.corpus.find import Corpus, find_corpus
from pipelines.output.span import SpanRow, with_row_groups
from pipelines.output.unit import plan_images, plan_rows
from pipelines.stages.read import DecodeSettings, ReadDecode
from pipelines.stages.unit_batch import UnitBatch
from pipelines.store import make_store

SIDE = 8
GEOMETRY = Square(side=SIDE, num_tokens=4, background=(0, 0, 0), fit="crop")
LIMIT = 10_000  # bytes of an image
BINARY = pa.binary()
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(number: int) -> bytes:
    """A solid image that tells its number by its colour."""
    Image.new("RGB", (SIDE, SIDE), (number % 256, number // 256, 7)).save(stream := io.BytesIO(), "PNG")
    return stream.getvalue()


def number_of(pixels: np.ndarray) -> int:
    """The number of an image, by its first pixel; `pixels` may be flattened."""
    red, green = pixels.reshape(-1)[:2].tolist()
    return red + 256 * green


def numbers_of(unit_batch: UnitBatch) -> list[int]:
    """The numbers of a unit's pictures, each of which must have all the pixels of its frame."""
    rows = unit_batch.arrays["pixels"].rows()
    assert {len(row) for row in rows} <= {3 * SIDE * SIDE}
    return [number_of(row) for row in rows]


def corpus_at(path, templates=("look",), **columns) -> Corpus:
    chosen = {"image_column": "auto", "id_column": "auto", "reference_column": "auto"} | columns
    return find_corpus(make_store(str(path)), templates=templates, **chosen)


LOCALHOST = Allowed(private=True)


def reader_of(
    corpus: Corpus, templates=("look",), fetch_timeout=5.0, geometry: Geometry = GEOMETRY, patience=0.0, **fetch
) -> ReadDecode:
    settings = DecodeSettings(geometry=geometry, max_bytes=LIMIT, max_pixels=10**6, min_side=2)
    return ReadDecode(
        store=corpus.store,
        format=corpus.format,
        columns=corpus.columns,
        templates=list(templates),
        decode=settings,
        fetch=FetchSettings(**{"threads": 4, "timeout": fetch_timeout, "retries": 1, "allowed": LOCALHOST, **fetch}),
        patience=patience,
    )


def spans_of(corpus: Corpus, num_images: int = 100, samples: int = 0) -> list[SpanRow]:
    if corpus.format.one_image_a_file:
        return [SpanRow((unit,), RowGroups(), samples) for unit in plan_images(list(corpus.files), "f", num_images)]
    spans = (with_row_groups(file, plan_rows(file, "f", num_images, file.num_rows, [])) for file in corpus.files)
    return [SpanRow(units, groups, samples) for planned in spans for units, groups in planned]


def read(path, *, num_images=100, samples=0, templates=("look",), fetch_timeout=5.0, **columns) -> list[UnitBatch]:
    corpus = corpus_at(path, templates, **columns)
    reader = reader_of(corpus, templates, fetch_timeout)
    spans = spans_of(corpus, num_images, samples)
    return [UnitBatch.from_row(row) for span in spans for row in reader(span.to_row())]


def reasons(works: list[UnitBatch]) -> dict[int, str]:
    return {rejected.row: rejected.reason for unit_batch in works for rejected in unit_batch.rejected}


def write(path: Path, images: list, kind: pa.DataType = BINARY, rows: int = 100, **columns) -> Path:
    pq.write_table(pa.table({"image": pa.array(images, kind), **columns}), path, row_group_size=rows)
    return path
