"""How far a point's kept tokens are from all tokens, on a sample of the questions' images.

Measured for methods that choose a subset before the language model; the others have no subset to hold against the
whole. The sample is encoded once for all points, in one task that holds an encode actor's share of a GPU.
"""

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from otprune import num_kept, select_tokens
from otprune.distance import gaussian_w2, trace_objective
from otprune.methods import Selector, get_method
from otprune.models import load_encoder
from pipelines.accuracy.evaluate import make_question_reader
from pipelines.accuracy.find_questions import Asked, first_spans
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
    """Points whose distances are not known yet; fills in those that an earlier run left in the points' outputs."""
    missing = []
    for point in measured:
        chooses = isinstance(get_method(point.job.config.prune.method), Selector)
        if num_images == 0 or not chooses or point.job.checkpoint.has_tiles:
            continue
        known = json.loads(point.job.output.read(FILE)) if point.job.output.exists(FILE) else {}
        if known.items() >= _asked(num_images).items():
            point.distance.update(known)
        else:
            missing.append(point)
    return missing


def measure_distances(config: Config, asked: Asked, points: Sequence[Measured], num_images: int) -> None:
    """Means over images of the points' kept tokens, into `distance` and `distance.json` of each: the trace objective on
    columns of unit mean square, which is what OTPrune maximises, and the Gaussian W2 of the tokens as they are."""
    job = points[0].job
    read = make_question_reader(asked, job)
    settings = [
        {
            "method": point.job.config.prune.method,
            "retention": point.job.config.prune.retention,
            "gamma": point.job.config.prune.gamma,
            "gamma_scale": point.job.config.prune.gamma_scale,
            "seed": point.job.config.prune.seed,
            **point.job.pruning,
        }
        for point in points
    ]
    device = "cuda" if actor_gpus(config, job.checkpoint)[0] else "cpu"
    given = first_spans(asked, num_images), str(job.checkpoint.path), config.model.dtype, device, settings
    found = call_on_cluster(config, job.checkpoint, distances, read, *given)
    for point, values in zip(points, found, strict=True):
        point.distance.update(values)
        point.job.output.write(FILE, json.dumps({**values, **_asked(num_images)}).encode())


def _asked(num_images: int) -> dict[str, Any]:
    """What `distance.json` says of the values in it: those of another sample or definition are measured again."""
    return {"asked": num_images, "normalize_columns": True}


def distances(
    read: ReadQuestions, spans: list[SpanRow], model_path: str, dtype: str, device: str, settings: list[dict[str, Any]]
) -> list[dict[str, float]]:
    """For each of `settings` (of `select_tokens`, with a retention): means over the spans' images."""
    from pathlib import Path

    encoder = load_encoder(Path(model_path), dtype=torch_dtype(dtype, device), device=device)
    sums = torch.zeros(len(settings), 2, dtype=torch.float64)
    count = 0
    for span in spans:
        for row in read(span.to_row()):
            unit_batch = UnitBatch.from_row(row)
            if unit_batch.error is not None:
                raise RuntimeError(unit_batch.error)
            hashes = [image.sha256 for image in unit_batch.images for _ in range(image.num_pictures)]
            pixels = as_tensor(unit_batch.arrays["pixels"])
            for start in range(0, len(pixels), IMAGES_AT_A_TIME):
                features = encoder(pixels[start : start + IMAGES_AT_A_TIME])
                batch = hashes[start : start + IMAGES_AT_A_TIME]
                sums += torch.stack([_of_selection(features, batch, **each) for each in settings])
                count += len(features)
    means = (sums / max(1, count)).tolist()
    return [{"trace_objective": trace, "gaussian_w2": w2, "images": count} for trace, w2 in means]


def _of_selection(features: Tensor, hashes: list[str], *, retention: float, seed: int, **selection: Any) -> Tensor:
    """Sums over the images [2]: trace objective, Gaussian W2."""
    seeds = torch.tensor([image_seed(sha256, seed) for sha256 in hashes], device=features.device)
    keep = select_tokens(features, num_kept(retention, features.shape[1]), seed=seeds, **selection)
    trace = trace_objective(features, keep, normalize_columns=True)
    return torch.stack([trace.sum(), gaussian_w2(features, keep).sum()]).cpu()
