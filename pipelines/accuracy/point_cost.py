"""Computes the cost of an evaluated point (kept tokens, multiply-adds, seconds) from its output alone.

The output survives the run, so a resumed grid needs no second run to know the cost.
"""

import json
import math
from dataclasses import replace
from typing import Any

import ray

from otprune.budget import selector_prefill
from otprune.flops import TrueFlops, true_flops
from otprune.merge import merge_flops
from otprune.methods import UNPRUNED, BeforeModel, get_method
from otprune.shapes import PatchVisionShape
from pipelines.output.reader import OutputReader
from pipelines.run.job import Job, inside_model
from pipelines.run.outcome import RECORD, read_cluster

COUNTS = ("num_visual_tokens", "num_kept_tokens", "num_prompt_tokens", "num_generated_tokens")


def measure_work(job: Job) -> dict[str, float | None]:
    """Means over all answered questions in the output of `job`.

    num_visual_tokens, num_kept_tokens   tokens of a question's images; for a method inside the model, the mean over
                                         its layers
    tflops_per_image                     multiply-adds / 1e12 to encode one image, select its tokens and answer one
                                         mean question. The selection counts as the algorithm of the device that ran
                                         it. Of pictures of free size, that of a square picture with the mean number
                                         of tokens. None for models that cut images into tiles, and if no
                                         question was answered
    budget                               prefill cost / the cost of a prefill with retention x N tokens in every layer,
                                         which a selector pays; a ratio of tokens if multiply-adds are unknown
    images_per_second                    rate of the point's last run, from its first finished unit on
    ms_per_image, encode_ms, generate_ms milliseconds of work of all stages, of encode and of generate, divided by the
                                         number of encoded images; the questions about one image share its encoding
    """
    record = json.loads(job.output.read(RECORD))
    totals = record["totals"]
    images = max(1, totals["images_captioned"])
    means = _mean_counts(job)
    flops = _flops(job, means, select_on_cpu=encoded_on_cpu(record))
    seconds = totals["seconds"]
    return {
        "num_visual_tokens": means["num_visual_tokens"],
        "num_kept_tokens": means["num_kept_tokens"],
        "tflops_per_image": None if flops is None else flops.total / 1e12,
        "budget": _budget(job, means, flops),
        "images_per_second": record["last_run"].get("images_per_second"),
        "ms_per_image": 1000 * sum(seconds.values()) / images,
        "encode_ms": 1000 * seconds.get("encode", 0.0) / images,
        "generate_ms": 1000 * seconds.get("generate", 0.0) / images,
    }


def encoded_on_cpu(record: dict[str, Any]) -> bool:
    """Whether the encode stage of the run behind this `run.json` had no GPU, by its configuration or its cluster.

    If the record does not give the size of its cluster in numbers, the cluster of this process's Ray decides.
    """
    gpus = record["config"]["encode.num_gpus"]
    if gpus is None:
        cluster = read_cluster(record["cluster"])
        gpus_here = ray.cluster_resources().get("GPU", 0) if ray.is_initialized() else 0
        gpus = cluster.gpus if cluster else gpus_here
    return not gpus


def _flops(job: Job, means: dict[str, float], *, select_on_cpu: bool) -> TrueFlops | None:
    method, kept, visual = get_method(job.config.prune.method), means["num_kept_tokens"], means["num_visual_tokens"]
    vision = job.checkpoint.vision
    if job.checkpoint.geometry.tiled or not visual:  # numbers of crops differ between images; no question was answered
        return None
    visual *= job.config.prune.shrink or 1  # whole pictures were counted, and smaller ones sent
    settings = method.counting.of_means(kept, visual) if isinstance(method, BeforeModel) else job.pruning
    counts: dict[str, Any] = {"num_text": _num_text(job, means)}
    counts["num_generated"] = max(1, round(means["num_generated_tokens"]))
    if method.sends_smaller:  # the tower makes the kept tokens and no others
        method, settings, visual = get_method(UNPRUNED), {}, kept
    if isinstance(vision, PatchVisionShape):
        side = vision.patch_size * vision.merge * max(1, round(math.sqrt(visual)))
        counts |= {"frame": (side, side), "num_visual": max(1, round(visual))}
    flops = true_flops(job.checkpoint.shape, method, **counts, select_on_cpu=select_on_cpu, **settings)
    if job.config.prune.merge is not None:
        merging = merge_flops(round(visual), round(kept), job.checkpoint.shape.language.hidden)
        flops = replace(flops, policy=flops.policy + merging)
    return flops


def _num_text(job: Job, means: dict[str, float]) -> int:
    """Text tokens of the mean prompt. A method inside the model prunes later, so its prompt holds all visual tokens."""
    in_prompt = means["num_visual_tokens" if inside_model(job.config) else "num_kept_tokens"]
    return round(means["num_prompt_tokens"] - in_prompt)


def _budget(job: Job, means: dict[str, float], flops: TrueFlops | None) -> float:
    """Prefill cost / a selector's at the same retention, in multiply-adds or, if those are unknown, in tokens."""
    retention, visual = job.config.prune.share, means["num_visual_tokens"]
    if flops is None:
        return means["num_kept_tokens"] / max(1.0, retention * visual)
    shape = job.checkpoint.language
    return flops.prefill / selector_prefill(shape, _num_text(job, means), round(visual), retention)


def _mean_counts(job: Job) -> dict[str, float]:
    """Means over answered questions."""
    sums, answered = dict.fromkeys(COUNTS, 0), 0
    for table in OutputReader(job.output, job.folder).tables(COUNTS):
        table = table.drop_null()
        answered += table.num_rows
        for column in COUNTS:
            sums[column] += table[column].to_numpy().sum().item()
    return {column: total / max(1, answered) for column, total in sums.items()}
