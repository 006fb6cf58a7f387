"""What is left to do: over any history of interrupted runs each row is committed once and none is lost."""

import random
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise

import pytest

from pipelines.corpus.file import CorpusFile
from pipelines.corpus.find import Corpus
from pipelines.corpus.format import Format
from pipelines.corpus.formats.images import FORMAT as IMAGES
from pipelines.corpus.formats.parquet import FORMAT as PARQUET
from pipelines.errors import UserError
from pipelines.output.plan import Plan, make_plan
from pipelines.output.unit import Unit
from pipelines.stages.unit_batch import Rejected, UnitBatch
from pipelines.stages.write import Sink
from pipelines.store import Store

FINGERPRINT = "0123456789abcdef"


@pytest.fixture
def output(tmp_path) -> Store:
    return Store(str(tmp_path / "out"))


def corpus_of(files: Sequence[CorpusFile], format: Format) -> Corpus:
    return Corpus(Store("/nowhere"), tuple(files), format)


def images(numbers: Sequence[int]) -> list[CorpusFile]:
    return [CorpusFile(f"{i:04d}.png", 100 + i) for i in numbers]


def plan_of(corpus: Corpus, output: Store, num_images: int = 4, limit: int | None = None, samples: int = 0) -> Plan:
    return make_plan(corpus, output, FINGERPRINT, num_images=num_images, limit=limit, num_samples=samples)


def rows_of(unit: Unit) -> list[tuple[str, int]]:
    if len(unit.sources) == 1 and unit.sources[0].endswith(".parquet"):
        return [(unit.sources[0], row) for row in range(unit.start, unit.stop)]
    return [(source, 0) for source in unit.sources]


def commit(output: Store, unit: Unit) -> None:
    """As the last stage would, of a unit whose every image was rejected."""
    rejected = [Rejected(source, source, row, None, "empty", "") for source, row in rows_of(unit)]
    Sink(store=output, fingerprint=FINGERPRINT, model="m", method="none").commit(UnitBatch(unit, rejected=rejected))


def all_rows(corpus: Corpus) -> list[tuple[str, int]]:
    return [(file.source, row) for file in corpus.files for row in range(file.num_rows)]


def run_history(rng: random.Random, corpus: Corpus, output: Store, num_runs: int) -> Counter:
    """Runs that differ in unit size and limit and stop anywhere; then one to the end. Counts commits of each row."""
    commits: Counter = Counter()
    for _ in range(num_runs):
        limit = rng.choice([None, rng.randint(1, corpus.num_rows)])
        units = plan_of(corpus, output, rng.randint(1, 9), limit).units
        for unit in rng.sample(units, k=rng.randint(0, len(units))):  # units end in any order
            commit(output, unit)
            commits.update(rows_of(unit))
    for unit in plan_of(corpus, output, rng.randint(1, 9)).units:
        commit(output, unit)
        commits.update(rows_of(unit))
    return commits


@pytest.mark.parametrize("seed", range(12))
def test_any_history_of_interrupted_runs_commits_each_parquet_row_once(seed, output):
    rng = random.Random(seed)
    layouts = [tuple(rng.randint(0, 12) for _ in range(rng.randint(1, 4))) for _ in range(3)]
    files = [CorpusFile(f"{i}.parquet", 100 + i, groups) for i, groups in enumerate(layouts) if sum(groups)]
    corpus = corpus_of(files or [CorpusFile("only.parquet", 1, (3,))], PARQUET)
    commits = run_history(rng, corpus, output, num_runs=4)
    assert commits == Counter(all_rows(corpus))
    done = plan_of(corpus, output)
    assert (done.spans, done.num_done, done.num_rows) == ([], corpus.num_rows, corpus.num_rows)


@pytest.mark.parametrize("seed", range(12))
def test_any_history_of_interrupted_runs_commits_each_image_file_once(seed, output):
    rng = random.Random(seed)
    corpus = corpus_of(images(range(rng.randint(1, 30))), IMAGES)
    commits = run_history(rng, corpus, output, num_runs=4)
    assert commits == Counter(all_rows(corpus))
    assert plan_of(corpus, output).spans == []


