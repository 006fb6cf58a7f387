"""The common row of all benchmarks. One row is one question, which gets one generated answer and one score.

`image_id` saves work: equal ids mean equal pixels, so an image with many questions (32 in GQA, 18 in POPE) is encoded
once.
"""

from typing import Literal, TypedDict

import pyarrow as pa

Kind = Literal["caption", "short", "yesno", "choice", "open"]


class Content(TypedDict):
    """The question that a benchmark makes from a source row."""

    images: list[bytes]  # encoded, in the order of the prompt's image tokens; one except in MMMU
    question: str  # raw, without instruction or image token
    hint: str | None
    choices: list[str]  # position 0 is A; empty if not multiple choice
    answers: list[str]  # references: captions, ten answers, one letter, yes or no
    category: str  # key of the breakdown, levels separated by "/"; empty without a category
    kind: Kind


class Row(Content):
    """A question with its address."""

    benchmark: str
    question_id: str  # unique inside the benchmark
    group_id: str  # scored as a whole: an image of MME, a question of MMBench with its copies
    image_id: str


class Record(TypedDict):
    """An answered question without its images: all that scoring needs, a few MB for a whole benchmark."""

    question_id: str
    group_id: str
    category: str
    kind: str
    choices: list[str]
    answers: list[str]
    prediction: str | None  # None if the image could not be read; scored as an empty answer


_TEXTS = pa.list_(pa.string())
RECORDS = pa.schema(
    [
        ("benchmark", pa.string()),
        ("question_id", pa.string()),
        ("group_id", pa.string()),
        ("image_id", pa.string()),
        ("question", pa.string()),
        ("hint", pa.string()),
        ("choices", _TEXTS),
        ("answers", _TEXTS),
        ("category", pa.string()),
        ("kind", pa.string()),
        ("prediction", pa.string()),
    ]
)
RECORD_COLUMNS = list(Record.__annotations__)
