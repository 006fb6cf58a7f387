"""The dry run of a sweep: estimates the dollars of every point before any point runs.

A finished point costs nothing more. For the other points, a trial captions a few images with the fewest and with the
most tokens of the grid. The estimate assumes that the seconds of an image grow linearly with the retention between
these two trials, and that start-up takes as long as in the trial. It ignores the method and the pool sizes: how speed
depends on them is what the sweep measures.
"""

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.config.keys import InputConfig
from pipelines.config.load import with_values
from pipelines.corpus.find import input_corpus
from pipelines.errors import UserError
from pipelines.run.job import prepare
from pipelines.run.outcome import DONE
from pipelines.run.run import run_job
from pipelines.sweep.checked import Sweep
from pipelines.sweep.grid import Point
from pipelines.sweep.point import FINISHED, read_record
from pipelines.sweep.run import Session

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trial:
    """The measured speed at one retention."""

    retention: float
    seconds_per_image: float
    startup_seconds: float
    usd_per_hour: float | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """The seconds and dollars that a point still needs; None where they are not known."""

    point: Point
    finished: bool
    images: int
    seconds: float | None
    usd: float | None
    note: str = ""


def estimate_points(sweep: Sweep) -> list[Estimate]:
    """An estimate for every point, in their order.

    Raises:
        UserError: if the trial cannot run.
    """
    todo = [point for point in sweep.points if not _is_finished(point)]
    here = [point for point in todo if point.address is None]
    trials = run_trials(sweep, here) if here and sweep.config.sweep.trial_images else []
    inputs = {repr(point.config.input): point.config.input for point in sweep.points}
    images = {key: num_images(each) for key, each in inputs.items()}
    return [_estimate(point, trials, point not in todo, images[repr(point.config.input)]) for point in sweep.points]


def run_trials(sweep: Sweep, here: Sequence[Point]) -> list[Trial]:
    """Runs one or two trials: at the lowest and the highest retention of the points `here`. Their output is deleted."""
    ends = {point.config.prune.share: point for point in sorted(here, key=lambda p: p.config.prune.share)}
    chosen = [ends[retention] for retention in dict.fromkeys((min(ends), max(ends)))]
    folder = f"trial-{secrets.token_hex(4)}"  # inside the sweep's output, because every node can reach that
    path = f"{sweep.output.address_with_user}/{folder}"
    with Session(sweep) as session:
        session.join()
        try:
            return [_trial(sweep, point, f"{path}/{number}") for number, point in enumerate(chosen)]
        finally:
            sweep.output.remove(folder)


def _trial(sweep: Sweep, point: Point, folder: str) -> Trial:
    wanted = sweep.config.sweep.trial_images
    values = {"output.path": folder, "input.limit": wanted, "unit.images": max(1, wanted // 6), "run.samples": 0}
    outcome = run_job(prepare(with_values(point.config, values), sweep.actors))
    metrics = outcome.metrics
    if outcome.code != DONE or metrics["images_per_second"] <= 0:
        raise UserError(f"the trial of {point.name} failed: {outcome.message or 'no image was captioned'}")
    seconds = 1 / metrics["images_per_second"]
    return Trial(point.config.prune.share, seconds, metrics["startup_seconds"], metrics.get("usd_per_hour"))


def _estimate(point: Point, trials: Sequence[Trial], finished: bool, images: int) -> Estimate:
    if finished:
        return Estimate(point, True, images, 0.0, 0.0, "finished")
    if point.address is not None:
        return Estimate(point, False, images, None, None, f"runs at {point.address}: not estimated")
    if not trials:
        return Estimate(point, False, images, None, None, "sweep.trial_images=0: not estimated")
    seconds = trials[-1].startup_seconds + images * seconds_per_image(point.config.prune.share, trials)
    per_hour = point.config.cost.usd_per_hour or trials[-1].usd_per_hour
    return Estimate(point, False, images, seconds, None if per_hour is None else per_hour * seconds / 3600)


def seconds_per_image(retention: float, trials: Sequence[Trial]) -> float:
    """Seconds on the line through the trials. If fewer tokens seem to take longer, which is noise, the trials' mean."""
    few, many = trials[0], trials[-1]
    if few.seconds_per_image >= many.seconds_per_image:
        return (few.seconds_per_image + many.seconds_per_image) / 2
    share = (retention - few.retention) / (many.retention - few.retention)
    return few.seconds_per_image + share * (many.seconds_per_image - few.seconds_per_image)


def num_images(chosen: InputConfig) -> int:
    """Rows of the corpus, or `input.limit` if that is less."""
    corpus = input_corpus(chosen)
    rows = sum(file.num_rows for file in corpus.files)
    return rows if chosen.limit is None else min(rows, chosen.limit)


def _is_finished(point: Point) -> bool:
    record = read_record(point)
    return record is not None and record["status"] == FINISHED
