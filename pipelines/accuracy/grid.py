"""The accuracy grid: evaluates methods x retentions on benchmarks, each point by itself, in one Ray session.

points/<method>-<retention>/   the output of one point's evaluation: predictions, scores.html, run.json, distance.json
accuracy.parquet               one row for each point and benchmark, in the columns of `table.accuracy_table`
accuracy.html                  the same for people, self-contained
grid.json                      the id of the tracked parent run, so that a resumed grid continues this run

The same command resumes the grid: finished points are scored from their predictions, without a model.
"""

import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from otprune.methods import UNPRUNED
from otprune.models import Checkpoint
from pipelines.accuracy.config import AccuracyConfig, EvaluateConfig, GridConfig
from pipelines.accuracy.distance import measure_distances, without_distance
from pipelines.accuracy.evaluate import choose_benchmarks, prepare_evaluation, run_evaluation
from pipelines.accuracy.find_questions import find_questions
from pipelines.accuracy.page import render_accuracy
from pipelines.accuracy.point_cost import measure_work
from pipelines.accuracy.recipes import fit_recipes, known_recipes, unfitted
from pipelines.accuracy.table import BASELINE, Measured, Point, accuracy_table, image_of_groups
from pipelines.config.load import to_yaml, with_values
from pipelines.errors import UserError
from pipelines.run.cluster import connected
from pipelines.run.job import ENGINES_OWN, Actors, check_keys, check_model, check_pruning, with_pictures_of
from pipelines.run.outcome import FAILED, INTERRUPTED
from pipelines.run.pruning import resolve_pruning
from pipelines.run.tracked import git_tag
from pipelines.store import Store, make_store
from pipelines.tracker import Tracker, default_store, environment_uri, make_tracker

logger = logging.getLogger(__name__)

STATE, TABLE, PAGE = "grid.json", "accuracy.parquet", "accuracy.html"
# keys of `prune` that grid.settings may set for one method
OF_PRUNE = ("shrink", "merge", "gamma", "gamma_scale", "seed", "per_tile")
PARENT_SECONDS = 60.0  # longest wait for the id of the parent run; without the id, the points' runs have no parent


class GridStoppedError(Exception):
    """A point stopped before its end. The output keeps everything committed; the same command resumes."""

    def __init__(self, code: int, message: str):
        super().__init__(message)
        self.code = code


def run_accuracy_grid(config: AccuracyConfig, actors: Actors = ENGINES_OWN) -> pa.Table:
    """Evaluates every point that is not finished. Writes the table and the page of all points; returns the table.

    Raises:
        UserError: for anything that the user has to correct.
        GridStoppedError: if a point failed, was interrupted or met the spend cap. The error holds the exit code.
    """
    points = grid_points(config.grid)
    checkpoint = check_points(config, points)
    benches = choose_benchmarks(config.benchmarks)
    store = make_store(config.input.path, endpoint_url=config.input.endpoint_url, anonymous=config.input.anonymous)
    questions = find_questions(store, benches, config.limit)
    output = make_store(config.output.path, endpoint_url=config.output.endpoint_url)
    measured: list[Measured] = []
    method, fit = unfitted(config) or (None, None)
    recipes = known_recipes(config, output, checkpoint) if fit else {}
    with ExitStack() as cluster, tracked(config, output) as (tracker, tags):
        for number, point in enumerate(points, 1):
            # The fit needs the job of a point that is evaluated already; the unpruned point is always the first.
            if fit and point.method == method and point.retention not in recipes:
                join(cluster, config, checkpoint)
                retentions = [other.retention for other in points if other.method == method]
                recipes = fit_recipes(config, questions, measured[0].job, output, fit, recipes, retentions)
            evaluation = prepare_evaluation(
                point_config(config, point, recipes.get(point.retention)), questions, tags, actors
            )
            if evaluation.job.plan.spans:
                join(cluster, config, checkpoint)
            outcome, results = run_evaluation(evaluation)
            if results is None:
                raise GridStoppedError(outcome.code, f"{point.name}: {outcome.message}")
            scores = {score.benchmark: score for score in results.scores}
            images, work = image_of_groups(evaluation.job.output), measure_work(evaluation.job)
            measured.append(Measured(point, evaluation.job, scores, images, work))
            logger.info("point %d of %d is finished: %s", number, len(points), point.name)
        if missing := without_distance(measured, config.grid.distance_images):
            join(cluster, config, checkpoint)
            measure_distances(config, questions, missing, config.grid.distance_images)
        table = accuracy_table(measured, benches, config.resamples)
        write_results(output, table, render_accuracy(config, table, measured, benches), tracker)
    return table


def grid_points(grid: GridConfig) -> list[Point]:
    """The points in the order of their evaluation: unpruned, then random, the baselines of all others, then the rest.

    Raises:
        UserError: if there is no method or no retention, a retention is outside (0, 1], or `grid.settings` names a
            method outside the grid, or lacks a variant's settings.
    """
    methods = [method for method in dict.fromkeys(grid.methods) if method != UNPRUNED]
    if not methods or not grid.retentions:
        raise UserError("grid.methods and grid.retentions must name at least one method and one retention")
    if unknown := [method for method in grid.settings if method not in methods]:
        raise UserError(f"grid.settings must be of methods in grid.methods, got {unknown[0]!r}")
    if wrong := [method for method, own in grid.settings.items() if not isinstance(own, Mapping)]:
        raise UserError(f"grid.settings of {wrong[0]} must map settings to values, got {grid.settings[wrong[0]]!r}")
    if undefined := [method for method in methods if ":" in method and not grid.settings.get(method)]:
        raise UserError(
            f"grid.settings must define the variant {undefined[0]!r}: {{{undefined[0]}: {{setting: value}}}}"
        )
    if wrong := [retention for retention in grid.retentions if not 0 < retention <= 1]:
        raise UserError(f"grid.retentions must be above 0 and at most 1, got {wrong[0]:g}")
    methods.sort(key=lambda method: method != BASELINE)
    retentions = sorted(set(grid.retentions), reverse=True)
    return [Point(UNPRUNED, 1.0), *(Point(method, retention) for method in methods for retention in retentions)]


