"""The configuration of jobs/export.py."""

from dataclasses import dataclass, field
from typing import Literal

from pipelines.config.keys import Config
from pipelines.config.schema import key


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSection:
    """what is written, and where"""

    format: Literal["txt", "json", "tar", "parquet", "dataset"] = key(
        "txt, json: a file beside each image, or in a mirror of the corpus at export.path. tar: shards of key.jpg, "
        "key.txt and key.json, as WebDataset reads them. parquet: the corpus's Parquet files with columns added. "
        "dataset: a Hugging Face dataset folder with its card",
        "txt",
    )
    path: str | None = key(
        "folder for the export; local or s3://. null: beside the images, for txt and json of a folder of images"
    )
    endpoint_url: str | None = key("S3 endpoint of the export, if it is not AWS")
    column: str = key(
        "column of the first prompt's caption; further prompts get NAME_2, NAME_3, ..., provenance NAME_model, ...",
        "caption",
    )
    rejected: Literal["auto", "keep", "drop"] = key(
        "rows without a caption. keep: null, with the reason; drop: leave out; auto: keep for parquet, else drop. "
        "txt never has them",
        "auto",
    )
    images: bool = key(
        "tar, dataset: write the encoded images as well, fetched again where the corpus holds addresses; false leaves "
        "captions with their ids",
        True,
    )
    name: Literal["auto", "row", "id"] = key(
        "txt, json, tar of a corpus of rows: what a file is named after. auto: the id where the corpus is tar shards, "
        "else the row",
        "auto",
    )
    shard_images: int = key("most images of a shard (tar, dataset); a shard of a tar corpus stays whole", 5000, low=1)
    threads: int = key("files that are written at the same time", 4, low=1, high=64)
    overwrite: bool = key("write everything again, also over files beside the images that are not this export's", False)
    hub: str | None = key("dataset: push the finished folder to this repository of the Hugging Face hub, owner/name")
    hub_private: bool = key("create the repository on the hub as a private one", True)
    license: str | None = key("dataset: license for the card, e.g. cc-by-4.0")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig(Config):
    """The configuration of jobs/export.py: the caption job's keys of input and output, and the export."""

    export: ExportSection = field(default_factory=ExportSection)
