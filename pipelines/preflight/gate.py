"""The gate: captions a sample with and without pruning before a run, and stops the run if pruning costs too much.

    quality    of the pruned captions relative to the unpruned ones, by gate.metric (gate_metrics.py)
    passed     the lower end of the 95 % interval of the quality (bootstrap over images, both captions of an image
               together) reaches gate.min_quality

The job fails if fewer than ENOUGH images, or fewer than half of a smaller sample, were captioned under both settings.
gate.json beside the captions stores the numbers, so that a resumed run does not pay for them again.
"""

import hashlib
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from otprune.methods import UNPRUNED
from pipelines.config.judge import read_judge
from pipelines.corpus.fetch import fetch_settings
from pipelines.corpus.pictures import picture_urls
from pipelines.corpus.truth import Truth, read_truth
from pipelines.errors import JobFailedError, UserError
from pipelines.metrics.agreement import agreement
from pipelines.preflight.gate_metrics import Comparison, Key, compare
from pipelines.preflight.pairwise import Judged, Pair, judge_pairs
from pipelines.preflight.sample import draw_units, run_sample
from pipelines.run.job import Job
from pipelines.run.outcome import Compared, Gate
from pipelines.secrets import public
from pipelines.stages.unit_batch import Sample
from pipelines.store import read_json, write_json

logger = logging.getLogger(__name__)

FILE = "gate.json"
ENOUGH = 16  # least images that are captioned under both settings


def pass_gate(job: Job) -> Gate | None:
    """Judges a sample that is captioned twice on the connected cluster, or the numbers in gate.json if they apply.

    Returns:
        The verdict; None if gate.min_quality is not set or nothing is pruned.

    Raises:
        JobFailedError: if too few sampled images were captioned under both settings.
    """
    config = job.config.gate
    if config.min_quality is None or job.config.prune.method == UNPRUNED:
        return None
    stored = _read(job)
    if stored is not None:
        return stored
    started = time.perf_counter()
    spans = draw_units(job, config.images, config.seed, shown=True)
    drawn = sum(span.units[0].num_images for span in spans)
    logger.info("gate: captioning %d images without and with pruning", drawn)
    unpruned = _images(run_sample(job, spans, method=UNPRUNED))
    pruned = _images(run_sample(job, spans))
    compared = _compare(pruned, unpruned)
    num_images = len({key[:2] for key in compared})
    if num_images < min(ENOUGH, max(1, drawn // 2)):
        raise JobFailedError(
            f"the gate has too little to compare: {num_images} of {drawn} sampled images came through twice"
        )
    ids = {address: image["id"] for address, image in pruned.items()}
    comparison = compare_sample(job, compared, ids)
    gate = judge(compared, config.min_quality, drawn, time.perf_counter() - started, comparison)
    stored = {"fingerprint": job.fingerprint, "sample": _sample(job), **asdict(gate)}
    # Captions and thumbnails of the sample are for the report of this run alone.
    write_json(job.output, FILE, stored | {"compared": None})
    return gate


def judge(
    compared: dict[Key, Compared],
    min_quality: float,
    drawn: int = 0,
    seconds: float = 0.0,
    comparison: Comparison | None = None,
) -> Gate:
    """The verdict on captions of the same images under both settings.

    Args:
        drawn: images of the sample.
        seconds: that the sample took.
        comparison: of the captions; None compares them by `auto`, of a corpus of which nothing more is known.
    """
    found = comparison or compare(compared)
    return Gate(
        passed=found.interval[0] >= min_quality,
        min_quality=min_quality,
        drawn=max(drawn, found.images),
        seconds=seconds,
        compared=sorted(compared.values(), key=lambda each: each.agreement),
        **{name: getattr(found, name) for name in Comparison.__slots__},
    )


def compare_sample(job: Job, compared: dict[Key, Compared], ids: dict[tuple[str, int], str]) -> Comparison:
    """The comparison of a sample's captions by `gate.metric`. `ids` are the ids of the images.

    Raises:
        JobFailedError: if the corpus has not what the metric needs.
    """
    config, settings = job.config, read_judge(job.config.quality.judge)

    def truth() -> Truth | None:
        references = {key[:2]: each.references for key, each in compared.items()}
        return read_truth(config.quality, config.input, ids, references)

    def ask(captions: Mapping[Key, Compared]) -> Judged:
        assert settings is not None
        asked = dict(list(captions.items())[: settings.pairs])
        urls = picture_urls(job.corpus, (key[:2] for key in asked), settings.seconds, fetch_settings(job.config.input))
        pairs = [
            Pair(key[:2], urls.get(key[:2]) or f"data:image/jpeg;base64,{e.picture['jpeg']}", e.pruned, e.unpruned)
            for key, e in asked.items()
        ]
        return judge_pairs(pairs, settings)

    try:
        return compare(compared, config.gate.metric, truth, ask if settings else None)
    except (UserError, ValueError) as error:
        raise JobFailedError(str(error)) from error


def _images(summaries: Iterable[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    """(source, row) -> sample with its captions and thumbnail."""
    return {(image["source"], image["row"]): image for summary in summaries for image in summary["samples"]}


def _compare(pruned: dict[tuple[str, int], Any], unpruned: dict[tuple[str, int], Any]) -> dict[Key, Compared]:
    """Both captions of every prompt of the images that were captioned under both settings."""
    texts: dict[Key, tuple[str, str]] = {
        (*address, i): (with_pruning["caption"], without["caption"])
        for address, image in pruned.items()
        if address in unpruned
        for i, (with_pruning, without) in enumerate(zip(image["captions"], unpruned[address]["captions"], strict=True))
    }
    if not texts:
        return {}
    pruned_texts, unpruned_texts = ({key: pair[i] for key, pair in texts.items()} for i in (0, 1))
    agreements = agreement(pruned_texts, unpruned_texts)["rouge_l"]
    return {
        key: Compared(
            source=key[0],
            row=key[1],
            prompt=pruned[key[:2]]["prompts"][key[2]],
            pruned=pruned_texts[key],
            unpruned=unpruned_texts[key],
            references=pruned[key[:2]]["references"],
            picture={name: pruned[key[:2]][name] for name in Sample.__slots__},
            agreement=agreements[key],
        )
        for key in texts
    }


def _sample(job: Job) -> dict[str, Any]:
    """The sampled images and their references, which decide the gate's numbers together with the fingerprint."""
    config = job.config
    files = "\n".join(f"{file.source} {file.size}" for file in job.corpus.files)
    sample = {
        "images": config.gate.images,
        "seed": config.gate.seed,
        "corpus": job.corpus.store.path,
        "files": hashlib.sha256(files.encode()).hexdigest()[:12],
        "limit": config.input.limit,
        "references": config.input.reference_column,
        "metric": config.gate.metric,
        "objects": [config.quality.objects, config.quality.instances],
        "judge": [config.quality.judge.get("url"), config.quality.judge.get("model")],
    }
    return public(sample)  # as gate.json stores it


def _read(job: Job) -> Gate | None:
    """The stored verdict by the current gate.min_quality; None unless it is of this configuration and sample."""
    stored = read_json(job.output, FILE)
    if (
        stored is None
        or stored.pop("fingerprint", None) != job.fingerprint
        or stored.pop("sample", None) != _sample(job)
    ):
        return None
    interval, min_quality = tuple(stored.pop("interval")), job.config.gate.min_quality
    stored |= {"min_quality": min_quality, "passed": interval[0] >= min_quality, "compared": []}
    return Gate(interval=interval, **stored)
