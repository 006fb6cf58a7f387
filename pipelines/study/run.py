"""The study job: checks the configuration, computes the missing pieces on Ray, concludes, and reports.

pieces/<experiment>/<name>-<digest>.parquet   the rows of one piece, the unit of commit and of resume
results/<table>.parquet                       the tables concluded from the pieces
study.html                                    the page
study.json                                    findings, metrics, configuration; written last
"""

import io
import logging
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config.load import to_yaml
from pipelines.errors import UserError
from pipelines.output.fingerprint import read_claim
from pipelines.run.cluster import connected
from pipelines.run.outcome import DONE, FAILED, INTERRUPTED, Outcome
from pipelines.run.resources import is_local
from pipelines.run.signals import interruptible
from pipelines.run.tracked import git_tag
from pipelines.store import STORE_ERRORS, Store, make_store, write_json
from pipelines.study.checks import check_demo_model, check_values, choose_experiments
from pipelines.study.config import NOT_IN_STUDY, StudyConfig
from pipelines.study.experiments import EXPERIMENTS
from pipelines.study.page import render_study
from pipelines.study.pieces import Conclusion, Model, Piece, compute_on_ray, load, missing
from pipelines.tracker import MlflowTracker, make_tracker

logger = logging.getLogger(__name__)

RECORD = "study.json"


@dataclass(frozen=True)
class Study:
    """A study whose configuration, model and output are checked, before any cluster starts."""

    config: StudyConfig
    names: tuple[str, ...]
    pieces: tuple[Piece, ...]
    missing: tuple[Piece, ...]
    output: Store


def prepare_study(config: StudyConfig) -> Study:
    """Checks the configuration, the model and the output in seconds, and plans the pieces left to compute.

    Raises:
        UserError: for anything that the user has to correct.
    """
    default = StudyConfig().dotted()
    for name in NOT_IN_STUDY:
        if config.dotted()[name] != default[name]:
            raise UserError(f"{name} has no meaning here: --help lists the study's keys")
    if is_local(config):
        raise UserError("ray.address=none has no meaning here: the pieces of a study are tasks of Ray")
    names = choose_experiments(config.experiments)
    check_values(config, names)
    model = check_demo_model(config) if any(EXPERIMENTS[name].needs_model for name in names) else Model("", "")
    output = open_study(config)
    pieces = [piece for name in names for piece in EXPERIMENTS[name].plan(config, model)]
    return Study(config, names, tuple(pieces), tuple(missing(pieces, output)), output)


def run_study(study: Study) -> tuple[Outcome, dict[str, Conclusion]]:
    """Computes the missing pieces, concludes every experiment whose pieces are complete, and writes the results.

    A failed piece raises nothing: the outcome has exit code 1, and the results leave out the experiment of the piece.
    An interruption raises nothing either; it gives the exit code of interrupted runs and no conclusions.
    """
    outcome, started = Outcome(), time.perf_counter()
    failed: dict[str, str] = {}
    try:
        with interruptible():
            if study.missing:
                with connected(study.config, None) as outcome.cluster, interruptible():
                    failed = _compute(study, started)
            conclusions = _conclude(study, failed)
    except KeyboardInterrupt:
        outcome.code, outcome.message = INTERRUPTED, "interrupted; the same command resumes"
        return outcome, {}
    outcome.metrics = {
        "pieces": float(len(study.pieces)),
        "pieces_computed": float(len(study.missing) - len(failed)),
        "wall_seconds": time.perf_counter() - started,
    }
    if failed:
        first, error = next(iter(failed.items()))
        outcome.code = FAILED
        outcome.message = f"{len(failed)} pieces failed, the first {first}: {error}; the same command tries them again"
    _write(study, outcome, conclusions)
    return outcome, conclusions


def open_study(config: StudyConfig) -> Store:
    """The store of the study's output.

    Raises:
        UserError: if output.path is not set, cannot be written, or holds the output of another job.
    """
    if not config.output.path:
        raise UserError("output.path must be set; --help lists the keys")
    output = make_store(config.output.path, endpoint_url=config.output.endpoint_url)
    try:
        if read_claim(output) is not None:
            raise UserError(
                f"output.path must be a study's or empty, got {output.path}, which holds another job's output"
            )
        output.write(".probe", b"")
        output.delete(".probe")
    except STORE_ERRORS as error:
        raise UserError(f"output.path {output.path} must be writable: {type(error).__name__}: {error}") from error
    return output


