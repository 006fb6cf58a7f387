"""Measures the quality of the captions of a corpus that has no questions.

    health       shares of empty, truncated, looping and equal captions
    agreement    agreement with the captions of another output (say, of the unpruned model) for the same images and
                 prompts
    references   CIDEr, BLEU-4 and ROUGE-L, if the corpus has a column of reference captions
    objects      CHAIR and recall, where the objects of images are known (corpus/truth.py); of drawn scenes, also how
                 right colours, sizes and places are
    judge        which of the two outputs' captions a model prefers (preflight/pairwise.py), with quality.judge
    canary       whether captions depend on their images at all; only the canary runs the model (preflight/canary.py)

The first four measure a sample of `sample` captions. The hash of a caption's address draws the sample, so that every
output of the same corpus has the same sample.
"""

import heapq
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.benchmarks import Record
from pipelines.benchmarks.captions import caption_scorer
from pipelines.benchmarks.scoring import score_records
from pipelines.config.judge import read_judge
from pipelines.config.load import to_yaml
from pipelines.corpus.fetch import fetch_settings
from pipelines.corpus.pictures import picture_urls
from pipelines.corpus.truth import Truth, open_corpus, read_texts, read_truth
from pipelines.errors import UserError
from pipelines.metrics.agreement import agreement, health
from pipelines.metrics.bootstrap import bootstrap
from pipelines.output.reader import OutputReader
from pipelines.output.schema import CAPTIONS_FOLDER
from pipelines.preflight.pairwise import Judged, Pair, judge_pairs
from pipelines.quality.config import QualityConfig
from pipelines.store import STORE_ERRORS, Store, make_store
from pipelines.tracker import make_tracker

if TYPE_CHECKING:
    from pipelines.preflight.canary import CanaryResult

COLUMNS = ["id", "source", "row", "prompt", "caption", "finish_reason"]

Address = tuple[str, int, str]  # source, row, prompt
Measured = dict[str, tuple[float, float, float]]  # metric -> value and the ends of its 95 % interval


@dataclass(frozen=True, slots=True)
class Quality:
    """The measured values; None if there was nothing to compare with."""

    captions: int
    health: dict[str, float]
    agreement: Measured | None
    agreed_on: int  # captions of the sample that both outputs hold
    references: Measured | None
    referenced: int  # captions of the sample with references
    objects: Measured | None = None
    known: int = 0  # captions of the sample whose images' objects are known
    health_intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    judged: Judged | None = None
    canary: "CanaryResult | None" = None


def measure_quality(config: QualityConfig) -> Quality:
    """Measures the captions at output.path, and runs the canary if `canary.images` is above 0.

    With a canary the output may be empty, so that the canary can run before a large job.

    Raises:
        UserError: if an output holds no captions, or if two outputs have no caption in common; as `run_canary`.
        JobFailedError: as `run_canary`.
    """
    output = make_store(config.output.path, endpoint_url=config.output.endpoint_url)
    if not config.canary.images:
        return measure_captions(config, output)
    nothing = Quality(0, {}, None, 0, None, 0)
    measured = measure_captions(config, output) if output.list(CAPTIONS_FOLDER) else nothing
    from pipelines.preflight.canary import run_canary  # imported here, because the canary needs Ray and the model

    return replace(measured, canary=run_canary(config, config.canary.images, config.canary.max_same))


def measure_captions(config: QualityConfig, output: Store) -> Quality:
    """Measures health, agreement and references, without the canary.

    Raises:
        UserError: if an output holds no captions, or if two outputs have no caption in common.
    """
    # Memory holds the sample, not the corpus: `nsmallest` keeps the captions with the smallest hashes.
    rows = heapq.nsmallest(config.sample, read_captions(output, "output.path"), key=sample_order)
    captions = {address_of(row): row["caption"] for row in rows}
    agreement_with_baseline, others = None, {}
    if config.baseline.path is not None:
        store = make_store(config.baseline.path, endpoint_url=config.baseline.endpoint_url)
        others = {
            key: row["caption"] for row in read_captions(store, "baseline.path") if (key := address_of(row)) in captions
        }
        if not others:
            raise UserError(
                f"baseline.path must hold captions of the same images and prompts, got none in {store.path}"
            )
        agreement_with_baseline = measure_agreement({key: captions[key] for key in others}, others, config.resamples)
    judged = ask_judge(config, captions, others) if config.quality.judge else None
    references = read_references(config, list(captions))
    objects, known = measure_objects(config, {address_of(row): row for row in rows}, references)
    return Quality(
        captions=len(rows),
        health=health([row["caption"] for row in rows], [row["finish_reason"] for row in rows]),
        health_intervals=health_intervals(rows, config.resamples),
        objects=objects,
        known=known,
        judged=judged,
        agreement=agreement_with_baseline,
        agreed_on=len(others),
        references=measure_references(captions, references, config.resamples) if references else None,
        referenced=len(references),
    )


