"""GQA, OK-VQA and POPE: the answer is a word or phrase, compared with the right answer or with ten human answers."""

import numpy as np

from pipelines.benchmarks.benchmark import Benchmark, ImageTable, Key, Source, one_key
from pipelines.benchmarks.columns import IMAGE, TEXT, TEXTS, image_bytes
from pipelines.benchmarks.prompts import SINGLE_WORD
from pipelines.benchmarks.rows import Content, Kind, Record
from pipelines.benchmarks.scoring import Scorer, mean_scorer
from pipelines.metrics.exact_match import exact_match
from pipelines.metrics.pope import pope_counts, pope_metrics
from pipelines.metrics.vqa import vqa_accuracy

_UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


def short_content(source: Source, answers: list[str], category: str, kind: Kind = "short") -> list[Content]:
    """The content of a row with one image and one question.

    Raises:
        ValueError: if the image or all answers are missing.
    """
    if not answers:
        raise ValueError("a question must have at least one answer, got none")
    return [
        {
            "images": [image_bytes(source["image"])],
            "question": source["question"],
            "hint": None,
            "choices": [],
            "answers": answers,
            "category": category,
            "kind": kind,
        }
    ]


def yes_or_no(answer: str) -> str:
    """The right answer in lower case and without dots, `yes` or `no`.

    Raises:
        ValueError: if the answer is neither.
    """
    answer = answer.lower().strip().replace(".", "")
    if answer not in ("yes", "no"):
        raise ValueError(f"column 'answer' must be yes or no, got {answer!r}")
    return answer


def exact_match_score(record: Record) -> float:
    """1 if the prediction matches the first answer exactly, else 0."""
    return float(exact_match(record["prediction"] or "", record["answers"][0]))


def yes_no_scorer(headline: str) -> Scorer:
    """A scorer with POPE's metrics, one of them as the headline. The paired test of two runs compares right answers."""

    def statistics(groups: list[list[Record]]) -> np.ndarray:
        return np.array(
            [sum(pope_counts(record["prediction"] or "", record["answers"][0]) for record in group) for group in groups]
        )

    return Scorer(headline=headline, scale=100.0, statistics=statistics, combine=pope_metrics, value=1)


def _pope_key(source: Source, _: int) -> list[Key]:
    """The id of a question holds its category, because ids repeat across the three categories."""
    question_id = f"{source['category']}/{source['id']}"
    return [Key(question_id, question_id, source["image_source"])]


GQA = Benchmark(
    name="gqa",
    repo="GQA",
    files="testdev_balanced_instructions/testdev-*.parquet",
    columns={"id": TEXT, "imageId": TEXT, "question": TEXT, "answer": TEXT},
    key_columns=("id", "imageId"),
    identify=one_key("id", image="imageId"),
    content=lambda source: short_content(source, [source["answer"]], category=""),
    prompt=lambda row: f"{row['question']}\n{SINGLE_WORD}",
    max_new_tokens=16,
    scorer=mean_scorer("exact_match", exact_match_score),
    image_table=ImageTable(
        files="testdev_balanced_images/testdev-*.parquet", columns={"id": TEXT, "image": IMAGE}, lookup="imageId"
    ),
)

OK_VQA = Benchmark(
    name="ok_vqa_val2014",
    repo="OK-VQA",
    files="data/val2014-*.parquet",
    columns={"question_id": TEXT, "image": IMAGE, "question": TEXT, "answers": TEXTS, "question_type": TEXT},
    key_columns=("question_id",),
    identify=one_key("question_id"),
    content=lambda source: short_content(source, source["answers"], category=source["question_type"]),
    prompt=lambda row: f"{row['question']}\n{_UNANSWERABLE}\n{SINGLE_WORD}",
    max_new_tokens=1024,
    scorer=mean_scorer("exact_match", lambda record: vqa_accuracy(record["prediction"] or "", record["answers"])),
)

POPE = Benchmark(
    name="pope",
    repo="POPE",
    files="data/test-*.parquet",
    columns={"id": TEXT, "question": TEXT, "answer": TEXT, "image_source": TEXT, "image": IMAGE, "category": TEXT},
    key_columns=("id", "image_source", "category"),
    identify=_pope_key,
    content=lambda source: short_content(source, [yes_or_no(source["answer"])], source["category"], kind="yesno"),
    prompt=lambda row: f"{row['question'].strip()}\n{SINGLE_WORD}",
    max_new_tokens=128,
    scorer=yes_no_scorer("pope_f1_score"),
)
