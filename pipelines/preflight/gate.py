"""The gate: before a run begins, a sample of the corpus is captioned with and without pruning, and what is left of the
quality must be enough.

    quality    CIDEr with the corpus's references, pruned / unpruned, of the images that have some; where most have
               none, the mean ROUGE-L of the pruned captions with the unpruned ones as reference (1: the same words)
               fails the job where fewer than ENOUGH images, or half of a smaller sample, came through twice
    passed     the lower end of its 95 % interval (bootstrap over images, both captions of an image together) reaches
               gate.min_quality

The numbers are kept in gate.json beside the captions, so that a resumed run does not pay for them again.
"""

import hashlib
import json
import logging
import time
from dataclasses import asdict
from typing import Any

import numpy as np

from otprune.methods import UNPRUNED
from pipelines.errors import JobFailedError
from pipelines.metrics.agreement import agreement
from pipelines.metrics.bootstrap import bootstrap
from pipelines.metrics.cider import cider_d_scores
from pipelines.metrics.ptb import tokenize
from pipelines.preflight.sample import draw_units, run_sample
from pipelines.run.job import Job
from pipelines.run.outcome import Compared, Gate
from pipelines.store import read_json

logger = logging.getLogger(__name__)

FILE = "gate.json"
ENOUGH = 16  # images captioned under both settings

Key = tuple[str, int, int]  # source, row, number of the prompt


def pass_gate(job: Job) -> Gate | None:
    """Captions the sample twice on the connected cluster, unless gate.json of this configuration has the numbers; None
    if no quality is asked for, or nothing is pruned.

    Raises:
        JobFailedError: if too few sampled images came through under both settings.
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
    came = len({key[:2] for key in compared})
    if came < min(ENOUGH, max(1, drawn // 2)):
        raise JobFailedError(f"the gate has too little to compare: {came} of {drawn} sampled images came through twice")
    gate = judge(compared, config.min_quality, drawn, time.perf_counter() - started)
    stored = {"fingerprint": job.fingerprint, "sample": _sample(job), **asdict(gate)}
    job.output.write(FILE, json.dumps(stored | {"compared": None}, indent=1).encode())
    return gate


def judge(compared: dict[Key, Compared], min_quality: float, drawn: int = 0, seconds: float = 0.0) -> Gate:
    """The verdict on captions of the same images under both settings; CIDEr where at least half have references."""
    keys, referenced = list(compared), [key for key in compared if compared[key].references]
    if 2 * len(referenced) >= len(keys):
        keys = referenced
        metric, references = "cider", {key: [tokenize(t) for t in compared[key].references] for key in keys}
        scores = [
            cider_d_scores({key: tokenize(getattr(compared[key], which)) for key in keys}, references)
            for which in ("pruned", "unpruned")
        ]
    else:
        metric = "rouge_l"
        scores = [{key: compared[key].agreement for key in keys}, dict.fromkeys(keys, 1.0)]
    images = {key: i for i, key in enumerate(dict.fromkeys(key[:2] for key in keys))}
    table = np.zeros((len(images), 2))  # an image with several prompts is resampled as a whole
    for key in keys:
        table[images[key[:2]]] += [scores[0][key], scores[1][key]]

    def combine(sums: np.ndarray) -> dict[str, np.ndarray]:
        return {"quality": sums[..., 0] / np.maximum(sums[..., 1], 1e-12)}

    interval = bootstrap(table, combine)["quality"]
    pruned, unpruned = table.sum(axis=0) / len(keys)
    return Gate(
        passed=interval[0] >= min_quality,
        min_quality=min_quality,
        quality=float(combine(table.sum(axis=0))["quality"]),
        interval=interval,
        metric=metric,
        pruned_score=float(pruned),
        unpruned_score=float(unpruned),
        images=len(images),
        drawn=max(drawn, len(images)),
        seconds=seconds,
        compared=sorted(compared.values(), key=lambda each: each.agreement),
    )


def _images(summaries: Any) -> dict[tuple[str, int], dict[str, Any]]:
    return {(image["source"], image["row"]): image for summary in summaries for image in summary["samples"]}


def _compare(pruned: dict[tuple[str, int], Any], unpruned: dict[tuple[str, int], Any]) -> dict[Key, Compared]:
    """The prompts of the images that came through under both settings."""
    texts: dict[Key, tuple[str, str]] = {
        (*where, i): (done["caption"], other["caption"])
        for where, image in pruned.items()
        if where in unpruned
        for i, (done, other) in enumerate(zip(image["captions"], unpruned[where]["captions"], strict=True))
    }
    if not texts:
        return {}
    ours, theirs = ({key: pair[i] for key, pair in texts.items()} for i in (0, 1))
    agreed = agreement(ours, theirs)["rouge_l"]
    return {
        key: Compared(
            source=key[0],
            row=key[1],
            prompt=pruned[key[:2]]["prompts"][key[2]],
            pruned=ours[key],
            unpruned=theirs[key],
            references=pruned[key[:2]]["references"],
            jpeg=pruned[key[:2]]["jpeg"],
            kept=pruned[key[:2]]["kept"],
            num_tokens=pruned[key[:2]]["num_tokens"],
            agreement=agreed[key],
        )
        for key in texts
    }


def _sample(job: Job) -> dict[str, Any]:
    """What decides the gate's numbers beside the fingerprint: which images, and what they are held against."""
    config = job.config
    files = "\n".join(f"{file.source} {file.size}" for file in job.corpus.files)
    return {
        "images": config.gate.images,
        "seed": config.gate.seed,
        "corpus": job.corpus.store.path,
        "files": hashlib.sha256(files.encode()).hexdigest()[:12],
        "limit": config.input.limit,
        "references": config.input.reference_column,
    }


def _read(job: Job) -> Gate | None:
    """The numbers of an earlier run of this configuration and sample, judged by gate.min_quality of now."""
    stored = read_json(job.output, FILE)
    if (
        stored is None
        or stored.pop("fingerprint", None) != job.fingerprint
        or stored.pop("sample", None) != _sample(job)
    ):
        return None
    interval, least = tuple(stored.pop("interval")), job.config.gate.min_quality
    stored |= {"min_quality": least, "passed": interval[0] >= least, "compared": []}
    return Gate(interval=interval, **stored)
