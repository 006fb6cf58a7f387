"""A .txt or .json file for each caption: beside the image, or in a folder that mirrors the corpus."""

import json
from collections.abc import Iterator

from pipelines.export import names
from pipelines.export.captions import CaptionColumns, Captioned
from pipelines.export.images import rows_of
from pipelines.export.pieces import Piece, stem
from pipelines.export.target import Target
from pipelines.store import Store, in_threads


def write_sidecars(
    piece: Piece,
    output: Store,
    target: Target,
    columns: CaptionColumns,
    *,
    kind: str,
    by_id: bool,
    keep: bool,
    overwrite: bool,
    shared: frozenset[str],
) -> list[str]:
    """Writes the files of a piece. None is the piece's alone: they stay if the corpus is cut otherwise.

    `shared` are the names of `names.shared_stems`.
    """
    taken: set[str] = set()

    def files() -> Iterator[tuple[str, bytes]]:
        for row in rows_of(piece, output):
            if not row.captions and not (keep and kind == "json" and row.error):
                continue
            if piece.file is None:
                name = names.beside(row, shared)
            else:
                name = f"{stem(piece.file.source)}/{names.unique(names.of_row(row, by_id), taken)}"
            yield from ((f"{name}.{suffix}", data) for suffix, data in texts(row, columns, kind))

    for _ in in_threads(lambda file: target.write_new(*file, overwrite), files()):
        pass
    return []


def texts(row: Captioned, columns: CaptionColumns, kind: str) -> Iterator[tuple[str, bytes]]:
    """Yields suffix and content of a row's files: one .json, or a .txt for each prompt."""
    if kind == "json":
        yield "json", to_json(row, columns)
        return
    for column, caption in zip(columns.texts, row.captions, strict=False):
        yield "txt" if column == columns.name else f"{column}.txt", caption["caption"].encode()


def to_json(row: Captioned, columns: CaptionColumns) -> bytes:
    """The row's address, captions and provenance."""
    values = {"id": row.id, "source": row.source, "row": row.row, **columns.values(row)}
    return json.dumps(values, ensure_ascii=False).encode()
