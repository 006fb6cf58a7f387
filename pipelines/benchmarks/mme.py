"""MME: two yes/no questions about each image, scored together. The papers print the sum over ten perception categories.

Departures:
- Metric keys spell "perception"; lmms-eval 0.2 wrote `mme_percetion_score`.
- The id of a question is the id of its image plus a hash of its text. The data set gives both questions of an image the
  same id, and the two may stand in different files or units.
"""

import zlib

import numpy as np

from pipelines.benchmarks.benchmark import Benchmark, Key, Source
from pipelines.benchmarks.columns import IMAGE, TEXT
from pipelines.benchmarks.prompts import SINGLE_WORD
from pipelines.benchmarks.rows import Content, Record
from pipelines.benchmarks.scoring import Scorer
from pipelines.benchmarks.short_answers import short_content, yes_or_no
from pipelines.metrics.mme import COGNITION, PERCEPTION, mme_answer, mme_image_score
from pipelines.metrics.sums import ratio

_CATEGORIES = PERCEPTION + COGNITION
_ASKS_FOR_YES_OR_NO = " Please answer yes or no."


def _identify(source: Source, _: int) -> list[Key]:
    image = f"{source['category']}/{source['question_id']}"
    return [Key(f"{source['question_id']}#{zlib.crc32(source['question'].encode()):08x}", image, image)]


def _content(source: Source) -> list[Content]:
    if source["category"] not in _CATEGORIES:
        raise ValueError(f"column 'category' must be one of {', '.join(_CATEGORIES)}, got {source['category']!r}")
    return short_content(source, [yes_or_no(source["answer"])], category=source["category"], kind="yesno")


def _statistics(groups: list[list[Record]]) -> np.ndarray:
    """[image score, right answers, answers, score in each category, images in each category] of each image."""
    table = np.zeros((len(groups), 3 + 2 * len(_CATEGORIES)))
    for row, group in zip(table, groups, strict=True):
        correct = [mme_answer(record["prediction"] or "") == record["answers"][0] for record in group]
        try:
            score = mme_image_score(correct)
        except ValueError as error:
            raise ValueError(f"{error}, for {group[0]['group_id']!r}") from error
        category = 3 + _CATEGORIES.index(group[0]["category"])
        row[:3] = score, sum(correct), len(correct)
        row[[category, category + len(_CATEGORIES)]] = score, 1
    return table


def _combine(sums: np.ndarray) -> dict[str, np.ndarray]:
    by_category = ratio(sums[..., 3 : 3 + len(_CATEGORIES)], sums[..., 3 + len(_CATEGORIES) :])
    return {
        "mme_perception_score": by_category[..., : len(PERCEPTION)].sum(axis=-1),
        "mme_cognition_score": by_category[..., len(PERCEPTION) :].sum(axis=-1),
        "accuracy": ratio(sums[..., 1], sums[..., 2]),
    }


MME = Benchmark(
    name="mme",
    repo="MME",
    files="data/test-*.parquet",
    columns={"question_id": TEXT, "image": IMAGE, "question": TEXT, "answer": TEXT, "category": TEXT},
    key_columns=("question_id", "question", "category"),
    identify=_identify,
    content=_content,
    prompt=lambda row: f"{row['question'].strip().replace(_ASKS_FOR_YES_OR_NO, '')}\n{SINGLE_WORD}",
    max_new_tokens=16,
    scorer=Scorer(headline="mme_perception_score", scale=1.0, statistics=_statistics, combine=_combine),
)
