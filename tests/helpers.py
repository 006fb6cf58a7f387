"""Small corpora, readers of what a job wrote, and drivers in processes of their own."""

import io
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from demo.render import render
from demo.world import scene_at
from pipelines.storage import Store

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO = ["--config", str(REPOSITORY / "conf" / "demo.yaml")]
QUICK = [
    "generate.max_new_tokens=8",
    "run.samples=2",
    "mlflow.enabled=false",
    f"model.path={REPOSITORY}/demo/checkpoint",
]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])

Row = tuple[str, int, str]  # source, row, caption


def scenes(count: int, first: int = 0) -> list[bytes]:
    """PNG files of demo scenes; their captions differ."""
    files = []
    for index in range(first, first + count):
        Image.fromarray(render(scene_at("corpus", index)).pixels).save(stream := io.BytesIO(), "PNG", compress_level=1)
        files.append(stream.getvalue())
    return files


def write_corpus(path: Path, images: Sequence[bytes | None], rows_per_group: int = 8, **columns: Sequence) -> Path:
    """A Parquet file in the Hugging Face image layout, ids `row-<i>`, with further columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    structs = [None if data is None else {"bytes": data, "path": f"{i}.png"} for i, data in enumerate(images)]
    table = pa.table(
        {"id": [f"row-{i}" for i in range(len(images))], "image": pa.array(structs, IMAGE), **columns},
    )
    pq.write_table(table, path, row_group_size=rows_per_group)
    return path


def read_table(output: Store | Path, folder: str) -> pa.Table | None:
    """All rows of `captions` or `quarantine` of an output, with duplicates if there are any; None if it has none."""
    store = output if isinstance(output, Store) else Store(str(output))
    tables = [pq.read_table(io.BytesIO(store.read(f"{folder}/{name}"))) for name in sorted(store.list(folder))]
    return pa.concat_tables(tables) if tables else None


def read_rows(output: Store | Path, folder: str = "captions") -> list[dict]:
    table = read_table(output, folder)
    return [] if table is None else table.to_pylist()


def captions_of(output: Store | Path) -> list[Row]:
    """Sorted (source, row, caption), doubles included."""
    return sorted((row["source"], row["row"], row["caption"]) for row in read_rows(output))


def addresses(output: Store | Path) -> list[tuple[str, int]]:
    """Sorted (source, row) of everything captioned or quarantined, doubles included."""
    return sorted((r["source"], r["row"]) for folder in ("captions", "quarantine") for r in read_rows(output, folder))
