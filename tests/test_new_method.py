"""A selector with a setting of its own is one record: nothing else has to know its name."""

import hashlib

import pytest
import torch
from torch import Tensor

from otprune import num_kept, select_tokens
from otprune.flops import paper_table, prefill_flops, projector_flops, true_flops, vision_flops
from otprune.methods import METHODS, Selector, Setting
from otprune.models import llava_encoder, read_checkpoint
from otprune.shapes import MODELS
from pipelines.config.keys import PruneConfig
from pipelines.config.load import load_config
from pipelines.errors import UserError
from pipelines.images.decode import Picture
from pipelines.output.unit import Unit
from pipelines.run.job import check_model, check_pruning, inside_model
from pipelines.stages.encode import Encoder
from pipelines.stages.gpu import Place
from pipelines.stages.read import flat_pixels
from pipelines.stages.token_arrays import unpack
from pipelines.stages.unit_batch import Image, UnitBatch
from tests.helpers import DEMO


def every(features_BND: Tensor, k: int, *, step: int, seed: int | Tensor) -> Tensor:
    """Every `step`-th token, going round from the place that the seed names."""
    B, N, _ = features_BND.shape
    start_B = torch.as_tensor(seed).expand(B) % N
    return (start_B[:, None] + step * torch.arange(k)) % N


EVERY = Selector(
    name="every",
    choose=every,
    cost=lambda num_tokens, width, kept, on_cpu: kept * width,
    settings={"step": Setting(meaning="distance of neighbours", kind="integer", default=1, low=1)},
    shared=frozenset(("seed",)),
)


@pytest.fixture
def known(monkeypatch):
    monkeypatch.setitem(METHODS, "every", EVERY)


def test_select_tokens_takes_the_record_with_its_setting():
    features = torch.randn(2, 12, 4)
    keep = select_tokens(features, 4, method=EVERY, step=3, seed=1)
    assert keep.tolist() == [[1, 4, 7, 10]] * 2
    assert select_tokens(features, 3, method=EVERY).tolist() == [[0, 1, 2]] * 2
    assert select_tokens(features, 2, method=EVERY, seed=torch.tensor([3, 11])).tolist() == [[3, 4], [0, 11]]
    with pytest.raises(ValueError, match=r"settings.step must be at least 1, got 0"):
        select_tokens(features, 4, method=EVERY, step=0)
    with pytest.raises(ValueError, match=r"settings of every must be one of step, got 'steps'"):
        select_tokens(features, 4, method=EVERY, steps=2)
    with pytest.raises(ValueError, match="must return distinct indices"):
        select_tokens(features, 4, method=EVERY, step=6)


def test_a_setting_reaches_no_method_that_does_not_take_it():
    features = torch.randn(1, 12, 4)
    with pytest.raises(ValueError, match="settings of otprune must be one of precision, got 'step'"):
        select_tokens(features, 4, step=3)
    with pytest.raises(ValueError, match="settings of a callable must be absent, got 'step'"):
        select_tokens(features, 4, method=lambda features, k: torch.arange(k)[None], step=3)


def test_its_name_is_known_where_its_record_is(known):
    features = torch.randn(1, 12, 4)
    assert select_tokens(features, 4, method="every", step=3).tolist() == [[0, 3, 6, 9]]


def test_both_books_of_flops_ask_the_record():
    model = MODELS["llava-1.5-7b"]
    flops = true_flops(model, EVERY, num_text=57, retention=0.098)
    assert flops.policy == 56 * 4096
    assert flops.prefill == prefill_flops(model.language, 57 + 56)
    assert (flops.vision, flops.projector) == (vision_flops(model.vision), projector_flops(model))
    assert paper_table("llava-1.5-7b", EVERY, retention=0.098) == paper_table(
        "llava-1.5-7b", "otprune", retention=0.098
    )


def test_a_job_checks_its_setting(known, demo_model):
    config = load_config([*DEMO, "prune.method=every", "prune.settings.step=3"])
    config, checkpoint = check_model(config)
    assert check_pruning(config, checkpoint) == {"step": 3}
    assert not inside_model(config)
    with pytest.raises(UserError, match=r"prune.settings.step must be an integer, got 'three'"):
        check_model(load_config([*DEMO, "prune.method=every", "prune.settings.step=three"]))


def test_the_encode_stage_runs_it_with_its_setting_and_each_images_seed(known, demo_model, scene_pixels):
    prune = PruneConfig(method="every", retention=0.1)
    checkpoint, place = read_checkpoint(str(demo_model)), Place("cpu", "float32")
    encoder = Encoder(checkpoint=checkpoint, prune=prune, settings={"step": 5}, batch_size=4, place=place)
    hashes = [hashlib.sha256(picture.tobytes()).hexdigest() for picture in scene_pixels]
    size, prompts = (224, 224), ["describe the image ."]
    images = [Image(str(i), "a", i, sha256, prompts, sizes=[size]) for i, sha256 in enumerate(hashes)]
    pixels = flat_pixels([Picture(picture, size) for picture in scene_pixels])
    batch = UnitBatch(Unit("0123456789ab", 0, 6, ("a",)), images=images, arrays={"pixels": pixels})
    batch = UnitBatch.from_row(encoder(batch.to_row()))
    assert batch.error is None
    features = llava_encoder.load(checkpoint, dtype=torch.float32, device="cpu")(torch.from_numpy(scene_pixels))
    for ((rows,),), sha256, visual in zip(unpack(batch), hashes, features, strict=True):
        start = int(sha256[:15], 16) % 2**62 % 256
        assert rows.kept.tolist() == sorted((start + 5 * i) % 256 for i in range(num_kept(0.1, 256)))
        torch.testing.assert_close(rows.tokens, visual[rows.kept.tolist()], rtol=1e-5, atol=1e-5)
