"""Checks one part of captions with its quarantine in itself: columns, types, nulls, rows, metadata and digest."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.corpus.columns import template_fields
from pipelines.output.parts import DIGEST_KEY, digest_of
from pipelines.output.reader import Part
from pipelines.output.schema import CAPTIONS, QUARANTINE, REASONS

Row = tuple[str, int]  # source and row
ADDED = frozenset(("num_attempts",))  # columns that parts of earlier versions lack
MAY_BE_NULL = frozenset(("sha256",))  # in quarantine: of an image without bytes
FINISH_REASONS = frozenset(("stop", "length", "loop"))


@dataclass(frozen=True, slots=True)
class Expected:
    """What a part must hold."""

    rows: Sequence[Row]
    templates: Sequence[str]
    fingerprint: str


def faults_of(part: Part, expected: Expected) -> Iterator[str]:
    """Yields what is wrong with a part, one line for people each; the first kind of fault ends the search."""
    tables = [("captions", part.rows, CAPTIONS)]
    tables += [] if part.quarantine is None else [("quarantine", part.quarantine, QUARANTINE)]
    checks = (
        lambda: (fault for folder, table, schema in tables for fault in _columns(folder, table, schema)),
        lambda: _values(part),
        lambda: _rows(part, expected),
        lambda: _metadata(part, expected),
        lambda: (fault for folder, table, _ in tables for fault in altered(folder, table)),
    )
    for check in checks:  # each relies on what those before it found in order
        if found := list(check()):
            yield from found
            return


def _columns(folder: str, table: pa.Table, schema: pa.Schema) -> Iterator[str]:
    """Missing columns, other types, and nulls, which none of the columns of captions may hold."""
    for field in schema:
        if field.name not in table.column_names:
            if field.name not in ADDED:
                yield f"{folder} lacks the column {field.name}"
        elif table.schema.field(field.name).type != field.type:
            yield f"{folder}.{field.name} must be {field.type}, got {table.schema.field(field.name).type}"
        elif nulls := [] if folder == "quarantine" and field.name in MAY_BE_NULL else _nulls(table, field.name):
            yield f"{folder}.{field.name} is null in {_where(nulls)}"


def _nulls(table: pa.Table, column: str) -> list[Row]:
    if not table[column].null_count:
        return []
    rows = table.select(["source", "row", column]).to_pylist()
    return [_row(row) for row in rows if row[column] is None]


def _values(part: Part) -> Iterator[str]:
    """Hashes, reasons and counts that nothing could have written."""
    captions = part.rows.to_pylist()
    wrong: dict[str, list[Row]] = defaultdict(list)
    for row in captions:
        where = _row(row)
        if not re.fullmatch("[0-9a-f]{64}", row["sha256"]):
            wrong["captions.sha256 is no sha256 in"].append(where)
        if row["finish_reason"] not in FINISH_REASONS:
            wrong[f"captions.finish_reason must be one of {', '.join(sorted(FINISH_REASONS))} in"].append(where)
        if min(row[name] for name in ("num_visual_tokens", "num_kept_tokens", "num_generated_tokens", "row")) < 0:
            wrong["captions holds a negative number in"].append(where)
    for row in [] if part.quarantine is None else part.quarantine.to_pylist():
        if REASONS.get(row["reason"]) != row["stage"]:
            wrong["quarantine holds a reason that is none, or one of another stage, in"].append(_row(row))
    hashes: dict[Row, set[str]] = defaultdict(set)
    for row in captions:
        hashes[_row(row)].add(row["sha256"])
    wrong["captions has two sha256 of one image in"] += [where for where, found in hashes.items() if len(found) > 1]
    yield from (f"{what} {_where(rows)}" for what, rows in wrong.items() if rows)


def _rows(part: Part, expected: Expected) -> Iterator[str]:
    """Each expected row must be captioned under every prompt, or quarantined, and there must be no other.

    The prompt of a template with fields differs from row to row. So such prompts are counted, and the text is compared
    only of templates without fields.
    """
    prompts, quarantined = prompts_of(part), quarantined_of(part)
    fixed = Counter(template for template in expected.templates if not template_fields(template))
    for row in expected.rows:
        mine, rejected = prompts.get(row, []), quarantined[row]
        complete = len(mine) == len(expected.templates) and Counter(mine) >= fixed
        if rejected + bool(mine) != 1 or (mine and not complete):
            number = f"{len(mine)} of {len(expected.templates)} captions, {rejected} quarantine rows"
            yield f"{row[0]} row {row[1]}: {number}"
    for source, row in sorted(({*prompts} | {*quarantined}) - {*expected.rows}):
        yield f"{source} row {row} does not belong here"


def prompts_of(part: Part) -> dict[Row, list[str]]:
    """The prompt of each caption by the row of its image."""
    prompts: dict[Row, list[str]] = defaultdict(list)
    for source, row, prompt in zip(*(part.rows[n].to_pylist() for n in ("source", "row", "prompt")), strict=True):
        prompts[source, row].append(prompt)
    return prompts


def quarantined_of(part: Part) -> Counter[Row]:
    """How often each row is in quarantine."""
    if part.quarantine is None:
        return Counter()
    return Counter(zip(*(part.quarantine[name].to_pylist() for name in ("source", "row")), strict=True))


def _metadata(part: Part, expected: Expected) -> Iterator[str]:
    """Metadata that says something else than the part's name and its rows. Resumes and totals rely on it."""
    captions, quarantine = part.rows, part.quarantine
    reasons = [] if quarantine is None else quarantine["reason"].to_pylist()
    found = {
        "unit": part.name.removeprefix("part-").removesuffix(".parquet"),
        "fingerprint": expected.fingerprint,
        "images_captioned": len(prompts_of(part)),
        "images_quarantined": len(reasons),
        "captions": len(captions),
        "prompt_tokens": sum(captions["num_prompt_tokens"].to_pylist()),
        "generated_tokens": sum(captions["num_generated_tokens"].to_pylist()),
        "finished_by_length": captions["finish_reason"].to_pylist().count("length"),
        "reasons": dict(Counter(reasons)),
    }
    for name, value in found.items():
        if part.totals.get(name) != value:
            yield f"its metadata must say {name}={value!r}, got {part.totals.get(name)!r}"
    sources = {source for source, _ in expected.rows}
    if set(part.totals.get("sources", ())) != sources:
        yield f"its metadata must name the files {', '.join(sorted(sources))}"


def altered(folder: str, table: pa.Table) -> Iterator[str]:
    """Yields a line if any value of a table is another than was written. Parts of earlier versions have no digest."""
    written = (table.schema.metadata or {}).get(DIGEST_KEY)
    if written is not None and written != digest_of(table).encode():
        yield f"{folder} holds other values than were written"


def _row(row: dict[str, Any]) -> Row:
    return row["source"], row["row"]


def _where(rows: Sequence[Row]) -> str:
    (source, row), more = rows[0], len(rows) - 1
    return f"{source} row {row}" + (f" and {more} more" if more else "")


def totals_of(part: Part) -> dict[str, Any]:
    """What a part adds to a verdict."""
    reasons = Counter() if part.quarantine is None else Counter(part.quarantine["reason"].to_pylist())
    return {"captioned": len(prompts_of(part)), "captions": len(part.rows), "reasons": reasons}