@pytest.mark.parametrize("seed", range(8))
def test_an_image_folder_that_grows_and_shrinks_between_runs_keeps_what_is_done(seed, output):
    rng = random.Random(seed)
    commits, present = Counter(), list(range(10))
    for _ in range(5):
        units = plan_of(corpus_of(images(present), IMAGES), output, rng.randint(1, 6)).units
        assert not commits.keys() & {row for unit in units for row in rows_of(unit)}
        for unit in rng.sample(units, k=rng.randint(0, len(units))):
            commit(output, unit)
            commits.update(rows_of(unit))
        gone = set(rng.sample(present, k=2))  # few enough that something done is still there
        present = sorted({*present, *(rng.randrange(100) for _ in range(5))} - gone)
    assert set(commits.values()) <= {1}


def test_rows_done_before_are_counted_whatever_the_limit_now_is(output):
    corpus = corpus_of([CorpusFile("a.parquet", 1, (10, 10))], PARQUET)
    for unit in plan_of(corpus, output, num_images=5, limit=10).units:
        commit(output, unit)
    assert [(p.num_rows, p.num_done) for p in [plan_of(corpus, output)]] == [(20, 10)]
    assert [(p.num_rows, p.num_done) for p in [plan_of(corpus, output, limit=4)]] == [(4, 4)]
    assert [(p.num_rows, p.num_done) for p in [plan_of(corpus, output, limit=13)]] == [(13, 10)]


def test_a_limit_reaches_over_files_and_no_further():
    corpus = corpus_of([CorpusFile(f"{i}.parquet", 1, (6,)) for i in range(4)], PARQUET)
    plan = plan_of(corpus, Store("/nowhere/out"), limit=8)
    assert [rows_of(unit) for unit in plan.units] == [
        [("0.parquet", 0), ("0.parquet", 1), ("0.parquet", 2)],
        [("0.parquet", 3), ("0.parquet", 4), ("0.parquet", 5)],
        [("1.parquet", 0), ("1.parquet", 1)],
    ]


def test_a_parquet_file_that_changed_or_vanished_is_refused(output):
    corpus = corpus_of([CorpusFile("a.parquet", 1000, (8,)), CorpusFile("b.parquet", 2000, (8,))], PARQUET)
    commit(output, plan_of(corpus, output).units[0])
    changed = corpus_of([CorpusFile("a.parquet", 1001, (8,)), corpus.files[1]], PARQUET)
    for other in (changed, corpus_of(corpus.files[1:], PARQUET)):
        with pytest.raises(UserError, match=r"captions of 1 files that this corpus does not have, or that changed"):
            plan_of(other, output)


def test_a_parquet_file_that_is_new_is_planned(output):
    corpus = corpus_of([CorpusFile("b.parquet", 2000, (4,))], PARQUET)
    commit(output, plan_of(corpus, output).units[0])
    grown = corpus_of([CorpusFile("a.parquet", 1000, (4,)), *corpus.files], PARQUET)
    assert [unit.sources for unit in plan_of(grown, output).units] == [("a.parquet",)]


def test_image_files_that_changed_are_refused(output):
    corpus = corpus_of(images(range(8)), IMAGES)
    commit(output, plan_of(corpus, output).units[0])
    changed = [CorpusFile("0002.png", 7) if file.source == "0002.png" else file for file in corpus.files]
    with pytest.raises(UserError, match=r"images that have changed since, in 0000.png ... 0003.png"):
        plan_of(corpus_of(changed, IMAGES), output)


def test_an_output_of_another_corpus_is_refused(output):
    commit(output, plan_of(corpus_of(images(range(4)), IMAGES), output).units[0])
    with pytest.raises(UserError, match="not in this corpus"):
        plan_of(corpus_of(images(range(50, 60)), IMAGES), output)
    with pytest.raises(UserError, match="this corpus does not have"):
        plan_of(corpus_of([CorpusFile("a.parquet", 1, (8,))], PARQUET), output)


def test_captions_of_a_parquet_corpus_are_not_mixed_with_those_of_a_folder(output):
    commit(output, plan_of(corpus_of([CorpusFile("a.parquet", 1, (4,))], PARQUET), output).units[0])
    with pytest.raises(UserError, match="not in this corpus"):
        plan_of(corpus_of(images(range(4)), IMAGES), output)


def test_a_foreign_object_among_the_captions_is_named(output):
    output.write("captions/mine.parquet", b"")
    with pytest.raises(UserError, match=r"nothing but captions of this job.*mine\.parquet"):
        plan_of(corpus_of(images(range(4)), IMAGES), output)


