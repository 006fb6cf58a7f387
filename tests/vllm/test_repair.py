"""vLLM on the demo model made to loop: captions are tried again, the same way whoever runs beside them."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from pipelines.config.keys import GenerateConfig
from pipelines.engines.repair import Ladder
from tests.looping import make_looping
from tests.vllm.engines_on_demo import Running, answers, unit

SCENES = range(12)


@pytest.fixture(scope="module")
def looping(demo_model, tmp_path_factory) -> Iterator[Running]:
    model = make_looping(demo_model, tmp_path_factory.mktemp("looping") / "model")
    running = Running(False, 600.0, f"model.path={model}", generate=GenerateConfig(max_new_tokens=64))
    yield running
    running.close()


@pytest.fixture(scope="module")
def features(encoded) -> torch.Tensor:
    return encoded(SCENES)[:, ::5].clone()


def said(running: Running, features: torch.Tensor, first: int = 0) -> list:
    return [done for done, *_ in answers(running.run(unit(list(features), first=first))[0])]


def test_loops_are_tried_again_and_the_same_in_another_unit(looping, features, monkeypatch):
    repaired = said(looping, features)
    assert said(looping, features[:3]) + said(looping, features[3:], first=3) == repaired
    monkeypatch.setattr(looping.stage, "ladder", Ladder.of(GenerateConfig(retries=0)))
    plain = said(looping, features)
    loops = [i for i, done in enumerate(plain) if done.finish_reason == "loop"]
    assert 0 < len(loops) < len(SCENES)
    for i, (before, after) in enumerate(zip(plain, repaired, strict=True)):
        assert (after.num_attempts > 1) == (i in loops)
        if after.num_attempts == 1 or after.finish_reason == "loop":
            assert after.caption == before.caption
    assert sum(done.finish_reason == "loop" for done in repaired) < len(loops)


def test_vllms_own_detector_of_loops_ends_them_early(looping, features, monkeypatch):
    monkeypatch.setattr(looping.stage, "ladder", Ladder.of(GenerateConfig(retries=0)))
    plain = said(looping, features)
    detector = {"repetition_detection": {"max_pattern_size": 12, "min_count": 3}}
    monkeypatch.setattr(looping.stage, "sampling", looping.stage.sampling | detector)
    early = said(looping, features)
    caught = [i for i, done in enumerate(early) if done.finish_reason == "loop"]
    assert {i for i, done in enumerate(plain) if done.finish_reason == "loop"} <= set(caught)
    assert all(early[i].num_generated_tokens <= plain[i].num_generated_tokens for i in caught)
    assert sum(done.num_generated_tokens for done in early) < sum(done.num_generated_tokens for done in plain)
    assert all(early[i] == replace(plain[i]) for i in range(len(SCENES)) if i not in caught)
