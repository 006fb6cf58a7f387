"""COCO 2017 val, Flickr30k (all 31,783 images, not the 1K test split) and NoCaps val: one caption for each image.

The papers print CIDEr over all images of the run. BLEU-4 and ROUGE-L cost nothing extra.
"""

import re
from collections.abc import Callable

import numpy as np

from pipelines.benchmarks import prompts
from pipelines.benchmarks.benchmark import Benchmark, Key, Source
from pipelines.benchmarks.columns import IMAGE, NUMBER, TEXT, TEXTS, image_bytes
from pipelines.benchmarks.rows import Content, Record
from pipelines.benchmarks.scoring import Scorer
from pipelines.metrics.bleu import NUM_COUNTS, bleu4, bleu4_counts
from pipelines.metrics.cider import cider_d_scores
from pipelines.metrics.ptb import tokenize
from pipelines.metrics.rouge import rouge_l
from pipelines.metrics.sums import ratio

MAX_NEW_TOKENS = 64


def caption_scorer(prefix: str) -> Scorer:
    """A scorer with the metrics `<prefix>_CIDEr`, `<prefix>_Bleu_4` and `<prefix>_ROUGE_L`.

    The statistics of a group are those of its captions, [CIDEr, ROUGE-L, 1, BLEU's counts], summed. CIDEr needs the
    references of the whole run, so it is computed for all groups at once.
    """

    def statistics(groups: list[list[Record]]) -> np.ndarray:
        records = {(i, j): record for i, group in enumerate(groups) for j, record in enumerate(group)}
        candidates = {key: tokenize(record["prediction"] or "") for key, record in records.items()}
        references = {key: [tokenize(text) for text in record["answers"]] for key, record in records.items()}
        cider = cider_d_scores(candidates, references)
        sums = np.zeros((len(groups), 3 + NUM_COUNTS))
        for key, texts in references.items():
            counts = bleu4_counts(candidates[key], texts)
            sums[key[0]] += [cider[key], rouge_l(candidates[key], texts), 1, *counts]
        return sums

    def combine(sums: np.ndarray) -> dict[str, np.ndarray]:
        return {
            f"{prefix}_CIDEr": ratio(sums[..., 0], sums[..., 2]),
            f"{prefix}_Bleu_4": bleu4(sums[..., -NUM_COUNTS:]),
            f"{prefix}_ROUGE_L": ratio(sums[..., 1], sums[..., 2]),
        }

    return Scorer(headline=f"{prefix}_CIDEr", scale=100.0, statistics=statistics, combine=combine)


def caption_content(image: bytes, references: list[str]) -> Content:
    """The content of an image to caption, which has no question.

    Raises:
        ValueError: if there is no reference.
    """
    if not references:
        raise ValueError("an image must have at least one reference caption, got none")
    return {
        "images": [image],
        "question": "",
        "hint": None,
        "choices": [],
        "answers": references,
        "category": "",
        "kind": "caption",
    }


def _coco_number(name: str) -> str:
    """`000000397133.jpg` or `COCO_val2014_000000397133.jpg` -> `397133`."""
    digits = re.search(r"(\d+)(?:\.\w+)?$", name)
    if digits is None:
        raise ValueError(f"column 'question_id' must be a file name with the image's number, got {name!r}")
    return str(int(digits[1]))


def _identify_by(column: str, number: Callable[[str], str] = str) -> Callable[[Source, int], list[Key]]:
    def identify(source: Source, _: int) -> list[Key]:
        key = number(source[column])
        return [Key(key, key, key)]

    return identify


def _content_from(column: str) -> Callable[[Source], list[Content]]:
    return lambda source: [caption_content(image_bytes(source["image"]), source[column])]


COCO = Benchmark(
    name="coco2017_cap_val",
    repo="COCO-Caption2017",
    files="data/val-*.parquet",
    columns={"question_id": TEXT, "image": IMAGE, "answer": TEXTS},
    key_columns=("question_id",),
    identify=_identify_by("question_id", _coco_number),
    content=_content_from("answer"),
    prompt=lambda row: prompts.CAPTION,
    max_new_tokens=MAX_NEW_TOKENS,
    scorer=caption_scorer("coco"),
)

FLICKR30K = Benchmark(
    name="flickr30k_test",
    repo="flickr30k",
    files="data/test-*.parquet",
    columns={"img_id": TEXT, "image": IMAGE, "caption": TEXTS},
    key_columns=("img_id",),
    identify=_identify_by("img_id"),
    content=_content_from("caption"),
    prompt=lambda row: prompts.CAPTION,
    max_new_tokens=MAX_NEW_TOKENS,
    scorer=caption_scorer("flickr"),
)

NOCAPS = Benchmark(
    name="nocaps_val",
    repo="NoCaps",
    files="data/validation-*.parquet",
    columns={"image_id": NUMBER, "image": IMAGE, "annotations_captions": TEXTS},
    key_columns=("image_id",),
    identify=_identify_by("image_id"),
    content=_content_from("annotations_captions"),
    prompt=lambda row: prompts.CAPTION,
    max_new_tokens=MAX_NEW_TOKENS,
    scorer=caption_scorer("nocaps"),
)
