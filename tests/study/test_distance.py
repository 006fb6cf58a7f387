"""Distance against accuracy: each number against its definition, and answers against greedy decoding."""

import random

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from demo.language import CAPTION_PROMPT, caption, question
from demo.render import render
from demo.world import scene_at
from otprune import select_tokens
from otprune.distance import gaussian_w2, trace_objective
from otprune.models import llava_encoder, load_decoder, read_checkpoint
from pipelines.study.correlation import arrange, correlate, spearman
from pipelines.study.demo_points import POINTS, choose, measure_scenes
from pipelines.study.gamma import compare_widths, embedded_tokens, overlap
from tests.conftest import REPOSITORY

MODEL = REPOSITORY / "demo" / "checkpoint"
SCENES = 4


def point(name: str) -> dict:
    return {"label": name, **POINTS[name]}


@pytest.fixture(scope="module")
def measured() -> list[dict]:
    return measure_scenes(
        start=0,
        stop=SCENES,
        retention=0.1,
        points=[point("OTPrune trace"), point("random")],
        distances=["w2", "trace"],
        weights="",
        model=str(MODEL),
    )


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    encoder = llava_encoder.load(read_checkpoint(str(MODEL)), dtype=torch.float32, device="cpu")
    pixels = np.stack([render(scene_at("validation", index)).pixels for index in range(SCENES)])
    return encoder(torch.from_numpy(pixels))


def test_distances_are_those_of_the_library_on_the_selections_of_the_library(measured, features):
    keep = select_tokens(features, 26, method="otprune", gamma=0.5, gamma_scale="trace")
    rows = [row for row in measured if row["point"] == "OTPrune trace"]
    assert [row["scene"] for row in rows] == list(range(SCENES))
    assert {row["kept"] for row in rows} == {26}
    assert [row["w2"] for row in rows] == pytest.approx(gaussian_w2(features, keep).tolist())
    expected = trace_objective(features, keep, normalize_columns=True).tolist()
    assert [row["trace"] for row in rows] == pytest.approx(expected)


def test_an_answer_counts_exactly_where_greedy_decoding_gives_it(measured, features):
    decoder = load_decoder(MODEL, dtype=torch.float32, device="cpu")
    keep = select_tokens(features, 26, method="otprune", gamma=0.5, gamma_scale="trace")
    tokens = features.gather(1, keep[..., None].expand(-1, -1, features.shape[-1]))
    rows = [row for row in measured if row["point"] == "OTPrune trace"]
    for index, row in enumerate(rows):
        scene, rng = scene_at("validation", index), random.Random(f"study {index}")
        asked = [("caption", CAPTION_PROMPT, caption(scene))]
        asked += [
            (task, *pair)
            for task in ("exist", "attr", "where", "rel", "count", "mc", "text", "bg", "exist", "attr")
            if (pair := question(scene, task, rng))
        ]
        prompts = [decoder.encode_prompt(text) for _, text, _ in asked]
        visual = tokens[index].expand(len(asked), -1, -1)
        answers = decoder.generate(list(visual), prompts, max_new_tokens=48)
        for task in {task for task, _, _ in asked}:
            told = [
                (answer.text, right) for (name, _, right), answer in zip(asked, answers, strict=True) if name == task
            ]
            assert row[f"asked_{task}"] == len(told)
            assert row[f"right_{task}"] == sum(text.split() == right.split() for text, right in told)


@pytest.mark.parametrize("name", POINTS)
def test_every_point_keeps_k_tokens_of_each_image_whatever_the_batch(name):
    tokens, seeds = torch.randn(3, 40, 8, generator=torch.Generator().manual_seed(0)), torch.arange(3)
    keep = choose(tokens, 0.2, point(name), seeds)
    assert keep.shape == (3, 8)
    assert (keep.diff(dim=1) > 0).all()
    assert torch.equal(choose(tokens[1:2], 0.2, point(name), seeds[1:2]), keep[1:2])


def test_spearman_is_scipys_with_ties_and_in_batches():
    rng = np.random.default_rng(0)
    x, y = rng.integers(6, size=(2, 7, 9))
    expected = [spearmanr(a, b).statistic for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(spearman(x, y), expected, rtol=1e-12)


def made_up(num_scenes: int, sign: int) -> list[dict]:
    """Five points; the distance of each is sign times the number of its wrong answers out of ten."""
    rng = np.random.default_rng(1)
    rows = []
    for scene in range(num_scenes):
        for retention in (0.1, 0.2):
            for number in range(5):
                right = 2 * number - int(rng.integers(2))
                far = sign * (10 - right) + 20
                answers = {"right_a": right, "asked_a": 10, "right_caption": 0, "asked_caption": 1}
                rows.append({"scene": scene, "point": str(number), "retention": retention, "far": far, **answers})
    return rows


@pytest.mark.parametrize("sign", [1, -1])
def test_rho_is_positive_where_closer_selections_answer_better(sign):
    columns = ["far", "right_a", "asked_a", "right_caption", "asked_caption"]
    rows = correlate(arrange(made_up(30, sign), list("01234"), columns), ["far"], ["a"], resamples=50)
    found = {row["reading"]: row for row in rows if row["task"] == "a"}
    assert set(found) == {"0.1", "0.2", "mean", "pooled"}
    for reading in ("0.1", "0.2", "mean"):
        row = found[reading]
        assert (row["rho"], row["low"], row["high"]) == pytest.approx((sign, sign, sign))
    assert found["pooled"]["points"] == 10


def test_intervals_over_methods_are_wider_than_those_over_scenes():
    rows, rng = made_up(30, 1), np.random.default_rng(2)
    noise = {str(number): rng.normal(0, 6) for number in range(5)}
    rows = [{**row, "far": row["far"] + noise[row["point"]]} for row in rows]
    columns = ["far", "right_a", "asked_a", "right_caption", "asked_caption"]
    found = correlate(arrange(rows, list("01234"), columns), ["far"], ["a"], resamples=200)
    mean = next(row for row in found if (row["task"], row["reading"]) == ("a", "mean"))
    assert mean["methods_high"] - mean["methods_low"] > mean["high"] - mean["low"]
    assert mean["low"] <= mean["rho"] <= mean["high"]


def test_images_of_the_gamma_study_have_the_same_geometry_at_every_width():
    grams = [unit @ unit.T for unit in (torch.nn.functional.normalize(embedded_tokens(60, d, 3)) for d in (2048, 4096))]
    assert torch.corrcoef(torch.stack([gram.flatten() for gram in grams]))[0, 1] > 0.98
    assert not torch.equal(embedded_tokens(60, 64, 3), embedded_tokens(60, 64, 4))


def test_the_reference_width_agrees_with_itself_and_overlap_is_a_share():
    rows = compare_widths(seed=0, tokens=50, kept=10, widths=[16, 64], gammas=[0.1], scales=["released", "trace"])
    assert [(row["width"], row["overlap"]) for row in rows if row["width"] == 64] == [(64, 1.0), (64, 1.0)]
    assert all(0 <= row["largest"] <= 1 and row["objective"] > 0 for row in rows)
    assert overlap(torch.tensor([1, 2, 3, 4]), torch.tensor([3, 4, 5, 6])) == 0.5


def test_a_gamma_too_small_keeps_the_largest_tokens():
    tiny, _ = (
        compare_widths(seed=0, tokens=50, kept=10, widths=[16, 64], gammas=[g], scales=["trace"]) for g in (1e-9, 1)
    )
    assert all(row["largest"] == 1.0 for row in tiny)
