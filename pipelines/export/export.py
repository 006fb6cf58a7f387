"""Exports the committed captions of an output, piece by piece.

A piece that is written gets a mark, whose name is a hash of the piece's captions and of the settings. So a killed
export goes on where it was, and an export of an output that has grown writes the pieces that grew.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from pipelines.corpus.fetch import Fetcher, fetch_settings, fetcher_of
from pipelines.corpus.find import Corpus, input_corpus
from pipelines.errors import JobFailedError, UserError
from pipelines.export import dataset, names
from pipelines.export.captions import CaptionColumns
from pipelines.export.config import ExportConfig
from pipelines.export.parquet import write_parquet
from pipelines.export.pieces import Cut, Piece, is_tar, make_pieces
from pipelines.export.sidecars import write_sidecars
from pipelines.export.tar import write_tar
from pipelines.export.target import Target
from pipelines.output.fingerprint import FILE, fingerprint, read_claim
from pipelines.output.lease import other_holder
from pipelines.store import STORE_ERRORS, Store, make_store

logger = logging.getLogger(__name__)

Write = Callable[[Piece], list[str]]  # writes a piece, and returns the files that belong to it alone


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export did."""

    path: str
    pieces: int
    written: int  # pieces of this run; the others were there
    hub: str | None = None  # address of the repository that it was pushed to


def export(config: ExportConfig) -> Exported:
    """Writes what `export` asks for.

    Raises:
        UserError: if there is no such corpus or output, or the keys do not fit them.
        JobFailedError: if files of the corpus or parts of the output cannot be read; all other pieces are written.
    """
    output = make_store(config.output.path, endpoint_url=config.output.endpoint_url)
    claim = _read_claim(output)
    if (holder := other_holder(output)) is not None:
        logger.warning(
            "output.path %s is being written by %s: what is committed by now is exported", output.path, holder
        )
    corpus = input_corpus(
        config.input,
        image_column=claim["input.image_column"],
        id_column=claim["input.id_column"],
    )
    _check(config, corpus)
    target = Target(_target_store(config, corpus))
    columns = CaptionColumns(config.export.column, 1 + len(claim["prompt.more"]), claim.get("prune.retention"))
    pieces = make_pieces(corpus, output, fingerprint(claim), _cut(config))
    target.begin()
    shards = config.export.format in ("tar", "parquet", "dataset")
    done = target.finished(pieces, tidy=shards)
    todo = pieces if config.export.overwrite else [piece for piece in pieces if piece.name not in done]
    fetcher = fetcher_of(corpus.store, fetch_settings(config.input), claim["decode.max_bytes"])
    write = _writer(config, corpus, output, target, columns, len(pieces), fetcher)
    _run(todo, write, target, config.export.threads)
    address = None
    if config.export.format == "dataset":
        dataset.write_card(target, claim, columns, license=config.export.license, images=config.export.images)
        if config.export.hub:
            address = dataset.push(target, config.export.hub, config.export.hub_private)
    return Exported(target.store.path, len(pieces), len(todo), address)


def _read_claim(output: Store) -> dict[str, Any]:
    try:
        claim = read_claim(output)
    except STORE_ERRORS as error:
        raise UserError(f"output.path {output.path} cannot be read: {type(error).__name__}: {error}") from error
    if claim is None or "prompt.template" not in claim:
        raise UserError(f"output.path must be the output of a caption job, found no such {FILE} in {output.path}")
    return claim


def _check(config: ExportConfig, corpus: Corpus) -> None:
    export = config.export
    if export.format == "parquet" and corpus.format.name != "parquet":
        raise UserError(
            f"export.format=parquet adds columns to a corpus of Parquet files, found {corpus.format.title} files; "
            "export.format=dataset writes Parquet of any corpus"
        )
    if export.hub and export.format != "dataset":
        raise UserError(f"export.hub pushes export.format=dataset, got {export.format}")
    if not export.path and not (export.format in ("txt", "json") and corpus.format.one_image_a_file):
        raise UserError("export.path must name a folder; only txt and json of a folder of images may do without")


def _target_store(config: ExportConfig, corpus: Corpus) -> Store:
    if config.export.path is None:
        return corpus.store
    target = make_store(config.export.path, endpoint_url=config.export.endpoint_url)
    for key, other in (("input.path", corpus.store), ("output.path", make_store(config.output.path))):
        if target.path == other.path and (
            key == "output.path" or config.export.format in ("tar", "parquet", "dataset")
        ):
            raise UserError(f"export.path must differ from {key}, got {target.path} for both")
    return target


def _cut(config: ExportConfig) -> Cut:
    export = config.export
    settings = (export.format, export.column, export.rejected, export.images, export.name)
    rows = None if export.format == "parquet" else export.shard_images
    return Cut(rows, numbered=export.format == "dataset", settings=settings)


def _writer(
    config: ExportConfig,
    corpus: Corpus,
    output: Store,
    target: Target,
    columns: CaptionColumns,
    num_pieces: int,
    fetcher: Fetcher,
) -> Write:
    """What writes a piece in the format that is asked for."""
    export = config.export
    keep = export.rejected == "keep" or (export.rejected == "auto" and export.format == "parquet")
    of_tar = all(is_tar(file.source) for file in corpus.files)
    by_id = export.name == "id" or (export.name == "auto" and of_tar)
    match export.format:
        case "parquet":
            return partial(write_parquet, corpus=corpus, output=output, target=target, columns=columns, keep=keep)
        case "tar":
            return partial(
                write_tar,
                corpus=corpus,
                output=output,
                target=target,
                columns=columns,
                by_id=by_id,
                keep=keep,
                images=export.images,
                fetcher=fetcher,
            )
        case "dataset":
            return partial(
                dataset.write_dataset,
                num_pieces=num_pieces,
                corpus=corpus,
                output=output,
                target=target,
                columns=columns,
                keep=keep,
                images=export.images,
                fetcher=fetcher,
            )
    files = corpus.files if corpus.format.one_image_a_file else ()
    return partial(
        write_sidecars,
        output=output,
        target=target,
        columns=columns,
        kind=export.format,
        by_id=by_id,
        keep=keep,
        overwrite=export.overwrite,
        shared=names.shared_stems(file.source for file in files),
    )


def _run(pieces: Iterable[Piece], write: Write, target: Target, threads: int) -> None:
    """Writes and marks the pieces, `threads` at a time. What cannot be read costs its own piece.

    Raises:
        JobFailedError: at the end, if pieces failed; it names the first.
    """

    def work(piece: Piece) -> None:
        target.finish(piece, write(piece))

    failures: list[str] = []
    for piece, future in _bounded(work, pieces, threads):
        try:
            future.result()
            logger.info("export: %s", piece.name)
        except JobFailedError as error:
            failures.append(f"{piece.name}: {error}")
            logger.warning("export: %s", failures[-1])
    target.close()
    if failures:
        raise JobFailedError(f"{len(failures)} pieces could not be written, the first is {failures[0]}")


def _bounded(
    work: Callable[[Piece], None], pieces: Iterable[Piece], threads: int
) -> Iterator[tuple[Piece, Future[None]]]:
    """Yields each piece with its finished work, in order; at most `threads` are under way."""
    waiting: deque[tuple[Piece, Future[None]]] = deque()
    pool = ThreadPoolExecutor(threads)
    try:
        for piece in pieces:
            waiting.append((piece, pool.submit(work, piece)))
            if len(waiting) >= threads:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        pool.shutdown(cancel_futures=True)
