"""The table of a photograph in each released checkpoint: that of every configuration, and its sums by definition."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from benchmarks.families import DECODE_STEPS, TEXT_TOKENS, read_released, row_of, select_ms, table
from benchmarks.released_configs import RELEASED
from otprune.flops import decode_flops, prefill_flops, projector_flops, vision_flops

CONF = Path(__file__).resolve().parents[2] / "conf"


@pytest.mark.parametrize("released", RELEASED, ids=lambda released: released.conf)
def test_a_released_checkpoint_is_the_one_that_its_configuration_names(released):
    assert OmegaConf.load(CONF / f"{released.conf}.yaml").model.path == released.name


@pytest.mark.parametrize(
    ("conf", "visual", "kept", "crops", "texts"),
    [
        ("llava15_7b", 576, 56, 1, (0, 0)),
        ("llava16_7b", 2340, 229, 5, (0, 0)),  # 2 x 2 tiles and the overview
        ("llava_onevision_7b", 4725, 463, 7, (0, 0)),  # 2 x 3
        ("internvl3_8b", 3328, 666, 13, (0, 0)),  # 3 x 4
        ("gemma3_4b", 256, 128, 1, (0, 0)),
        ("smolvlm2_2b", 1053, 347, 13, (30, 30)),  # 13 labels of two ids, a break a row, and the mark at the end
    ],
)
def test_figures_of_pictures_in_crops_are_sums_of_parts(conf, visual, kept, crops, texts):
    (released,) = (each for each in RELEASED if each.conf == conf)
    row, (_, facts, shape) = row_of(released, times=False), read_released(released)
    assert (row.visual, row.kept) == (visual, kept)
    assert facts.geometry.frame((768, 1024)).num_crops == crops
    assert row.bytes_between_actors == kept * (2 * shape.language.hidden + 4)
    assert row.tower == pytest.approx(
        (vision_flops(shape.vision, crops=crops) + projector_flops(shape, crops=crops)) / 1e12
    )
    for i, (num, text) in enumerate(zip((visual, kept), texts, strict=True)):
        length = TEXT_TOKENS + text + num
        assert row.prefill[i] == pytest.approx(prefill_flops(shape.language, length) / 1e12)
        assert row.decode[i] == pytest.approx(decode_flops(shape.language, length, 1 + DECODE_STEPS) / 1e12)


@pytest.mark.parametrize(
    ("conf", "visual", "kept", "frame", "levels", "ends"),
    [
        ("qwen25_vl_7b", 999, 330, (756, 1036), 0, (0, 0)),
        ("qwen3_vl_8b", 768, 253, (768, 1024), 3, (0, 0)),
        ("qwen35_08b", 768, 253, (768, 1024), 0, (0, 0)),
        ("mistral_small_24b", 1036, 342, (784, 1036), 0, (28, 28)),  # a row's end each
    ],
)
def test_figures_of_pictures_of_free_size_are_sums_of_parts(conf, visual, kept, frame, levels, ends):
    (released,) = (each for each in RELEASED if each.conf == conf)
    row, (_, _, shape) = row_of(released, times=False), read_released(released)
    assert (row.visual, row.kept) == (visual, kept)
    assert row.bytes_between_actors == kept * (2 * shape.language.hidden * (1 + levels) + 4)
    assert row.tower == pytest.approx(
        (vision_flops(shape.vision, frame=frame) + projector_flops(shape, frame=frame)) / 1e12
    )
    for i, (num, text) in enumerate(zip((visual, kept), ends, strict=True)):
        assert row.prefill[i] == pytest.approx(prefill_flops(shape.language, TEXT_TOKENS + text + num) / 1e12)


def test_a_selection_is_measured_and_the_table_says_all():
    assert select_ms("otprune", num_tokens=64, width=16, keep=6) > 0
    rows = [row_of(released, times=False) for released in RELEASED]
    lines = table(rows).splitlines()
    assert len(lines) == 2 + len(RELEASED)
    assert {line.count("|") for line in lines} == {11}
    assert "| InternVL3-8B-hf | 3,328 | 666 (0.2) | - | - | 4.8 |" in lines[8]
