"""Every benchmark from its Parquet files to its scores, with predictions whose score is known."""

import random
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from demo.corpus import SCHEMA
from demo.language import CAPTION_PROMPT, TASKS, questions, references
from demo.world import scene_at
from pipelines.benchmarks import DEMO, PUBLISHED, RECORD_COLUMNS, RECORDS, Benchmark, Record, Row, Scores, get_benchmark
from pipelines.metrics import cider_d
from tests.benchmark_fixtures import picture, write_fixtures

LETTER = "Answer with the option's letter from the given choices directly."
SINGLE_WORD = "Answer the question using a single word or phrase."
CAPTION = "Provide a one-sentence caption for the provided image."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    write_fixtures(folder)
    return folder


def read_rows(bench: Benchmark, folder: Path) -> list[Row]:
    """As a driver does it: only the needed columns, file by file, batch by batch, the images looked up where apart."""
    root, rows, first = folder / bench.repo, [], 0
    images = None
    if bench.image_table:
        [path] = root.glob(bench.image_table.files)
        images = bench.image_lookup(pq.read_table(path, columns=list(bench.image_table.columns)))
    for path in sorted(root.glob(bench.files)):
        parquet = pq.ParquetFile(path)
        bench.check_schema(parquet.schema_arrow)
        for batch in parquet.iter_batches(batch_size=2, columns=list(bench.columns)):
            rows += bench.rows(batch, first, images)
            first += batch.num_rows
    return rows


def answer(rows: list[Row], predict: Callable[[Row], str | None]) -> list[Record]:
    kept = [name for name in RECORD_COLUMNS if name != "prediction"]
    return [{**{name: row[name] for name in kept}, "prediction": predict(row)} for row in rows]


def score(bench: Benchmark, rows: list[Row], predict: Callable[[Row], str | None]) -> Scores:
    return bench.score(answer(rows, predict), resamples=50)


def perfect(row: Row) -> str:
    """The right answer, or what most people said."""
    return max(row["answers"], key=row["answers"].count)


@pytest.mark.parametrize("bench", [*PUBLISHED, *DEMO], ids=lambda bench: bench.name)
def test_perfect_answers_get_the_best_score_and_silence_gets_none(bench: Benchmark, folder: Path):
    rows = read_rows(bench, folder)
    assert rows
    assert all(row["benchmark"] == bench.name and row["images"] and bench.prompt(row) for row in rows)
    assert len({row["question_id"] for row in rows}) == len(rows)
    best, silent = score(bench, rows, perfect), score(bench, rows, lambda row: None)
    if bench.name == "mme":
        assert best.metrics[bench.scorer.headline] == 2 * 200  # two perception categories are there
    elif rows[0]["kind"] == "caption":
        assert best.metrics[bench.scorer.headline] > 3
    else:
        assert best.metrics[bench.scorer.headline] * bench.scorer.scale == 100
    assert silent.metrics[bench.scorer.headline] == 0
    assert (best.unanswered, silent.unanswered) == (0, len(rows))
    assert best.questions == len(rows)


@pytest.mark.parametrize("bench", [*PUBLISHED, *DEMO], ids=lambda bench: bench.name)
def test_keys_need_only_their_columns_and_are_those_of_the_rows(bench: Benchmark, folder: Path):
    first, keys = 0, []
    for path in sorted((folder / bench.repo).glob(bench.files)):
        table = pq.read_table(path, columns=list(bench.key_columns))
        keys += bench.keys(table, first)
        first += table.num_rows
    rows = read_rows(bench, folder)
    assert keys == [(row["question_id"], row["group_id"], row["image_id"]) for row in rows]
    assert set(bench.key_columns) <= set(bench.columns)


@pytest.mark.parametrize("bench", [*PUBLISHED, *DEMO], ids=lambda bench: bench.name)
def test_equal_image_ids_mean_equal_images(bench: Benchmark, folder: Path):
    by_id: dict[str, list[bytes]] = {}
    for row in read_rows(bench, folder):
        assert by_id.setdefault(row["image_id"], row["images"]) == row["images"]


