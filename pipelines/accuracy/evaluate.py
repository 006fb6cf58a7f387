"""The evaluation job: the caption job's stages answer the questions of benchmarks, and the answers are scored.

Answers are committed part by part, as captions are, so that a rerun resumes:

predictions/part-<unit>.parquet   one row for each question, with its answer and its references
quarantine/part-<unit>.parquet    images that could not be read; a question about such an image counts as wrong
scores.json, scores.html          metrics, intervals, categories
run.json                          fingerprint, configuration, totals, scores
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

from otprune.models import Checkpoint
from pipelines.accuracy.config import NOT_IN_EVALUATION, EvaluateConfig
from pipelines.accuracy.find_questions import Questions, find_questions, plan_questions
from pipelines.accuracy.read_questions import ReadQuestions, prediction_rows
from pipelines.accuracy.schema import PREDICTIONS
from pipelines.accuracy.scores import (
    as_json,
    category_table,
    compare_outputs,
    predictions_parquet,
    render_scores,
    score_metrics,
    score_output,
)  # fmt: skip
from pipelines.benchmarks import Benchmark, Comparison, Scores, get_benchmarks
from pipelines.config.keys import Config
from pipelines.corpus.find import Corpus
from pipelines.corpus.formats.parquet import FORMAT as PARQUET
from pipelines.dollars.meter import make_tariff
from pipelines.errors import UserError
from pipelines.output.fingerprint import fingerprint, read_claim
from pipelines.output.schema import PREDICTIONS_FOLDER
from pipelines.output.totals import Totals
from pipelines.run.describe import describe
from pipelines.run.job import (
    ENGINES_OWN,
    Actors,
    Job,
    check_model,
    check_runs,
    inside_model,
    open_output,
)
from pipelines.run.metrics import prefill_tflops
from pipelines.run.outcome import DONE, Outcome
from pipelines.run.run import run_job
from pipelines.run.stages import Stages, decode_settings, model_stages
from pipelines.stages.write import Sink
from pipelines.store import STORE_ERRORS, Store, make_store, write_json
from pipelines.tracker import Tracker


@dataclass(frozen=True, slots=True)
class Evaluation:
    """An evaluation whose configuration and files are checked, before any cluster starts."""

    config: EvaluateConfig
    benchmarks: tuple[Benchmark, ...]
    asked: Questions
    job: Job
    baseline: Store | None


@dataclass(frozen=True, slots=True)
class Results:
    """Scores of every benchmark, and their comparison with the baseline's scores."""

    scores: list[Scores]
    comparisons: dict[str, Comparison]  # by benchmark; empty without a baseline


def prepare_evaluation(
    config: EvaluateConfig,
    questions: Questions | None = None,
    tags: Mapping[str, str] | None = None,
    actors: Actors = ENGINES_OWN,
) -> Evaluation:
    """Checks the model, the benchmarks, their files and the output in seconds, and plans the questions left to ask.

    A caller that runs several evaluations of the same questions passes `questions`, so that the files are read once.
    `tags` are added to the tracked run.

    Raises:
        UserError: for anything that the user has to correct.
    """
    default = Config().dotted()
    for name in NOT_IN_EVALUATION:
        if config.dotted()[name] != default[name]:
            raise UserError(f"{name} has no meaning here: each benchmark has its own prompts and columns")
    make_tariff(config.cost)
    config, checkpoint = check_model(config)
    benches = tuple(choose_benchmarks(config.benchmarks))
    store = make_store(config.input.path, endpoint_url=config.input.endpoint_url, anonymous=config.input.anonymous)
    questions = questions or find_questions(store, benches, config.limit)
    pruning = check_runs(config, checkpoint)
    described = describe_evaluation(config, checkpoint, benches, pruning if inside_model(config) else None)
    baseline = open_baseline(config, described)
    output = open_output(config, described)
    plan = plan_questions(questions, output, fingerprint(described), config.unit.images)
    job = Job(
        config,
        checkpoint,
        Corpus(store, tuple(questions.files), PARQUET),
        output,
        described,
        plan,
        pruning=pruning,
        folder=PREDICTIONS_FOLDER,
        counted="questions",
        tags={"benchmarks": ",".join(described["benchmarks"]), **(tags or {})},
        actors=actors,
    )
    return Evaluation(config, benches, questions, job, baseline)


