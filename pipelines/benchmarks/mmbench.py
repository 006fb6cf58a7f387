"""MMBench-EN dev: one copy of a question for each rotation of its options; solved only if every copy is answered right.

The index of a copy is the index of the base question plus a multiple of a million. Undecided answers are wrong, and
their number is reported: see `pipelines.metrics.mmbench`.
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


def _identify(source: Source, _: int) -> list[Key]:
    index = int(source["index"])
    return [Key(str(index), str(index % _COPY), str(index % _COPY))]


def _present(text: str | None) -> str | None:
    return None if text in (None, "", "nan") else text  # the data set writes `nan` for an absent text


def _content(source: Source) -> list[Content]:
    options = [_present(source[letter]) for letter in _OPTIONS]
    choices = [option for option in options if option is not None]
    if None in options[: len(choices)] or not choices:
        raise ValueError(f"columns A to D must be filled from A without a gap, got {options}")
    if source["answer"] not in _OPTIONS[: len(choices)]:
        raise ValueError(
            f"column 'answer' must be the letter of one of {len(choices)} options, got {source['answer']!r}"
        )
    return [
        {
            "images": [image_bytes(source["image"])],
            "question": source["question"],
            "hint": _present(source["hint"]),
            "choices": choices,
            "answers": [source["answer"]],
            "category": f"{source['L2-category']}/{source['category']}",
            "kind": "choice",
        }
    ]


def _prompt(row: Row) -> str:
    hint = f"{row['hint']} " if row["hint"] else ""
    return f"{hint}{row['question']} There are several options:\n{options_text(row['choices'])}\n\n{LETTER}"


def _statistics(groups: list[list[Record]]) -> np.ndarray:
    """[solved, 1, undecided copies, copies] of each question."""
    table = []
    for group in groups:
        if all(record["question_id"] != record["group_id"] for record in group):
            raise ValueError(f"question {group[0]['group_id']} must come with its base row, got rotated copies alone")
        letters = [
            # An absent option counts as the text `nan`, as in the published rules.
            mmbench_letter(record["prediction"] or "", record["choices"] + ["nan"] * (4 - len(record["choices"])))
            for record in group
        ]
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