def ask_judge(config: QualityConfig, captions: Mapping[Address, str], others: Mapping[Address, str]) -> Judged:
    """The judgement on captions and the baseline's captions of the same images, whose pictures the corpus holds.

    Raises:
        UserError: if quality.judge is wrong, or there is no baseline or no corpus.
    """
    settings = read_judge(config.quality.judge)
    assert settings is not None
    if not others or not config.input.path:
        raise UserError("quality.judge compares two outputs by their images: it needs baseline.path and input.path")
    asked = [address for address in captions if address in others][: settings.pairs]  # in the order of the sample
    images, fetching = (address[:2] for address in asked), fetch_settings(config.input)
    urls = picture_urls(open_corpus(config.input, "none"), images, settings.seconds, fetching)
    pairs = [Pair(address[:2], urls.get(address[:2]), captions[address], others[address]) for address in asked]
    return judge_pairs(pairs, settings)


def health_intervals(rows: Sequence[dict[str, Any]], resamples: int) -> dict[str, tuple[float, float]]:
    """95 % intervals of the metrics of `health` that are means over captions."""
    parts = [health([row["caption"]], [row["finish_reason"]]) for row in rows]
    names = [name for name in parts[0] if name != "distinct"]
    table = sum_by_image(map(address_of, rows), [[*(part[name] for name in names), 1] for part in parts])
    return bootstrap(
        table, lambda sums: {name: sums[..., i] / sums[..., -1] for i, name in enumerate(names)}, resamples=resamples
    )


def measure_objects(
    config: QualityConfig, rows: Mapping[Address, Mapping[str, Any]], references: Mapping[Address, Sequence[str]]
) -> tuple[Measured | None, int]:
    """The metrics of `Truth`, and the number of captions that they are of; (None, 0) if no object is known."""
    ids = {address[:2]: row["id"] for address, row in rows.items()}
    truth = read_truth(config.quality, config.input, ids, {key[:2]: texts for key, texts in references.items()})
    if truth is None:
        return None, 0
    captions = {address: row["caption"] for address, row in rows.items()}
    return measure_truth(captions, truth, config.resamples), sum(address[:2] in truth.objects for address in rows)


def measure_truth(captions: Mapping[Address, str], truth: Truth, resamples: int) -> Measured | None:
    """The metrics of `Truth` over the captions of the images whose objects are known; None if there are none."""
    known = [address for address in captions if address[:2] in truth.objects]
    if not known:
        return None
    table = sum_by_image(known, [truth.counts(address[:2], captions[address]) for address in known])
    intervals = bootstrap(table, truth.metrics, resamples=resamples)
    values, unsaid = truth.metrics(table.sum(axis=0)), truth.unsaid(table.sum(axis=0))
    return {name: (float(value), *intervals[name]) for name, value in values.items() if name not in unsaid}


def measure_agreement(captions: Mapping[Address, str], others: Mapping[Address, str], resamples: int) -> Measured:
    """Means of the metrics of `agreement` over the captions.

    The bootstrap resamples images: a resample takes all captions of an image or none.
    """
    values = agreement(captions, others)
    table = sum_by_image(captions, [[*(values[name][key] for name in values), 1] for key in captions])

    def combine(sums: np.ndarray) -> dict[str, np.ndarray]:
        return {name: sums[..., i] / sums[..., -1] for i, name in enumerate(values)}

    intervals = bootstrap(table, combine, resamples=resamples)
    return {name: (float(value), *intervals[name]) for name, value in combine(table.sum(axis=0)).items()}


