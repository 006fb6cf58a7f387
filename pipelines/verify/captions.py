"""Verifies an output: every row of the input is either captioned or in quarantine, exactly once.

`answers.py` verifies the output of an evaluation: every question of its benchmarks has exactly one prediction.

Only the committed Parquet parts are evidence, and all of them is read: every column, with hashes, nulls, types and
metadata (`part.py`). The job's own records of its work are not read. A part whose name has the key of a file's name,
size and tag is of that very file (`output/unit.py`), so no image has to be read again. Memory holds a few parts at a
time and, for a folder of image files, one counter for each file.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any

from pipelines.corpus.find import Corpus, input_corpus
from pipelines.errors import UserError
from pipelines.output.fingerprint import FILE, fingerprint, read_claim
from pipelines.output.lease import take_lease
from pipelines.output.reader import DAMAGE, DamagedPart, OutputReader, Part, read_totals
from pipelines.output.schema import CAPTIONS_FOLDER, PREDICTIONS_FOLDER
from pipelines.output.unit import Unit, parse_part, unit_key
from pipelines.store import STORE_ERRORS, Store, make_store
from pipelines.verify.config import VerifyConfig
from pipelines.verify.images import compare_images
from pipelines.verify.part import Expected, Row, faults_of, totals_of
from pipelines.verify.ranges import superfluous
from pipelines.verify.repair import repair
from pipelines.verify.verdict import Verdict, committed_names

Read = Callable[[Iterable[str]], Iterator[Part | DamagedPart]]
Check = Callable[[Part | DamagedPart, Sequence[Row], str], None]
"""(part, the rows that it must hold, its file and rows for people): condemns a part that is wrong."""


def verify(config: VerifyConfig) -> tuple[Verdict, list[str]]:
    """Compares the output with the input; with `repair`, removes what is broken. Returns the repair's lines as well.

    Prompts, columns and benchmarks come from the output's own fingerprint file.

    Raises:
        UserError: if there is no such input, the output cannot be read, it is not that of a caption job or an
            evaluation, or another driver holds the output that is to be repaired.
    """
    output = make_store(config.output.path, endpoint_url=config.output.endpoint_url)
    claim = _read_claim(output)
    if config.repair:
        take_lease(output)  # units write their quarantine before the part that commits them
    folder = CAPTIONS_FOLDER
    try:
        if "benchmarks" in claim:
            from pipelines.verify.answers import verify_answers  # imported here: captions need no benchmarks

            folder, verdict = PREDICTIONS_FOLDER, verify_answers(config, output, claim)
        else:
            verdict = verify_captions(config, output, claim)
        return verdict, repair(output, folder, verdict) if config.repair else []
    except STORE_ERRORS as error:
        raise UserError(f"output.path {output.path} cannot be read: {type(error).__name__}: {error}") from error


def verify_captions(config: VerifyConfig, output: Store, claim: dict[str, Any]) -> Verdict:
    """The verdict on captions.

    Raises:
        UserError: as of `input_corpus`. Also one of `STORE_ERRORS` if the store fails.
    """
    templates = [claim["prompt.template"], *claim["prompt.more"]]
    corpus = input_corpus(
        config.input,
        image_column=claim["input.image_column"],
        id_column=claim["input.id_column"],
        templates=templates,
    )
    verdict, mine = Verdict(), fingerprint(claim)
    names, quarantined = committed_names(output, CAPTIONS_FOLDER, verdict)

    def read(names: Iterable[str]) -> Iterator[Part | DamagedPart]:
        return OutputReader(output).whole(names, quarantined)

    def check(part: Part | DamagedPart, rows: Sequence[Row], where: str) -> None:
        if isinstance(part, DamagedPart):
            verdict.condemn(part.name, where, f"captions/{part} ({where})")
            return
        for fault in faults_of(part, Expected(rows, templates, mine)):
            verdict.condemn(part.name, where, f"captions/{part.name} ({where}): {fault}")
        if part.name not in verdict.broken:
            counts = totals_of(part)
            verdict.captioned += counts["captioned"]
            verdict.captions += counts["captions"]
            verdict.reasons += counts["reasons"]

    if corpus.format.one_image_a_file:
        _check_images(corpus, names, output, mine, config.input.limit, verdict, read, check)
    else:
        _check_files(corpus, names, mine, config.input.limit, verdict, read, check)
    if config.images:
        compare_images(config, corpus, output, mine, [name for name in names if name not in verdict.broken], verdict)
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


def _check_files(
    corpus: Corpus, names: list[str], mine: str, limit: int | None, verdict: Verdict, read: Read, check: Check
) -> None:
    """Every part with the rows that its name promises. Overlaps, gaps and unknown files are differences.

    The ranges of a file are swept in order: `reached` is the first row that no earlier part covers. A last, empty range
    without a name starts where the input ends, so that rows without output at the end are a gap like any other.
    """
    by_key: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for name in names:
        key, start, stop = parse_part(name)
        by_key[key].append((start, stop, name))
    for file in corpus.files:
        end = file.num_rows if limit is None else min(file.num_rows, limit - verdict.rows)
        ranges, reached = sorted(by_key.pop(unit_key([file], mine), [])), 0
        for part in read(name for *_, name in ranges):
            key, start, stop = parse_part(part.name)
            where = Unit(key, start, stop, (file.source,)).where
            check(part, [(file.source, row) for row in range(start, stop)], where)
        for start, stop, name in [*ranges, (max(end, 0), file.num_rows, "")]:
            if start > reached:
                verdict.differ(f"{file.source}: rows {reached} to {start - 1} have no output")
            if name and start < reached:
                verdict.differ(
                    f"{file.source}: rows {start} to {min(stop, reached) - 1} are in two parts, one is {name}"
                )
            reached = max(reached, stop)
        verdict.rows += max(end, 0)
        for start, stop, name in superfluous([each for each in ranges if each[2] not in verdict.broken]):
            verdict.broken[name] = Unit("", start, stop, (file.source,)).where
    for name in sorted(name for ranges in by_key.values() for *_, name in ranges):
        verdict.differ(f"captions/{name} is of a file that is not in the input, or of another configuration")


def _check_images(
    corpus: Corpus,
    names: list[str],
    output: Store,
    mine: str,
    limit: int | None,
    verdict: Verdict,
    read: Read,
    check: Check,
) -> None:
    """Every part with the files that its metadata names. A file in no part or in two parts is a difference."""
    files, num_parts = {file.source: file for file in corpus.files}, Counter()
    ours = []  # names of the parts of these files
    for part in read(names):
        sources = _sources_of(part, output)
        key, start, stop = parse_part(part.name)
        known = [files[source] for source in sources if source in files]
        is_ours = len(known) == len(sources) and key == unit_key(known, mine)
        if sources and not is_ours:
            verdict.differ(f"captions/{part.name} is of files that are not in the input, or of another configuration")
            continue
        num_parts.update(sources)
        ours.append(part.name)
        where = Unit(key, start, stop, tuple(sources)).where if sources else f"{stop} image files"
        check(part, [(source, 0) for source in sources], where)
    wanted = [file.source for file in corpus.files[:limit]]
    verdict.rows = len(wanted)
    for source in wanted:
        if not num_parts[source]:
            verdict.differ(f"{source} has no output")
    doubled = {source for source, count in num_parts.items() if count > 1}
    for source in sorted(doubled):
        verdict.differ(f"{source} is in {num_parts[source]} parts")
    if doubled:
        _choose_images(ours, doubled, output, verdict)


def _sources_of(part: Part | DamagedPart, output: Store) -> list[str]:
    """The files that a part's metadata names; none if that is damaged too."""
    with suppress(*DAMAGE):
        totals = read_totals(output, part.name) if isinstance(part, DamagedPart) else part.totals
        return [source for source in totals["sources"] if isinstance(source, str)]
    return []


def _choose_images(names: list[str], doubled: set[str], output: Store, verdict: Verdict) -> None:
    """Condemns the parts without which no file is in two parts: of those that share a file, the smaller ones."""
    left = [name for name in names if name not in verdict.broken]
    sharing = []
    for name, totals in zip(left, OutputReader(output).totals(left), strict=True):
        if doubled & {*totals["sources"]}:
            sharing.append((name, totals["sources"]))
    seen: set[str] = set()
    for name, sources in sorted(sharing, key=lambda each: (-len(each[1]), each[0])):
        if seen & {*sources}:
            verdict.broken[name] = Unit("", 0, len(sources), tuple(sources)).where
        else:
            seen.update(sources)
