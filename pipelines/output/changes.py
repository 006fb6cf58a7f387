"""A corpus that lost or changed files since they were captioned: what becomes of their captions, and what is planned.

A part tells its files by its name, which holds a hash of their names, sizes and tags; the names stand in its metadata.
"""

import logging
from typing import Literal

from pipelines.corpus.find import Corpus
from pipelines.output.reader import OutputReader
from pipelines.output.unit import parse_part, unit_key
from pipelines.store import Store

logger = logging.getLogger(__name__)

OnChanged = Literal["refuse", "skip", "redo"]


def settle_changes(
    corpus: Corpus,
    output: Store,
    fingerprint: str,
    committed: frozenset[str],
    on_changed: OnChanged,
    *,
    tidy: bool,
) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    """The files to leave out, the committed parts that account for files of the corpus, and all parts that stay.

    With `skip`, files of which the output has other content are left out. With `redo`, the parts of such files are
    removed (with `tidy`). Parts of files that are lost stay and account for nothing. Of a unit of image files of which
    some changed, all count as changed, unless others of them are lost: then none is known to have changed.
    """
    by_name = {file.source: file for file in corpus.files}
    keys = {unit_key([file], fingerprint) for file in corpus.files}
    unknown = sorted(name for name in committed if parse_part(name)[0] not in keys)
    lost: set[str] = set()
    changed: dict[str, list[str]] = {}  # part -> its files
    foreign: set[str] = set()  # parts of which no file is in the corpus
    for name, totals in zip(unknown, OutputReader(output).totals(unknown), strict=True):
        sources = totals["sources"]
        files = [by_name[source] for source in sources if source in by_name]
        lost.update(source for source in sources if source not in by_name)
        if not files:
            foreign.add(name)
        elif len(files) == len(sources) and unit_key(files, fingerprint) != parse_part(name)[0]:
            changed[name] = sources
    sources = {source for names in changed.values() for source in names}
    if lost or sources:
        what = "left out, their captions are kept" if on_changed == "skip" else "captioned again"
        logger.warning("%d captioned files are lost; of %d, units have changed: %s", len(lost), len(sources), what)
    if on_changed == "redo" and tidy:
        for name in changed:
            output.delete(f"captions/{name}")  # first: what is only in quarantine counts as undone
            output.delete(f"quarantine/{name}")
    left_out = frozenset(sources if on_changed == "skip" else ())
    staying = committed - changed.keys() if on_changed == "redo" else committed
    return left_out, committed - changed.keys() - foreign, staying
