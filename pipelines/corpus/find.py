"""Finds the corpus: its files, their format, and the columns to read. Runs once, on the driver."""

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pipelines.config.keys import InputConfig
from pipelines.corpus.choose import choose_format, files_of
from pipelines.corpus.columns import ColumnChoice, Columns
from pipelines.corpus.file import CorpusFile
from pipelines.corpus.format import Format, Found
from pipelines.corpus.formats import FORMATS
from pipelines.corpus.listing import Listing, list_files
from pipelines.corpus.suffixes import is_image
from pipelines.errors import UserError
from pipelines.store import Store, in_threads, make_store

logger = logging.getLogger(__name__)

PARQUET_MAGIC = b"PAR1"
NAMED_BY_ROWS = "image files that rows may name"
NUM_EXAMPLES = 3  # names that the line about what is left out shows for each reason


@dataclass(frozen=True, slots=True)
class Corpus:
    """The files of one format in a folder."""

    store: Store
    files: tuple[CorpusFile, ...]
    format: Format
    columns: Columns | None = None  # passed on to the format's functions; None for a format without columns
    left_out: Mapping[str, int] = field(default_factory=dict)  # what lies at input.path and is no part of it, by reason

    @property
    def num_rows(self) -> int:
        return sum(file.num_rows for file in self.files)


def input_corpus(
    chosen: InputConfig,
    *,
    image_column: str | None = None,
    id_column: str | None = None,
    reference_column: str = "none",
    templates: Sequence[str] = (),
) -> Corpus:
    """The corpus that a configuration names. A column that is None is the configuration's own.

    Raises:
        UserError: as of `find_corpus`.
    """
    return find_corpus(
        make_store(chosen.path, endpoint_url=chosen.endpoint_url, anonymous=chosen.anonymous),
        format=chosen.format,
        image_column=chosen.image_column if image_column is None else image_column,
        id_column=chosen.id_column if id_column is None else id_column,
        reference_column=reference_column,
        templates=templates,
        cache=make_store(chosen.cache) if chosen.cache else None,
        allow_paths=chosen.allow_paths,
    )


def find_corpus(
    store: Store,
    *,
    image_column: str,
    id_column: str,
    reference_column: str,
    templates: Sequence[str],
    format: str = "auto",
    formats: Sequence[Format] = FORMATS,
    cache: Store | None = None,
    allow_paths: Sequence[str] = (),
) -> Corpus:
    """The corpus at `store.path`: a file, a glob, or a folder (searched recursively).

    `format` is the name of one of `formats`, or `auto` for the format that the files' names tell. `cache` keeps what
    was learned about files that have to be read to be planned.

    Raises:
        UserError: if the format is unknown, the path holds no file or no file of the format or could be two formats, a
            file is damaged, or no image column is usable.
    """
    candidates = _candidate_formats(format, formats)
    listing = list_files(store, cache, allow_paths)
    choice = ColumnChoice(image_column, id_column, reference_column, tuple(templates))
    chosen, found = _find(candidates, listing, choice)
    left_out = _left_out(listing, chosen, found, formats)
    corpus = Corpus(listing.store, tuple(found.files), chosen, found.columns, left_out)
    shown_format = f"{format}, found {chosen.name}" if format == "auto" else format
    logger.info(
        "input.format=%s: %d files, %d rows in %s",
        shown_format,
        len(corpus.files),
        corpus.num_rows,
        corpus.store.path,
    )
    return corpus


def _candidate_formats(name: str, formats: Sequence[Format]) -> Sequence[Format]:
    """The formats that `input.format=name` allows."""
    candidates = [candidate for candidate in formats if name in ("auto", candidate.name)]
    if not candidates:
        known = ", ".join(["auto", *(candidate.name for candidate in formats)])
        raise UserError(f"input.format must be one of {known}, got {name!r}")
    return candidates


def _find(candidates: Sequence[Format], listing: Listing, choice: ColumnChoice) -> tuple[Format, Found]:
    """The format among the candidates that the listing has files of, and the corpus that it finds."""
    if any(candidate.recognises(name) for candidate in candidates for name in listing.sizes):
        if len(candidates) > 1:
            return choose_format(listing, candidates, choice)
        return candidates[0], candidates[0].files(listing, files_of(candidates[0], listing), choice)
    # Spark and others write Parquet files without a suffix.
    parquet = next((candidate for candidate in candidates if candidate.name == "parquet"), None)
    if parquet is not None and (names := _parquet_by_content(listing)):
        return parquet, parquet.files(listing, names, choice)
    *most, last = (candidate.title for candidate in candidates)
    titles = f"{', '.join(most)} or {last}" if most else last
    examples = ", ".join(list(listing.sizes)[:3])
    raise UserError(
        f"input.path must hold {titles} files, found {len(listing.sizes)} others in {listing.store.path}: {examples}"
    )


def _parquet_by_content(listing: Listing) -> list[str]:
    """Names of the files that begin as Parquet files do."""

    def begins(name: str) -> bool:
        return listing.store.fs.cat_file(listing.store.join(name), start=0, end=4) == PARQUET_MAGIC

    names = [name for name, size in listing.sizes.items() if size > 8]
    return [name for name, is_parquet in zip(names, in_threads(begins, names), strict=True) if is_parquet]


def _left_out(listing: Listing, chosen: Format, found: Found, formats: Sequence[Format]) -> dict[str, int]:
    """Counts by reason what is no part of the corpus, and says so in a line."""
    counts = Counter(listing.left_out)
    examples: dict[str, list[str]] = {}
    taken = {file.source for file in found.files}
    has_addresses = found.columns is not None and (found.columns.kind == "uri" or found.columns.with_paths)
    for name in listing.sizes.keys() - taken:
        if chosen.recognises(name):
            continue  # the format itself says why, if at all: a Parquet file may have no rows
        kinds = [format for format in formats if format.recognises(name)]
        if has_addresses and is_image(name):
            reason = NAMED_BY_ROWS
        elif kinds:
            reason = f"{kinds[0].title} files beside the {chosen.title} files"
        else:
            reason = "files without an image suffix" if chosen.one_image_a_file else "files of no known kind"
        counts[reason] += 1
        examples.setdefault(reason, []).append(name)
    counts.update(found.left_out)
    if counts.keys() - {NAMED_BY_ROWS}:
        shown = (f"{count} {reason}{_shown(examples.get(reason))}" for reason, count in counts.items())
        logger.warning("no part of the corpus in %s: %s", listing.store.path, ", ".join(shown))
    return dict(counts)


def _shown(names: Sequence[str] | None) -> str:
    return f" ({', '.join(sorted(names)[:NUM_EXAMPLES])})" if names else ""
