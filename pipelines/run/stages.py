"""Makes the stages of a job from its configuration, and runs them by Ray or in this process."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.config.keys import Config
from pipelines.corpus.fetch import fetch_settings
from pipelines.engines.registry import get_engine, takes_images
from pipelines.errors import JobFailedError
from pipelines.output.span import SpanRow
from pipelines.run.flow import run_flow
from pipelines.run.job import Job
from pipelines.run.local_flow import local_flow
from pipelines.run.placement import Stage
from pipelines.run.pool_clock import PoolClock
from pipelines.run.resources import actor_gpus, is_local, wait_for_room
from pipelines.run.watchdog import cause_of
from pipelines.stages.encode import Encoder
from pipelines.stages.gpu import Place
from pipelines.stages.read import DecodeSettings, ReadDecode, Reader
from pipelines.stages.write import Sink


@dataclass(frozen=True, slots=True)
class Stages:
    """The four stages of a job, ready for `run_flow` or `local_flow`."""

    read: Reader
    encode: Stage | None  # None: the generate stage takes the pixels
    generate: Stage
    sink: Sink

    def run(
        self,
        spans: list[SpanRow],
        config: Config,
        one_at_a_time: bool,
        clock: PoolClock | None = None,
        max_lost: int | None = None,
    ) -> Iterator[dict[str, Any]]:
        """Runs the units of the spans by Ray, or in this process with `ray.address=none`. Yields their summaries.

        `max_lost` units may fail as a whole; None takes the number from the configuration.

        Raises:
            JobFailedError: if Ray gives up, or a stage in this process raises.
        """
        if one_at_a_time and not is_local(config):
            wait_for_room([stage for stage in (self.encode, self.generate) if stage is not None])
        summaries = choose_flow(config)(
            spans,
            read=self.read,
            encode=self.encode,
            generate=self.generate,
            sink=self.sink,
            retries=config.faults.retries,
            max_lost=config.faults.max_isolated if max_lost is None else max_lost,
            no_progress_seconds=config.faults.no_progress_seconds,
            max_restarts=get_engine(config).max_restarts(config),
            one_at_a_time=one_at_a_time,
            clock=clock,
        )
        try:
            for row in summaries:
                yield json.loads(row["summary"])
        except Exception as error:  # Ray raises the errors of its executor as they are, of any type
            culprit = "a stage" if is_local(config) else "Ray"
            raise JobFailedError(f"{culprit} gave up: {type(error).__name__}: {cause_of(str(error))}") from error


def choose_flow(config: Config) -> Callable[..., Iterator[dict[str, Any]]]:
    """The function that runs the stages: Ray Data, or with `ray.address=none` a loop in this process."""
    return local_flow if is_local(config) else run_flow


def make_stages(job: Job) -> Stages:
    """The stages of a caption job on the connected cluster."""
    config = job.config
    sink = Sink(store=job.output, fingerprint=job.fingerprint, model=config.model.path, method=config.prune.method)
    return Stages(make_reader(job), *model_stages(job), sink)


def make_reader(job: Job) -> ReadDecode:
    """The stage that reads a unit and decodes its images."""
    config = job.config
    return ReadDecode(
        store=job.corpus.store,
        format=job.corpus.format,
        columns=job.corpus.columns,
        templates=[config.prompt.template, *config.prompt.more],
        decode=decode_settings(job),
        fetch=fetch_settings(config.input),
        patience=config.faults.patience_seconds,
    )


def decode_settings(job: Job) -> DecodeSettings:
    """The settings of the decoder: geometry of the checkpoint, limits of the configuration."""
    config = job.config.decode
    return DecodeSettings(
        job.checkpoint.geometry,
        config.max_bytes,
        config.max_pixels,
        config.min_side,
        config.color_profiles,
        tuple(config.more_formats),
    )


def model_stages(job: Job) -> tuple[Stage | None, Stage]:
    """(encode, generate), the actor stages of every kind of job. An engine that takes images needs no encode stage."""
    encode = None if takes_images(job.config, job.checkpoint) else encode_stage(job)
    return encode, generate_stage(job)


def encode_stage(job: Job) -> Stage:
    """The stage that turns pixels into visual tokens and prunes them."""
    config = job.config
    num_gpus, _ = actor_gpus(config, job.checkpoint)
    return Stage(
        actor=job.actors.encode or Encoder,
        arguments={
            "checkpoint": job.checkpoint,
            "prune": config.prune,
            "settings": job.pruning,
            "batch_size": config.encode.batch_size,
            "place": place_of(config, num_gpus),
        },
        min_actors=config.encode.actors,
        max_actors=config.encode.max_actors or config.encode.actors,
        num_cpus=config.encode.num_cpus,
        num_gpus=num_gpus,
        accelerator=config.encode.accelerator,
    )


def generate_stage(job: Job) -> Stage:
    """The stage that writes the captions, by the actor of the configured engine."""
    config, engine = job.config, get_engine(job.config)
    _, num_gpus = actor_gpus(config, job.checkpoint)
    return Stage(
        actor=job.actors.generate or engine.actor(),
        arguments=engine.arguments(config, job.checkpoint, job.pruning, place_of(config, num_gpus)),
        min_actors=config.generate.actors,
        max_actors=config.generate.max_actors or config.generate.actors,
        num_cpus=config.generate.num_cpus,
        num_gpus=num_gpus,
        units_at_once=engine.units_in_flight(config),
        bundles=engine.bundles(config),
        accelerator=config.generate.accelerator,
    )


def place_of(config: Config, num_gpus: float) -> Place:
    """The device and the dtype of an actor that holds `num_gpus` GPUs."""
    return Place("cuda" if num_gpus else "cpu", config.model.dtype, num_gpus)