@pytest.mark.parametrize(
    ("name", "prompts", "max_new_tokens"),
    [
        ("coco2017_cap_val", [CAPTION] * 3, 64),
        ("flickr30k_test", [CAPTION] * 4, 64),
        ("nocaps_val", [CAPTION] * 4, 64),
        ("gqa", [f"Is the sky dark?\n{SINGLE_WORD}"], 16),
        (
            "mmbench_en_dev",
            [
                f"What is in picture 7? There are several options:\nA. cat\nB. dog\nC. bus\nD. tree\n\n{LETTER}",
                f"Look well. What is in picture 9? There are several options:\nA. yes\nB. no\n\n{LETTER}",
            ],
            1024,
        ),
        ("mme", [f"Is it Yes that existence?\n{SINGLE_WORD}"], 16),
        (
            "mmmu_val",
            [
                f"What is <image 1>?\nA. a bowl\nB. a painter's hat\nC. a wall\n\n{LETTER}",
                f"Which of these?\nA. <image 2>\nB. <image 1>\n\n{LETTER}",
                f"How many in <image 1>?\n\n{SINGLE_WORD}",
            ],
            128,
        ),
        (
            "ok_vqa_val2014",
            [
                "What sport is it?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
                f"{SINGLE_WORD}"
            ],
            1024,
        ),
        ("pope", [f"Is there a snowboard in the image?\n{SINGLE_WORD}"], 128),
        (
            "scienceqa_img",
            [
                f"Which is a solid?\nA. water\nB. rock\n{LETTER}",
                f"Context: See the map.\nWhere?\nA. a\nB. b\nC. c\nD. d\nE. e\n{LETTER}",
            ],
            16,
        ),
        ("seedbench", [f"What is it?\nA. a thing\nB. b thing\nC. c thing\nD. d thing\n{LETTER}"], 1024),
        ("demo_caption", ["describe the image ."] * 2, 64),
        ("demo_mc", ["what color is the ring ? A blue B red C cyan D white"], 8),
        ("demo_exist", ["is there a red ring ?"], 8),
    ],
)
def test_prompts_are_the_published_ones(name: str, prompts: list[str], max_new_tokens: int, folder: Path):
    bench = get_benchmark(name)
    asked = [bench.prompt(row) for row in read_rows(bench, folder)]
    assert asked[: len(prompts)] == prompts
    assert bench.max_new_tokens == max_new_tokens


def test_coco_ids_are_numbers_and_every_reference_counts(folder: Path):
    rows = read_rows(get_benchmark("coco2017_cap_val"), folder)
    assert [row["question_id"] for row in rows] == ["139", "285", "632"]
    assert [len(row["answers"]) for row in rows] == [5, 5, 7]


def test_captions_score_as_the_pure_functions_do(folder: Path):
    bench = get_benchmark("coco2017_cap_val")
    rows = read_rows(bench, folder)
    said = {"139": "a red bus", "285": "dogs play ball", "632": ""}
    scores = score(bench, rows, lambda row: said[row["question_id"]])
    references = {row["question_id"]: row["answers"] for row in rows}
    assert scores.metrics["coco_CIDEr"] == pytest.approx(cider_d(said, references))
    assert dict(zip(scores.group_ids, scores.values, strict=True))["632"] == 0
    assert scores.unanswered == 1


def test_nocaps_has_an_image_with_the_id_zero(folder: Path):
    assert "0" in [row["question_id"] for row in read_rows(get_benchmark("nocaps_val"), folder)]


def test_gqa_joins_two_tables_and_ignores_case_and_punctuation(folder: Path):
    bench = get_benchmark("gqa")
    rows = read_rows(bench, folder)
    assert rows[0]["images"] == [picture("blue")["bytes"]]
    assert rows[2]["images"] == [picture("green")["bytes"]]
    said = dict(zip((row["question_id"] for row in rows), ["Yes.", "blue", "tshirt", "right"], strict=True))
    assert score(bench, rows, lambda row: said[row["question_id"]]).metrics == {"exact_match": 0.5}


def test_mmbench_loses_a_question_with_one_wrong_copy(folder: Path):
    bench = get_benchmark("mmbench_en_dev")
    rows = read_rows(bench, folder)
    assert [row["group_id"] for row in rows] == ["7", "9", "7", "7", "7", "9"]
    assert rows[0]["hint"] is None
    assert rows[1]["choices"] == ["yes", "no", "nan", "nan"]  # as the published rules read them
    scores = score(bench, rows, lambda row: "I cannot say" if row["question_id"] == "3000007" else row["answers"][0])
    assert scores.metrics == {"gpt_eval_score": 50.0, "undecided": 1.0, "undecided_share": pytest.approx(1 / 6)}
    assert scores.categories["coarse_perception"]["gpt_eval_score"] == 50.0
    assert scores.categories["coarse_perception/image_topic"]["gpt_eval_score"] == 0.0
    assert scores.categories["coarse_perception/image_scene"]["gpt_eval_score"] == 100.0


def test_mme_pairs_questions_and_sums_categories(folder: Path):
    bench = get_benchmark("mme")
    rows = read_rows(bench, folder)
    scores = score(bench, rows, lambda row: "yes" if row["category"] != "code_reasoning" else row["answers"][0])
    assert scores.metrics["mme_perception_score"] == 50 + 50
    assert scores.metrics["mme_cognition_score"] == 200
    assert scores.metrics["accuracy"] == pytest.approx(4 / 6)
    assert scores.categories["OCR"]["mme_perception_score"] == 50.0
    assert len(scores.group_ids) == 3


