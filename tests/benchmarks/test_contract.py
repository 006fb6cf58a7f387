"""What a benchmark says to a wrong table, how a limit cuts, and how records become scores."""

import random
import re
from fnmatch import fnmatch

import numpy as np
import pyarrow as pa
import pytest

from pipelines.benchmarks import PUBLISHED, Benchmark, Record, Row, get_benchmark, get_benchmarks, whole_groups
from pipelines.metrics.compare import mcnemar_p, wilcoxon_p
from tests.benchmark_fixtures import COLORS, FIXTURES, IMAGE


def questions_of(bench: Benchmark) -> pa.Table:
    """The first file of the fixture's question table."""
    return next(table for name, table in FIXTURES[bench.repo]().items() if fnmatch(name, bench.files))


def with_cell(table: pa.Table, column: str, row: int, value: object) -> pa.Table:
    values = table.column(column).to_pylist()
    values[row] = value
    return table.set_column(table.schema.names.index(column), column, pa.array(values, table.schema.field(column).type))


def test_an_unknown_benchmark_is_answered_with_the_known_ones():
    message = r"must be one of coco2017_cap_val, .*, gallery_bg, got 'popes'; did you mean pope\?"
    with pytest.raises(ValueError, match=message):
        get_benchmark("popes")


def test_benchmarks_come_in_sets_and_each_once():
    assert get_benchmarks("all") == list(PUBLISHED)
    assert len(PUBLISHED) == 11
    assert [bench.name for bench in get_benchmarks(["pope", "gqa", "pope"])] == ["pope", "gqa"]
    assert len(get_benchmarks(["demo", "all"])) == 20
    with pytest.raises(ValueError, match="got none"):
        get_benchmarks([])


@pytest.mark.parametrize("bench", PUBLISHED, ids=lambda bench: bench.name)
def test_every_missing_column_is_named(bench: Benchmark):
    table = questions_of(bench)
    for column, expected in bench.columns.items():
        without = table.drop_columns(column).schema
        message = f"benchmark {bench.name!r}: column {column!r} must be there as {expected}, got only "
        with pytest.raises(ValueError, match=re.escape(message + ", ".join(without.names))):
            bench.check_schema(without)


@pytest.mark.parametrize("bench", PUBLISHED, ids=lambda bench: bench.name)
def test_every_wrong_type_is_named(bench: Benchmark):
    schema = questions_of(bench).schema
    for column, expected in bench.columns.items():
        wrong = schema.set(schema.names.index(column), pa.field(column, pa.bool_()))
        message = f"benchmark {bench.name!r}: column {column!r} must be {expected}, got bool"
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            bench.check_schema(wrong)


def test_all_problems_come_in_one_message():
    schema = pa.schema([("id", pa.int64()), ("question", pa.string())])
    message = "'id' must be string, got int64; .*'answer' must be there as string, got only"
    with pytest.raises(ValueError, match=message):
        get_benchmark("gqa").check_schema(schema)


def test_widths_and_dictionaries_do_not_matter():
    bench = get_benchmark("nocaps_val")
    table = questions_of(bench)
    image = pa.struct([("bytes", pa.large_binary()), ("path", pa.large_string())])
    wide = table.set_column(0, "image", table.column("image").cast(image))
    wide = wide.set_column(wide.schema.names.index("image_id"), "image_id", table.column("image_id").cast(pa.int64()))
    captions = table.column("annotations_captions").cast(pa.large_list(pa.large_string()))
    wide = wide.set_column(wide.schema.names.index("annotations_captions"), "annotations_captions", captions)
    assert list(bench.rows(wide)) == list(bench.rows(table))

    pope = questions_of(get_benchmark("pope"))
    i = pope.schema.names.index("category")
    encoded = pope.set_column(i, "category", pope.column("category").dictionary_encode())
    assert list(get_benchmark("pope").rows(encoded)) == list(get_benchmark("pope").rows(pope))


