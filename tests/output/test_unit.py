"""Planning of work units: every row once whatever the layout, names that are pure functions, cuts fit to be read."""

import random
from itertools import pairwise

import pytest

from pipelines.corpus.file import CorpusFile
from pipelines.output.unit import SPAN_UNITS, Unit, parse_part, plan_images, plan_rows, split_unit, unit_key

SEEDS = range(60)


def random_layout(rng: random.Random) -> CorpusFile:
    """Row groups from empty to many times a unit."""
    sizes = rng.choice([(0, 3), (1, 1), (5, 40), (0, 400), (100, 100)])
    groups = tuple(rng.randint(*sizes) for _ in range(rng.randint(1, 12)))
    return CorpusFile("a/file.parquet", 12345, groups if sum(groups) else (1,))


def random_ranges(rng: random.Random, end: int) -> list[tuple[int, int]]:
    """Disjoint ranges in [0, end), in any order, as earlier runs may have committed them."""
    cuts = sorted(rng.sample(range(end + 1), k=min(end + 1, 2 * rng.randint(0, 6))))
    ranges = list(zip(cuts[::2], cuts[1::2], strict=False))
    rng.shuffle(ranges)
    return ranges


def rows_of(spans: list[list[Unit]]) -> list[int]:
    return [row for units in spans for unit in units for row in range(unit.start, unit.stop)]


@pytest.mark.parametrize("seed", SEEDS)
def test_every_row_that_is_not_done_is_planned_exactly_once(seed):
    rng = random.Random(seed)
    file = random_layout(rng)
    stop = rng.randint(1, file.num_rows)
    done = random_ranges(rng, file.num_rows)
    planned = rows_of(plan_rows(file, "f", rng.randint(1, 60), stop, done))
    covered = {row for a, b in done for row in range(a, b)}
    assert sorted(planned) == [row for row in range(stop) if row not in covered]


@pytest.mark.parametrize("seed", SEEDS)
def test_units_are_of_bounded_size_and_a_span_of_several_is_of_one_row_group(seed):
    rng = random.Random(seed)
    file, num_images = random_layout(rng), rng.randint(1, 60)
    edges = [sum(file.row_groups[:i]) for i in range(len(file.row_groups) + 1)]
    for units in plan_rows(file, "f", num_images, file.num_rows, random_ranges(rng, file.num_rows)):
        assert all(1 <= unit.num_images <= num_images for unit in units)
        assert all(a.stop <= b.start for a, b in pairwise(units))
        if units[-1].stop - units[0].start > num_images:
            assert not [edge for edge in edges if units[0].start < edge < units[-1].stop]


@pytest.mark.parametrize("seed", SEEDS)
def test_a_unit_holds_whole_row_groups_or_a_part_of_one(seed):
    rng = random.Random(seed)
    file = random_layout(rng)
    edges = [sum(file.row_groups[:i]) for i in range(len(file.row_groups) + 1)]
    for units in plan_rows(file, "f", rng.randint(1, 60), file.num_rows, []):
        for unit in units:
            inside = [edge for edge in edges if unit.start < edge < unit.stop]
            assert not inside or {unit.start, unit.stop} <= set(edges)


def test_small_row_groups_are_joined_up_to_a_unit():
    spans = plan_rows(CorpusFile("f", 1, (5,) * 10), "f", 16, 50, [])
    assert [(u.start, u.stop) for units in spans for u in units] == [(0, 15), (15, 30), (30, 45), (45, 50)]
    assert all(len(units) == 1 for units in spans)


def test_a_large_row_group_is_cut_evenly_and_its_units_share_one_read():
    (span,) = plan_rows(CorpusFile("f", 1, (130,)), "f", 64, 130, [])
    assert [unit.num_images for unit in span] == [43, 43, 44]
    rows = 122_880
    (span,) = plan_rows(CorpusFile("f", rows * 4096, (rows,)), "f", 128, rows, [])
    assert len(span) == rows // 128
    (span,) = plan_rows(CorpusFile("f", rows * 4096, (rows,)), "f", 128, rows, [(0, 1000), (5000, 5001)])  # a resume
    assert [(span[0].start, span[-1].stop)] == [(1000, rows)]


def test_a_row_group_of_addresses_is_read_by_several_tasks():
    rows = 122_880
    spans = plan_rows(CorpusFile("f", rows * 128, (rows,)), "f", 128, rows, [])
    assert {len(units) for units in spans[:-1]} == {57}  # 17 reads of 960 units
    spans = plan_rows(CorpusFile("f", 1000, (8000,)), "f", 100, 8000, [])
    assert {len(units) for units in spans} == {SPAN_UNITS}


def test_a_file_that_is_done_plans_nothing():
    assert plan_rows(CorpusFile("f", 1, (10, 10)), "f", 4, 20, [(0, 15), (15, 20)]) == []


def test_names_depend_on_file_size_fingerprint_and_range_and_on_nothing_else():
    file = CorpusFile("a.parquet", 100, (10,))

    def names(file: CorpusFile, fingerprint: str = "f", done: tuple = ()) -> set[str]:
        return {unit.name for units in plan_rows(file, fingerprint, 5, 10, list(done)) for unit in units}

    assert names(file) == names(CorpusFile("a.parquet", 100, (10,)))
    assert names(file, done=[(0, 5)]) < names(file)
    others = [names(CorpusFile("b.parquet", 100, (10,))), names(CorpusFile("a.parquet", 101, (10,))), names(file, "g")]
    assert all(not names(file) & other for other in others)


def test_a_key_tells_the_boundaries_between_names_apart():
    assert unit_key([CorpusFile("a", 12)], "f") != unit_key([CorpusFile("a1", 2)], "f")
    assert unit_key([CorpusFile("a", 1), CorpusFile("b", 2)], "f") != unit_key(
        [CorpusFile("b", 2), CorpusFile("a", 1)], "f"
    )


def test_a_part_name_gives_its_range_back():
    unit = Unit("0123456789ab", 7, 1_234_567_890, ("f",))  # more than the nine digits that names are padded to
    assert parse_part(f"part-{unit.name}.parquet") == (unit.key, unit.start, unit.stop)


@pytest.mark.parametrize(
    "name", ["part-0.parquet", "x-a-1-2.parquet", "part-a-1-2", "part-a-b-c.parquet", "part-a-1-2-3.parquet"]
)
def test_a_foreign_name_is_refused(name):
    with pytest.raises(ValueError, match="must be named part-<key>"):
        parse_part(name)


def test_image_files_are_taken_in_order_a_unit_at_a_time():
    files = [CorpusFile(f"{i}.png", i) for i in range(7)]
    units = plan_images(files, "f", 3)
    assert [unit.sources for unit in units] == [("0.png", "1.png", "2.png"), ("3.png", "4.png", "5.png"), ("6.png",)]
    assert [(unit.start, unit.stop) for unit in units] == [(0, 3), (0, 3), (0, 1)]
    assert len({unit.name for unit in units}) == 3


def test_a_unit_of_rows_splits_into_its_rows_under_the_same_key():
    unit = Unit("0123456789ab", 5, 8, ("f",))
    singles = split_unit(unit, {"f": CorpusFile("f", 100)}, "f")
    assert [(single.key, single.start, single.stop) for single in singles] == [(unit.key, i, i + 1) for i in (5, 6, 7)]


def test_a_unit_of_files_splits_into_the_files_as_they_would_be_planned_alone():
    files = [CorpusFile(f"{i}.png", 10 + i) for i in range(3)]
    (unit,) = plan_images(files, "f", 3)
    assert split_unit(unit, {f.source: f for f in files}, "f") == plan_images(files, "f", 1)
