"""Prepares the caption job: checks its configuration, model, corpus and output, and plans the units left to do."""

import logging
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from otprune.families import Options
from otprune.methods import get_method
from otprune.models import Checkpoint, CheckpointError, check_weights, read_checkpoint
from pipelines.config.judge import read_judge
from pipelines.config.keys import Config, PruneConfig
from pipelines.corpus.find import Corpus, input_corpus
from pipelines.dollars.meter import check_instances
from pipelines.engines.registry import check_engine, check_family
from pipelines.errors import UserError
from pipelines.output.fingerprint import claim_output, fingerprint
from pipelines.output.lease import take_lease
from pipelines.output.patient import with_patience
from pipelines.output.plan import Plan, make_plan
from pipelines.output.schema import CAPTIONS_FOLDER
from pipelines.run.describe import describe
from pipelines.run.progress import Counted
from pipelines.run.pruning import count_text, resolve_pruning
from pipelines.store import STORE_ERRORS, Store, make_store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Actors:
    """The classes of the two actor stages. None is the default class; a test or a user may bring another."""

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
    described: dict[str, Any]  # of `describe`; the fingerprint is its hash
    plan: Plan
    folder: str = CAPTIONS_FOLDER  # of the parts that commit units
    counted: Counted = "images"  # what progress calls a row of the plan
    tags: dict[str, str] = field(default_factory=dict)  # of the tracked run, in addition to those of every job
    pruning: dict[str, Any] = field(default_factory=dict)  # resolved settings of the method
    actors: Actors = ENGINES_OWN

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.described)


def prepare(config: Config, actors: Actors = ENGINES_OWN) -> Job:
    """Checks model, corpus and output within seconds, and plans the units left to do.

    An estimate (`run.estimate`) only reads the output; any other job claims it.

    Raises:
        UserError: for anything that the user has to correct.
    """
    check_instances(config)  # a wrong price ends the job here, not after its sample
    config, checkpoint = check_model(config)
    corpus = find_input(config)
    pruning = check_runs(config, checkpoint)
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
        redo=config.faults.redo,
        on_changed=config.input.on_changed,
    )
    return Job(config, checkpoint, corpus, output, described, plan, pruning=pruning, actors=actors)


def find_input(config: Config) -> Corpus:
    """The corpus at input.path, with the columns that the prompts need.

    Raises:
        UserError: as of `input_corpus`, or if the output is the folder of the input.
    """
    if config.output.path and make_store(config.output.path).path == make_store(config.input.path).path:
        raise UserError(f"output.path must be another folder than input.path, got {config.output.path} for both")
    return input_corpus(
        config.input,
        reference_column=config.input.reference_column,
        templates=[config.prompt.template, *config.prompt.more],
    )


AnyConfig = TypeVar("AnyConfig", bound=Config)


def check_model(config: AnyConfig, *, writes: bool = True) -> tuple[AnyConfig, Checkpoint]:
    """Checks the keys and reads the checkpoint, once for the whole job.

    Args:
        writes: whether the job needs `output.path`.

    Returns:
        The configuration with the model's own values in place of null and `auto`, and the checkpoint. For a method that
        sends smaller pictures, the checkpoint's geometry is that of the smaller pictures.

    Raises:
        UserError: as of `check_keys`, or if there is no usable checkpoint at model.path.
    """
    check_keys(config, writes=writes)
    options = Options(
        aspect=config.decode.aspect,
        max_pixels=config.model.max_pixels,
        min_pixels=config.model.min_pixels,
        max_tiles=config.model.max_tiles,
        original_tiles=config.model.original_tiles,
    )
    try:
        checkpoint = read_checkpoint(config.model.path, options)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    retention = checkpoint.record.retention if config.prune.retention is None else config.prune.retention
    options = checkpoint.options
    config = replace(
        config,
        model=replace(
            config.model,
            max_pixels=options.max_pixels,
            min_pixels=options.min_pixels,
            max_tiles=options.max_tiles,
        ),
        decode=replace(config.decode, aspect=options.aspect),
        prune=replace(config.prune, retention=retention),
    )
    checkpoint = with_pictures_of(config.prune, checkpoint)
    check_unit(config, checkpoint)
    return config, checkpoint


