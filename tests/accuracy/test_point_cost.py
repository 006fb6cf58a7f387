"""The multiply-adds of a mean answer where pictures have any size."""

from types import SimpleNamespace

import pytest

from otprune.flops import decode_flops, prefill_flops, projector_flops, selector_flops, vision_flops
from otprune.models import read_checkpoint
from pipelines.accuracy.point_cost import _flops
from pipelines.config.load import load_config
from tests.tiny import MAKERS

MEANS = {"num_visual_tokens": 100.0, "num_kept_tokens": 36.0, "num_prompt_tokens": 46.0, "num_generated_tokens": 5.0}
SIDE = 28  # pixels of a token


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return read_checkpoint(str(MAKERS["qwen2_5_vl"](tmp_path_factory.mktemp("qwen"))))


@pytest.mark.parametrize(("method", "seen"), [("otprune", 100), ("resize", 36), ("random", 100)])
def test_the_tower_reads_the_picture_that_it_gets_and_the_language_model_what_is_kept(checkpoint, method, seen):
    config = load_config([f"prune.method={method}", "prune.retention=0.36"])
    job = SimpleNamespace(checkpoint=checkpoint, config=config, pruning={})
    found, side = _flops(job, MEANS, select_on_cpu=True), round(seen**0.5) * SIDE
    assert found is not None
    shape = checkpoint.shape
    assert found.vision == vision_flops(shape.vision, frame=(side, side))
    assert found.projector == projector_flops(shape, frame=(side, side))
    chosen = selector_flops(method, 100, shape.language.hidden, 36, on_cpu=True) if method != "resize" else 0
    assert found.policy == chosen
    assert found.prefill == prefill_flops(shape.language, 10 + 36)
    assert found.decode == decode_flops(shape.language, 10 + 36, 5)


def test_a_smaller_picture_spares_the_tower_and_the_choice(checkpoint):
    config = load_config(["prune.method=otprune", "prune.retention=0.36", "prune.shrink=0.64"])
    found = _flops(SimpleNamespace(checkpoint=checkpoint, config=config, pruning={}), MEANS, select_on_cpu=True)
    shape, side = checkpoint.shape, 8 * SIDE
    assert found is not None
    assert found.vision == vision_flops(shape.vision, frame=(side, side))
    assert found.policy == selector_flops("otprune", 64, shape.language.hidden, 36, on_cpu=True)
    assert found.prefill == prefill_flops(shape.language, 10 + 36)