def sum_by_image(addresses: Iterable[Address], rows: Sequence[Sequence[float] | np.ndarray]) -> np.ndarray:
    """Sums rows of captions [captions, columns] over the prompts of each image: float64 [images, columns]."""
    images = [address[:2] for address in addresses]
    index_of = {image: i for i, image in enumerate(dict.fromkeys(images))}
    table = np.zeros((len(index_of), len(rows[0])))
    np.add.at(table, [index_of[image] for image in images], np.array(rows, np.float64))
    return table


def measure_references(
    captions: Mapping[Address, str], references: Mapping[Address, Sequence[str]], resamples: int
) -> Measured:
    """CIDEr (raw scale), BLEU-4 and ROUGE-L of the captions that have references."""
    records: list[Record] = [
        {
            "question_id": str(key),
            "group_id": str(key[:2]),
            "category": "",
            "kind": "caption",
            "choices": [],
            "answers": list(texts),
            "prediction": captions[key],
        }
        for key, texts in references.items()
    ]
    scores = score_records("captions", caption_scorer("corpus"), records, resamples=resamples)
    return {name.removeprefix("corpus_"): (value, *scores.intervals[name]) for name, value in scores.metrics.items()}


def track_quality(config: QualityConfig, quality: Quality) -> str:
    """Tracks everything measured as one MLflow run; returns the address of the run."""
    retention = "default" if config.prune.retention is None else f"{config.prune.retention:g}"
    name = config.mlflow.run_name or f"quality of {config.prune.method}-{retention}"
    tracker = make_tracker(
        config.mlflow.enabled, config.mlflow.tracking_uri, config.mlflow.experiment, name, config.output.path
    )
    tags = {"method": config.prune.method, "retention": retention, "model": config.model.path}
    tracker.start(config.dotted(), tags, to_yaml(config))
    metrics: dict[str, float] = {f"health/{name}": value for name, value in quality.health.items()}
    for part, measured in measured_parts(quality):
        for name, (value, low, high) in measured.items():
            metrics |= {f"{part}/{name}": value, f"{part}/{name}/low": low, f"{part}/{name}/high": high}
    if quality.judged is not None:
        metrics |= quality.judged.metrics()
    if quality.canary is not None:
        metrics["canary/saw_the_images"] = quality.canary.saw_the_images
    tracker.log(metrics, 0)
    tracker.artifact("quality.json", json.dumps(asdict(quality), indent=1))
    return tracker.finish("FINISHED")


def measured_parts(quality: Quality) -> list[tuple[str, Measured]]:
    """(part, metrics) of every part of the quality that has intervals."""
    parts = [
        ("agreement", quality.agreement or {}),
        ("references", quality.references or {}),
        ("objects", quality.objects or {}),
    ]
    if quality.canary is not None:
        names = ("same_as_blank", "same_as_swapped", "follows_swap")
        shares = {name: getattr(quality.canary, name) for name in names}
        parts.append(("canary", {name: share for name, share in shares.items() if share is not None}))
    return parts


def read_references(config: QualityConfig, addresses: Sequence[Address]) -> dict[Address, list[str]]:
    """The corpus's own reference captions of the images at `addresses`.

    Empty if no corpus is configured, or if the corpus has no column of references.
    """
    if not config.input.path or config.input.reference_column == "none":
        return {}
    texts = read_texts(config.input, config.input.reference_column, (address[:2] for address in addresses))
    return {address: texts[address[:2]] for address in addresses if address[:2] in texts}


def read_captions(store: Store, name: str) -> Iterator[dict[str, Any]]:
    """All captions of an output, a few parts at a time. `name` is the configuration key behind `store`.

    Raises:
        UserError: if the output cannot be listed, or holds no captions.
    """
    reader = OutputReader(store)
    try:
        names = reader.names()
    except STORE_ERRORS as error:
        raise UserError(f"{name} {store.path} cannot be listed: {type(error).__name__}: {error}") from error
    if not names:
        raise UserError(f"{name} must be the output of a caption job, found no captions in {store.path}")
    for table in reader.tables(COLUMNS, names):
        yield from table.to_pylist()


def address_of(row: dict[str, Any]) -> Address:
    """The address of a caption."""
    return row["source"], row["row"], row["prompt"]


def sample_order(row: dict[str, Any]) -> tuple[int, Address]:
    """The sort key that draws the sample: the hash of the address. The address itself breaks ties."""
    address = address_of(row)
    return zlib.crc32(repr(address).encode()), address
