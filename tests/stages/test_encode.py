"""The encoder: pixels to the visual tokens worth decoding, image by image, whatever batch or company they come in."""

import base64
import hashlib
import io
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from otprune import num_kept, select_tokens
from otprune.families.llava_next import Tiled
from otprune.models import read_checkpoint
from otprune.models.llava_encoder import LlavaEncoder
from otprune.select import METHODS
from pipelines.config.keys import PruneConfig
from pipelines.images.decode import Picture
from pipelines.output.unit import Unit
from pipelines.stages import batches, encode, gpu
from pipelines.stages.batches import SYSTEMATIC, Suspicion, run_batched
from pipelines.stages.encode import Encoder
from pipelines.stages.gpu import Place, exit_if_cuda_is_broken, torch_dtype
from pipelines.stages.read import flat_pixels
from pipelines.stages.token_arrays import from_numpy
from pipelines.stages.unit_batch import Image, QuestionSet, UnitBatch

BAD = 255  # the shade of an image that breaks the fake tower below


@pytest.fixture(scope="module")
def encoder(demo_model):
    return make_encoder(demo_model, "float32")


def make_encoder(model: Path, dtype: str, *, batch_size: int = 32, **prune: Any) -> Encoder:
    return Encoder(
        checkpoint=read_checkpoint(str(model)),
        prune=PruneConfig(**{"method": "otprune", "retention": 0.1, "gamma_scale": "trace", **prune}),
        settings={},
        batch_size=batch_size,
        place=Place("cpu", dtype),
    )


@pytest.fixture
def pixels(scene_pixels) -> np.ndarray:
    return scene_pixels


@pytest.fixture(scope="module")
def with_settings(demo_model):
    """An encoder with some settings of its own; loading the demo's tower takes a tenth of a second."""
    made: dict[tuple, Encoder] = {}

    def make(**changes) -> Encoder:
        key = tuple(sorted(changes.items()))
        if key not in made:
            made[key] = make_encoder(demo_model, "float32", **changes)
        return made[key]

    return make


def work_of(pixels: np.ndarray, samples: int = 0) -> UnitBatch:
    images = []
    for i, picture in enumerate(pixels):
        sha256, prompts = hashlib.sha256(picture.tobytes()).hexdigest(), ["describe the image ."]
        images.append(Image(str(i), "a.parquet", i, sha256, prompts, sizes=[picture.shape[:2]], sampled=i < samples))
    arrays = {"pixels": flat_pixels([Picture(picture, picture.shape[:2]) for picture in pixels])}
    return UnitBatch(Unit("0123456789ab", 0, len(pixels), ("a.parquet",)), images=images, arrays=arrays)


def encoded(encoder: Encoder, pixels: np.ndarray, samples: int = 0) -> UnitBatch:
    return UnitBatch.from_row(encoder(work_of(pixels, samples).to_row()))


def kept_of(unit_batch: UnitBatch) -> np.ndarray:
    """The indices [B, K] of the kept tokens of images that keep equally many."""
    return np.stack(unit_batch.arrays["kept"].rows())


def tokens_of(unit_batch: UnitBatch) -> torch.Tensor:
    """The kept tokens [B, K, R] of images that keep equally many."""
    return torch.stack([from_numpy(row) for row in unit_batch.arrays["tokens"].rows()])


def tower_of(encoder: Encoder) -> LlavaEncoder:
    assert isinstance(encoder.pruner.encoder, LlavaEncoder)
    return encoder.pruner.encoder


# What comes out


def test_tokens_are_the_selected_ones_of_the_tower_and_pixels_are_gone(encoder, pixels):
    unit_batch = encoded(encoder, pixels)
    features = tower_of(encoder)(torch.from_numpy(pixels))
    expected = select_tokens(features, 26, method="otprune", gamma_scale="trace")
    assert set(unit_batch.arrays) == {"tokens", "kept"}
    assert unit_batch.arrays["kept"].values.dtype == np.int32
    assert np.array_equal(kept_of(unit_batch), expected)
    assert torch.equal(tokens_of(unit_batch), features.gather(1, expected[..., None].expand(-1, -1, 192)))
    assert {image.num_visual_tokens for image in unit_batch.images} == {256}
    assert unit_batch.error is None
    assert unit_batch.seconds["encode"] > 0


