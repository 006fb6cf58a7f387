"""Verifies the output of an evaluation: every question of its benchmarks is in the predictions exactly once.

The benchmarks' files say which questions exist, and the committed parts say which questions have a prediction. An image
is in quarantine if and only if the questions about it have no answer.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from pipelines.accuracy.find_questions import Questions, find_questions
from pipelines.benchmarks import Benchmark, get_benchmarks
from pipelines.config.keys import Config
from pipelines.output.fingerprint import fingerprint
from pipelines.output.reader import DAMAGE, DamagedPart, OutputReader, Part
from pipelines.output.schema import PREDICTIONS_FOLDER
from pipelines.output.unit import parse_part, unit_key
from pipelines.store import Store, make_store
from pipelines.text import clean
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
    names = committed_names(output, PREDICTIONS_FOLDER, verdict)
    for part in OutputReader(output, PREDICTIONS_FOLDER).parts(COLUMNS, ["id", "reason"], names):
        try:
            if isinstance(part, DamagedPart):
                verdict.differ(str(part))
            else:
                _check_part(part, source_of_key, fingerprint_of_output, predicted, verdict)
        except DAMAGE as error:  # the Parquet is readable, but its metadata lacks a total
            verdict.differ(f"{part.name} is damaged: {type(error).__name__}: {clean(str(error))}")
    expected = set(expected_questions(questions, benches))
    verdict.rows = len(expected)
    for question in sorted(expected - {*predicted}):
        verdict.differ(f"{_describe(question)} has no prediction")
    for question, count in sorted(predicted.items()):
        if question not in expected:
            verdict.differ(f"{_describe(question)} was not asked")
        elif count > 1:
            verdict.differ(f"{_describe(question)} has {count} predictions")
    return verdict


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
    name, metadata, rows = part.name, part.totals, part.rows.to_pylist()
    key, start, stop = parse_part(name)
    quarantined: set[str] = set()  # image ids
    if part.quarantine is not None:
        quarantined = set(part.quarantine["id"].to_pylist())
        verdict.reasons.update(part.quarantine["reason"].to_pylist())
    if key not in source_of_key:
        verdict.differ(
            f"{PREDICTIONS_FOLDER}/{name} is of a file that was not asked about, or of another configuration"
        )
    if metadata["fingerprint"] != fingerprint_of_output:
        verdict.differ(
            f"{PREDICTIONS_FOLDER}/{name} has the fingerprint {metadata['fingerprint']}, the output has "
            f"{fingerprint_of_output}"
        )
    unanswered = [row for row in rows if row["prediction"] is None]
    if (metadata["captions"], metadata["unanswered"]) != (len(rows) - len(unanswered), len(unanswered)):
        verdict.differ(f"{PREDICTIONS_FOLDER}/{name} holds another number of questions than its metadata says")
    for row in rows:
        question = Question(row["source"], row["row"], row["benchmark"], row["question_id"])
        predicted[question] += 1
        if row["source"] != source_of_key.get(key, row["source"]) or not start <= row["row"] < stop:
            verdict.differ(f"{_describe(question)} does not belong into {name}")
        if (row["prediction"] is None) != (row["image_id"] in quarantined):
            state = "no answer, yet its image is not" if row["prediction"] is None else "an answer, yet its image is"
            verdict.differ(f"{_describe(question)} has {state} in quarantine")
    for image in sorted(quarantined - {row["image_id"] for row in unanswered}):
        verdict.differ(f"quarantine/{name} holds image {image}, but {name} has no unanswered question about it")
    verdict.captioned += metadata["images_captioned"]
    verdict.captions += len(rows) - len(unanswered)
    verdict.unanswered += len(unanswered)


def _describe(question: Question) -> str:
    return f"{question.benchmark} {question.question_id} ({question.source} row {question.row})"