def with_pictures_of(prune: PruneConfig, checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the geometry of the pictures that the method of `prune`, resolved for the model, sends.

    Raises:
        UserError: if the method or prune.shrink sends smaller pictures, and the model takes none; or if a smaller
            picture has fewer tokens than prune.retention keeps.
    """
    method = get_method(prune.method)
    share = prune.share if method.sends_smaller else None if method.keeps_all else prune.shrink
    if share is None:
        return replace(checkpoint, geometry=checkpoint.whole_geometry)
    shrunk = checkpoint.whole_geometry.shrunk(share)
    if shrunk is None:
        said = f"prune.method={prune.method}" if method.sends_smaller else f"prune.shrink={share:g}"
        raise UserError(
            f"{said} needs a model of free picture size, got a {checkpoint.record.title}, whose pictures all have one "
            "size or its tiles"
        )
    if share < prune.share:
        raise UserError(
            f"prune.retention must be at most prune.shrink={share:g}, the share of the tokens that the smaller picture "
            f"has, got {prune.share:g}"
        )
    return replace(checkpoint, geometry=shrunk)


def check_unit(config: Config, checkpoint: Checkpoint) -> None:
    """Refuses units whose pixels are more than one array of a row can hold.

    Raises:
        UserError: if a unit of the largest pictures has more than 2 GiB of pixels.
    """
    geometry = checkpoint.geometry if config.gate.min_quality is None else checkpoint.whole_geometry  # sent by the gate
    most = geometry.most_bytes
    if config.unit.images * most >= 2**31:
        raise UserError(
            f"unit.images must be at most {2**31 // most} with pictures of up to {most // 3} pixels "
            f"(model.max_pixels, model.max_tiles), because a unit's pixels take at most 2 GiB; got {config.unit.images}"
        )


def check_keys(config: Config, *, writes: bool = True) -> None:
    """Checks the keys that need no file: the paths, the method with its settings, and the engine.

    Args:
        writes: whether the job needs `output.path`.

    Raises:
        UserError: if a path is not set, or if the method, one of its settings or the engine is unknown or does not fit.
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
    if read_judge(config.quality.judge) is None and config.gate.metric == "judge":
        raise UserError("gate.metric=judge needs quality.judge.url and quality.judge.model")
    check_engine(config)


def inside_model(config: Config) -> bool:
    """Whether the method prunes visual tokens inside the language model, not before it."""
    return get_method(config.prune.method).inside_model


def check_runs(config: Config, checkpoint: Checkpoint) -> dict[str, Any]:
    """The resolved settings of the method, once the model is known to load, to be pruned so, and to get prompts.

    Raises:
        UserError: if one of these is not so.
    """
    pruning = check_pruning(config, checkpoint)
    check_prompts(config, checkpoint)
    check_loads(checkpoint)
    return pruning


def check_pruning(config: Config, checkpoint: Checkpoint) -> dict[str, Any]:
    """The resolved settings of the method for this checkpoint.

    Raises:
        UserError: if the settings do not fit the checkpoint, or the method or the engine cannot run in this model.
    """
    check_family(config, checkpoint)
    try:
        return resolve_pruning(config, checkpoint)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    except ValueError as error:
        raise UserError(f"prune.{error}") from error


def check_prompts(config: Config, checkpoint: Checkpoint) -> None:
    """Refuses prompts that the model could not get for any image: they would quarantine the whole corpus.

    Raises:
        UserError: if there is no tokenizer, a template or the system message holds the image token, or the conversation
            format cannot write the prompt.
    """
    prompt = config.prompt
    for template in (prompt.template, *prompt.more):
        try:
            count_text(template, prompt.conversation, prompt.system, checkpoint)
        except Exception as error:  # of a broken tokenizer.json, tokenizers raises a plain one
            reason = " ".join(str(error).split())
            raise UserError(f"prompt.* must fit the tokenizer of {checkpoint.path}: {reason}") from error


def check_loads(checkpoint: Checkpoint) -> None:
    """Refuses a checkpoint whose weights do not fit its configuration, before any actor holds a GPU for it.

    Raises:
        UserError: with the weight that is missing or has another shape.
    """
    try:
        check_weights(checkpoint)
    except CheckpointError as error:
        raise UserError(f"model.path: {error}") from error


def open_output(config: Config, described: dict[str, Any], *, write: bool = True) -> Store:
    """The output's store, which is waited for in an outage (`faults.patience_seconds`) from now on.

    With `write`, this process takes its lease and claims it for this configuration.

    Raises:
        UserError: if the output belongs to another configuration, is being written by another driver, or cannot be
            written.
    """
    output = make_store(config.output.path, endpoint_url=config.output.endpoint_url)
    try:
        output = claim_output(output, described, config.output.on_mismatch, mark=False)
        if write:
            take_lease(output, config.run.heartbeat_seconds)
            output = claim_output(output, described, "refuse")  # a driver before may have left its own mark meanwhile
            output.write(".probe", b"")
            output.delete(".probe")
    except STORE_ERRORS as error:
        raise UserError(f"output.path {output.path} must be writable: {type(error).__name__}: {error}") from error
    return with_patience(output, config.faults.patience_seconds)