def test_kept_tokens_are_ascending_and_as_many_as_the_retention_says(with_settings, pixels):
    for retention in (0.001, 0.098, 0.5, 1.0):
        kept = kept_of(encoded(with_settings(retention=retention), pixels[:2]))
        assert kept.shape == (2, num_kept(retention, 256))
        assert (np.diff(kept, axis=1) > 0).all()


def test_none_keeps_all_tokens_in_their_order(with_settings, pixels):
    encoder = with_settings(method="none")
    unit_batch = encoded(encoder, pixels)
    assert torch.equal(tokens_of(unit_batch), tower_of(encoder)(torch.from_numpy(pixels)))
    assert np.array_equal(kept_of(unit_batch), np.tile(np.arange(256), (len(pixels), 1)))


def test_the_settings_of_the_selection_arrive(with_settings, pixels):
    features = tower_of(with_settings())(torch.from_numpy(pixels))
    for selection in ({"gamma": 50.0}, {"gamma": 0.01, "gamma_scale": "released"}, {"gamma_scale": "paper"}):
        options = {"gamma": None, "gamma_scale": "trace"} | selection
        expected = select_tokens(features, 26, method="otprune", **options)
        assert np.array_equal(kept_of(encoded(with_settings(**selection), pixels)), expected)


def test_bfloat16_travels_as_bits(demo_model, pixels):
    encoder = make_encoder(demo_model, "bfloat16")
    unit_batch = encoded(encoder, pixels[:2])
    assert unit_batch.arrays["tokens"].values.dtype == np.int16
    tokens = tokens_of(unit_batch)
    assert tokens.dtype == torch.bfloat16
    all_tokens = tower_of(encoder)(torch.from_numpy(pixels[:2]))
    assert all((all_tokens[i] == tokens[i, 0]).all(dim=-1).any() for i in range(2))


def test_sampled_images_carry_a_thumbnail_and_their_kept_tokens(encoder, pixels):
    unit_batch = encoded(encoder, pixels, samples=2)
    assert [image.sample is not None for image in unit_batch.images] == [True, True] + [False] * 4
    sample = unit_batch.images[1].sample
    assert sample is not None
    assert sample.kept == unit_batch.arrays["kept"].rows()[1].tolist()
    assert (sample.rows, sample.columns) == (16, 16)
    thumbnail = PILImage.open(io.BytesIO(base64.b64decode(sample.jpeg)))
    assert thumbnail.size == (sample.width, sample.height) == (224, 224)
    assert np.abs(np.asarray(thumbnail).astype(int) - pixels[1]).mean() < 10  # JPEG of noisy pixels


def test_an_image_of_several_pictures_counts_the_visual_tokens_of_all(encoder, pixels):
    unit_batch = work_of(pixels[:3], samples=2)
    first, second, _ = unit_batch.images
    unit_batch.images = [replace(first, sizes=first.sizes * 2, question_set=QuestionSet([], 2)), second]
    done = UnitBatch.from_row(encoder(unit_batch.to_row()))
    assert [image.num_visual_tokens for image in done.images] == [512, 256]
    assert [image.sample and image.sample.kept for image in done.images] == kept_of(done)[[0, 2]].tolist()


def test_pictures_that_were_sent_smaller_count_the_tokens_of_their_whole_size(demo_model, pixels):
    encoder = make_encoder(demo_model, "float32")
    whole = replace(encoder.checkpoint.geometry, num_tokens=1024)
    encoder.checkpoint = replace(encoder.checkpoint, whole_geometry=whole)
    unit_batch = encoded(encoder, pixels[:2])
    assert [image.num_visual_tokens for image in unit_batch.images] == [1024, 1024]
    assert kept_of(unit_batch).shape == (2, 26)


def test_pictures_of_free_size_are_batched_by_their_numbers_of_tokens(demo_model):
    """Tiles of 4 x 4 tokens; a square picture has 4 of them, a long one 2 with half of their rows padding."""
    tiled = Tiled(side=56, grid_side=4, resolutions=((56, 112), (112, 112)), background=(0, 0, 0))
    encoder = make_encoder(demo_model, "float32", batch_size=2)
    encoder.checkpoint = replace(encoder.checkpoint, geometry=tiled)
    square, long = (200, 200), (20, 80)
    assert tiled.num_visual(long) < tiled.num_visual(square)
    assert encoder._batches([square, long, square, long, square]) == [[1, 3], [0, 2], [4]]


