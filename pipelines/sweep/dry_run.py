"""The dry run of a sweep: its points with the dollars that they will cost, before any of them runs.

A finished point costs nothing more. For the others a trial captions a few images unpruned and with the fewest tokens of
the grid; seconds an image are taken to grow linearly with the tokens kept in between, and start-up to be the trial's.
Neither the method nor the pools are in it: what two machines make of a second actor is what the sweep is there to find.
"""

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from pipelines.config.keys import InputConfig
from pipelines.config.load import with_values
from pipelines.corpus.find import find_corpus
from pipelines.errors import UserError
from pipelines.run.job import prepare
from pipelines.run.outcome import DONE
from pipelines.run.run import run_job
from pipelines.store import make_store
from pipelines.sweep.checked import Sweep
from pipelines.sweep.grid import Point
from pipelines.sweep.point import FINISHED, read_record
from pipelines.sweep.run import Session

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Trial:
    """What a few images took."""

    retention: float
    seconds_per_image: float
    startup_seconds: float
    usd_per_hour: float | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """A point, and the seconds and dollars that are still to come; None where nothing is known."""

    point: Point
    finished: bool
    images: int
    seconds: float | None
    usd: float | None
    note: str = ""


def estimate_points(sweep: Sweep) -> list[Estimate]:
    """Every point with what it will take.

    Raises:
        UserError: if the trial cannot run.
    """
    todo = [point for point in sweep.points if not _is_finished(point)]
    here = [point for point in todo if point.address is None]
    trials = run_trials(sweep, here) if here and sweep.config.sweep.trial_images else []
    return [_estimate(point, trials, point not in todo) for point in sweep.points]


def run_trials(sweep: Sweep, here: Sequence[Point]) -> list[Trial]:
    """At most two, of the fewest and of the most tokens; in a folder of their own that does not stay."""
    ends = {point.config.prune.retention: point for point in sorted(here, key=lambda p: p.config.prune.retention)}
    chosen = [ends[retention] for retention in dict.fromkeys((min(ends), max(ends)))]
    folder = f"trial-{secrets.token_hex(4)}"  # in the sweep's output, which every node of the cluster reaches
    path = f"{sweep.output.path}/{folder}"
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
        raise UserError(f"the trial of {point.name} came to nothing: {outcome.message or 'no image was captioned'}")
    seconds = 1 / metrics["images_per_second"]
    return Trial(point.config.prune.retention, seconds, metrics["startup_seconds"], metrics.get("usd_per_hour"))


def _estimate(point: Point, trials: Sequence[Trial], finished: bool) -> Estimate:
    images = num_images(point.config.input)
    if finished:
        return Estimate(point, True, images, 0.0, 0.0, "finished")
    if point.address is not None:
        return Estimate(point, False, images, None, None, f"runs at {point.address}: not known before")
    if not trials:
        return Estimate(point, False, images, None, None, "sweep.trial_images=0: not known before")
    seconds = trials[-1].startup_seconds + images * seconds_per_image(point.config.prune.retention, trials)
    per_hour = point.config.cost.usd_per_hour or trials[-1].usd_per_hour
    return Estimate(point, False, images, seconds, None if per_hour is None else per_hour * seconds / 3600)


def seconds_per_image(retention: float, trials: Sequence[Trial]) -> float:
    """On the line through the trials; their mean where fewer tokens seem to take longer, which is noise."""
    few, many = trials[0], trials[-1]
    if few.seconds_per_image >= many.seconds_per_image:
        return (few.seconds_per_image + many.seconds_per_image) / 2
    share = (retention - few.retention) / (many.retention - few.retention)
    return few.seconds_per_image + share * (many.seconds_per_image - few.seconds_per_image)


@cache
def num_images(chosen: InputConfig) -> int:
    """Rows of a corpus, as far as its limit lets us go."""
    store = make_store(chosen.path, endpoint_url=chosen.endpoint_url, anonymous=chosen.anonymous)
    corpus = find_corpus(
        store,
        format=chosen.format,
        image_column=chosen.image_column,
        id_column=chosen.id_column,
        reference_column="none",
        templates=[],
    )
    rows = sum(file.num_rows for file in corpus.files)
    return rows if chosen.limit is None else min(rows, chosen.limit)


def _is_finished(point: Point) -> bool:
    record = read_record(point)
    return record is not None and record["status"] == FINISHED
