"""A unit on its way: the row holds all of it, copies none of its arrays, and comes back as it was."""

import json
import tracemalloc
from dataclasses import MISSING, Field, fields

import numpy as np
import pytest

from pipelines.output.unit import Unit
from pipelines.stages.ragged import Ragged
from pipelines.stages.unit_batch import (
    Answer,
    CanaryCopy,
    Image,
    QuestionSet,
    Rejected,
    Sample,
    UnitBatch,
)
from tests.helpers import question


def everything() -> UnitBatch:
    """A unit in which every field of every value is set to something else than its default."""
    asked = question('what does "\u00e9\u2028\ud800" say ?', hint="a hint", choices=["A", "B"], answers=["A"], row=7)
    image = Image(
        id="id-0",
        source="a.parquet",
        row=7,
        sha256="ab" * 32,
        prompts=[asked.prompt, "describe\nit"],
        sizes=[(480, 640), (7, 3000)],
        answers=[Answer("said", 25, 31, 2, "stop"), Answer("", 26, 32, 40, "length")],
        num_visual_tokens=512,
        crop_tokens={"overview": 16, "tiles": 64},
        sampled=True,
        references=["a reference"],
        sample=Sample("/9j/", 224, 168, [-1, 0, 255], 16, 12),
        question_set=QuestionSet([asked, question(max_new_tokens=5)], num_pictures=2),
        canary=CanaryCopy("swapped", 3, 4),
    )
    plain = Image("id-1", "b.parquet", 8, "cd" * 32, ["describe it"], sizes=[(9, 9)])
    lengths, rng = np.array([3, 0, 1, 2, 3]), np.random.default_rng(0)
    return UnitBatch(
        Unit("0123456789ab", 7, 9, ("a.parquet", "b.parquet")),
        images=[image, plain],
        rejected=[Rejected("id-2", "a.parquet", 9, None, "truncated", "no end", [asked])],
        seconds={"read": 0.1, "decode": 1 / 3},
        error="encode: gone",
        rows_per_prompt=True,
        arrays={
            "tokens": Ragged(rng.integers(0, 2**15, (9, 4)).astype(np.int16), lengths),
            "kept": Ragged(rng.integers(-1, 256, 9).astype(np.int32), lengths),
        },
    )


def default_of(field: Field) -> object:
    return field.default_factory() if field.default_factory is not MISSING else field.default


@pytest.mark.parametrize(
    "find",
    [lambda unit: unit, lambda unit: unit.images[0], lambda unit: unit.rejected[0]]
    + [lambda unit, name=name: getattr(unit.images[0], name) for name in ("sample", "question_set", "canary")],
)
def test_the_round_trip_below_is_of_every_field(find):
    value = find(everything())
    assert [f.name for f in fields(value) if getattr(value, f.name) == default_of(f)] == []


def test_a_unit_comes_back_from_its_row_byte_for_byte():
    unit_batch, again = everything(), UnitBatch.from_row(everything().to_row())
    for field in fields(UnitBatch):
        if field.name != "arrays":
            assert getattr(again, field.name) == getattr(unit_batch, field.name), field.name
    assert again.arrays.keys() == unit_batch.arrays.keys()
    for name, array in unit_batch.arrays.items():
        assert len(again.arrays[name]) == len(array) == 5
        for got, row in zip(again.arrays[name].rows(), array.rows(), strict=True):
            assert (got.dtype, got.shape, got.tobytes()) == (row.dtype, row.shape, row.tobytes())
    assert again.to_row()["meta"] == unit_batch.to_row()["meta"]


def test_the_row_holds_one_string_and_the_arrays_themselves():
    unit_batch = everything()
    row = unit_batch.to_row()
    assert row.keys() == {"meta", "tokens", "tokens.lengths", "kept", "kept.lengths"}
    assert isinstance(row["meta"], str)
    for name, array in UnitBatch.from_row(row).arrays.items():
        assert array.values is row[name] is unit_batch.arrays[name].values
        assert array.lengths is row[f"{name}.lengths"] is unit_batch.arrays[name].lengths


def test_to_row_allocates_less_than_a_tenth_of_the_arrays():
    pixels = Ragged(np.zeros(8 * 336 * 336 * 3, np.uint8), np.full(8, 336 * 336 * 3))
    images = [Image(f"id-{i}", "a.parquet", i, f"{i:064x}", ["describe it"]) for i in range(len(pixels))]
    unit_batch = UnitBatch(Unit("0123456789ab", 0, 8, ("a.parquet",)), images=images, arrays={"pixels": pixels})
    unit_batch.to_row()
    tracemalloc.start()
    try:
        unit_batch.to_row()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < pixels.values.nbytes / 10


def test_from_row_parses_its_string_once(monkeypatch):
    row, parsed, loads = everything().to_row(), [], json.loads
    monkeypatch.setattr(json, "loads", lambda text: (parsed.append(text), loads(text))[1])
    UnitBatch.from_row(row)
    assert parsed == [row["meta"]]


def test_an_image_has_a_row_for_each_picture_and_where_the_method_asks_for_it_for_each_prompt():
    unit_batch = everything()
    assert unit_batch.rows() == [range(4), range(4, 5)]
    unit_batch.rows_per_prompt = False
    assert unit_batch.rows() == [range(2), range(2, 3)]


def test_a_caption_job_has_no_questions_and_one_picture_an_image():
    image = everything().images[1]
    assert (list(image.questions), image.num_pictures) == ([], 1)


def test_a_rejected_image_keeps_its_questions_and_leaves_with_drop():
    unit_batch = everything()
    asked = unit_batch.images[0].questions
    unit_batch.reject(0, "generate", "RuntimeError: kernel failed\nat line 7")
    with pytest.raises(AssertionError, match="arrays must be taken out before images are dropped"):
        unit_batch.drop({0})
    unit_batch.arrays = {}
    unit_batch.drop({0})
    rejected = unit_batch.rejected[-1]
    assert (rejected.id, rejected.reason, rejected.detail) == ("id-0", "generate", "RuntimeError: kernel failed")
    assert rejected.questions == asked
    assert [image.id for image in unit_batch.images] == ["id-1"]
