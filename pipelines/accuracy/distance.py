"""Measures how far a point's kept tokens are from all tokens, on a sample of the questions' images.

Only methods that choose a subset before the language model have such a distance; the other methods have no subset to
compare with the whole. One Ray task, which holds an encode actor's share of a GPU, encodes the sample once for all
points.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from otprune import num_kept, select_tokens
from otprune.distance import gaussian_w2, trace_objective
from otprune.methods import Selector, get_method
from otprune.models import Checkpoint, load_encoder
from pipelines.accuracy.evaluate import make_question_reader
from pipelines.accuracy.find_questions import Questions, first_spans
from pipelines.accuracy.read_questions import ReadQuestions
from pipelines.accuracy.table import Measured
from pipelines.config.keys import Config
from pipelines.output.span import SpanRow
from pipelines.run.cluster import call_on_cluster
from pipelines.run.resources import actor_gpus
from pipelines.stages.gpu import torch_dtype
from pipelines.stages.seeds import image_seed
from pipelines.stages.token_arrays import as_tensor
from pipelines.stages.unit_batch import UnitBatch

FILE = "distance.json"
IMAGES_AT_A_TIME = 16


def without_distance(measured: Sequence[Measured], num_images: int) -> list[Measured]:
    """The points whose distances must be measured; fills in the distances that an earlier run stored in their outputs.

    Points of methods without a distance, and all points of models whose images differ in tokens, are never measured.
    """
    missing = []
    for point in measured:
        is_selector = isinstance(get_method(point.job.config.prune.method), Selector)
        if num_images == 0 or not is_selector or point.job.checkpoint.geometry.fixed is None:
            continue
        stored = json.loads(point.job.output.read(FILE)) if point.job.output.exists(FILE) else {}
        if stored.items() >= _definition(num_images).items():
            point.distance.update(stored)
        else:
            missing.append(point)
    return missing


def measure_distances(config: Config, questions: Questions, points: Sequence[Measured], num_images: int) -> None:
    """Measures the distances of all points, and stores them in `distance` and in `distance.json` of each point.

    Both distances are means over the images: the trace objective on columns of unit mean square, which is the value
    that OTPrune maximises, and the Gaussian W2 of the tokens as they are.
    """
    job = points[0].job
    read = make_question_reader(questions, job)
    settings = [
        {
            "method": point.job.config.prune.method,
            "retention": point.job.config.prune.share,
            "gamma": point.job.config.prune.gamma,
            "gamma_scale": point.job.config.prune.gamma_scale,
            "seed": point.job.config.prune.seed,
            **point.job.pruning,
        }
        for point in points
    ]
    device = "cuda" if actor_gpus(config, job.checkpoint)[0] else "cpu"
    arguments = first_spans(questions, num_images), job.checkpoint, config.model.dtype, device, settings
    means = call_on_cluster(config, job.checkpoint, distances, read, *arguments)
    for point, values in zip(points, means, strict=True):
        point.distance.update(values)
        point.job.output.write(FILE, json.dumps({**values, **_definition(num_images)}).encode())


def _definition(num_images: int) -> dict[str, Any]:
    """The sample and the definition behind the values in `distance.json`; other files are measured again."""
    return {"asked": num_images, "normalize_columns": True}


def distances(
    read: ReadQuestions,
    spans: list[SpanRow],
    checkpoint: Checkpoint,
    dtype: str,
    device: str,
    settings: list[dict[str, Any]],
) -> list[dict[str, float]]:
    """Means over the images of `spans`, for each entry of `settings` (arguments of `select_tokens`, and a retention).

    Raises:
        RuntimeError: if a unit cannot be read.
    """
    encoder = load_encoder(checkpoint, dtype=torch_dtype(dtype, device), device=device)
    sums = torch.zeros(len(settings), 2, dtype=torch.float64)
    count = 0
    for span in spans:
        for row in read(span.to_row()):
            unit_batch = UnitBatch.from_row(row)
            if unit_batch.error is not None:
                raise RuntimeError(unit_batch.error)
            hashes = [image.sha256 for image in unit_batch.images for _ in range(image.num_pictures)]
            sizes = [size for image in unit_batch.images for size in image.sizes]
            frames = [as_tensor(frame) for frame in unit_batch.frames(checkpoint.geometry)]
            for start in range(0, len(frames), IMAGES_AT_A_TIME):
                batch = slice(start, start + IMAGES_AT_A_TIME)
                regions = encoder.regions(frames[batch], sizes[batch], "joint")
                features = torch.stack([region.features for (region,) in regions])
                sums += torch.stack([_sum_distances(features, hashes[batch], **selection) for selection in settings])
                count += len(features)
    means = (sums / max(1, count)).tolist()
    return [{"trace_objective": trace, "gaussian_w2": w2, "images": count} for trace, w2 in means]


def _sum_distances(features: Tensor, hashes: list[str], *, retention: float, seed: int, **selection: Any) -> Tensor:
    """Trace objective and Gaussian W2 of one selection, summed over the images: [2], of features [B, N, D]."""
    seeds = torch.tensor([image_seed(sha256, seed) for sha256 in hashes], device=features.device)
    keep = select_tokens(features, num_kept(retention, features.shape[1]), seed=seeds, **selection)
    trace = trace_objective(features, keep, normalize_columns=True)
    return torch.stack([trace.sum(), gaussian_w2(features, keep).sum()]).cpu()
