"""The captions of one piece of an export, joined to the rows of the corpus by source and row."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from pipelines.errors import JobFailedError
from pipelines.output.reader import DamagedPart, OutputReader, Part
from pipelines.output.unit import parse_part
from pipelines.store import Store

NOT_DONE = "not_done"  # stands for the reason of a row that the caption job has not reached yet

_OF_PROMPT = {  # what differs between the prompts of an image
    "prompt": pa.string(),
    "finish_reason": pa.string(),
    "num_kept_tokens": pa.int32(),
    "num_generated_tokens": pa.int32(),
}
_OF_ROW = {
    "model": pa.string(),
    "method": pa.string(),
    "retention": pa.float64(),
    "num_visual_tokens": pa.int32(),
    "sha256": pa.string(),
    "error": pa.string(),  # reason of the quarantine, or `NOT_DONE`; null beside a caption
}
_READ = ["id", "source", "row", "caption", "model", "method", "num_visual_tokens", "sha256", *_OF_PROMPT]
_READ_REJECTED = ["id", "source", "row", "sha256", "reason"]


@dataclass(slots=True)
class Captioned:
    """A row of the corpus with its captions, or with the reason why it has none."""

    source: str
    row: int
    id: str | None = None  # None: not known yet
    sha256: str | None = None
    captions: list[dict[str, Any]] = field(default_factory=list)  # one for each prompt, in the order of the prompts
    error: str | None = NOT_DONE


@dataclass(frozen=True, slots=True)
class CaptionColumns:
    """The columns that an export adds to a row: one for each prompt, and provenance in further ones."""

    name: str  # column of the first prompt's caption
    num_prompts: int
    retention: float | None

    @property
    def texts(self) -> list[str]:
        """The column of each prompt's caption."""
        return [self.name, *(f"{self.name}_{i}" for i in range(2, self.num_prompts + 1))]

    @property
    def schema(self) -> pa.Schema:
        fields = [(text, pa.string()) for text in self.texts]
        fields += [(f"{text}_{leaf}", kind) for text in self.texts for leaf, kind in _OF_PROMPT.items()]
        return pa.schema([*fields, *((f"{self.name}_{leaf}", kind) for leaf, kind in _OF_ROW.items())])

    def values(self, row: Captioned) -> dict[str, Any]:
        """The value of each column that is not null."""
        values: dict[str, Any] = {f"{self.name}_sha256": row.sha256, f"{self.name}_error": row.error}
        for text, caption in zip(self.texts, row.captions, strict=False):
            values[text] = caption["caption"]
            values |= {f"{text}_{leaf}": caption[leaf] for leaf in _OF_PROMPT}
        if row.captions:
            shared = ("model", "method", "num_visual_tokens")
            values |= {f"{self.name}_{leaf}": row.captions[0][leaf] for leaf in shared}
            values[f"{self.name}_retention"] = self.retention
        return {name: value for name, value in values.items() if value is not None}


def rows_of_file(output: Store, source: str, parts: Sequence[str], start: int, stop: int) -> Iterator[Captioned]:
    """Yields each of the rows [start, stop) of a file, in order. Memory holds a bounded number of parts.

    `parts` are the names of the parts that hold any of the rows, in the order of their rows.

    Raises:
        JobFailedError: if a part is damaged.
    """
    reached = start
    for part in _read(output, parts):
        _, first, last = parse_part(part.name)
        held = _by_address(part)
        for row in range(reached, min(last, stop)):
            captioned = held.get((source, row)) if row >= first else None
            yield captioned or Captioned(source, row)
        reached = max(reached, min(last, stop))
    for row in range(reached, stop):
        yield Captioned(source, row)


def rows_of_images(output: Store, parts: Sequence[str]) -> Iterator[Captioned]:
    """Yields a row for each image file that the parts account for, in the parts' own order.

    Raises:
        JobFailedError: if a part is damaged.
    """
    for part in _read(output, parts):
        held = _by_address(part)
        for source in part.totals["sources"]:
            yield held.get((source, 0)) or Captioned(source, 0)


def _read(output: Store, parts: Sequence[str]) -> Iterator[Part]:
    for part in OutputReader(output).parts(_READ, _READ_REJECTED, parts):
        if isinstance(part, DamagedPart):
            raise JobFailedError(str(part))
        yield part


def _by_address(part: Part) -> Mapping[tuple[str, int], Captioned]:
    """The rows of a part by source and row. The captions of an image stand in the order of the prompts."""
    rows: dict[tuple[str, int], Captioned] = {}
    for caption in part.rows.to_pylist():
        address = caption["source"], caption["row"]
        if address not in rows:
            rows[address] = Captioned(*address, caption["id"], caption["sha256"], error=None)
        rows[address].captions.append(caption)
    for rejected in part.quarantine.to_pylist() if part.quarantine is not None else ():
        address = rejected["source"], rejected["row"]
        rows[address] = Captioned(*address, rejected["id"], rejected["sha256"], error=rejected["reason"])
    return rows
