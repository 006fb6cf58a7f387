"""Proving an evaluation's output: every question of its benchmarks is in the predictions exactly once.

Asks the benchmarks' files which questions there are, and the written Parquet objects which were answered. A question
without an answer must be about an image in quarantine, and every image in quarantine must leave such questions.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from pipelines.accuracy.find_questions import Asked, find_questions
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
    """Where a question stands."""

    source: str
    row: int
    benchmark: str
    question_id: str


def verify_answers(config: Config, output: Store, claim: dict[str, Any]) -> Verdict:
    """Holds the predictions against the questions that the output's `claim` says were asked.

    Raises:
        UserError: as `find_questions`.
    """
    verdict, mine = Verdict(counted="questions"), fingerprint(claim)
    store = make_store(config.input.path, endpoint_url=config.input.endpoint_url, anonymous=config.input.anonymous)
    benches = get_benchmarks(claim["benchmarks"])
    asked = find_questions(store, benches, claim["limit"])
    keys = {unit_key([file], mine): file.source for file in asked.files}
    found: Counter[Question] = Counter()
    names = committed_names(output, PREDICTIONS_FOLDER, verdict)
    for part in OutputReader(output, PREDICTIONS_FOLDER).parts(COLUMNS, ["id", "reason"], names):
        try:
            if isinstance(part, DamagedPart):
                verdict.differ(str(part))
            else:
                _check_part(part, keys, mine, found, verdict)
        except DAMAGE as error:  # readable, but its metadata lacks a total
            verdict.differ(f"{part.name} is damaged: {type(error).__name__}: {clean(str(error))}")
    expected = set(expected_questions(asked, benches))
    verdict.rows = len(expected)
    for question in sorted(expected - {*found}):
        verdict.differ(f"{_words(question)} has no prediction")
    for question, count in sorted(found.items()):
        if question not in expected:
            verdict.differ(f"{_words(question)} was not asked")
        elif count > 1:
            verdict.differ(f"{_words(question)} has {count} predictions")
    return verdict


def expected_questions(asked: Asked, benches: Sequence[Benchmark]) -> Iterator[Question]:
    """Every question that was to be asked, from the key columns of the benchmarks' files."""
    by_name = {bench.name: bench for bench in benches}
    for source, file in asked.readers.items():
        for bench in (by_name[name] for name in file.benchmarks):
            with asked.store.fs.open(asked.store.join(source), "rb") as stream:
                table = pq.read_table(stream, columns=list(bench.key_columns))
            wanted = asked.wanted.get(bench.name)
            for row, keys in enumerate(bench.keys_by_row(table, file.first_row)):
                for key in keys:
                    if wanted is None or key.group_id in wanted:
                        yield Question(source, row, bench.name, key.question_id)


def _check_part(part: Part, keys: dict[str, str], mine: str, found: Counter[Question], verdict: Verdict) -> None:
    """Counts the questions of one object, and holds it against its name, its metadata and its quarantine."""
    name, stored, rows = part.name, part.totals, part.rows.to_pylist()
    key, start, stop = parse_part(name)
    rejected: set[str] = set()
    if part.quarantine is not None:
        rejected = set(part.quarantine["id"].to_pylist())
        verdict.reasons.update(part.quarantine["reason"].to_pylist())
    if key not in keys:
        verdict.differ(
            f"{PREDICTIONS_FOLDER}/{name} is of a file that was not asked about, or of another configuration"
        )
    if stored["fingerprint"] != mine:
        verdict.differ(f"{PREDICTIONS_FOLDER}/{name} has the fingerprint {stored['fingerprint']}, the output {mine}")
    unanswered = [row for row in rows if row["prediction"] is None]
    if (stored["captions"], stored["unanswered"]) != (len(rows) - len(unanswered), len(unanswered)):
        verdict.differ(f"{PREDICTIONS_FOLDER}/{name} counts other questions in its metadata than it holds")
    for row in rows:
        question = Question(row["source"], row["row"], row["benchmark"], row["question_id"])
        found[question] += 1
        if row["source"] != keys.get(key, row["source"]) or not start <= row["row"] < stop:
            verdict.differ(f"{_words(question)} does not belong into {name}")
        if (row["prediction"] is None) != (row["image_id"] in rejected):
            state = "no answer, yet its image is not" if row["prediction"] is None else "an answer, yet its image is"
            verdict.differ(f"{_words(question)} has {state} in quarantine")
    for image in sorted(rejected - {row["image_id"] for row in unanswered}):
        verdict.differ(f"quarantine/{name} holds image {image}, about which nothing was asked")
    verdict.captioned += stored["images_captioned"]
    verdict.captions += len(rows) - len(unanswered)
    verdict.unanswered += len(unanswered)


def _words(question: Question) -> str:
    return f"{question.benchmark} {question.question_id} ({question.source} row {question.row})"