def _compute(study: Study, started: float) -> dict[str, str]:
    """Computes the missing pieces and logs the progress; experiment/name -> error of every failed piece."""
    failed: dict[str, str] = {}
    total = Counter(piece.experiment for piece in study.pieces)
    done = total - Counter(piece.experiment for piece in study.missing)
    logger.info("%d of %d pieces to compute", len(study.missing), len(study.pieces))
    last_logged = time.perf_counter()
    for finished in compute_on_ray(study.missing, study.output):
        piece = finished.piece
        if finished.error:
            failed[f"{piece.experiment}/{piece.name}"] = finished.error
            logger.warning("%s/%s failed: %s", piece.experiment, piece.name, finished.error)
            continue
        done[piece.experiment] += 1
        if time.perf_counter() - last_logged >= study.config.run.progress_seconds:
            last_logged = time.perf_counter()
            parts = ", ".join(f"{name} {done[name]}/{count}" for name, count in total.items())
            logger.info("%d/%d pieces (%s), %.0f s", done.total(), total.total(), parts, last_logged - started)
    return failed


def _conclude(study: Study, failed: Mapping[str, str]) -> dict[str, Conclusion]:
    """The conclusions of all experiments without a failed piece."""
    incomplete = {name.split("/")[0] for name in failed}
    conclusions = {}
    for name in study.names:
        if name not in incomplete:
            pieces = [piece for piece in study.pieces if piece.experiment == name]
            conclusions[name] = EXPERIMENTS[name].conclude(load(pieces, study.output), study.config)
    return conclusions


def _write(study: Study, outcome: Outcome, conclusions: Mapping[str, Conclusion]) -> None:
    """Writes tables, MLflow runs, page and record. The record is last: with it, `track_study` adds no further run."""
    page = render_study(study.config, conclusions, outcome)
    for conclusion in conclusions.values():
        for name, rows in conclusion.tables.items():
            study.output.write(f"results/{name}.parquet", _parquet(rows))
    outcome.tracked = track_study(study, conclusions, outcome, page)
    record = {
        "finished": outcome.code == DONE,
        "experiments": {name: {"findings": list(c.findings), "metrics": c.metrics} for name, c in conclusions.items()},
        "last_run": outcome.metrics,
        "cluster": outcome.cluster and outcome.cluster.to_dict(),
        "config": {k: v for k, v in study.config.dotted().items() if k not in NOT_IN_STUDY},
    }
    study.output.write("study.html", page.encode())
    write_json(study.output, RECORD, record)


def track_study(study: Study, conclusions: Mapping[str, Conclusion], outcome: Outcome, page: str) -> str:
    """Tracks one MLflow run for the study and, below it, one for each experiment; returns the address of the parent.

    Nothing is tracked if this run computed nothing and the study is reported already: the address is empty then.
    """
    if not study.missing and study.output.exists(RECORD):
        return ""
    mlflow = study.config.mlflow
    params = {k: v for k, v in study.config.dotted().items() if k not in NOT_IN_STUDY}
    status = "FINISHED" if outcome.code == DONE else "FAILED"
    tags = git_tag() | {"model": study.config.model.path, "cluster": study.config.ray.address or "local"}

    def tracker(name: str):
        return make_tracker(mlflow.enabled, mlflow.tracking_uri, mlflow.experiment, name, study.output.path)

    parent = tracker(mlflow.run_name or "study")
    parent.start(params, tags, to_yaml(study.config))
    parent.log(outcome.metrics, 0)
    parent.artifact("study.html", page)
    address = parent.finish(status)
    parent_id = parent.run_id if isinstance(parent, MlflowTracker) else None
    for name, conclusion in conclusions.items():
        child = tracker(name)
        own = {k: v for k, v in params.items() if k.startswith(f"{name}.")} | {"resamples": study.config.resamples}
        child.start(own, tags | ({"mlflow.parentRunId": parent_id} if parent_id else {}), to_yaml(study.config))
        child.log(conclusion.metrics, 0)
        child.artifact("findings.txt", "\n".join(conclusion.findings))
        for table, rows in conclusion.tables.items():
            child.artifact(f"{table}.parquet", _parquet(rows))
        child.finish("FINISHED")
    return address


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    pq.write_table(pa.Table.from_pylist(rows), stream := io.BytesIO(), compression="zstd")
    return stream.getvalue()