def check_points(config: AccuracyConfig, points: Sequence[Point]) -> Checkpoint:
    """Checks the configurations of all points before the first one runs; returns their checkpoint.

    Raises:
        UserError: if a method, one of its settings or the model does not fit.
    """
    configs = [point_config(config, point, recipe={}) for point in points]  # recipes may not be fitted yet
    for of_point in configs:
        check_keys(of_point)
    _, checkpoint = check_model(configs[0])
    # Resolving a point logs its budget. Every point is resolved again when it is prepared, so nothing is logged here.
    budget_logger = logging.getLogger(resolve_pruning.__module__)
    level = budget_logger.level
    budget_logger.setLevel(logging.WARNING)
    try:
        for of_point in configs:
            check_pruning(of_point, with_pictures_of(of_point.prune, checkpoint))
    finally:
        budget_logger.setLevel(level)
    return checkpoint


def point_config(config: AccuracyConfig, point: Point, recipe: dict[int, int] | None = None) -> EvaluateConfig:
    """The configuration of one point's evaluation: its own output folder, and the grid's store of tracked runs.

    `recipe` is the fitted setting of the grid's unfitted method, if the point is of this method.
    """
    of_grid = {f.name: getattr(config, f.name) for f in fields(EvaluateConfig)}
    settings = dict(config.grid.settings.get(point.method, {}))
    prune_keys = {f"prune.{key}": settings.pop(key) for key in OF_PRUNE if key in settings}
    method, fit = unfitted(config) or (None, None)
    if fit and point.method == method:
        settings[fit.setting] = recipe
    prune = with_values(config, prune_keys).prune if prune_keys else config.prune
    prune = replace(prune, method=point.base, retention=point.retention, settings=settings)
    output = replace(config.output, path=f"{config.output.path.rstrip('/')}/points/{point.name}")
    mlflow = replace(config.mlflow, tracking_uri=tracking_uri(config), run_name=point.name)
    return EvaluateConfig(**{**of_grid, "prune": prune, "output": output, "mlflow": mlflow})


def tracking_uri(config: AccuracyConfig) -> str:
    """The MLflow store of the parent run and of all points' runs."""
    return config.mlflow.tracking_uri or environment_uri() or default_store(make_store(config.output.path).path)[0]


def join(cluster: ExitStack, config: AccuracyConfig, checkpoint: Checkpoint) -> None:
    """Connects to the cluster at the first call, until `cluster` closes at the end of the grid.

    A grid whose points are all finished needs no cluster, so the callers connect only for work.
    """
    if not ray.is_initialized():
        cluster.enter_context(connected(config, checkpoint))


@contextmanager
def tracked(config: AccuracyConfig, output: Store) -> Iterator[tuple[Tracker, dict[str, str]]]:
    """The tracker of the parent run, and the tags that place a point's run below the parent run.

    The parent run ends as FAILED if a point failed, and as KILLED if it was interrupted or met the spend cap.

    Raises:
        GridStoppedError: instead of KeyboardInterrupt.
    """
    known_run = json.loads(output.read(STATE))["mlflow_run"] if output.exists(STATE) else None
    name = config.mlflow.run_name or f"grid of {len(config.grid.methods)} methods"
    mlflow = config.mlflow
    tracker = make_tracker(mlflow.enabled, mlflow.tracking_uri, mlflow.experiment, name, output.path, known_run)
    tracker.start(config.dotted(), {"model": config.model.path, **git_tag()}, to_yaml(config))
    run_id = tracker.wait_for_id(PARENT_SECONDS)
    output.write(STATE, json.dumps({"mlflow_run": run_id}).encode())
    status = "FAILED"
    try:
        yield tracker, {"mlflow.parentRunId": run_id} if run_id else {}
        status = "FINISHED"
    except (KeyboardInterrupt, GridStoppedError) as stopped:
        status = "FAILED" if isinstance(stopped, GridStoppedError) and stopped.code == FAILED else "KILLED"
        if isinstance(stopped, KeyboardInterrupt):
            raise GridStoppedError(INTERRUPTED, "interrupted; the same command resumes") from stopped
        raise
    finally:
        logger.info("mlflow: %s", tracker.finish(status))


def write_results(output: Store, table: pa.Table, page: str, tracker: Tracker) -> None:
    """Writes accuracy.parquet and accuracy.html to the output and to the parent run."""
    pq.write_table(table, stream := io.BytesIO(), compression="zstd")
    output.write(TABLE, stream.getvalue())
    output.write(PAGE, page.encode())
    tracker.artifact(TABLE, stream.getvalue())
    tracker.artifact(PAGE, page)
    tracker.artifact("accuracy.json", table.to_pydict())
    relative = {Point(row["method"], row["retention"]).name: row["relative"] for row in table.to_pylist()}
    tracker.log({f"relative/{name}": value for name, value in relative.items()}, 0)
