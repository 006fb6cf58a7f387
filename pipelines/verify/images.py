"""Reads a sample of the corpus's images again and compares their sha256 with that of their captions."""

import hashlib
import random
from collections.abc import Iterator

from pipelines.corpus.fetch import fetch_settings, fetcher_of
from pipelines.corpus.file import RowGroups
from pipelines.corpus.find import Corpus
from pipelines.corpus.format import Record
from pipelines.output.reader import DamagedPart, OutputReader
from pipelines.output.span import SpanRow, with_row_groups
from pipelines.output.unit import Unit, parse_part, unit_key
from pipelines.store import Store
from pipelines.verify.config import VerifyConfig
from pipelines.verify.verdict import Verdict

Address = tuple[str, int]  # source and row


def compare_images(
    config: VerifyConfig, corpus: Corpus, output: Store, mine: str, names: list[str], verdict: Verdict
) -> None:
    """Condemns parts with captions of another image than the corpus holds, found by `config.images` images.

    The sample takes one image of each of as many parts; which ones depends on the parts alone. An image that cannot be
    read now says nothing.
    """
    drawn = sorted(random.Random(mine).sample(names, min(config.images, len(names))))
    by_key = {unit_key([file], mine): file for file in corpus.files}
    by_name = {file.source: file for file in corpus.files}
    for part in OutputReader(output).parts(["source", "row", "sha256"], [], drawn):
        if isinstance(part, DamagedPart) or not len(part.rows):
            continue
        row = part.rows.to_pylist()[random.Random(part.name).randrange(len(part.rows))]
        file = by_key.get(parse_part(part.name)[0]) or by_name.get(row["source"])
        if file is None:
            continue
        unit = Unit("", row["row"], row["row"] + 1, (file.source,))
        [(units, groups)] = with_row_groups(file, [[unit]]) if file.row_groups else [((unit,), RowGroups())]
        for found in _hashes(config, corpus, SpanRow(units, groups, 0), (row["source"], row["row"])):
            if found != row["sha256"]:
                verdict.condemn(
                    part.name, unit.where, f"captions/{part.name} ({unit.where}): the image in the corpus is another"
                )


def _hashes(config: VerifyConfig, corpus: Corpus, span: SpanRow, address: Address) -> Iterator[str]:
    """The sha256 of the image at an address of the corpus, if it can be read."""
    fetcher = fetcher_of(corpus.store, fetch_settings(config.input), config.decode.max_bytes)

    def wanted() -> Iterator[Record]:
        records = corpus.format.records(
            corpus.store, span.rows, corpus.columns, max_bytes=config.decode.max_bytes, with_references=False
        )
        return (record for record in records if (record.source, record.row) == address)

    for _, data in fetcher.load(wanted()):
        if isinstance(data, bytes):
            yield hashlib.sha256(data).hexdigest()
