"""The metrics by which the gate compares captions with those of the unpruned model, and the choice among them.

    cider     ratio of the CIDErs, over the images with references
    rouge_l   mean ROUGE-L with the unpruned captions as references: agreement, not accuracy
    objects   ratio of the F1s of CHAIR's precision and recall, over the images whose objects are known
    judge     2 x the share of pairs that a judge gives to the pruned caption: 1 if it is as good

`auto` goes by the length of the unpruned captions. Up to LONG words it takes CIDEr, or ROUGE-L without references, as
papers on pruning do. Above, both say little: CIDEr-D scales each n-gram by exp(-d^2 / 72) for a caption that is d words
longer than a reference, so that one of 60 words has none beside COCO's references of ten, and two good captions of 100
words share few of their longest sequences. So `auto` takes objects, then the judge, and falls back on the short ones.
"""

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import numpy as np

from pipelines.corpus.truth import Truth
from pipelines.metrics.bootstrap import Combine, bootstrap
from pipelines.metrics.cider import cider_d_scores
from pipelines.metrics.ptb import tokenize
from pipelines.metrics.sums import ratio
from pipelines.preflight.pairwise import Judged
from pipelines.run.outcome import Compared

LONG = 30  # words of the mean unpruned caption above which n-grams say little
ENOUGH = 16  # pairs that a judge must have judged, or half of those it was asked about if they are fewer

Key = tuple[str, int, int]  # source, row, index of the prompt
AskJudge = Callable[[Mapping[Key, Compared]], Judged]
"""Asks about the first of the captions, pruned against unpruned, in their order."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """How the pruned captions do beside the unpruned ones."""

    metric: str
    quality: float  # relative to unpruned
    interval: tuple[float, float]  # 95 %
    pruned_score: float
    unpruned_score: float
    images: int
    note: str = ""  # why this metric is second best
    judged: dict[str, float] = field(default_factory=dict)  # what the judge said and cost, under MLflow names


@dataclass(frozen=True, slots=True)
class _Scored:
    """A metric's numbers of each caption. `combine` turns their sums into quality, pruned and unpruned."""

    rows: Mapping[Key, Sequence[float] | np.ndarray]
    combine: Combine
    judged: dict[str, float] = field(default_factory=dict)


def compare(
    compared: Mapping[Key, Compared],
    metric: str = "auto",
    read_truth: Callable[[], Truth | None] = lambda: None,
    judge: AskJudge | None = None,
) -> Comparison:
    """Compares by the metric that is asked for, or by the one that `auto` takes.

    Args:
        read_truth: reads the objects of the images; called only where they are needed.
        judge: asks the judge; None if there is none.

    Raises:
        ValueError: if the corpus has not what the metric needs. A judge that fails is replaced, and noted.
    """
    is_long = mean_words([each.unpruned for each in compared.values()]) > LONG
    wanted = [metric] if metric != "auto" else ["objects", "judge"] if is_long else ["cider"]
    judged: dict[str, float] = {}
    for name in wanted:
        scored = _MEASURES[name](compared, read_truth, judge)
        judged |= scored.judged if scored else {}
        if scored and scored.rows:
            return _comparison(name, scored, "", judged)
    if metric not in ("auto", "judge") or (metric == "judge" and judge is None):
        raise ValueError(f"gate.metric={metric} needs {_NEEDS[metric]}, of half of the sample at least")
    note = "the judge judged too little" if judged else ""
    if is_long and not judged:
        note = "says little of captions as long as these; set quality.objects or quality.judge"
    cider = _cider(compared)
    name, scored = ("cider", cider) if cider else ("rouge_l", _rouge_l(compared))
    return _comparison(name, scored, note, judged)


def mean_words(captions: Sequence[str]) -> float:
    """Mean number of words of a caption."""
    return fmean(len(caption.split()) for caption in captions)


