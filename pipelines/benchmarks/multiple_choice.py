"""ScienceQA (the images subset) and SEED-Bench (its image questions): the answer must be the letter of the option."""

from pipelines.benchmarks.benchmark import Benchmark, Key, Source, one_key
from pipelines.benchmarks.columns import IMAGE, IMAGES, MAYBE_TEXT, NUMBER, NUMBER_OR_TEXT, TEXT, TEXTS, image_bytes
from pipelines.benchmarks.prompts import LETTER, LETTERS, options_text
from pipelines.benchmarks.rows import Content, Row
from pipelines.benchmarks.scoring import mean_scorer
from pipelines.metrics.choice import scienceqa_correct, seed_correct

_SEED_CHOICES = ("choice_a", "choice_b", "choice_c", "choice_d")


def _number_of_row(_: Source, number: int) -> list[Key]:
    """ScienceQA has no id column. The row's number in all files is its id, as long as no step shuffles rows before."""
    return [Key(str(number), str(number), str(number))]


def _scienceqa_content(source: Source) -> list[Content]:
    choices = source["choices"]
    if not 0 <= source["answer"] < len(choices):
        raise ValueError(f"column 'answer' must be the index of one of {len(choices)} choices, got {source['answer']}")
    return [
        {
            "images": [image_bytes(source["image"])],
            "question": source["question"],
            "hint": source["hint"] or None,
            "choices": choices,
            "answers": [LETTERS[source["answer"]]],
            "category": source["subject"],
            "kind": "choice",
        }
    ]


def _scienceqa_prompt(row: Row) -> str:
    context = f"Context: {row['hint']}\n" if row["hint"] else ""
    return f"{context}{row['question']}\n{options_text(row['choices'])}\n{LETTER}"


_identify_question = one_key("question_id")


def _seed_key(source: Source, number: int) -> list[Key]:
    return _identify_question(source, number) if source["data_type"] == "image" else []


def _seed_content(source: Source) -> list[Content]:
    if len(source["image"]) != 1:
        raise ValueError(f"column 'image' must hold one image in an image row, got {len(source['image'])}")
    if source["answer"] not in LETTERS[: len(_SEED_CHOICES)]:
        raise ValueError(f"column 'answer' must be A, B, C or D, got {source['answer']!r}")
    return [
        {
            "images": [image_bytes(source["image"][0])],
            "question": source["question"],
            "hint": None,
            "choices": [source[name] for name in _SEED_CHOICES],
            "answers": [source["answer"]],
            "category": str(source["question_type_id"]),
            "kind": "choice",
        }
    ]


SCIENCEQA = Benchmark(
    name="scienceqa_img",
    repo="ScienceQA",
    files="ScienceQA-IMG/test-*.parquet",
    columns={"image": IMAGE, "question": TEXT, "choices": TEXTS, "answer": NUMBER, "hint": MAYBE_TEXT, "subject": TEXT},
    key_columns=("subject",),
    identify=_number_of_row,
    content=_scienceqa_content,
    prompt=_scienceqa_prompt,
    max_new_tokens=16,
    scorer=mean_scorer("exact_match", lambda r: float(scienceqa_correct(r["prediction"] or "", r["answers"][0]))),
)

SEEDBENCH = Benchmark(
    name="seedbench",
    repo="SEED-Bench",
    files="data/test-*.parquet",
    columns={
        "question_id": NUMBER_OR_TEXT,
        "image": IMAGES,
        "question": TEXT,
        **dict.fromkeys(_SEED_CHOICES, TEXT),
        "answer": TEXT,
        "data_type": TEXT,
        "question_type_id": NUMBER,
    },
    key_columns=("question_id", "data_type"),
    identify=_seed_key,
    content=_seed_content,
    prompt=lambda row: f"{row['question']}\n{options_text(row['choices'])}\n{LETTER}",
    max_new_tokens=1024,
    scorer=mean_scorer("seed_image", lambda r: float(seed_correct(r["prediction"] or "", r["answers"][0]))),
)
