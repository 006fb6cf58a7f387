"""Verifies the output of an evaluation: every question of its benchmarks is in the predictions exactly once.

The benchmarks' files say which questions exist, and the committed parts say which questions have a prediction. An image
is in quarantine if and only if the questions about it have no answer.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from pipelines.accuracy.find_questions import Questions, find_questions
from pipelines.benchmarks import Benchmark, get_benchmarks
from pipelines.config.keys import Config
from pipelines.output.fingerprint import fingerprint
from pipelines.output.reader import DAMAGE, DamagedPart, OutputReader, Part
from pipelines.output.schema import PREDICTIONS_FOLDER
from pipelines.output.unit import Unit, parse_part, unit_key
from pipelines.store import Store, make_store
from pipelines.text import clean
from pipelines.verify.part import altered
from pipelines.verify.ranges import superfluous
from pipelines.verify.verdict import Verdict, committed_names

COLUMNS = ["benchmark", "question_id", "image_id", "source", "row", "prediction"]


class Question(NamedTuple):
    """The address of a question."""

    source: str
    row: int
    benchmark: str
    question_id: str


def verify_answers(config: Config, output: Store, claim: dict[str, Any]) -> Verdict:
    """Compares the predictions with the questions of the benchmarks and the limit in the output's `claim`.

    Raises:
        UserError: as `find_questions`.
    """
    verdict, fingerprint_of_output = Verdict(counted="questions"), fingerprint(claim)
    store = make_store(config.input.path, endpoint_url=config.input.endpoint_url, anonymous=config.input.anonymous)
    benches = get_benchmarks(claim["benchmarks"])
    questions = find_questions(store, benches, claim["limit"])
    source_of_key = {unit_key([file], fingerprint_of_output): file.source for file in questions.files}
    predicted: Counter[Question] = Counter()
    names, quarantined = committed_names(output, PREDICTIONS_FOLDER, verdict)
    ranges = _ranges(names, source_of_key)
    for part in OutputReader(output, PREDICTIONS_FOLDER).whole(names, quarantined):
        where = _where(part.name, source_of_key)
        try:
            if isinstance(part, DamagedPart):
                verdict.condemn(part.name, where, f"{PREDICTIONS_FOLDER}/{part} ({where})")
            else:
                _check_part(part, source_of_key, fingerprint_of_output, predicted, verdict)
        except DAMAGE as error:  # the Parquet is readable, but lacks a column, or its metadata a total
            what = f"is damaged: {type(error).__name__}: {clean(str(error))}"
            verdict.condemn(part.name, where, f"{PREDICTIONS_FOLDER}/{part.name} {what} ({where})")
    expected = set(expected_questions(questions, benches))
    verdict.rows = len(expected)
    wrong = {question: "has no prediction" for question in expected - {*predicted}}
    for question, count in predicted.items():
        if question not in expected:
            wrong[question] = "was not asked"
        elif count > 1:
            wrong[question] = f"has {count} predictions"
    for question, what in sorted(wrong.items()):
        verdict.differ(f"{_describe(question)} {what}")
        holding = [name for start, stop, name in ranges[question.source] if start <= question.row < stop]
        if len(holding) == 1:
            verdict.broken[holding[0]] = _where(holding[0], source_of_key)
    for own in ranges.values():
        for *_, name in superfluous([each for each in own if each[2] not in verdict.broken]):
            verdict.broken[name] = _where(name, source_of_key)
    for name in [name for name in verdict.broken if parse_part(name)[0] not in source_of_key]:
        del verdict.broken[name]  # of another input: this job would not make it anew
    return verdict


def _ranges(names: Iterable[str], source_of_key: dict[str, str]) -> dict[str, list[tuple[int, int, str]]]:
    """The parts of each file, by their rows [start, stop) in order."""
    ranges: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for name in names:
        key, start, stop = parse_part(name)
        if key in source_of_key:
            ranges[source_of_key[key]].append((start, stop, name))
    return defaultdict(list, {source: sorted(own) for source, own in ranges.items()})


def _where(name: str, source_of_key: dict[str, str]) -> str:
    key, start, stop = parse_part(name)
    return Unit(key, start, stop, (source_of_key.get(key, "a file that was not asked about"),)).where


def expected_questions(questions: Questions, benches: Sequence[Benchmark]) -> Iterator[Question]:
    """Every question that the evaluation had to ask, from the key columns of the benchmarks' files."""
    by_name = {bench.name: bench for bench in benches}
    for source, file in questions.readers.items():
        for bench in (by_name[name] for name in file.benchmarks):
            with questions.store.fs.open(questions.store.join(source), "rb") as stream:
                table = pq.read_table(stream, columns=list(bench.key_columns))
            wanted = questions.wanted.get(bench.name)
            for row, keys in enumerate(bench.keys_by_row(table, file.first_row)):
                for key in keys:
                    if wanted is None or key.group_id in wanted:
                        yield Question(source, row, bench.name, key.question_id)


def _check_part(
    part: Part,
    source_of_key: dict[str, str],
    fingerprint_of_output: str,
    predicted: Counter[Question],
    verdict: Verdict,
) -> None:
    """Counts the questions of one part, and compares the part with its name, its metadata and its quarantine."""
    name, metadata, rows = part.name, part.totals, part.rows.select(COLUMNS).to_pylist()

    def wrong(text: str) -> None:
        verdict.condemn(name, _where(name, source_of_key), text)

    key, start, stop = parse_part(name)
    quarantined: set[str] = set()  # image ids
    if part.quarantine is not None:
        quarantined = set(part.quarantine["id"].to_pylist())
        verdict.reasons.update(part.quarantine["reason"].to_pylist())
    if key not in source_of_key:
        wrong(f"{PREDICTIONS_FOLDER}/{name} is of a file that was not asked about, or of another configuration")
    if metadata["fingerprint"] != fingerprint_of_output:
        wrong(
            f"{PREDICTIONS_FOLDER}/{name} has the fingerprint {metadata['fingerprint']}, the output has "
            f"{fingerprint_of_output}"
        )
    unanswered = [row for row in rows if row["prediction"] is None]
    if (metadata["captions"], metadata["unanswered"]) != (len(rows) - len(unanswered), len(unanswered)):
        wrong(f"{PREDICTIONS_FOLDER}/{name} holds another number of questions than its metadata says")
    for row in rows:
        question = Question(row["source"], row["row"], row["benchmark"], row["question_id"])
        predicted[question] += 1
        if row["source"] != source_of_key.get(key, row["source"]) or not start <= row["row"] < stop:
            wrong(f"{_describe(question)} does not belong into {name}")
        if (row["prediction"] is None) != (row["image_id"] in quarantined):
            state = "no answer, yet its image is not" if row["prediction"] is None else "an answer, yet its image is"
            wrong(f"{_describe(question)} has {state} in quarantine")
    for image in sorted(quarantined - {row["image_id"] for row in unanswered}):
        wrong(f"quarantine/{name} holds image {image}, but {name} has no unanswered question about it")
    for folder, table in ((PREDICTIONS_FOLDER, part.rows), ("quarantine", part.quarantine)):
        for fault in [] if table is None else altered(folder, table):
            wrong(f"{fault}: {name}")
    verdict.captioned += metadata["images_captioned"]
    verdict.captions += len(rows) - len(unanswered)
    verdict.unanswered += len(unanswered)


def _describe(question: Question) -> str:
    return f"{question.benchmark} {question.question_id} ({question.source} row {question.row})"
