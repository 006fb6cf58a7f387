"""The common row of every benchmark: one row is one question, that is one generation, and later one score.

`image_id` is for the reader's economy: equal ids mean equal pixels, so an image that is asked about many times (32 in
GQA, 18 in POPE) is encoded once.
"""

from typing import Literal, TypedDict

import pyarrow as pa

Kind = Literal["caption", "short", "yesno", "choice", "open"]


class Content(TypedDict):
    """What a benchmark's adapter makes of a source row."""

    images: list[bytes]  # encoded, in the order of the prompt's image tokens; one except in MMMU
    question: str  # raw, without instruction or image token
    hint: str | None
    choices: list[str]  # position 0 is A; empty if not multiple choice
    answers: list[str]  # references: captions, ten answers, one letter, yes or no
    category: str  # key of the breakdown, levels separated by "/"; empty for none
    kind: Kind


class Row(Content):
    """A content with its address."""

    benchmark: str
    question_id: str  # unique inside the benchmark
    group_id: str  # what is scored as a whole: an image of MME, a question of MMBench with its copies
    image_id: str


class Record(TypedDict):
    """A row without its images, answered: all that scoring needs, a few MB for a whole benchmark."""

    question_id: str
    group_id: str
    category: str
    kind: str
    choices: list[str]
    answers: list[str]
    prediction: str | None  # None where the image could not be read; scored as an empty answer


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
