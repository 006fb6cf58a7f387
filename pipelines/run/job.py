"""The caption job: check everything, plan, run the flow, isolate what kills its process, account for it all."""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from otprune.methods import check_settings, get_method
from otprune.models import CheckpointError, resolve_checkpoint
from otprune.models.checkpoint import ANYRES, RESOLUTIONS, image_statistics, read_config
from pipelines.config.keys import Config
from pipelines.config.load import UserError
from pipelines.corpus.find import Corpus, find_corpus
from pipelines.dollars.meter import check_instances
from pipelines.engines.checks import check_engine, engine_arguments, engine_bundles, takes_images, units_in_flight
from pipelines.engines.transformers_actor import Generator
from pipelines.engines.vllm_actor import VllmGenerator
from pipelines.images.decode import mean_color
from pipelines.output.fingerprint import claim_output, describe, fingerprint
from pipelines.output.plan import Plan, make_plan
from pipelines.output.schema import CAPTIONS_FOLDER
from pipelines.run.cluster import actor_gpus, wait_for_room
from pipelines.run.flow import Stage, run_flow
from pipelines.run.isolate import JobFailedError
from pipelines.run.progress import Counted
from pipelines.run.pruning import resolve_pruning
from pipelines.run.watchdog import cause_of
from pipelines.stages.encode import Encoder
from pipelines.stages.read import DecodeSettings, ReadDecode, Reader, SpanRow
from pipelines.stages.write import Sink
from pipelines.store import STORE_ERRORS, Store, make_store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """A checked job, before any cluster is touched."""

    config: Config
    model: Path
    corpus: Corpus
    output: Store
    described: dict[str, Any]  # what the fingerprint stands for
    plan: Plan
    folder: str = CAPTIONS_FOLDER  # of the objects that commit units
    counted: Counted = "images"  # what the plan's rows are to progress
    tags: dict[str, str] = field(default_factory=dict)  # of the tracked run, beside those of every job
    pruning: dict[str, Any] = field(default_factory=dict)  # the method's settings, complete

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.described)


def prepare(config: Config) -> Job:
    """Checks model, corpus and output, in seconds, and plans what is left to do. An estimate only reads the output.

    Raises:
        UserError: for anything that the user has to correct.
    """
    check_instances(config)
    model = check_model(config)
    corpus = find_input(config)
    pruning = check_pruning(config, model)
    described = describe(config, model, pruning if inside_model(config) else None)
    output = open_output(config, described, write=not config.run.estimate)
    plan = make_plan(
        corpus,
        output,
        fingerprint(described),
        num_images=config.unit.images,
        limit=config.input.limit,
        num_samples=config.run.samples,
        tidy=not config.run.estimate,
    )
    return Job(config, model, corpus, output, described, plan, pruning=pruning)


def find_input(config: Config) -> Corpus:
    """The corpus at input.path, with the columns that the prompts need.

    Raises:
        UserError: as `find_corpus`.
    """
    return find_corpus(
        make_store(config.input.path, endpoint_url=config.input.endpoint_url, anonymous=config.input.anonymous),
        image_column=config.input.image_column,
        id_column=config.input.id_column,
        reference_column=config.input.reference_column,
        templates=[config.prompt.template, *config.prompt.more],
    )


def check_model(config: Config, *, writes: bool = True) -> Path:
    """The checkpoint's folder; `output.path` must be set if the job `writes` there.

    Raises:
        UserError: if a path is not set, the method or one of its settings is not known, or there is no checkpoint.
    """
    for name, value in (
        ("model.path", config.model.path),
        ("input.path", config.input.path),
        ("output.path", config.output.path),
    ):
        if not value and (writes or name != "output.path"):
            raise UserError(f"{name} must be set; --help lists the keys")
    try:
        get_method(config.prune.method)
        check_settings(config.prune.method, config.prune.settings)
    except ValueError as error:
        raise UserError(f"prune.{error}") from error
    check_engine(config)
    try:
        return resolve_checkpoint(config.model.path).resolve()
    except CheckpointError as error:
        raise UserError(str(error)) from error


def inside_model(config: Config) -> bool:
    """Whether the method prunes inside the language model."""
    return get_method(config.prune.method).kind == "in_llm"


def check_pruning(config: Config, model: Path) -> dict[str, Any]:
    """The method's settings, complete, for this checkpoint.

    Raises:
        UserError: if they do not fit it, or the method cannot decode as configured.
    """
    try:
        return resolve_pruning(config, model)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    except ValueError as error:
        raise UserError(f"prune.{error}") from error


