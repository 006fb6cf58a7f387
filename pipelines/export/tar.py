"""Tar shards as WebDataset reads them: the files of a row share a key and stand side by side."""

import io
import tarfile

from pipelines.corpus.fetch import Fetcher
from pipelines.corpus.find import Corpus
from pipelines.export import names
from pipelines.export.captions import CaptionColumns
from pipelines.export.images import rows_of, rows_with_images, suffix_of
from pipelines.export.pieces import Piece
from pipelines.export.sidecars import texts, to_json
from pipelines.export.target import Target
from pipelines.store import Store


def write_tar(
    piece: Piece,
    corpus: Corpus,
    output: Store,
    target: Target,
    columns: CaptionColumns,
    *,
    by_id: bool,
    keep: bool,
    images: bool,
    fetcher: Fetcher,
) -> list[str]:
    """Writes the shard of a piece and returns its name. Equal captions and images give equal bytes."""
    name, taken = f"{piece.name}.tar", set()
    if images:
        rows = rows_with_images(piece, corpus, output, fetcher, keep)
    else:
        rows = ((row, None) for row in rows_of(piece, output) if keep or row.captions)
    with target.stream(name) as stream, tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as shard:
        for row, data in rows:
            if piece.file is None:
                key = names.key_of_image(row, taken)
            else:
                key = names.unique(names.of_row(row, by_id), taken)
            if data is not None:
                _add(shard, f"{key}.{suffix_of(data)}", data)
            for suffix, text in texts(row, columns, "txt"):
                _add(shard, f"{key}.{suffix}", text)
            _add(shard, f"{key}.json", to_json(row, columns))
    return [name]


def _add(shard: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)  # its time is 0, its owner nobody
    member.size = len(data)
    shard.addfile(member, io.BytesIO(data))