def test_unfinished_writes_and_notes_in_the_output_do_not_count(output):
    corpus = corpus_of(images(range(4)), IMAGES)
    name = plan_of(corpus, output).units[0].name
    output.write(f"captions/.part-{name}.parquet.1234.tmp", b"half")
    output.write("captions/README.txt", b"mine")
    assert plan_of(corpus, output).num_done == 0


def test_quarantine_of_a_unit_that_was_never_committed_goes_when_its_rows_are_cut_anew(output):
    corpus = corpus_of(images(range(8)), IMAGES)
    first, second = plan_of(corpus, output, num_images=4).units
    commit(output, first)
    output.write(f"quarantine/{second.part}", b"of a try that died before it could commit")
    output.write("quarantine/notes.txt", b"mine")
    plan_of(corpus, output, num_images=4)  # the same unit again: whoever commits it rewrites or removes the object
    assert set(output.list("quarantine")) == {first.part, second.part, "notes.txt"}
    plan_of(corpus, output, num_images=2)  # its images go to other units: it would count them twice
    assert set(output.list("quarantine")) == {first.part, "notes.txt"}


@pytest.mark.parametrize(("samples", "spans"), [(0, 10), (1, 10), (3, 10), (10, 10), (24, 10), (5, 1), (7, 3)])
def test_samples_are_spread_evenly_over_the_plan(samples, spans, output):
    plan = plan_of(corpus_of(images(range(8 * spans)), IMAGES), output, num_images=8, samples=samples)
    wanted = [span.num_samples for span in plan.spans]
    assert sum(wanted) == samples
    assert max(wanted) - min(wanted) <= 1
    if 1 < samples < spans:
        marked = [i for i, n in enumerate(wanted) if n]
        assert max(b - a for a, b in pairwise(marked)) <= -(-spans // samples)


def names_of(plan: Plan) -> set[tuple[str, tuple[str, ...]]]:
    return {(unit.name, unit.sources) for unit in plan.units}


def random_corpus(rng: random.Random, kind: str) -> Corpus:
    if kind == "images":
        return corpus_of(images(range(rng.randint(1, 30))), IMAGES)
    layouts = [tuple(rng.randint(1, 12) for _ in range(rng.randint(1, 4))) for _ in range(3)]
    return corpus_of([CorpusFile(f"{i}.parquet", 100 + i, groups) for i, groups in enumerate(layouts)], PARQUET)


@pytest.mark.parametrize("kind", ["rows", "images"])
@pytest.mark.parametrize("seed", range(20))
def test_commits_never_move_the_boundaries_of_other_units(seed, kind, output):
    """A second driver plans what the first one planned, without what was committed in between, and nothing else.

    Whatever lay in the output before: units of other sizes, of a lower limit, of single images.
    """
    rng = random.Random(seed)
    corpus = random_corpus(rng, kind)
    for _ in range(rng.randint(0, 3)):
        before = plan_of(corpus, output, rng.randint(1, 9), rng.choice([None, rng.randint(1, corpus.num_rows)])).units
        for unit in rng.sample(before, k=rng.randint(0, len(before))):
            commit(output, unit)
    size, limit = rng.randint(1, 9), rng.choice([None, rng.randint(1, corpus.num_rows)])
    first = plan_of(corpus, output, size, limit)
    left = names_of(first)
    for unit in rng.sample(first.units, k=len(first.units)):
        commit(output, unit)
        left.discard((unit.name, unit.sources))
        assert names_of(plan_of(corpus, output, size, limit)) == left


def test_a_limit_moves_no_boundary_but_its_own(output):
    corpus = corpus_of([CorpusFile("a.parquet", 1, (17,))], PARQUET)
    whole = [(unit.start, unit.stop) for unit in plan_of(corpus, output).units]
    assert [(unit.start, unit.stop) for unit in plan_of(corpus, output, limit=8).units] == [*whole[:2], (6, 8)]


def test_files_that_are_left_out_move_no_boundary(output):
    """Image files that changed since they were captioned, with input.on_changed=skip."""
    corpus = corpus_of(images(range(12)), IMAGES)
    first = plan_of(corpus, output).units
    commit(output, first[0])
    changed = [CorpusFile(file.source, file.size + (file.source < "0004"), (1,)) for file in corpus.files]
    again = make_plan(
        corpus_of(changed, IMAGES), output, FINGERPRINT, num_images=4, limit=None, num_samples=0, on_changed="skip"
    )
    assert again.units == first[1:]
    assert (again.num_rows, again.num_done) == (8, 0)
