"""Checks a study's configuration before anything is computed."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from otprune.models import CheckpointError, read_checkpoint
from pipelines.errors import UserError
from pipelines.study.config import EXPERIMENTS, StudyConfig
from pipelines.study.demo_points import POINTS
from pipelines.study.pieces import Model

LINES = 5  # number of lines of Table 2


def choose_experiments(names: Any) -> tuple[str, ...]:
    """The experiments that the configuration names, in the order of EXPERIMENTS.

    Raises:
        UserError: unless `names` is all, an experiment, or a list of experiments.
    """
    chosen = [names] if isinstance(names, str) else names
    if chosen == ["all"]:
        return EXPERIMENTS
    if not isinstance(chosen, list) or not chosen or any(name not in EXPERIMENTS for name in chosen):
        raise UserError(f"experiments must be all or a list of {', '.join(EXPERIMENTS)}, got {names!r}")
    return tuple(name for name in EXPERIMENTS if name in chosen)


def check_values(config: StudyConfig, names: Sequence[str]) -> None:
    """Checks what the bounds of single keys cannot express: lists, and relations between keys.

    Raises:
        UserError: for the first wrong key; the message names it.
    """
    table2, greedy, gamma, distance = config.table2, config.greedy, config.gamma, config.distance
    for key, lines in (("table2.rows", table2.rows), ("table2.exhaustive", table2.exhaustive)):
        if any(not 1 <= line <= LINES for line in lines):
            raise UserError(f"{key} must be lines 1 to {LINES}, got {lines}")
    if any(line > 2 for line in table2.exhaustive):
        raise UserError(f"table2.exhaustive must be 1 or 2: the other lines have 1e25 subsets, got {table2.exhaustive}")
    for size in greedy.sizes:
        if len(size) != 3 or not 1 <= size[2] < size[0] <= 24 or size[1] < 1:
            raise UserError(f"greedy.sizes must be [tokens <= 24, width, kept < tokens], got {list(size)}")
    for key, values in (("greedy.gammas", greedy.gammas), ("gamma.gammas", gamma.gammas)):
        if not values or any(value <= 0 for value in values):
            raise UserError(f"{key} must be positive numbers, got {list(values)}")
    if gamma.kept >= gamma.tokens:
        raise UserError(f"gamma.kept must be below gamma.tokens ({gamma.tokens}), got {gamma.kept}")
    if len(gamma.widths) < 2 or min(gamma.widths) < 1 or len(set(gamma.widths)) < len(gamma.widths):
        raise UserError(f"gamma.widths must be two different widths or more, got {list(gamma.widths)}")
    if unknown := [name for name in distance.methods if name not in POINTS]:
        raise UserError(f"distance.methods must be of {', '.join(POINTS)}, got {unknown[0]!r}")
    if len(distance.methods) in (1, 2):
        raise UserError(f"distance.methods must be three or more to be ranked, got {list(distance.methods)}")
    if not distance.retentions or any(not 0 < value < 1 for value in distance.retentions):
        raise UserError(f"distance.retentions must be in (0, 1), got {list(distance.retentions)}")
    empty = {"table2": table2.rows, "greedy": greedy.sizes, "gamma": gamma.scales}
    for name in names:
        if name in empty and not empty[name]:
            raise UserError(f"{name} must have something to compute; leave it out of experiments instead")
    if "distance" in names and distance.exact and find_spec("ot") is None:
        raise UserError("distance.exact must be false without POT (pip install 'otprune[test]'), got true")


def check_demo_model(config: StudyConfig) -> Model:
    """The checkpoint at model.path.

    Raises:
        UserError: if there is no checkpoint, or if its vocabulary is not that of the demo world.
    """
    from demo.language import words

    if not config.model.path:
        raise UserError("model.path must be set; --help lists the keys")
    try:
        checkpoint = read_checkpoint(config.model.path)
    except CheckpointError as error:
        raise UserError(str(error)) from error
    vocabulary = checkpoint.language.vocab
    if not len(words()) <= vocabulary < 1000:
        raise UserError(
            f"model.path must be a model of the demo world, because the study asks the demo world's questions, got "
            f"{config.model.path} with a vocabulary of {vocabulary}"
        )
    return Model(str(checkpoint.path), checkpoint.digest)
