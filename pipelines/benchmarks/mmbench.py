"""MMBench-EN dev: one copy of a question for each rotation of its options; solved only if every copy is answered right.

The index of a copy is the index of the base question plus a multiple of a million. Undecided answers are wrong, and
their number is reported: see `pipelines.metrics.mmbench`. An absent option is null or, in the published files, the text
`nan`. Neither is in the prompt. The published rules look for the text `nan` in answers, so `choices` holds it.
"""

import numpy as np

from pipelines.benchmarks.benchmark import Benchmark, Key, Source
from pipelines.benchmarks.columns import IMAGE, MAYBE_TEXT, NUMBER_OR_TEXT, TEXT, image_bytes
from pipelines.benchmarks.prompts import LETTER, options_text
from pipelines.benchmarks.rows import Content, Record, Row
from pipelines.benchmarks.scoring import Scorer
from pipelines.metrics.mmbench import circular_hit, mmbench_letter
from pipelines.metrics.sums import ratio

_COPY = 1_000_000  # distance between the indices of a question and its next copy
_OPTIONS = ("A", "B", "C", "D")
_ABSENT = "nan"


def _identify(source: Source, _: int) -> list[Key]:
    index = int(source["index"])
    return [Key(str(index), str(index % _COPY), str(index % _COPY))]


def _present(text: str | None) -> str | None:
    return None if text in (None, "", _ABSENT) else text


def _content(source: Source) -> list[Content]:
    options = [_present(source[letter]) for letter in _OPTIONS]
    num_present = len(options) - options.count(None)
    if None in options[:num_present] or not num_present:
        raise ValueError(f"columns A to D must be filled from A without a gap, got {options}")
    if source["answer"] not in _OPTIONS[:num_present]:
        raise ValueError(
            f"column 'answer' must be the letter of one of {num_present} options, got {source['answer']!r}"
        )
    return [
        {
            "images": [image_bytes(source["image"])],
            "question": source["question"],
            "hint": _present(source["hint"]),
            "choices": [source[letter] for letter in _OPTIONS if source[letter]],
            "answers": [source["answer"]],
            "category": f"{source['L2-category']}/{source['category']}",
            "kind": "choice",
        }
    ]


def _prompt(row: Row) -> str:
    hint = f"{row['hint']} " if row["hint"] else ""
    options = options_text([choice for choice in row["choices"] if choice != _ABSENT])
    return f"{hint}{row['question']} There are several options:\n{options}\n\n{LETTER}"


def _statistics(groups: list[list[Record]]) -> np.ndarray:
    """[solved, 1, undecided copies, copies] of each question."""
    table = []
    for group in groups:
        if all(record["question_id"] != record["group_id"] for record in group):
            raise ValueError(f"question {group[0]['group_id']} must come with its base row, got rotated copies alone")
        letters = [mmbench_letter(record["prediction"] or "", record["choices"]) for record in group]
        solved = circular_hit(letters, [record["answers"][0] for record in group])
        table.append([solved, 1, letters.count(None), len(letters)])
    return np.array(table, np.float64)


def _combine(sums: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "gpt_eval_score": 100 * ratio(sums[..., 0], sums[..., 1]),
        "undecided_share": ratio(sums[..., 2], sums[..., 3]),
        "undecided": sums[..., 2],
    }


MMBENCH = Benchmark(
    name="mmbench_en_dev",
    repo="MMBench",
    files="en/dev-*.parquet",
    columns={
        "index": NUMBER_OR_TEXT,
        "question": TEXT,
        "hint": MAYBE_TEXT,
        "answer": TEXT,
        **dict.fromkeys(_OPTIONS, MAYBE_TEXT),
        "category": TEXT,
        "image": IMAGE,
        "L2-category": TEXT,
    },
    key_columns=("index",),
    identify=_identify,
    content=_content,
    prompt=_prompt,
    max_new_tokens=1024,
    scorer=Scorer(headline="gpt_eval_score", scale=1.0, statistics=_statistics, combine=_combine),
)
