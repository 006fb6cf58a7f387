"""A Hugging Face dataset folder: Parquet files under data/, and a card, README.md."""

import json
from collections.abc import Mapping
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipelines.corpus.fetch import Fetcher
from pipelines.corpus.find import Corpus
from pipelines.errors import UserError
from pipelines.export.captions import CaptionColumns
from pipelines.export.images import rows_of, rows_with_images, suffix_of
from pipelines.export.pieces import Piece
from pipelines.export.target import Target
from pipelines.store import Store

CARD = "README.md"
BATCH_ROWS = 100  # of a row group: a reader of one image reads about this many
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
_OWN = "<!-- Written by jobs/export.py, which replaces this page. Delete this line to keep your own. -->"


def write_dataset(
    piece: Piece,
    num_pieces: int,
    corpus: Corpus,
    output: Store,
    target: Target,
    columns: CaptionColumns,
    *,
    keep: bool,
    images: bool,
    fetcher: Fetcher,
) -> list[str]:
    """Writes one of the `num_pieces` data files and returns its name. Memory holds BATCH_ROWS rows."""
    name = f"data/train-{piece.name}-of-{num_pieces:05d}.parquet"
    schema = _schema(columns, images)
    if images:
        rows = rows_with_images(piece, corpus, output, fetcher, keep)
    else:
        rows = ((row, None) for row in rows_of(piece, output) if keep or row.captions)
    with target.stream(name) as stream, pq.ParquetWriter(stream, schema, compression="zstd") as writer:
        while batch := list(islice(rows, BATCH_ROWS)):
            values: list[dict[str, Any]] = []
            for row, data in batch:
                values.append({"id": row.id, "source": row.source, "row": row.row, **columns.values(row)})
                if data is not None:
                    path = row.source if piece.file is None else f"{row.row:09d}.{suffix_of(data)}"
                    values[-1]["image"] = {"bytes": data, "path": path}
            writer.write_table(pa.Table.from_pylist(values, schema))
    return [name]


def write_card(
    target: Target, claim: Mapping[str, Any], columns: CaptionColumns, *, license: str | None, images: bool
) -> None:
    """Writes the card, unless a page without its mark is there: that is somebody's own."""
    try:
        if _OWN not in target.store.read(CARD).decode(errors="replace"):
            return
    except FileNotFoundError:
        pass
    target.write(CARD, _card(claim, columns, license, images).encode())


def push(target: Target, repository: str, private: bool) -> str:
    """Uploads the folder to the hub and returns its address. Files that are there already are not sent again.

    Raises:
        UserError: if the folder is not local, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if "://" in target.store.path:
        raise UserError(f"export.hub pushes a local folder, got export.path {target.store.path}")
    try:
        api = HfApi()
        address = api.create_repo(repository, repo_type="dataset", private=private, exist_ok=True)
        # `delete_patterns` removes shards of an earlier cut. A push that was cut off goes on where it was.
        api.upload_folder(
            repo_id=repository,
            folder_path=target.store.path,
            repo_type="dataset",
            allow_patterns=["data/*", CARD],
            delete_patterns="data/train-*.parquet",
        )
    except (HfHubHTTPError, HFValidationError) as error:
        raise UserError(f"export.hub={repository} was refused: {error}") from error
    return str(address)


def _schema(columns: CaptionColumns, images: bool) -> pa.Schema:
    """The columns of a data file, with the features that `datasets` and the hub's viewer read from its metadata."""
    fields = [("id", pa.string()), ("source", pa.string()), ("row", pa.int64())]
    schema = pa.schema([*([("image", IMAGE)] if images else []), *fields, *columns.schema])
    names = {pa.string(): "string", pa.int32(): "int32", pa.int64(): "int64", pa.float64(): "float64"}
    features = {
        f.name: {"_type": "Image"} if f.name == "image" else {"dtype": names[f.type], "_type": "Value"} for f in schema
    }
    return schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def _card(claim: Mapping[str, Any], columns: CaptionColumns, license: str | None, images: bool) -> str:
    front = {
        **({"license": license} if license else {}),
        "task_categories": ["image-to-text"],
        "tags": ["captions", "synthetic"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*.parquet"}]}],
    }
    prompts = [claim["prompt.template"], *claim["prompt.more"]]
    asked = "\n".join(f"| `{text}` | {prompt} |" for text, prompt in zip(columns.texts, prompts, strict=True))
    name = columns.name
    with_images = "`image`: the encoded image as the corpus has it." if images else "The images are not included."
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

{_OWN}

# Captions

Written by a vision-language model, one row an image. {with_images} `id`, `source` and `row` are its id, file and row in
the corpus.

| column | prompt |
|---|---|
{asked}

`NAME_prompt` has the prompt with the row's own columns filled in. `NAME_finish_reason` is `length` where a caption was
cut. `{name}_error` says why a row has no caption.

| | |
|---|---|
| model | `{claim.get("model.path")}` |
| visual tokens | method `{claim.get("prune.method")}`, share kept {claim.get("prune.retention")} |
| decoding | temperature {claim.get("generate.temperature")}, up to {claim.get("generate.max_new_tokens")} tokens |
"""
