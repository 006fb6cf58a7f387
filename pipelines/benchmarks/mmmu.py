"""MMMU validation: college questions with one to seven images, 847 multiple-choice and 53 open of 900.

Image markers such as `<image 1>` stay in the text of the prompt. The model gets the named images in the order of their
numbers. An open answer is compared with the answer in the table as one text, even if this text is a list of
alternatives (three questions), as lmms-eval 0.2 does.
"""

import ast
import re

import numpy as np

from pipelines.benchmarks.benchmark import Benchmark, Source, one_key
from pipelines.benchmarks.columns import MAYBE_IMAGE, TEXT, image_bytes
from pipelines.benchmarks.prompts import LETTER, LETTERS, SINGLE_WORD, options_text
from pipelines.benchmarks.rows import Content, Record, Row
from pipelines.benchmarks.scoring import Scorer
from pipelines.metrics.mmmu import mmmu_letter, mmmu_open_correct
from pipelines.metrics.sums import ratio

_IMAGE_COLUMNS = tuple(f"image_{k}" for k in range(1, 8))


def _content(source: Source) -> list[Content]:
    choices = _choices(source["options"])
    is_choice = source["question_type"] == "multiple-choice"
    if not is_choice and source["question_type"] != "open":
        raise ValueError(f"column 'question_type' must be multiple-choice or open, got {source['question_type']!r}")
    if is_choice and source["answer"] not in LETTERS[: len(choices)]:
        raise ValueError(
            f"column 'answer' must be the letter of one of {len(choices)} options, got {source['answer']!r}"
        )
    return [
        {
            "images": _images(source, [source["question"], *(choices if is_choice else [])]),
            "question": source["question"],
            "hint": None,
            "choices": choices if is_choice else [],
            "answers": [source["answer"]],
            "category": _subject(source["id"]),
            "kind": "choice" if is_choice else "open",
        }
    ]


def _choices(literal: str) -> list[str]:
    """The options, which the data set stores as the text of a Python list."""
    try:
        options = ast.literal_eval(literal)
    except (ValueError, SyntaxError):
        options = None
    if not isinstance(options, list):
        raise ValueError(f"column 'options' must be text that holds a Python list, got {literal!r}")
    return [str(option) for option in options]


def _images(source: Source, texts: list[str]) -> list[bytes]:
    """The images that the markers in `texts` name, each once, in the order of their numbers."""
    numbers = sorted({int(number) for text in texts for number in re.findall(r"<image (\d+)>", text)})
    if not numbers or numbers[-1] > len(_IMAGE_COLUMNS):
        raise ValueError(f"question and options must refer to images 1 to {len(_IMAGE_COLUMNS)}, got {numbers}")
    return [image_bytes(source[f"image_{number}"], f"image_{number}") for number in numbers]


def _subject(question_id: str) -> str:
    """`validation_Art_Theory_12` -> `Art_Theory`."""
    match = re.fullmatch(r"[^_]+_(.+)_\d+", question_id)
    if match is None:
        raise ValueError(f"column 'id' must look like validation_<Subject>_<number>, got {question_id!r}")
    return match[1]


def _prompt(row: Row) -> str:
    if row["kind"] == "open":
        return f"{row['question']}\n\n{SINGLE_WORD}"
    return f"{row['question']}\n{options_text(row['choices'])}\n\n{LETTER}"


def _score(record: Record) -> tuple[bool, bool]:
    """(whether the answer is right, whether the letter was drawn)."""
    prediction, answer = record["prediction"] or "", record["answers"][0]
    if record["kind"] == "open":
        return mmmu_open_correct(prediction, answer), False
    letter, drawn = mmmu_letter(prediction, record["choices"], record["question_id"])
    return letter == answer, drawn


def _statistics(groups: list[list[Record]]) -> np.ndarray:
    """[right, 1, drawn letter] of each question."""
    scores = [_score(group[0]) for group in groups]
    return np.array([[right, 1, drawn] for right, drawn in scores], np.float64)


def _combine(sums: np.ndarray) -> dict[str, np.ndarray]:
    return {"mmmu_acc": ratio(sums[..., 0], sums[..., 1]), "drawn": sums[..., 2]}


MMMU = Benchmark(
    name="mmmu_val",
    repo="MMMU",
    files="data/validation-*.parquet",
    columns={
        **dict.fromkeys(("id", "question", "options", "answer", "question_type"), TEXT),
        **dict.fromkeys(_IMAGE_COLUMNS, MAYBE_IMAGE),
    },
    key_columns=("id",),
    identify=one_key("id"),
    content=_content,
    prompt=_prompt,
    max_new_tokens=128,
    scorer=Scorer(headline="mmmu_acc", scale=100.0, statistics=_statistics, combine=_combine),
)
