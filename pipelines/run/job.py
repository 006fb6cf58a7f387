"""The caption job: check everything, plan, run the flow, isolate what kills its process, account for it all."""

import logging
from dataclasses import dataclass, field
from typing import Any

from otprune.methods import get_method
from otprune.models import Checkpoint, CheckpointError, read_checkpoint
from pipelines.config.keys import Config
from pipelines.corpus.find import Corpus, find_corpus
from pipelines.dollars.meter import check_instances
from pipelines.engines.registry import check_engine
from pipelines.errors import UserError
from pipelines.output.fingerprint import claim_output, fingerprint
from pipelines.output.plan import Plan, make_plan
from pipelines.output.schema import CAPTIONS_FOLDER
from pipelines.run.describe import describe
from pipelines.run.progress import Counted
from pipelines.run.pruning import resolve_pruning
from pipelines.store import STORE_ERRORS, Store, make_store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Actors:
    """The classes of the two actor stages; None is the engine's own. A test or a user brings others."""

    encode: type | None = None
    generate: type | None = None


ENGINES_OWN = Actors()


@dataclass(frozen=True, slots=True)
class Job:
    """A checked job, before any cluster is touched."""

    config: Config
    checkpoint: Checkpoint
    corpus: Corpus
    output: Store
    described: dict[str, Any]  # what the fingerprint stands for
    plan: Plan
    folder: str = CAPTIONS_FOLDER  # of the objects that commit units
    counted: Counted = "images"  # what the plan's rows are to progress
    tags: dict[str, str] = field(default_factory=dict)  # of the tracked run, beside those of every job
    pruning: dict[str, Any] = field(default_factory=dict)  # the method's settings, complete
    actors: Actors = ENGINES_OWN

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.described)


def prepare(config: Config, actors: Actors = ENGINES_OWN) -> Job:
    """Checks model, corpus and output, in seconds, and plans what is left to do. An estimate only reads the output.

    Raises:
        UserError: for anything that the user has to correct.
    """
    check_instances(config)
    checkpoint = check_model(config)
    corpus = find_input(config)
    pruning = check_pruning(config, checkpoint)
    described = describe(config, checkpoint, pruning if inside_model(config) else None)
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
    return Job(config, checkpoint, corpus, output, described, plan, pruning=pruning, actors=actors)


def find_input(config: Config) -> Corpus:
    """The corpus at input.path, with the columns that the prompts need.

    Raises:
        UserError: as `find_corpus`.
    """
    return find_corpus(
        make_store(config.input.path, endpoint_url=config.input.endpoint_url, anonymous=config.input.anonymous),
        format=config.input.format,
        image_column=config.input.image_column,
        id_column=config.input.id_column,
        reference_column=config.input.reference_column,
        templates=[config.prompt.template, *config.prompt.more],
    )


def check_model(config: Config, *, writes: bool = True) -> Checkpoint:
    """The checkpoint, read once for the whole job; `output.path` must be set if the job `writes` there.

    Raises:
        UserError: as `check_keys`, or if there is no checkpoint.
    """
    check_keys(config, writes=writes)
    try:
        return read_checkpoint(config.model.path)
    except CheckpointError as error:
        raise UserError(str(error)) from error


def check_keys(config: Config, *, writes: bool = True) -> None:
    """Checks what can be checked without a file: paths, the method with its settings, the engine.

    Raises:
        UserError: if a path is not set, or the method, one of its settings or the engine is not known or does not fit.
    """
    for name, value in (
        ("model.path", config.model.path),
        ("input.path", config.input.path),
        ("output.path", config.output.path),
    ):
        if not value and (writes or name != "output.path"):
            raise UserError(f"{name} must be set; --help lists the keys")
    try:
        get_method(config.prune.method).check(config.prune.settings)
    except ValueError as error:
        raise UserError(f"prune.{error}") from error
    check_engine(config)


def inside_model(config: Config) -> bool:
    """Whether the method prunes inside the language model."""
    return get_method(config.prune.method).inside_model


def check_pruning(config: Config, checkpoint: Checkpoint) -> dict[str, Any]:
    """The method's settings, complete, for this checkpoint.

    Raises:
        UserError: if they do not fit it, or the method cannot decode as configured.
    """
    try:
        return resolve_pruning(config, checkpoint)
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