def _comparison(metric: str, scored: _Scored, note: str, judged: dict[str, float]) -> Comparison:
    images = {image: i for i, image in enumerate(dict.fromkeys(key[:2] for key in scored.rows))}
    table = np.zeros((len(images), len(next(iter(scored.rows.values())))))
    for key, row in scored.rows.items():  # the bootstrap resamples an image with all its prompts
        table[images[key[:2]]] += row
    found = {name: float(value) for name, value in scored.combine(table.sum(axis=0)).items()}
    interval = bootstrap(table, scored.combine)["quality"]
    scores = found["quality"], interval, found["pruned"], found["unpruned"]
    return Comparison(metric, *scores, images=len(images), note=note, judged=judged | scored.judged)


def _relative(sums: np.ndarray) -> dict[str, np.ndarray]:
    """From sums of (pruned score, unpruned score, captions)."""
    quality = sums[..., 0] / np.maximum(sums[..., 1], 1e-12)
    return {
        "quality": quality,
        "pruned": ratio(sums[..., 0], sums[..., 2]),
        "unpruned": ratio(sums[..., 1], sums[..., 2]),
    }


def _preference(sums: np.ndarray) -> dict[str, np.ndarray]:
    """From sums of (score of the pruned caption, captions)."""
    share = ratio(sums[..., 0], sums[..., 1])
    return {"quality": 2 * share, "pruned": share, "unpruned": 1 - share}


def _cider(compared: Mapping[Key, Compared]) -> _Scored | None:
    """None unless half of the captions have references."""
    keys = [key for key in compared if compared[key].references]
    if not keys or 2 * len(keys) < len(compared):
        return None
    references = {key: [tokenize(text) for text in compared[key].references] for key in keys}
    pruned, unpruned = (
        cider_d_scores({key: tokenize(getattr(compared[key], setting)) for key in keys}, references)
        for setting in ("pruned", "unpruned")
    )
    return _Scored({key: (pruned[key], unpruned[key], 1) for key in keys}, _relative)


def _rouge_l(compared: Mapping[Key, Compared]) -> _Scored:
    return _Scored({key: (each.agreement, 1, 1) for key, each in compared.items()}, _relative)


def _objects(compared: Mapping[Key, Compared], truth: Truth | None) -> _Scored | None:
    """None unless the objects of half of the captions' images are known."""
    keys = [key for key in compared if truth is not None and key[:2] in truth.objects]
    if truth is None or not keys or 2 * len(keys) < len(compared):
        return None
    rows = {
        key: np.concatenate(
            [truth.counts(key[:2], compared[key].pruned), truth.counts(key[:2], compared[key].unpruned)]
        )
        for key in keys
    }

    def combine(sums: np.ndarray) -> dict[str, np.ndarray]:
        half = sums.shape[-1] // 2
        pruned, unpruned = (truth.metrics(part)["object_f1"] for part in (sums[..., :half], sums[..., half:]))
        return {"quality": pruned / np.maximum(unpruned, 1e-12), "pruned": pruned, "unpruned": unpruned}

    return _Scored(rows, combine)


def _judge(compared: Mapping[Key, Compared], ask: AskJudge | None) -> _Scored | None:
    """None without a judge; without rows if it judged too little."""
    if ask is None:
        return None
    keys = sorted(compared, key=lambda key: zlib.crc32(repr(key).encode()))  # the first of them are a random sample
    judged = ask({key: compared[key] for key in keys})
    rows = {key: (score, 1) for key, score in zip(keys, judged.scores, strict=False) if score is not None}
    enough = len(rows) >= min(ENOUGH, max(1, judged.pairs // 2))
    return _Scored(rows if enough else {}, _preference, judged.metrics())


_MEASURES: dict[str, Callable[..., _Scored | None]] = {
    "cider": lambda compared, truth, judge: _cider(compared),
    "rouge_l": lambda compared, truth, judge: _rouge_l(compared),
    "objects": lambda compared, truth, judge: _objects(compared, truth()),
    "judge": lambda compared, truth, judge: _judge(compared, judge),
}
_NEEDS = {
    "cider": "reference captions",
    "objects": "the objects of the images (quality.objects, quality.instances)",
    "judge": "quality.judge",
}
