"""Measures distances and accuracy of the same selections on the same scenes of the demo world.

A point is a selector with its settings at a retention. Accuracy is the exact match of the answers to each scene's own
questions. The answers are teacher-forced, which gives the accuracy of greedy decoding (demo/evaluate.py) at a tenth of
its cost. Scenes, questions and random selections depend on the scene's number alone, so points can be compared scene by
scene.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from otprune import num_kept, select_tokens
from otprune.distance import exact_w2, gaussian_w2, sliced_w2, trace_objective
from otprune.methods import UNPRUNED
from otprune.methods.cdpruner import cdpruner
from pipelines.study.pieces import Row

TASKS = ("exist", "attr", "where", "rel", "count", "mc", "text", "bg")
"""The tasks of the questions. Their mean accuracy is `qa`; captions are scored apart."""

Point = Mapping[str, Any]
"""`label`, and arguments of `select_tokens`: `method`, `gamma`, `gamma_scale`."""

POINTS: dict[str, Point] = {
    "OTPrune released": {"method": "otprune", "gamma": 0.01, "gamma_scale": "released"},
    "OTPrune trace": {"method": "otprune", "gamma": 0.5, "gamma_scale": "trace"},
    "OTPrune centred": {"method": "otprune_centered", "gamma": 0.5, "gamma_scale": "trace"},
    "linear log-det": {"method": "logdet_linear"},
    "linear log-det centred": {"method": "logdet_linear_centered"},
    "DivPrune": {"method": "divprune"},
    "cosine DPP": {"method": "dpp"},
    "largest norm": {"method": "norm"},
    "random": {"method": "random"},
    "uniform": {"method": "uniform"},
    "first": {"method": "first"},
    "last": {"method": "last"},
}
"""All selectors that keep a subset of the projected tokens and look at nothing else. Other methods have no such
distance: those inside the language model keep different tokens for every question, and reducers change the tokens."""

BLIND = ("random", "uniform", "first", "last")
"""The selectors that never look at the tokens."""

FIGURE_2 = ("first", "last", "uniform", "random", "DivPrune")
"""The five strategies of the paper's own correlation study."""

FIGURE_4 = ("OTPrune released", "OTPrune trace", "DivPrune", "cosine DPP", "random")
"""The four methods whose distances the paper compares; OTPrune stands twice, with gamma on two scales."""

DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "w2": gaussian_w2,
    "w2_means": partial(gaussian_w2, center=True),
    "w2_unit": partial(gaussian_w2, unit_variance=True),
    "trace": partial(trace_objective, normalize_columns=True),
    "sliced": sliced_w2,
    "exact": exact_w2,
}
"""(features [B, N, D], keep [B, k]) -> [B]. Smaller is closer, except for `trace`, the objective of Eq. 4."""


def measure_scenes(
    *,
    start: int,
    stop: int,
    retention: float,
    points: Sequence[Point],
    distances: Sequence[str],
    weights: str,
    model: str,
) -> list[Row]:
    """One row for each point and each of the scenes start .. stop - 1 of the validation split.

    `model` is the checkpoint's folder. `weights` is the digest of the checkpoint; it is not read here, and makes pieces
    of other weights different pieces. Columns: scene, point, retention, kept, one for each distance, `right_<task>` and
    `asked_<task>` for each task and for caption.
    """
    import numpy as np

    from demo.render import render
    from demo.train_language import ask
    from demo.world import scene_at

    encoder, decoder, tokenizer = _load(model)
    scenes = [scene_at("validation", index) for index in range(start, stop)]
    features = encoder(torch.from_numpy(np.stack([render(scene).pixels for scene in scenes])))
    asked = [ask(scene, random.Random(f"study {start + i}"), ("exist", "attr")) for i, scene in enumerate(scenes)]
    rows: list[Row] = []
    for point in points:
        keep = choose(features, retention, point, torch.arange(start, stop))
        measured = {name: DISTANCES[name](features, keep).tolist() for name in distances}
        kept = features.gather(1, keep[..., None].expand(-1, -1, features.shape[-1]))
        answers = _answers(decoder, tokenizer, kept, asked)
        for i, counts in enumerate(answers):
            address = {"scene": start + i, "point": point["label"], "retention": retention, "kept": keep.shape[1]}
            rows.append({**address, **{name: values[i] for name, values in measured.items()}, **counts})
    return rows


def choose(features: Tensor, retention: float, point: Point, seeds: Tensor) -> Tensor:
    """Indices int64 [B, k] of the tokens that the point keeps of features [B, N, D].

    Only random selectors use the seeds, int64 [B].
    """
    k = num_kept(retention, features.shape[1])
    method = point["method"]
    if method == UNPRUNED:
        return torch.arange(features.shape[1]).expand(len(features), -1)
    if method == "dpp":  # CDPruner with equal relevance of all tokens is a DPP on cosine similarity
        return select_tokens(features, k, method=partial(cdpruner, relevance=torch.ones(features.shape[:2])))
    if method == "norm":
        return select_tokens(features, k, method=lambda f, k: f.norm(dim=-1).topk(k).indices)
    settings = {name: point[name] for name in ("gamma", "gamma_scale") if point.get(name) is not None}
    return select_tokens(features, k, method=method, seed=seeds, **settings)


@lru_cache(maxsize=1)
def _load(model: str) -> tuple[Any, Any, Any]:
    """(encoder, whole model, tokenizer) of the checkpoint; a worker process loads them once."""
    import transformers  # imported here, so that workers on other pieces start without it

    from otprune.models import llava_encoder, read_checkpoint

    transformers.utils.logging.disable_progress_bar()
    encoder = llava_encoder.load(read_checkpoint(model), dtype=torch.float32, device="cpu")
    decoder: Any = transformers.LlavaForConditionalGeneration.from_pretrained(model, dtype=torch.float32)
    return encoder, decoder.eval(), transformers.AutoTokenizer.from_pretrained(model)


@torch.inference_mode()
def _answers(decoder: Any, tokenizer: Any, visual: Tensor, asked: list[list[Any]]) -> list[dict[str, int]]:
    """For each image and task, the number of questions asked, and of answers that are right word for word.

    `visual`: kept tokens [B, k, D]. `asked`: the (task, question, answer) triples of each image. All questions of an
    image share one packed sequence, so one forward pass scores all of them.
    """
    from demo.packing import answer_logits, pack, prefix_ids

    packed = pack(asked, tokenizer, visual.shape[1])
    logits, is_target = answer_logits(decoder, prefix_ids(tokenizer), visual, packed)
    right = torch.zeros(is_target.shape, dtype=torch.bool)
    right[is_target] = logits.argmax(1) == packed.targets[is_target]
    counts = []
    for row, questions in enumerate(asked):
        count = {f"{kind}_{task}": 0 for task in (*TASKS, "caption") for kind in ("right", "asked")}
        for number, (task, _, _) in enumerate(questions, start=1):
            count[f"asked_{task}"] += 1
            count[f"right_{task}"] += int(right[row][(packed.segment[row] == number) & is_target[row]].all())
        counts.append(count)
    return counts