def test_mmbench_takes_its_index_as_a_number_or_as_text():
    bench = get_benchmark("mmbench_en_dev")
    table = questions_of(bench)
    as_text = table.set_column(0, "index", table.column("index").cast(pa.string()))
    assert list(bench.rows(as_text)) == list(bench.rows(table))


@pytest.mark.parametrize(("absent", "undecided"), [("nan", 1), (None, 0), ("", 0)])
def test_mmbench_looks_for_the_text_nan_and_for_no_null(absent: str | None, undecided: int):
    """`banana` holds the text `nan` of an absent option, as in the published rules; a null option has no text."""
    bench = get_benchmark("mmbench_en_dev")
    table = questions_of(bench)
    for letter in "CD":
        table = with_cell(table, letter, 1, absent)
    row = list(bench.rows(table))[1]
    assert "nan" not in bench.prompt(row)
    scores = bench.score([record("", "surely yes, a banana it is", row)], resamples=5)
    assert scores.metrics["undecided"] == undecided
    assert scores.metrics["gpt_eval_score"] == 100 * (1 - undecided)


@pytest.mark.parametrize(
    ("name", "column", "value", "message"),
    [
        ("pope", "image", None, "column 'image' must hold struct<.*>, got null"),
        (
            "pope",
            "image",
            {"bytes": None, "path": "a.jpg"},
            "must hold the image's bytes, got none, with the path 'a.jpg'",
        ),
        ("pope", "image", {"bytes": b"", "path": None}, "must hold the image's bytes"),
        ("scienceqa_img", "image", None, "column 'image'"),
        ("mmmu_val", "image_1", None, "column 'image_1' must hold an image, got null"),
        ("mmmu_val", "question", "What?", r"must refer to images 1 to 7, got \[\]"),
        ("mmmu_val", "question", "See <image 8>", r"must refer to images 1 to 7, got \[1, 8\]"),
        ("mmmu_val", "options", "[<image 1>", "must be text that holds a Python list, got '.<image 1>'"),
        ("mmmu_val", "question_type", "essay", "must be multiple-choice or open, got 'essay'"),
        ("mmmu_val", "answer", "Z", "must be the letter of one of 2 options, got 'Z'"),
        ("mmmu_val", "id", "Art-1", "must look like validation_<Subject>_<number>, got 'Art-1'"),
        ("seedbench", "image", [], "must hold one image in an image row, got 0"),
        ("seedbench", "answer", "E", "must be A, B, C or D, got 'E'"),
        ("seedbench", "question_id", None, "column 'question_id' must hold int64 or string, got null"),
        ("pope", "answer", "maybe", "column 'answer' must be yes or no, got 'maybe'"),
        ("mme", "answer", "", "column 'answer' must be yes or no, got ''"),
        ("mme", "category", "taste", "must be one of existence, .*, got 'taste'"),
        ("gqa", "imageId", "n9", "column 'imageId' must name one of the 2 images, got 'n9'"),
        ("gqa", "answer", None, "column 'answer' must hold string, got null"),
        ("coco2017_cap_val", "question_id", "cat.jpg", "must be a file name with the image's number, got 'cat.jpg'"),
        ("coco2017_cap_val", "answer", [], "must have at least one reference caption, got none"),
        ("ok_vqa_val2014", "answers", [], "must have at least one answer, got none"),
        ("mmbench_en_dev", "A", "nan", "must be filled from A without a gap"),
        ("mmbench_en_dev", "answer", "D", "must be the letter of one of 2 options, got 'D'"),
        ("scienceqa_img", "answer", 5, "must be the index of one of 5 choices, got 5"),
        ("demo_mc", "questions", [{"task": "mc", "question": "A or B?", "answer": "A"}], "a choice must read"),
    ],
)
def test_an_impossible_row_is_named_with_its_benchmark(name: str, column: str, value: object, message: str):
    bench = get_benchmark(name)
    table, row = questions_of(bench), 2 if name == "seedbench" else 1
    if (name, column) == ("mmmu_val", "question"):  # whose options name images as well
        table = with_cell(table, "options", row, "['<image 1>']" if value == "See <image 8>" else "['x']")
    table = with_cell(table, column, row, value)
    images = {"n1": b"1", "n2": b"2"} if bench.image_table else None
    with pytest.raises(ValueError, match=f"benchmark '{name}', row 11: .*{message}"):
        list(bench.rows(table, first_row=11 - row, images=images))


