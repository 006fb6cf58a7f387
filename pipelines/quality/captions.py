"""How good the captions of a corpus without questions are: by themselves, against other captions, against references.

    health       shares of empty, truncated, looping and equal captions
    agreement    with the captions of another output (say, of the unpruned model) for the same images and prompts
    references   CIDEr, BLEU-4 and ROUGE-L where the corpus has a column of reference captions
    canary       whether captions depend on their images at all; the only part that runs the model (canary.py)

Looks at a sample of `sample` captions, drawn by the hash of their address, so that it is the same in every output.
"""

import heapq
import json
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.benchmarks import Record
from pipelines.benchmarks.captions import caption_scorer
from pipelines.benchmarks.scoring import score_records
from pipelines.config.load import to_yaml
from pipelines.corpus.find import find_corpus
from pipelines.errors import UserError
from pipelines.metrics.agreement import agreement, health
from pipelines.metrics.bootstrap import bootstrap
from pipelines.output.reader import OutputReader
from pipelines.output.schema import CAPTIONS_FOLDER
from pipelines.quality.config import QualityConfig
from pipelines.store import STORE_ERRORS, Store, make_store
from pipelines.tracker import make_tracker

if TYPE_CHECKING:
    from pipelines.preflight.canary import CanaryResult

COLUMNS = ["source", "row", "prompt", "caption", "finish_reason"]

Address = tuple[str, int, str]  # source, row, prompt
Measured = dict[str, tuple[float, float, float]]  # metric -> value and the ends of its 95 % interval


@dataclass(frozen=True, slots=True)
class Quality:
    """What was measured; None where there was nothing to compare with."""

    captions: int
    health: dict[str, float]
    agreement: Measured | None
    agreed_on: int  # captions that both outputs hold
    references: Measured | None
    referenced: int  # captions with references
    canary: "CanaryResult | None" = None


def measure_quality(config: QualityConfig) -> Quality:
    """The quality of the captions at output.path, and the canary if it is asked for.

    With a canary the output may be empty: it is worth its minute before a large job, too.

    Raises:
        UserError: if an output holds no captions, or two have none in common; as `run_canary`.
        JobFailedError: as `run_canary`.
    """
    output = make_store(config.output.path, endpoint_url=config.output.endpoint_url)
    if not config.canary.images:
        return measure_captions(config, output)
    nothing = Quality(0, {}, None, 0, None, 0)
    measured = measure_captions(config, output) if output.list(CAPTIONS_FOLDER) else nothing
    from pipelines.preflight.canary import run_canary  # with Ray and the model

    return replace(measured, canary=run_canary(config, config.canary.images, config.canary.max_same))


def measure_captions(config: QualityConfig, output: Store) -> Quality:
    """All but the canary."""
    rows = heapq.nsmallest(config.sample, read_captions(output, "output.path"), key=sample_order)
    captions = {address_of(row): row["caption"] for row in rows}
    agreed, others = None, {}
    if config.baseline.path is not None:
        store = make_store(config.baseline.path, endpoint_url=config.baseline.endpoint_url)
        others = {
            key: row["caption"] for row in read_captions(store, "baseline.path") if (key := address_of(row)) in captions
        }
        if not others:
            raise UserError(
                f"baseline.path must hold captions of the same images and prompts, got none in {store.path}"
            )
        agreed = measure_agreement({key: captions[key] for key in others}, others, config.resamples)
    references = read_references(config, list(captions))
    return Quality(
        captions=len(rows),
        health=health([row["caption"] for row in rows], [row["finish_reason"] for row in rows]),
        agreement=agreed,
        agreed_on=len(others),
        references=measure_references(captions, references, config.resamples) if references else None,
        referenced=len(references),
    )


def measure_agreement(captions: Mapping[Address, str], others: Mapping[Address, str], resamples: int) -> Measured:
    """Means of `agreement` over the captions; bootstrap over images, whose prompts stand or fall together."""
    values = agreement(captions, others)
    table = sum_by_image(captions, [[*(values[name][key] for name in values), 1] for key in captions])

    def combine(sums: np.ndarray) -> dict[str, np.ndarray]:
        return {name: sums[..., i] / sums[..., -1] for i, name in enumerate(values)}

    intervals = bootstrap(table, combine, resamples=resamples)
    return {name: (float(value), *intervals[name]) for name, value in combine(table.sum(axis=0)).items()}


def sum_by_image(addresses: Iterable[Address], rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Rows of captions [captions, columns] summed over the prompts of each image [images, columns]."""
    keys = [address[:2] for address in addresses]
    image = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    table = np.zeros((len(image), len(rows[0])))
    np.add.at(table, [image[key] for key in keys], rows)
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
    """One MLflow run with everything measured; says where it is."""
    name = config.mlflow.run_name or f"quality of {config.prune.method}-{config.prune.retention:g}"
    tracker = make_tracker(
        config.mlflow.enabled, config.mlflow.tracking_uri, config.mlflow.experiment, name, config.output.path
    )
    tags = {"method": config.prune.method, "retention": f"{config.prune.retention:g}", "model": config.model.path}
    tracker.start(config.dotted(), tags, to_yaml(config))
    metrics: dict[str, float] = {f"health/{name}": value for name, value in quality.health.items()}
    for part, measured in measured_parts(quality):
        for name, (value, low, high) in measured.items():
            metrics |= {f"{part}/{name}": value, f"{part}/{name}/low": low, f"{part}/{name}/high": high}
    if quality.canary is not None:
        metrics["canary/saw_the_images"] = quality.canary.saw_the_images
    tracker.log(metrics, 0)
    tracker.artifact("quality.json", json.dumps(asdict(quality), indent=1))
    return tracker.finish("FINISHED")


def measured_parts(quality: Quality) -> list[tuple[str, Measured]]:
    """Everything with intervals, by part."""
    parts = [("agreement", quality.agreement or {}), ("references", quality.references or {})]
    if quality.canary is not None:
        names = ("same_as_blank", "same_as_swapped", "follows_swap")
        shares = {name: getattr(quality.canary, name) for name in names}
        parts.append(("canary", {name: share for name, share in shares.items() if share is not None}))
    return parts


def read_references(config: QualityConfig, addresses: Sequence[Address]) -> dict[Address, list[str]]:
    """The corpus's own captions of the images at `addresses`, where it has some; the corpus need not be there."""
    if not config.input.path or config.input.reference_column == "none":
        return {}
    corpus = find_corpus(
        make_store(config.input.path, endpoint_url=config.input.endpoint_url, anonymous=config.input.anonymous),
        format=config.input.format,
        image_column=config.input.image_column,
        id_column=config.input.id_column,
        reference_column=config.input.reference_column,
        templates=[],
    )
    found: dict[Address, list[str]] = {}
    wanted: dict[str, list[Address]] = defaultdict(list)
    for address in addresses:
        wanted[address[0]].append(address)
    for file in corpus.files:
        if asked := wanted.get(file.source):
            rows = [row for _, row, _ in asked]
            texts = corpus.format.references(corpus.store, file, corpus.columns, rows)
            found |= {address: texts[address[1]] for address in asked if address[1] in texts}
    return found


def read_captions(store: Store, name: str) -> Iterator[dict[str, Any]]:
    """All captions of an output, some objects at a time.

    Raises:
        UserError: if there are none.
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
    return row["source"], row["row"], row["prompt"]


def sample_order(row: dict[str, Any]) -> tuple[int, Address]:
    address = address_of(row)
    return zlib.crc32(repr(address).encode()), address
