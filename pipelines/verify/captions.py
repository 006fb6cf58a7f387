"""Proving an output: every row of the input is in exactly one of captions and quarantine, exactly once.

Of an evaluation: every question of its benchmarks has exactly one prediction (verify_answers.py).

Asks the written Parquet objects alone, not the job's own records of them. Memory holds some objects at a time, and for
a folder of image files one counter a file.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.config.keys import Config
from pipelines.corpus.columns import template_fields
from pipelines.corpus.find import Corpus, find_corpus
from pipelines.errors import UserError
from pipelines.output.fingerprint import FILE, fingerprint, read_claim
from pipelines.output.reader import DamagedPart, OutputReader
from pipelines.output.reader import Part as Stored
from pipelines.output.schema import CAPTIONS_FOLDER
from pipelines.output.unit import parse_part, unit_key
from pipelines.store import STORE_ERRORS, Store, make_store
from pipelines.verify.verdict import Verdict, committed_names

Row = tuple[str, int]  # source and row


@dataclass(frozen=True, slots=True)
class Part:
    """A committed object with its quarantine: what it says of itself, and the rows that it holds."""

    name: str
    stored: dict[str, Any]  # metadata of the captions object
    prompts: dict[Row, list[str]]  # of every caption
    rejected: Counter[Row]
    reasons: Counter[str]


def verify(config: Config) -> Verdict:
    """Holds the output against the input; prompts, columns and benchmarks are those that the output was made with.

    Raises:
        UserError: if there is no such input, or the output is none of a caption job or an evaluation.
    """
    output = make_store(config.output.path, endpoint_url=config.output.endpoint_url)
    claim = _read_claim(output)
    if "benchmarks" in claim:
        from pipelines.verify.answers import verify_answers  # which needs this module

        return verify_answers(config, output, claim)
    templates = [claim["prompt.template"], *claim["prompt.more"]]
    corpus = find_corpus(
        make_store(config.input.path, endpoint_url=config.input.endpoint_url, anonymous=config.input.anonymous),
        format=config.input.format,
        image_column=claim["input.image_column"],
        id_column=claim["input.id_column"],
        reference_column="none",
        templates=templates,
    )
    verdict, mine = Verdict(), fingerprint(claim)
    committed = committed_names(output, CAPTIONS_FOLDER, verdict)
    expected = _image_rows if corpus.format.one_image_a_file else _file_rows

    def read(names: list[str]) -> Iterator[Part]:
        for stored in OutputReader(output).parts(["source", "row", "prompt"], ["source", "row", "reason"], names):
            if isinstance(stored, DamagedPart):
                verdict.differ(str(stored))
            else:
                yield _count_rows(stored)

    for part, rows in expected(corpus, committed, mine, config.input.limit, verdict, read):
        _check_part(part, rows, templates, mine, verdict)
    return verdict


def _read_claim(output: Store) -> dict[str, Any]:
    try:
        claim = read_claim(output)
    except STORE_ERRORS as error:
        raise UserError(f"output.path {output.path} cannot be read: {type(error).__name__}: {error}") from error
    if claim is None:
        raise UserError(
            f"output.path must be the output of a caption job or an evaluation, found no {FILE} in {output.path}"
        )
    return claim


def _count_rows(stored: Stored) -> Part:
    prompts: dict[Row, list[str]] = defaultdict(list)
    for source, row, prompt in zip(*(column.to_pylist() for column in stored.rows.columns), strict=True):
        prompts[source, row].append(prompt)
    rejected, reasons = Counter(), Counter()
    if stored.quarantine is not None:
        rejected.update(zip(*(column.to_pylist() for column in stored.quarantine.columns[:2]), strict=True))
        reasons.update(stored.quarantine["reason"].to_pylist())
    return Part(stored.name, stored.totals, prompts, rejected, reasons)


Read = Callable[[list[str]], Iterable[Part]]
Expected = Iterator[tuple[Part, list[Row]]]


def _file_rows(
    corpus: Corpus, committed: list[str], mine: str, limit: int | None, verdict: Verdict, read: Read
) -> Expected:
    """Every part with the rows that its name promises; overlaps, gaps and unknown files are differences."""
    by_key: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for name in committed:
        key, start, stop = parse_part(name)
        by_key[key].append((start, stop, name))
    for file in corpus.files:
        end = file.num_rows if limit is None else min(file.num_rows, limit - verdict.rows)
        ranges, reached = sorted(by_key.pop(unit_key([file], mine), [])), 0
        for start, stop, name in [*ranges, (max(end, 0), file.num_rows, "")]:
            if start > reached:
                verdict.differ(f"{file.source}: rows {reached} to {start - 1} have no output")
            if name and start < reached:
                verdict.differ(
                    f"{file.source}: rows {start} to {min(stop, reached) - 1} are in two objects, one is {name}"
                )
            reached = max(reached, stop)
        verdict.rows += max(end, 0)
        for part in read([name for *_, name in ranges]):
            _, start, stop = parse_part(part.name)
            yield part, [(file.source, row) for row in range(start, stop)]
    for name in sorted(name for ranges in by_key.values() for *_, name in ranges):
        verdict.differ(f"captions/{name} is of a file that is not in the input, or of another configuration")


def _image_rows(
    corpus: Corpus, committed: list[str], mine: str, limit: int | None, verdict: Verdict, read: Read
) -> Expected:
    """Every part with the files that its metadata promises; files in none or in two of them are differences."""
    files, seen = {file.source: file for file in corpus.files}, Counter()
    for part in read(committed):
        sources = part.stored["sources"]
        seen.update(sources)
        known = [files[source] for source in sources if source in files]
        if len(known) != len(sources) or parse_part(part.name)[0] != unit_key(known, mine):
            verdict.differ(f"captions/{part.name} is of files that are not in the input, or of another configuration")
        yield part, [(source, 0) for source in sources]
    wanted = [file.source for file in corpus.files[:limit]]
    verdict.rows = len(wanted)
    for source in wanted:
        if not seen[source]:
            verdict.differ(f"{source} has no output")
    for source in (source for source, count in seen.items() if count > 1):
        verdict.differ(f"{source} is in {seen[source]} objects")


def _check_part(part: Part, rows: list[Row], templates: list[str], mine: str, verdict: Verdict) -> None:
    """Every expected row is captioned under every prompt or quarantined, and the metadata says the same."""
    captioned = 0
    fixed = Counter(template for template in templates if not template_fields(template))
    for row in rows:
        prompts, rejected = part.prompts.get(row, []), part.rejected[row]
        fits = len(prompts) == len(templates) and Counter(prompts) >= fixed
        if rejected + bool(prompts) != 1 or (prompts and not fits):
            where = f"{row[0]} row {row[1]} in {part.name}"
            verdict.differ(f"{where}: {len(prompts)} of {len(templates)} captions, {rejected} quarantine rows")
        captioned += bool(prompts)
    for source, row in sorted(({*part.prompts} | {*part.rejected}) - {*rows}):
        verdict.differ(f"{source} row {row} does not belong into {part.name}")
    stored = part.stored
    if stored["fingerprint"] != mine:
        verdict.differ(f"captions/{part.name} has the fingerprint {stored['fingerprint']}, the output {mine}")
    if (stored["images_captioned"], stored["images_quarantined"]) != (captioned, part.rejected.total()):
        verdict.differ(f"captions/{part.name} counts other images in its metadata than it holds")
    verdict.captioned += captioned
    verdict.captions += sum(map(len, part.prompts.values()))
    verdict.reasons += part.reasons