def test_a_lookup_of_images_is_given_where_it_is_needed_and_only_there():
    gqa, pope = get_benchmark("gqa"), get_benchmark("pope")
    with pytest.raises(ValueError, match="'gqa' must be given a lookup"):
        list(gqa.rows(questions_of(gqa)))
    with pytest.raises(ValueError, match="'pope' must not be given a lookup"):
        list(pope.rows(questions_of(pope), images={}))
    with pytest.raises(ValueError, match="'pope' has its images in its own rows"):
        pope.image_lookup(questions_of(pope))
    with pytest.raises(ValueError, match="benchmark 'gqa': column 'image' must be struct"):
        gqa.image_lookup(pa.table({"id": ["n1"], "image": ["n1.jpg"]}))
    nothing = pa.Table.from_pylist([{"id": "n1", "image": None}], pa.schema([("id", pa.string()), ("image", IMAGE)]))
    with pytest.raises(ValueError, match="benchmark 'gqa', image 'n1': column 'image' must hold an image"):
        gqa.image_lookup(nothing)


def test_rows_are_numbered_over_files_so_that_pieces_give_what_the_whole_gives():
    for bench in PUBLISHED:
        table = questions_of(bench)
        images = dict.fromkeys(("n1", "n2"), b"x") if bench.image_table else None
        whole = list(bench.rows(table, images=images))
        pieces = [row for i in range(table.num_rows) for row in bench.rows(table.slice(i, 1), i, images)]
        assert pieces == whole


def test_a_limit_takes_whole_groups_wherever_their_members_stand():
    bench = get_benchmark("mmbench_en_dev")
    keys = bench.keys(questions_of(bench))
    assert [keys[i].group_id for i in whole_groups(keys, 1)] == ["7"] * 4
    assert [keys[i].group_id for i in whole_groups(keys, 4)] == ["7"] * 4
    assert whole_groups(keys, 5) == list(range(6))
    assert whole_groups(keys, 10**9) == list(range(6))
    with pytest.raises(ValueError, match="limit must be at least 1"):
        whole_groups(keys, 0)


def test_a_limited_mme_still_scores():
    bench = get_benchmark("mme")
    table = questions_of(bench)
    rows = list(bench.rows(table))
    taken = [rows[i] for i in whole_groups(bench.keys(table), 3)]
    assert len(taken) == 4
    scores = bench.score([record(row["question_id"], row["answers"][0], row) for row in taken], resamples=5)
    assert scores.metrics["mme_perception_score"] == 400


def record(question: str, prediction: str | None, row: Row | None = None, category: str = "") -> Record:
    """A record of a row, or of a made-up question whose right answer is `a`."""
    own = {"question_id": question, "group_id": question, "category": category, "kind": "short", "choices": []}
    taken = {name: row[name] for name in (*own, "answers")} if row else {**own, "answers": ["a"]}
    return {**taken, "prediction": prediction}


def test_half_a_pair_and_a_lonely_copy_are_errors_and_not_scores():
    mme, mmbench = get_benchmark("mme"), get_benchmark("mmbench_en_dev")
    rows = list(mme.rows(questions_of(mme)))
    with pytest.raises(ValueError, match="benchmark 'mme': an MME image must have 2 questions, got 1, for 'existence/"):
        mme.score([record("", "yes", rows[0])])
    rows = list(mmbench.rows(questions_of(mmbench)))
    with pytest.raises(ValueError, match="question 7 must come with its base row"):
        mmbench.score([record("", "A", rows[2])])


def test_no_question_counts_twice_and_none_at_all_is_an_error():
    bench = get_benchmark("gqa")
    with pytest.raises(ValueError, match="benchmark 'gqa': question ids must be unique, got 'q1' twice"):
        bench.score([record("q1", "a"), record("q1", "b")])
    with pytest.raises(ValueError, match="must not be empty"):
        bench.score([])