def test_large_pictures_take_the_room_of_several_in_a_batch(demo_model, monkeypatch):
    encoder = make_encoder(demo_model, "float32", batch_size=4)
    assert encoder._batches([(9, 9)] * 5) == [[0, 1, 2, 3], [4]]
    monkeypatch.setattr(encode, "LARGE", 128)  # of the demo's 256 tokens
    assert encoder._batches([(9, 9)] * 5) == [[0, 1], [2, 3], [4]]
    monkeypatch.setattr(encode, "LARGE", 16)  # a picture beyond a whole batch still goes, alone
    assert encoder._batches([(9, 9)] * 2) == [[0], [1]]
    assert encoder._batches([]) == []


def test_a_unit_without_images_goes_through(encoder):
    unit_batch = encoded(encoder, np.empty((0, 224, 224, 3), np.uint8))
    assert unit_batch.error is None
    tokens, kept = unit_batch.arrays["tokens"], unit_batch.arrays["kept"]
    assert (len(tokens), tokens.values.shape, tokens.values.dtype) == (0, (0, 192), np.float32)
    assert (len(kept), kept.values.shape, kept.values.dtype) == (0, (0,), np.int32)


# No image depends on its company


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_batch_does_not_change_what_is_kept(with_settings, pixels, method):
    together = kept_of(encoded(with_settings(method=method), pixels))
    for batch_size in (1, 4):
        smaller = with_settings(method=method, batch_size=batch_size)
        assert np.array_equal(kept_of(encoded(smaller, pixels)), together)
    backwards = kept_of(encoded(with_settings(method=method), pixels[::-1]))
    assert np.array_equal(backwards[::-1], together)


def test_random_selection_depends_on_the_image_and_the_seed(with_settings, pixels):
    twins = np.stack([pixels[0], pixels[1], pixels[0]])
    first, second, third = kept_of(encoded(with_settings(method="random"), twins))
    assert np.array_equal(first, third)
    assert not np.array_equal(first, second)
    other = kept_of(encoded(with_settings(method="random", seed=1), twins))
    assert not np.array_equal(other[0], first)


# Faults


def test_run_batched_runs_everything_in_batches():
    batches = []
    assert run_batched(list(range(10)), 4, batches.append) == {}
    assert sorted(i for batch in batches for i in batch) == list(range(10))
    assert sorted(map(len, batches)) == [2, 4, 4]
    assert run_batched([], 4, batches.append) == {}


@pytest.mark.parametrize("guilty", [{0}, {31}, {5, 6}, {0, 15, 16, 31}])
def test_run_batched_finds_the_guilty_and_runs_all_others_once(guilty):
    done, calls = [], []

    def run(batch):
        calls.append(batch)
        if guilty & set(batch):
            raise ValueError(f"one of {batch}")
        done.extend(batch)

    failed = run_batched(list(range(32)), 32, run)
    assert {i: str(error) for i, error in failed.items()} == {i: f"one of {[i]}" for i in guilty}
    assert sorted(done) == [i for i in range(32) if i not in guilty]
    assert len(calls) <= 1 + 2 * 5 * len(guilty)  # halving, not one by one


def test_a_batch_that_is_too_large_for_memory_is_halved_until_it_fits():
    done = []

    def run(batch):
        if len(batch) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.append(batch)

    assert run_batched(list(range(16)), 16, run) == {}
    assert sorted(i for batch in done for i in batch) == list(range(16))


def test_an_image_is_not_blamed_for_memory_that_its_neighbours_hold(monkeypatch):
    monkeypatch.setattr(batches, "OOM_WAITS", (0.0, 0.0))
    left = [4]  # calls until somebody else on the GPU has let go

    def run(batch):
        left[0] -= 1
        if left[0] >= 0:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert run_batched(list(range(16)), 4, run) == {}
    left[0] = 10**6
    with pytest.raises(torch.OutOfMemoryError):  # the unit fails and is tried again; no image is lost for it
        run_batched(list(range(16)), 4, run)


def test_one_image_that_is_too_large_for_the_gpu_is_its_own_fault(monkeypatch):
    monkeypatch.setattr(batches, "OOM_WAITS", (0.0, 0.0))

    def run(batch):
        if 5 in batch:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert list(run_batched(list(range(16)), 4, run)) == [5]


