"""The canary tests whether captions depend on the image: it captions images as they are, blank, and swapped.

A pipeline that feeds wrong, constant or mixed-up visual tokens still writes fluent captions, but these captions do not
depend on the image. The canary sends every sampled image three times through the caption job's stages, in one unit:

    true       the image as it is
    blank      every pixel in the mean colour of the model's training images
    swapped    the row and the prompts of the image, but the pixels of another image of the sample

The captions of the blank and of the swapped copy must differ from the true caption. If all images have the same
prompts, the swapped caption should also equal the true caption of the other image; else images and rows are mixed up
somewhere. Decoding is greedy whatever `generate.temperature` is, because two random samples differ even if the model
ignores the image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipelines.config.keys import Config
from pipelines.corpus.file import CorpusFile, RowGroups
from pipelines.corpus.find import Corpus
from pipelines.errors import JobFailedError, UserError
from pipelines.metrics.agreement import canary
from pipelines.metrics.ptb import tokenize
from pipelines.output.plan import Plan
from pipelines.output.span import SpanRow, with_row_groups
from pipelines.output.unit import Unit
from pipelines.preflight.canary_stages import VARIANTS, ReadThreefold, collect
from pipelines.run.cluster import connected
from pipelines.run.job import (
    ENGINES_OWN,
    Actors,
    Job,
    check_model,
    check_runs,
    find_input,
)
from pipelines.run.stages import make_stages
from pipelines.store import make_store

PIECES = 4  # least files over which a large sample is spread
LEVEL = 0.95  # of the intervals

Key = tuple[str, int, int]  # unit, index of the image in the unit, index of the prompt
Interval = tuple[float, float, float]  # value and the ends of its 95 % interval


@dataclass(frozen=True, slots=True)
class CanaryResult:
    """The verdict of the canary: shares of captions, with exact binomial (Clopper-Pearson) intervals."""

    images: int
    captions: int  # one for each image and prompt
    left_out: int  # sampled images that were quarantined, or had no other image to swap with
    same_as_blank: Interval
    same_as_swapped: Interval
    follows_swap: Interval | None  # swapped captions that are the other image's own; None if prompts differ by row
    saw_the_images: bool  # neither share of equal captions is above `canary.max_same`


def run_canary(config: Config, images: int, max_same: float, actors: Actors = ENGINES_OWN) -> CanaryResult:
    """Captions images of the corpus three times each and compares the captions.

    Args:
        images: number of sampled images (`canary.images`).
        max_same: largest share of equal captions of a model that sees its images (`canary.max_same`).

    Raises:
        UserError: for anything that the user has to correct, such as a corpus of one image.
        JobFailedError: if Ray gives up, or a unit fails as a whole.
    """
    config = replace(config, generate=replace(config.generate, temperature=0.0, retries=0))
    config, checkpoint = check_model(config)
    corpus = find_input(config)
    spans = sample_spans(corpus, images)
    output = make_store(config.output.path)  # the canary writes nothing there
    pruning = check_runs(config, checkpoint)
    job = Job(config, checkpoint, corpus, output, {}, Plan(spans, frozenset(), 0, 0), pruning=pruning, actors=actors)
    with connected(config, checkpoint):
        stages = make_stages(job)
        threefold = replace(stages, read=ReadThreefold(stages.read, checkpoint.geometry.background), sink=collect)
        try:
            units = list(threefold.run(spans, config, one_at_a_time=False, max_lost=0))
        except JobFailedError as error:
            raise JobFailedError(f"the canary failed: {error}") from error
    if failed := [unit["error"] for unit in units if unit["error"]]:
        raise JobFailedError(f"the canary failed: {failed[0]}")
    return compare(units, sum(span.units[0].num_images for span in spans), max_same)


def compare(units: list[dict[str, Any]], num_sampled: int, max_same: float) -> CanaryResult:
    """The result over the units, from the summaries that `collect` sent.

    Raises:
        UserError: if fewer than two captions exist in all three variants.
    """
    captions: dict[str, dict[Key, str]] = {variant: {} for variant in VARIANTS}
    others: dict[Key, Key] = {}  # swapped caption -> true caption of the image that gave the pixels
    for unit in units:
        for record in unit["captions"]:
            key = (unit["unit"], record["image"], record["prompt"])
            captions[record["variant"]][key] = record["caption"]
            if record["partner"] is not None:
                others[key] = (unit["unit"], record["partner"], record["prompt"])
    complete = [key for key in captions["true"] if all(key in by_key for by_key in captions.values())]
    if len(complete) < 2:
        raise UserError(f"canary.images must find at least two different images in input.path, got {len(complete)}")
    true, blank, swapped = ({key: by_key[key] for key in complete} for by_key in captions.values())
    result = canary(true, blank, swapped, max_same)
    count, images = len(complete), len({key[:2] for key in complete})
    # The true caption of the other image counts even if that image lost a variant of its own.
    pairs = [(swapped[key], captions["true"].get(others[key])) for key in complete if key in others]
    follows = [tokenize(caption) == tokenize(expected) for caption, expected in pairs if expected is not None]
    return CanaryResult(
        images=images,
        captions=count,
        left_out=num_sampled - images,
        same_as_blank=_share(round(result.same_as_blank * count), count),
        same_as_swapped=_share(round(result.same_as_swapped * count), count),
        follows_swap=_share(sum(follows), len(follows)) if follows else None,
        saw_the_images=result.saw_the_images,
    )


def sample_spans(corpus: Corpus, num_images: int) -> list[SpanRow]:
    """The sample: first rows of Parquet files spread over the corpus, or image files spread over a folder.

    Each span has one unit. Image files form one unit; so images swap pixels with images of their own unit.
    """
    if corpus.format.one_image_a_file:
        files = _spread(corpus.files, num_images)
        return [SpanRow((Unit("0" * 12, 0, len(files), tuple(file.source for file in files)),), RowGroups(), 0)]
    count = min(PIECES, max(1, num_images // 8))
    while sum(file.num_rows for file in _spread(corpus.files, count)) < num_images and count < len(corpus.files):
        count *= 2  # the files are small
    files = _spread(corpus.files, count)
    spans, left = [], num_images
    for i, file in enumerate(files):
        rows = min(file.num_rows, -(-left // (len(files) - i)))  # an equal share, rounded up, of the images left
        [(units, groups)] = with_row_groups(file, [[Unit(f"{i:012d}", 0, rows, (file.source,))]])
        spans.append(SpanRow(units, groups, 0))
        left -= rows
    return spans


def _spread(files: Sequence[CorpusFile], count: int) -> list[CorpusFile]:
    """At most `count` files at equal distances."""
    count = min(count, len(files))
    return [files[i * len(files) // count] for i in range(count)]


def _share(count: int, total: int) -> Interval:
    """count / total with its exact interval."""
    from scipy.stats import binomtest  # scipy takes a second to load

    interval = binomtest(count, total).proportion_ci(LEVEL, method="exact")
    return count / total, float(interval.low), float(interval.high)