def open_output(config: Config, described: dict[str, Any], *, write: bool = True) -> Store:
    """The store to write to, marked as this configuration's unless it is not to be written.

    Raises:
        UserError: if it is another configuration's, or cannot be written.
    """
    output = make_store(config.output.path, endpoint_url=config.output.endpoint_url)
    try:
        output = claim_output(output, described, config.output.on_mismatch, mark=write)
        if write:
            output.write(".probe", b"")
            output.delete(".probe")
    except STORE_ERRORS as error:
        raise UserError(f"output.path {output.path} must be writable: {type(error).__name__}: {error}") from error
    return output


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages of a job, with everything that they need, ready for `run_flow`."""

    read: Reader
    encode: Stage | None
    generate: Stage
    sink: Sink

    def run(self, spans: list[SpanRow], config: Config, one_at_a_time: bool) -> Iterator[dict[str, Any]]:
        """Summaries of the spans' units, as dicts.

        Raises:
            JobFailedError: if Ray gives up.
        """
        if one_at_a_time:
            wait_for_room(config)
        summaries = run_flow(
            spans,
            read=self.read,
            encode=self.encode,
            generate=self.generate,
            sink=self.sink,
            retries=config.faults.retries,
            max_lost=config.faults.max_isolated,
            no_progress_seconds=config.faults.no_progress_seconds,
            max_restarts=config.engine.max_restarts if config.engine.name == "vllm" else None,
            one_at_a_time=one_at_a_time,
        )
        try:
            for row in summaries:
                yield json.loads(row["summary"])
        except Exception as error:  # whatever its executor ran into, Ray raises as it is
            raise JobFailedError(f"Ray gave up: {type(error).__name__}: {cause_of(str(error))}") from error


def make_stages(job: Job, encoder: type = Encoder, generator: type | None = None) -> Stages:
    """The stages for the connected cluster; `encoder` and `generator` are the actor classes, the latter by default the
    configured engine's."""
    config = job.config
    sink = Sink(store=job.output, fingerprint=job.fingerprint, model=config.model.path, method=config.prune.method)
    return Stages(make_reader(job), *model_stages(job, encoder, generator), sink)


def make_reader(job: Job) -> ReadDecode:
    """The first stage."""
    config = job.config
    return ReadDecode(
        store=job.corpus.store,
        columns=job.corpus.columns,
        templates=[config.prompt.template, *config.prompt.more],
        decode=decode_settings(job),
        fetch_threads=config.input.fetch_threads,
        fetch_timeout=config.input.fetch_timeout,
    )


def decode_settings(job: Job) -> DecodeSettings:
    config = job.config.decode
    mean, _ = image_statistics(job.model)
    checkpoint = read_config(job.model)
    resolutions = checkpoint.get("image_grid_pinpoints", RESOLUTIONS) if checkpoint["model_type"] == ANYRES else ()
    return DecodeSettings(
        size=checkpoint["vision_config"].get("image_size", 336),
        resolutions=tuple((height, width) for height, width in resolutions),
        aspect=config.aspect,
        background=mean_color(mean),
        max_bytes=config.max_bytes,
        max_pixels=config.max_pixels,
        min_side=config.min_side,
    )


def model_stages(job: Job, encoder: type, generator: type | None) -> tuple[Stage | None, Stage]:
    """The two actor stages, which are those of every kind of job; an engine that takes images needs no encode stage."""
    return None if takes_images(job.config) else encode_stage(job, encoder), generate_stage(job, generator)


def encode_stage(job: Job, encoder: type) -> Stage:
    config = job.config
    num_gpus, _ = actor_gpus(config)
    return Stage(
        actor=encoder,
        arguments={
            "model_path": str(job.model),
            "dtype": config.model.dtype,
            "device": "cuda" if num_gpus else "cpu",
            "gpu_share": num_gpus,
            "method": config.prune.method,
            "retention": config.prune.retention,
            "gamma": config.prune.gamma,
            "gamma_scale": config.prune.gamma_scale,
            "settings": job.pruning,
            "per_tile": config.prune.per_tile,
            "seed": config.prune.seed,
            "batch_size": config.encode.batch_size,
        },
        min_actors=config.encode.actors,
        max_actors=config.encode.max_actors or config.encode.actors,
        num_cpus=config.encode.num_cpus,
        num_gpus=num_gpus,
        accelerator=config.encode.accelerator,
    )


def generate_stage(job: Job, generator: type | None) -> Stage:
    config = job.config
    _, num_gpus = actor_gpus(config)
    arguments = {
        "model_path": str(job.model),
        "conversation": config.prompt.conversation,
        "max_new_tokens": config.generate.max_new_tokens,
        "temperature": config.generate.temperature,
        "top_p": config.generate.top_p,
        "seed": config.generate.seed,
    }
    if config.engine.name == "vllm":
        default: type = VllmGenerator
        arguments |= {
            "engine": engine_arguments(config, num_gpus),
            "sampling": dict(config.engine.sampling),
            "images": takes_images(config),
            "timeout_seconds": config.engine.timeout_seconds,
        }
    else:
        default = Generator
        arguments |= {
            "dtype": config.model.dtype,
            "device": "cuda" if num_gpus else "cpu",
            "gpu_share": num_gpus,
            "batch_size": config.generate.batch_size,
            "method": config.prune.method,
            "settings": job.pruning,
            "cuda_graphs": config.generate.cuda_graphs,
        }
    return Stage(
        actor=generator or default,
        arguments=arguments,
        min_actors=config.generate.actors,
        max_actors=config.generate.max_actors or config.generate.actors,
        num_cpus=config.generate.num_cpus,
        num_gpus=num_gpus,
        units_at_once=units_in_flight(config),
        bundles=engine_bundles(config),
        accelerator=config.generate.accelerator,
    )
