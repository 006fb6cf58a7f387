"""Rows of the quarantine that are tried again: which units hold them, and how a unit takes in what comes of them.

A unit stays one part of captions and one of quarantine under the same name. Its captions only ever grow: they are
written first, by one PUT, and the quarantine is written after them without the rows that are captioned now. So no row
is ever in neither of the two. If the job dies between the two writes, a row is in both; the same command mends that.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from typing import Any

from pipelines.corpus.file import CorpusFile, RowGroups
from pipelines.corpus.find import Corpus
from pipelines.errors import UserError
from pipelines.output.reader import DamagedPart, OutputReader, Part
from pipelines.output.schema import CAPTIONS_FOLDER, REASONS
from pipelines.output.span import with_row_groups
from pipelines.output.unit import Unit, parse_part, unit_key
from pipelines.store import Store

Row = tuple[str, int]  # source and row


def plan_redo(
    corpus: Corpus, output: Store, fingerprint: str, reasons: Collection[str], committed: Collection[str]
) -> Iterator[tuple[tuple[Unit, ...], RowGroups]]:
    """Yields a span for each committed unit with quarantined rows of these reasons, restricted to these rows.

    Files that the corpus does not have any more are left out.

    Raises:
        UserError: if a reason is unknown, or a part is damaged.
    """
    if unknown := [reason for reason in reasons if reason not in REASONS]:
        raise UserError(f"faults.redo must hold reasons of the quarantine ({', '.join(REASONS)}), got {unknown[0]!r}")
    if not reasons:
        return
    by_key = {unit_key([file], fingerprint): file for file in corpus.files}
    by_name = {file.source: file for file in corpus.files}
    names = sorted(set(committed) & output.list("quarantine").keys())
    for part in OutputReader(output).parts(["source", "row"], ["source", "row", "reason"], names):
        if isinstance(part, DamagedPart):
            raise UserError(f"{output.path}: {part}")
        key, start, stop = parse_part(part.name)
        wanted = _rejected(part, reasons)
        if not corpus.format.one_image_a_file:
            if wanted and (file := by_key.get(key)) is not None:
                redo = tuple(sorted(row - start for _, row in wanted))
                yield from with_row_groups(file, [[Unit(key, start, stop, (file.source,), redo)]])
            continue
        sources = tuple(part.totals["sources"])
        files: list[CorpusFile] = [by_name[source] for source in sources if source in by_name]
        if wanted and len(files) == len(sources):
            redo = tuple(i for i, source in enumerate(sources) if (source, 0) in wanted)
            yield (Unit(key, start, stop, sources, redo),), RowGroups()


def _rejected(part: Part, reasons: Collection[str]) -> set[Row]:
    if part.quarantine is None:
        return set()
    return {(row["source"], row["row"]) for row in part.quarantine.to_pylist() if row["reason"] in reasons}


def merge(
    unit: Unit,
    captions: list[dict[str, Any]],
    quarantine: list[dict[str, Any]],
    totals_of: Callable[[set[Row]], dict[str, Any]],
    output: Store,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """The rows and the totals of a committed unit with those of a further try, which takes nothing away.

    Args:
        captions, quarantine: of the rows that were tried again.
        totals_of: the totals of the try, with those of its captioned images that are given by source and row.

    Raises:
        OSError: if the committed part cannot be read.
    """
    reader = OutputReader(output, CAPTIONS_FOLDER)
    [part] = reader.parts(None, None, [unit.part])
    if isinstance(part, DamagedPart):
        raise OSError(str(part))
    old_captions = part.rows.to_pylist()
    old_quarantine = [] if part.quarantine is None else part.quarantine.to_pylist()
    known = {_row(row) for row in old_captions}
    fresh = [row for row in captions if _row(row) not in known]
    place = {source: i for i, source in enumerate(unit.sources)}
    merged = sorted(
        old_captions + fresh, key=lambda row: (place[row["source"]], row["row"])
    )  # stable: prompts in order
    captioned = known | {_row(row) for row in fresh}
    tried = {_row(row) for row in quarantine}
    rejected = [row for row in old_quarantine if _row(row) not in captioned | tried]
    rejected += [row for row in quarantine if _row(row) not in captioned]
    rejected.sort(key=lambda row: (place[row["source"]], row["row"]))
    old, new = part.totals, totals_of(captioned - known)
    counters = {name: dict(Counter(old.get(name, {})) + Counter(new[name])) for name in ("crop_tokens", "seconds")}
    sums = {name: old.get(name, 0) + value for name, value in new.items() if isinstance(value, int)}
    return (
        merged,
        rejected,
        {
            **old,
            **sums,
            **counters,
            "images_quarantined": len(rejected),
            "reasons": dict(Counter(row["reason"] for row in rejected)),
        },
    )


def _row(row: dict[str, Any]) -> Row:
    return row["source"], row["row"]