def test_failures_do_not_keep_what_their_batch_held():
    class Tensors:
        pass

    held = []

    def run(batch):
        tensors = Tensors()
        held.append(weakref.ref(tensors))
        raise ValueError("bad image")

    failed = run_batched([0, 1], 2, run)
    assert len(failed) == 2
    assert all(ref() is None for ref in held)


def test_when_every_image_fails_it_is_not_the_images():
    def run(batch):
        raise RuntimeError("no kernel image")

    with pytest.raises(RuntimeError, match="no kernel image"):
        run_batched(list(range(SYSTEMATIC)), 4, run)
    assert len(run_batched(list(range(SYSTEMATIC - 1)), 4, run)) == SYSTEMATIC - 1  # so few may well be bad


def with_bad_images(pixels: np.ndarray, indices: set[int]) -> np.ndarray:
    pixels = pixels.copy()
    for i in indices:
        pixels[i] = BAD
    return pixels


def break_on_bad(encoder: Encoder, monkeypatch, result) -> None:
    """The tower raises `result` for a batch with a bad image, or puts that value into the image's hidden states."""
    see = tower_of(encoder).see

    def broken(pixels):
        bad = (pixels == BAD).flatten(1).all(dim=1)
        if isinstance(result, Exception) and bad.any():
            raise result
        hidden = see(pixels)
        return hidden if isinstance(result, Exception) else hidden.masked_fill(bad[:, None, None], result)

    monkeypatch.setattr(encoder.pruner.encoder, "see", broken)


@pytest.mark.parametrize("result", [RuntimeError("kernel failed\nsecond line"), float("nan")], ids=["raises", "nan"])
def test_an_image_that_breaks_the_tower_is_rejected_and_the_others_stay_aligned(encoder, pixels, monkeypatch, result):
    expected = encoded(encoder, pixels)
    break_on_bad(encoder, monkeypatch, result)
    unit_batch = encoded(encoder, with_bad_images(pixels, {1, 4}))
    assert [(r.row, r.reason) for r in unit_batch.rejected] == [(1, "encode"), (4, "encode")]
    assert "\n" not in unit_batch.rejected[0].detail
    assert [image.row for image in unit_batch.images] == [0, 2, 3, 5]
    assert np.array_equal(kept_of(unit_batch), kept_of(expected)[[0, 2, 3, 5]])
    assert tokens_of(unit_batch).shape == (4, 26, 192)


def test_a_unit_that_fails_as_a_whole_carries_its_error_and_no_arrays(encoder, pixels, monkeypatch):
    break_on_bad(encoder, monkeypatch, RuntimeError("wrong driver"))
    unit_batch = encoded(encoder, np.full((SYSTEMATIC, 224, 224, 3), BAD, np.uint8))
    assert unit_batch.error == "encode: RuntimeError: wrong driver"
    assert unit_batch.arrays == {}


def test_who_fails_from_the_first_image_on_may_not_blame_the_images():
    suspicion = Suspicion()
    suspicion.note(0, [ValueError("first")] * (SYSTEMATIC - 1))
    with pytest.raises(ValueError, match="second"):
        suspicion.note(0, [ValueError("second")])
    suspicion.note(1, [ValueError("a bad image beside a good one")])
    suspicion.note(0, [ValueError("a bad unit")] * SYSTEMATIC)


def test_a_unit_that_failed_before_passes_through(encoder):
    row = UnitBatch(Unit("0123456789ab", 0, 1, ("f",)), error="read: gone").to_row()
    unit_batch = UnitBatch.from_row(encoder(row))
    assert (unit_batch.error, unit_batch.arrays, unit_batch.seconds) == ("read: gone", {}, {})


def test_a_broken_cuda_context_ends_the_process_and_nothing_else_does(monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(gpu.os, "_exit", codes.append)
    exit_if_cuda_is_broken(ValueError("bad image"))
    exit_if_cuda_is_broken(torch.OutOfMemoryError("CUDA error: out of memory"))
    assert codes == []
    exit_if_cuda_is_broken(RuntimeError("CUDA error: an illegal memory access was encountered\nlong text"))
    assert codes == [1]
    assert "the actor restarts" in capsys.readouterr().out


def test_precision_is_chosen_by_device_unless_it_is_named():
    assert torch_dtype("auto", "cpu") == torch.float32
    assert torch_dtype("auto", "cuda") == torch.bfloat16
    assert torch_dtype("float16", "cpu") == torch.float16