def test_mmmu_takes_the_images_that_the_text_names(folder: Path):
    bench = get_benchmark("mmmu_val")
    rows = read_rows(bench, folder)
    assert rows[0]["images"] == [picture("red")["bytes"]]
    assert rows[1]["images"] == [picture("red")["bytes"], picture("blue")["bytes"]]
    assert [row["category"] for row in rows] == ["Art", "Art_Theory", "Math"]
    assert rows[0]["choices"][1] == "a painter's hat"
    scores = score(bench, rows, lambda row: "it is 12.5" if row["kind"] == "open" else "who knows")
    assert scores.metrics["drawn"] == 2
    assert scores.categories["Math"]["mmmu_acc"] == 1


def test_ok_vqa_gives_partial_credit(folder: Path):
    bench = get_benchmark("ok_vqa_val2014")
    scores = score(bench, read_rows(bench, folder), lambda row: {"one": "racing", "two": "2"}[row["category"]])
    assert scores.metrics["exact_match"] == pytest.approx((0.6 + 0.6 + 0) / 3)
    assert scores.categories["two"]["exact_match"] == pytest.approx(0.3)


def test_pope_pools_the_categories_and_keeps_them_apart(folder: Path):
    bench = get_benchmark("pope")
    rows = read_rows(bench, folder)
    assert len({row["image_id"] for row in rows}) == 1
    scores = score(bench, rows, lambda row: "yes" if row["category"] != "random" else "no")
    assert scores.metrics["pope_accuracy"] == 0.5
    assert scores.metrics["pope_f1_score"] == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))
    assert scores.metrics["said_yes_ratio"] == pytest.approx(4 / 6)
    assert scores.categories["random"]["pope_f1_score"] == 0
    assert scores.categories["popular"]["pope_recall"] == 1


def test_scienceqa_numbers_its_rows_and_has_options_beyond_d(folder: Path):
    bench = get_benchmark("scienceqa_img")
    rows = read_rows(bench, folder)
    assert [row["question_id"] for row in rows] == ["0", "1", "2"]
    assert [row["answers"] for row in rows] == [["B"], ["E"], ["A"]]
    assert [row["hint"] for row in rows] == [None, "See the map.", None]
    scores = score(
        bench, rows, lambda row: f"{row['answers'][0]}) sure" if row["hint"] else f"{row['answers'][0]}. sure"
    )
    assert scores.metrics["exact_match"] == pytest.approx(2 / 3)


def test_seedbench_leaves_videos_out(folder: Path):
    bench = get_benchmark("seedbench")
    rows = read_rows(bench, folder)
    assert [row["question_id"] for row in rows] == ["101669", "101670"]
    scores = score(bench, rows, lambda row: "A thing")
    assert scores.metrics["seed_image"] == 0.5
    assert scores.categories["1"]["seed_image"] == 1


def test_the_demo_asks_only_what_a_scene_allows(folder: Path):
    asked = {bench.name: len(read_rows(bench, folder)) for bench in DEMO}
    assert asked.pop("demo_text") == 1
    assert set(asked.values()) == {2}
    [row, _] = read_rows(get_benchmark("demo_mc"), folder)
    assert (row["question"], row["answers"]) == ("what color is the ring ?", ["B"])
    assert row["choices"] == ["blue", "red", "cyan", "white"]


def test_the_demo_benchmarks_are_the_demo_worlds_tasks():
    """The two packages do not import each other; this is where they meet."""
    assert {bench.name for bench in DEMO} == {"demo_caption", *(f"demo_{task}" for task in TASKS)}
    rows = []
    for i in range(60):
        scene = scene_at("corpus", i)
        asked = questions(scene, random.Random(i))
        rows.append({"id": str(i), "image": picture(), "references": references(scene), "questions": asked})
    table = pa.Table.from_pylist(rows, SCHEMA)
    for bench in DEMO:
        bench.check_schema(table.schema)
        made = list(bench.rows(table))
        if bench.name == "demo_caption":
            assert bench.prompt(made[0]) == CAPTION_PROMPT
            continue
        task = bench.name.removeprefix("demo_")
        asked = [q["question"] for row in rows for q in row["questions"] if q["task"] == task]
        assert [bench.prompt(row) for row in made] == asked
        assert score(bench, made, perfect).metrics[bench.scorer.headline] == 1.0


def test_records_survive_parquet(folder: Path, tmp_path: Path):
    bench = get_benchmark("mmbench_en_dev")
    rows = read_rows(bench, folder)
    full = [{**{name: row.get(name) for name in RECORDS.names}, "prediction": perfect(row)} for row in rows]
    pq.write_table(pa.Table.from_pylist(full, RECORDS), tmp_path / "p.parquet")
    back = pq.read_table(tmp_path / "p.parquet", columns=RECORD_COLUMNS).to_pylist()
    assert bench.score(back, resamples=10).metrics == score(bench, rows, perfect).metrics