def random_run(seed: int, accuracy: float, questions: int = 300) -> list[Record]:
    rng = random.Random(seed)
    said = ["a" if rng.random() < accuracy else "b" for _ in range(questions)]
    return [record(f"q{i}", said[i], category=f"kind{i % 3}/part{i % 2}") for i in range(questions)]


def test_scores_do_not_depend_on_the_order_of_the_records():
    bench, run = get_benchmark("gqa"), random_run(0, 0.7)
    scores, shuffled = bench.score(run), bench.score(random.Random(1).sample(run, len(run)))
    assert (scores.metrics, scores.intervals, scores.categories) == (
        shuffled.metrics, shuffled.intervals, shuffled.categories,
    )  # fmt: skip
    assert scores.group_ids == shuffled.group_ids


def test_intervals_surround_the_score_and_shrink_with_the_questions():
    bench = get_benchmark("gqa")
    widths = []
    for questions in (50, 800):
        scores = bench.score(random_run(0, 0.7, questions))
        low, high = scores.intervals["exact_match"]
        assert low < scores.metrics["exact_match"] < high
        widths.append(high - low)
    assert widths[1] == pytest.approx(widths[0] / 4, rel=0.25)  # one over the square root of 16


def test_categories_count_at_every_level():
    scores = get_benchmark("gqa").score(random_run(0, 0.7))
    kinds = [[f"kind{i}", f"kind{i}/part0", f"kind{i}/part1"] for i in range(3)]
    assert list(scores.categories) == [category for kind in kinds for category in kind]
    by_kind = [scores.categories[f"kind{i}"] for i in range(3)]
    assert sum(kind["groups"] for kind in by_kind) == 300
    mean = np.mean([kind["exact_match"] for kind in by_kind])
    assert mean == pytest.approx(scores.metrics["exact_match"])  # a hundred of each


def test_two_runs_are_compared_question_by_question():
    bench = get_benchmark("gqa")
    good, bad = bench.score(random_run(0, 0.8)), bench.score(random_run(1, 0.6))
    found = bench.compare(good, bad)
    assert found.difference == pytest.approx(good.metrics["exact_match"] - bad.metrics["exact_match"])
    assert found.interval[0] < found.difference < found.interval[1]
    assert (found.test, found.p) == ("mcnemar", mcnemar_p(good.values, bad.values))
    assert found.p < 0.001
    assert found.better - found.worse == round(found.difference * 300)
    same = bench.compare(good, good)
    assert (same.difference, same.p, same.interval) == (0, 1, (0, 0))


def test_a_paired_interval_is_narrower_than_two_of_its_own():
    """Runs that agree on most questions: the difference is known better than either score."""
    bench, run = get_benchmark("gqa"), random_run(0, 0.7)
    other = [{**r, "prediction": "b"} if i < 6 else r for i, r in enumerate(run)]
    ours, theirs = bench.score(run), bench.score(other)
    low, high = bench.compare(ours, theirs).interval
    own_low, own_high = ours.intervals["exact_match"]
    assert high - low < (own_high - own_low) / 2


def test_captions_are_compared_by_wilcoxon_on_the_cider_of_each_image():
    bench = get_benchmark("flickr30k_test")
    rows = list(bench.rows(questions_of(bench)))
    ours = bench.score([record("", f"a {color} wall number 3", row) for color, row in zip(COLORS, rows, strict=True)])
    theirs = bench.score([record("", "a wall", row) for row in rows])
    found = bench.compare(ours, theirs)
    assert (found.test, found.better) == ("wilcoxon", 4)
    assert found.p == wilcoxon_p(ours.values, theirs.values)


def test_runs_of_other_questions_are_not_compared():
    bench = get_benchmark("gqa")
    ours, theirs = bench.score(random_run(0, 0.5)), bench.score(random_run(0, 0.5, 200))
    with pytest.raises(ValueError, match="same questions, got 'gqa' with 300 groups and 'gqa' with 200"):
        bench.compare(ours, theirs)
