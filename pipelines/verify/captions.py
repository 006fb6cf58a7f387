"""Verifies an output: every row of the input is either captioned or in quarantine, exactly once.

`answers.py` verifies the output of an evaluation: every question of its benchmarks has exactly one prediction.

Only the committed Parquet parts are evidence; the job's own records of its work are not read. Memory holds a few parts
at a time and, for a folder of image files, one counter for each file.
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
from pipelines.output.reader import Part as StoredPart
from pipelines.output.schema import CAPTIONS_FOLDER
from pipelines.output.unit import parse_part, unit_key
from pipelines.store import STORE_ERRORS, Store, make_store
from pipelines.verify.verdict import Verdict, committed_names

Row = tuple[str, int]  # source and row


@dataclass(frozen=True, slots=True)
class Part:
    """A committed part with its quarantine: its metadata, and the rows that it holds."""

    name: str
    metadata: dict[str, Any]  # of the captions
    prompts: dict[Row, list[str]]  # row -> the prompt of each of its captions
    quarantined: Counter[Row]
    reasons: Counter[str]


def verify(config: Config) -> Verdict:
    """Compares the output with the input. Prompts, columns and benchmarks come from the output's own fingerprint file.

    Raises:
        UserError: if there is no such input, or the output is not that of a caption job or an evaluation.
    """
    output = make_store(config.output.path, endpoint_url=config.output.endpoint_url)
    claim = _read_claim(output)
    if "benchmarks" in claim:
        from pipelines.verify.answers import verify_answers  # imported here: captions need no benchmarks

        return verify_answers(config, output, claim)
    templates = [claim["prompt.template"], *claim["prompt.more"]]
    corpus = find_corpus(
        make_store(config.input.path, endpoint_url=config.input.endpoint_url, anonymous=config.input.anonymous),
        format=config.input.format,
        image_column=claim["input.image_column"],
        id_column=claim["input.id_column"],
        reference_column="none",
        templates=templates,
        cache=make_store(config.input.cache) if config.input.cache else None,
    )
    verdict, fingerprint_of_output = Verdict(), fingerprint(claim)
    committed = committed_names(output, CAPTIONS_FOLDER, verdict)
    parts_with_rows = _image_parts if corpus.format.one_image_a_file else _file_parts

    def read(names: list[str]) -> Iterator[Part]:
        for stored in OutputReader(output).parts(["source", "row", "prompt"], ["source", "row", "reason"], names):
            if isinstance(stored, DamagedPart):
                verdict.differ(str(stored))
            else:
                yield _count_rows(stored)

    for part, rows in parts_with_rows(corpus, committed, fingerprint_of_output, config.input.limit, verdict, read):
        _check_part(part, rows, templates, fingerprint_of_output, verdict)
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


def _count_rows(stored: StoredPart) -> Part:
    prompts: dict[Row, list[str]] = defaultdict(list)
    for source, row, prompt in zip(*(column.to_pylist() for column in stored.rows.columns), strict=True):
        prompts[source, row].append(prompt)
    quarantined, reasons = Counter(), Counter()
    if stored.quarantine is not None:
        quarantined.update(zip(*(column.to_pylist() for column in stored.quarantine.columns[:2]), strict=True))
        reasons.update(stored.quarantine["reason"].to_pylist())
    return Part(stored.name, stored.totals, prompts, quarantined, reasons)


Read = Callable[[list[str]], Iterable[Part]]
PartsWithRows = Iterator[tuple[Part, list[Row]]]  # each part with the rows that it must hold


def _file_parts(
    corpus: Corpus, committed: list[str], fingerprint_of_output: str, limit: int | None, verdict: Verdict, read: Read
) -> PartsWithRows:
    """Every part with the rows that its name promises. Overlaps, gaps and unknown files are differences.

    The ranges of a file are swept in order: `reached` is the first row that no earlier part covers. A last, empty range
    without a name starts where the input ends, so that rows without output at the end are a gap like any other.
    """
    by_key: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for name in committed:
        key, start, stop = parse_part(name)
        by_key[key].append((start, stop, name))
    for file in corpus.files:
        end = file.num_rows if limit is None else min(file.num_rows, limit - verdict.rows)
        ranges, reached = sorted(by_key.pop(unit_key([file], fingerprint_of_output), [])), 0
        for start, stop, name in [*ranges, (max(end, 0), file.num_rows, "")]:
            if start > reached:
                verdict.differ(f"{file.source}: rows {reached} to {start - 1} have no output")
            if name and start < reached:
                verdict.differ(
                    f"{file.source}: rows {start} to {min(stop, reached) - 1} are in two parts, one is {name}"
                )
            reached = max(reached, stop)
        verdict.rows += max(end, 0)
        for part in read([name for *_, name in ranges]):
            _, start, stop = parse_part(part.name)
            yield part, [(file.source, row) for row in range(start, stop)]
    for name in sorted(name for ranges in by_key.values() for *_, name in ranges):
        verdict.differ(f"captions/{name} is of a file that is not in the input, or of another configuration")


def _image_parts(
    corpus: Corpus, committed: list[str], fingerprint_of_output: str, limit: int | None, verdict: Verdict, read: Read
) -> PartsWithRows:
    """Every part with the files that its metadata promises. A file in no part or in two parts is a difference."""
    files, num_parts = {file.source: file for file in corpus.files}, Counter()
    for part in read(committed):
        sources = part.metadata["sources"]
        num_parts.update(sources)
        in_corpus = [files[source] for source in sources if source in files]
        if len(in_corpus) != len(sources) or parse_part(part.name)[0] != unit_key(in_corpus, fingerprint_of_output):
            verdict.differ(f"captions/{part.name} is of files that are not in the input, or of another configuration")
        yield part, [(source, 0) for source in sources]
    wanted = [file.source for file in corpus.files[:limit]]
    verdict.rows = len(wanted)
    for source in wanted:
        if not num_parts[source]:
            verdict.differ(f"{source} has no output")
    for source in (source for source, count in num_parts.items() if count > 1):
        verdict.differ(f"{source} is in {num_parts[source]} parts")


def _check_part(
    part: Part, rows: list[Row], templates: list[str], fingerprint_of_output: str, verdict: Verdict
) -> None:
    """Checks that every expected row is captioned under every prompt or quarantined, and that the metadata agrees.

    The prompt of a template with fields differs from row to row. So the check counts such prompts, and compares the
    text only of templates without fields.
    """
    captioned = 0
    fixed = Counter(template for template in templates if not template_fields(template))
    for row in rows:
        prompts, quarantined = part.prompts.get(row, []), part.quarantined[row]
        complete = len(prompts) == len(templates) and Counter(prompts) >= fixed
        if quarantined + bool(prompts) != 1 or (prompts and not complete):
            where = f"{row[0]} row {row[1]} in {part.name}"
            verdict.differ(f"{where}: {len(prompts)} of {len(templates)} captions, {quarantined} quarantine rows")
        captioned += bool(prompts)
    for source, row in sorted(({*part.prompts} | {*part.quarantined}) - {*rows}):
        verdict.differ(f"{source} row {row} does not belong into {part.name}")
    metadata = part.metadata
    if metadata["fingerprint"] != fingerprint_of_output:
        verdict.differ(
            f"captions/{part.name} has the fingerprint {metadata['fingerprint']}, the output has "
            f"{fingerprint_of_output}"
        )
    if (metadata["images_captioned"], metadata["images_quarantined"]) != (captioned, part.quarantined.total()):
        verdict.differ(f"captions/{part.name} holds another number of images than its metadata says")
    verdict.captioned += captioned
    verdict.captions += sum(map(len, part.prompts.values()))
    verdict.reasons += part.reasons