def run_evaluation(evaluation: Evaluation) -> tuple[Outcome, Results | None]:
    """Asks the questions that have no answer yet, and scores the output once it is complete.

    The results are None if the output is incomplete, as after an interruption.
    """
    results: list[Results] = []

    def conclude(job: Job, outcome: Outcome, totals: Totals, tracker: Tracker) -> dict[str, Any]:
        if outcome.code != DONE:
            return {}
        results.append(score_evaluation(evaluation))
        outcome.metrics |= score_metrics(results[0].scores) | {"prefill_tflops_per_image": prefill_tflops(job, totals)}
        return report_scores(evaluation, results[0], outcome, totals, tracker)

    stages = partial(make_question_stages, evaluation.asked)
    outcome = run_job(evaluation.job, stages=stages, conclude=conclude)
    if outcome.code == DONE and not results:  # complete before this run: run_job did not conclude
        results.append(score_evaluation(evaluation))
    return outcome, results[0] if results else None


def choose_benchmarks(names: Any) -> list[Benchmark]:
    """The benchmarks that the configuration names.

    Raises:
        UserError: unless `names` is the name of a benchmark, `all`, `demo`, `gallery`, or a list of such names.
    """
    if not isinstance(names, str) and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"benchmarks must be a name or a list of names, got {names!r}")
    try:
        return get_benchmarks(names)
    except ValueError as error:
        raise UserError(str(error)) from error


def describe_evaluation(
    config: EvaluateConfig,
    checkpoint: Checkpoint,
    benches: tuple[Benchmark, ...],
    pruning: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The keys and values behind the fingerprint: the caption job's that apply, the benchmarks and the limit."""
    captioning = describe(config, checkpoint, pruning)
    chosen = {name: value for name, value in captioning.items() if name not in NOT_IN_EVALUATION}
    return {**chosen, "benchmarks": sorted(bench.name for bench in benches), "limit": config.limit}


def open_baseline(config: EvaluateConfig, described: dict[str, Any]) -> Store | None:
    """The output to compare with; None if the configuration names none.

    Raises:
        UserError: if the output cannot be read, or does not hold an evaluation of the same questions.
    """
    if config.baseline.path is None:
        return None
    store = make_store(config.baseline.path, endpoint_url=config.baseline.endpoint_url)
    try:
        claim = read_claim(store)
    except STORE_ERRORS as error:
        raise UserError(f"baseline.path {store.path} cannot be read: {type(error).__name__}: {error}") from error
    if claim is None or "benchmarks" not in claim:
        raise UserError(f"baseline.path must be the output of an evaluation, found none in {store.path}")
    missing = set(described["benchmarks"]) - set(claim["benchmarks"])
    if missing or claim["limit"] != described["limit"]:
        raise UserError(
            f"baseline.path must hold the same questions: benchmarks {', '.join(described['benchmarks'])} with limit "
            f"{described['limit']}, got {', '.join(claim['benchmarks'])} with limit {claim['limit']}"
        )
    return store


def make_question_reader(questions: Questions, job: Job) -> ReadQuestions:
    """The stage that reads questions and decodes their images."""
    return ReadQuestions(
        store=questions.store,
        files=questions.readers,
        wanted=questions.wanted,
        decode=decode_settings(job),
        max_new_tokens=job.config.generate.max_new_tokens,
    )


def make_question_stages(questions: Questions, job: Job) -> Stages:
    """The caption job's stages, with a reader of questions and a sink of predictions."""
    sink = Sink(
        store=job.output,
        fingerprint=job.fingerprint,
        model=job.config.model.path,
        method=job.config.prune.method,
        folder=PREDICTIONS_FOLDER,
        schema=PREDICTIONS,
        rows=prediction_rows,
    )
    return Stages(make_question_reader(questions, job), *model_stages(job), sink)


def score_evaluation(evaluation: Evaluation) -> Results:
    """Scores of the complete output, compared with the baseline's scores if there is a baseline."""
    resamples, output = evaluation.config.resamples, evaluation.job.output
    scores = score_output(output, evaluation.benchmarks, evaluation.asked.num_by_benchmark, resamples)
    if evaluation.baseline is None:
        return Results(scores, {})
    of_baseline = score_output(evaluation.baseline, evaluation.benchmarks, evaluation.asked.num_by_benchmark, resamples)
    return Results(scores, compare_outputs(evaluation.benchmarks, scores, of_baseline, resamples))


def report_scores(
    evaluation: Evaluation, results: Results, outcome: Outcome, totals: Totals, tracker: Tracker
) -> dict[str, Any]:
    """Writes scores.json and scores.html, and tracks both with the predictions. Returns the scores for run.json."""
    output, record = evaluation.job.output, as_json(results.scores, results.comparisons)
    page = render_scores(evaluation.job, results.scores, results.comparisons, outcome, totals)
    write_json(output, "scores.json", record)
    output.write("scores.html", page.encode())
    tracker.artifact("scores.json", json.dumps(record, indent=1))
    tracker.artifact("scores.html", page)
    tracker.artifact("categories.json", category_table(results.scores))
    tracker.artifact("predictions.parquet", predictions_parquet(output))
    return {"scores": cast(dict[str, Any], record)}
