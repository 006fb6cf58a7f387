"""Cuts an export into pieces, each of which is written, and written again if its captions change, as a whole."""

import hashlib
import json
import logging
import posixpath
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from pipelines.corpus.file import CorpusFile
from pipelines.corpus.find import Corpus
from pipelines.errors import UserError
from pipelines.output.plan import committed_parts
from pipelines.output.reader import QUARANTINE_FOLDER, OutputReader
from pipelines.output.schema import CAPTIONS_FOLDER
from pipelines.output.unit import parse_part, unit_key
from pipelines.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows [start, stop) of a file, or the image files of some parts."""

    name: str  # of what is written, relative to the export, without a suffix
    file: CorpusFile | None  # None for image files
    start: int
    stop: int
    parts: tuple[str, ...]  # parts that hold the rows, in the order of the rows
    stamp: str  # hash of the captions and the settings that decide what is written


@dataclass(frozen=True, slots=True)
class Cut:
    """How pieces are cut and named."""

    rows: int | None  # most rows of a piece; None: a piece is a whole file
    numbered: bool  # whether pieces are named by their number instead of their file
    settings: Sequence[object]  # what else decides the bytes


def make_pieces(corpus: Corpus, output: Store, fingerprint: str, cut: Cut) -> list[Piece]:
    """The pieces of the whole corpus, in order. Captions of files that the corpus lacks are left out with a warning.

    Raises:
        UserError: if the output holds no captions of this corpus.
    """
    sizes = [output.list(folder) for folder in (CAPTIONS_FOLDER, QUARANTINE_FOLDER)]
    names = committed_parts(output, CAPTIONS_FOLDER)
    known = [name for name, size in sizes[0].items() if name in names]
    if not known:
        raise UserError(f"output.path must be the output of a caption job, found no captions in {output.path}")

    def stamp(*what: object, parts: Sequence[str]) -> str:
        # A part that is rewritten keeps its name: its size tells, and that of its quarantine.
        committed = [(part, *(folder.get(part) for folder in sizes)) for part in parts]
        return hashlib.sha256(json.dumps([fingerprint, cut.settings, what, committed]).encode()).hexdigest()[:16]

    pieces = _image_pieces(output, known, cut) if corpus.format.one_image_a_file else None
    if pieces is None:
        pieces = _row_pieces(corpus, _by_file(corpus, output, fingerprint, known), cut)
    return [
        Piece(name, file, start, stop, parts, stamp(file and (file.source, file.size), start, stop, parts=parts))
        for name, file, start, stop, parts in pieces
    ]


Pieces = Iterator[tuple[str, CorpusFile | None, int, int, tuple[str, ...]]]
Parts = list[tuple[int, int, str]]  # start, stop and name of parts, sorted


def _by_file(corpus: Corpus, output: Store, fingerprint: str, names: Sequence[str]) -> Mapping[str, Parts]:
    """The parts of each file by its source."""
    sources = {unit_key([file], fingerprint): file.source for file in corpus.files}
    parts: dict[str, Parts] = defaultdict(list)
    unknown = 0
    for name in names:
        key, start, stop = parse_part(name)
        if key in sources:
            parts[sources[key]].append((start, stop, name))
        else:
            unknown += 1
    if not parts:
        raise UserError(f"{output.path} holds captions of other files than {corpus.store.path}, or of changed ones")
    if unknown:
        logger.warning("%d parts are of files that input.path lacks, or that changed: left out", unknown)
    return {source: sorted(ranges) for source, ranges in parts.items()}


def _row_pieces(corpus: Corpus, parts: Mapping[str, Parts], cut: Cut) -> Pieces:
    count = 0
    for file in corpus.files:
        own = parts.get(file.source, [])
        whole = cut.rows is None or file.num_rows <= cut.rows or is_tar(file.source)
        size = file.num_rows if whole else cut.rows or 1
        for number, start in enumerate(range(0, file.num_rows, size)):
            stop = min(start + size, file.num_rows)
            held = tuple(name for a, b, name in own if a < stop and b > start)
            name = stem(file.source) if whole else f"{stem(file.source)}-{number:05d}"
            yield f"{count:05d}" if cut.numbered else name, file, start, stop, held
            count += 1


def _image_pieces(output: Store, names: Sequence[str], cut: Cut) -> Pieces:
    """Consecutive parts, up to `cut.rows` images together, or a part if that has more."""
    sources = (totals["sources"] for totals in OutputReader(output).totals(names))
    ordered = sorted((held[0], len(held), name) for held, name in zip(sources, names, strict=True))
    group: list[str] = []
    held = count = 0
    for _, num_images, name in ordered:
        if group and held + num_images > (cut.rows or 1):
            yield f"{count:05d}", None, 0, held, tuple(group)
            group, held, count = [], 0, count + 1
        group.append(name)
        held += num_images
    yield f"{count:05d}", None, 0, held, tuple(group)


def is_tar(source: str) -> bool:
    """Whether a file of the corpus is a tar shard by its name."""
    return source.lower().endswith((".tar", ".tar.gz", ".tgz"))


def stem(source: str) -> str:
    """The name of a file without its suffix, a tar's with neither of two."""
    if is_tar(source):
        return source[: source.lower().rindex(".t")]
    return posixpath.splitext(source)[0]
