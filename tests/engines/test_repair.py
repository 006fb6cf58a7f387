"""Looping captions are tried again, each image's own way: the ladder, and both stages that climb it."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from otprune.models import Kept, read_checkpoint
from otprune.models.llava_encoder import load
from pipelines.config.keys import EngineConfig, GenerateConfig, PromptConfig, PruneConfig
from pipelines.engines.repair import Ladder, better_of, failed_again
from pipelines.engines.requests import as_answer
from pipelines.engines.transformers_actor import Generator
from pipelines.engines.vllm_actor import VllmGenerator
from pipelines.engines.vllm_client import EngineDiedError, Generated
from pipelines.output.unit import Unit
from pipelines.stages.gpu import Place
from pipelines.stages.seeds import sampling_seed
from pipelines.stages.token_arrays import pack
from pipelines.stages.unit_batch import Answer, Image, UnitBatch
from tests.looping import make_looping

CAPTION, IMAGES = "describe the image .", 6
PLACE = Place("cpu", "float32")


def ladder(**changes) -> Ladder:
    return Ladder.of(GenerateConfig(**changes))


def answer(reason: str, attempts: int = 1, tokens: int = 10, discarded: int = 0) -> Answer:
    return Answer(f"{reason} {tokens}", 5, 9, tokens, reason, attempts, discarded)


# The ladder


def test_a_loop_is_tried_again_as_often_as_asked_and_a_cut_caption_only_on_demand():
    assert [ladder(retries=2).goes_on(answer("loop", n)) for n in (1, 2, 3)] == [True, True, False]
    assert not ladder(retries=0).goes_on(answer("loop"))
    assert not ladder().goes_on(answer("length"))
    assert ladder(retry_cut=True).goes_on(answer("length"))
    assert not ladder(retry_cut=True).goes_on(answer("stop"))


def test_the_first_attempt_is_as_configured_and_each_further_one_hotter_with_a_seed_of_its_own():
    steps = [ladder(temperature=0.5).sampling(attempt) for attempt in range(3)]
    assert [step["temperature"] for step in steps] == pytest.approx([0.5, 0.8, 1.1])
    assert [step["top_p"] for step in steps] == [1.0, 0.9, 0.9]
    assert ladder(top_p=0.4).sampling(1)["top_p"] == 0.4
    seeds = [sampling_seed("ab", 0, seed, attempt) for seed in range(3) for attempt in range(3)]
    assert len(set(seeds)) == 9
    assert sampling_seed("ab", 0, 1, 0) == sampling_seed("ab", 0, 1)


def test_the_least_faulty_attempt_is_kept_and_the_tokens_of_the_others_are_counted():
    kept = better_of(better_of(answer("loop", tokens=40), answer("loop", tokens=39)), answer("length", tokens=38))
    assert kept == answer("length", attempts=3, tokens=38, discarded=79)
    assert better_of(kept, answer("length", tokens=37)) == answer("length", attempts=4, tokens=38, discarded=116)
    assert better_of(kept, answer("stop", tokens=7)) == answer("stop", attempts=4, tokens=7, discarded=117)
    assert better_of(kept, replace(answer("stop", tokens=1), caption="")).caption == kept.caption, (
        "nothing is no repair"
    )
    assert failed_again(kept) == replace(kept, num_attempts=4)


# The stage with transformers, on a model made to loop


@pytest.fixture(scope="module")
def model(demo_model, tmp_path_factory) -> Path:
    return make_looping(demo_model, tmp_path_factory.mktemp("looping") / "model")


@pytest.fixture(scope="module")
def tokens(demo_model, scene_pixels) -> torch.Tensor:
    encoder = load(read_checkpoint(str(demo_model)), dtype=torch.float32, device="cpu")
    return encoder(torch.from_numpy(scene_pixels))[:, ::5].clone()


@pytest.fixture(scope="module")
def loaded(model) -> Generator:
    return Generator(
        checkpoint=read_checkpoint(str(model)),
        prompt=PromptConfig(),
        generate=GenerateConfig(max_new_tokens=48),
        prune=PruneConfig(method="none"),
        settings={},
        place=PLACE,
    )


def work(tokens: torch.Tensor, rows: range = range(IMAGES), prompts: tuple[str, ...] = (CAPTION,)) -> UnitBatch:
    images = [Image(f"id{i}", "a", i, f"{i:064x}", list(prompts), sizes=[(224, 224)]) for i in rows]
    arrays = pack([Kept(tokens[i], torch.arange(tokens.shape[1]), 256) for i in rows], 192, torch.float32)
    return UnitBatch(Unit("0123456789ab", rows.start, rows.stop, ("a",)), images=images, arrays=arrays)


@pytest.fixture
def answers(loaded, tokens, monkeypatch) -> Callable[..., list[Answer]]:
    def run(rows: range = range(IMAGES), batch_size: int = 32, **changes) -> list[Answer]:
        monkeypatch.setattr(loaded, "ladder", ladder(**changes))
        monkeypatch.setattr(loaded, "batch_size", batch_size)
        done = UnitBatch.from_row(loaded(work(tokens, rows).to_row()))
        assert (done.error, done.rejected) == (None, [])
        return [image.answers[0] for image in done.images]

    return run


def test_captions_that_loop_are_replaced_and_no_other_caption_changes(answers):
    plain, repaired = answers(retries=0), answers(retries=4)
    reasons = [before.finish_reason for before in plain]
    assert {"loop", "stop"} <= set(reasons)
    for before, after in zip(plain, repaired, strict=True):
        if before.finish_reason != "loop":
            assert after == before
        elif after.finish_reason == "loop":  # the first attempt is kept
            assert after.caption == before.caption
            assert after.num_attempts == 5
        else:
            assert after.num_discarded_tokens >= before.num_generated_tokens
            assert 1 < after.num_attempts <= 5
    assert [after.finish_reason for after in repaired].count("loop") < reasons.count("loop")


@pytest.mark.slow
def test_the_attempts_are_those_of_each_image_alone(loaded, tokens, answers):
    """The rule by hand: decode each image by itself, hotter each time, until a caption ends."""
    prompt = loaded.decoder.encode_prompt(CAPTION)
    expected = []
    for i in range(IMAGES):
        tried: list[Answer] = []
        while len(tried) < 4 and (not tried or tried[-1].finish_reason == "loop"):
            sampled = {"temperature": 0.3 * len(tried), "top_p": 0.9, "seeds": [0]} if tried else {}
            if tried:
                sampled["seeds"] = [sampling_seed(f"{i:064x}", 0, 0, len(tried))]
            [done] = loaded.decoder.generate([tokens[i]], [prompt], max_new_tokens=48, **sampled)
            tried.append(as_answer(done, 52))
        best = tried[-1] if tried[-1].finish_reason != "loop" else tried[0]
        discarded = sum(each.num_generated_tokens for each in tried) - best.num_generated_tokens
        expected.append(replace(best, num_attempts=len(tried), num_discarded_tokens=discarded))
    assert answers(retries=3) == expected
    assert max(each.num_attempts for each in expected) > 2


@pytest.mark.slow
def test_neither_the_unit_nor_the_batch_changes_a_repaired_caption(answers):
    whole = answers(retries=1)
    assert any(each.num_attempts > 1 for each in whole)
    assert answers(range(3), 2, retries=1) + answers(range(3, IMAGES), 2, retries=1) == whole


def test_a_cut_caption_is_tried_again_on_demand(answers, loaded, monkeypatch):
    monkeypatch.setattr(loaded, "requests", replace(loaded.requests, max_new_tokens=24))
    plain, again = answers(), answers(retry_cut=True)
    cut = [i for i, each in enumerate(plain) if each.finish_reason == "length"]
    assert cut
    assert all(again[i].num_attempts > 1 for i in cut)


def test_a_retry_that_fails_leaves_the_caption_as_it_was(answers, loaded, monkeypatch):
    plain, decode = answers(retries=0), loaded.decoder.generate

    def generate(*args, temperature, **options):
        if temperature > 0.4:
            raise RuntimeError("kernel failed")
        return decode(*args, temperature=temperature, **options)

    monkeypatch.setattr(loaded.decoder, "generate", generate)
    for before, after in zip(plain, answers(retries=2), strict=True):
        if after.num_attempts == 3:
            assert (after.caption, after.finish_reason) == (before.caption, "loop")


# The stage with vLLM, with an engine made to loop


class LoopingEngine:
    """Loops for as many attempts as the first number of the picture says."""

    max_length, num_slots = 400, 4

    def __init__(self, error: Exception | None = None):
        self.error, self.names = error, []
        self.asked: list[dict] = []

    async def complete(self, prompt: dict, sampling: dict, name: str) -> Generated:
        await asyncio.sleep(0)
        self.names.append(name)
        self.asked.append(sampling)
        attempt = int(name.rpartition(":")[2])
        if attempt and self.error is not None:
            raise self.error
        if attempt < float(prompt["multi_modal_data"]["image"]["image_embeds"][0, 0]):
            return Generated([20, 21] * 20, "length")
        return Generated([10 + attempt, 2], "stop")

    def kill(self) -> None:
        pass


def climbed(demo_model: Path, engine: LoopingEngine, needed: list[int], **generate) -> UnitBatch:
    """What the stage answers of images that need so many retries."""

    class Stage(VllmGenerator):
        def start_engine(self, model_path, arguments):
            return engine

        def die(self, reason):
            raise EngineDiedError(reason)

    stage = Stage(
        checkpoint=read_checkpoint(str(demo_model)),
        prompt=PromptConfig(),
        generate=GenerateConfig(max_new_tokens=40, **generate),
        engine=EngineConfig(name="vllm"),
        images=False,
        place=Place("cpu"),
    )
    visual = torch.tensor(needed, dtype=torch.float32)[:, None, None].expand(-1, 5, 192)
    return UnitBatch.from_row(asyncio.run(stage(work(visual, range(len(needed))).to_row())))


def test_vllm_climbs_the_same_ladder(demo_model):
    engine = LoopingEngine()
    done = climbed(demo_model, engine, [0, 1, 3, 9, 0], retries=3, temperature=0.2)
    answers = [image.answers[0] for image in done.images]
    assert [each.finish_reason for each in answers] == ["stop", "stop", "stop", "loop", "stop"]
    assert [each.num_attempts for each in answers] == [1, 2, 4, 4, 1]
    assert [each.num_generated_tokens for each in answers] == [2, 2, 2, 40, 2]
    assert [each.num_discarded_tokens for each in answers] == [0, 40, 120, 120, 0]
    assert len(set(engine.names)) == len(engine.names) == 12
    for name, sampling in zip(engine.names, engine.asked, strict=True):
        image, _, attempt = map(int, name.split(":")[1:])
        assert sampling["temperature"] == pytest.approx(0.2 + 0.3 * attempt)
        assert sampling["seed"] == sampling_seed(f"{image:064x}", 0, 0, attempt)


def test_with_vllm_a_retry_that_fails_leaves_the_caption_and_a_dead_engine_is_no_failed_retry(demo_model):
    done = climbed(demo_model, LoopingEngine(ValueError("refused")), [0, 1], retries=2)
    assert [(image.answers[0].finish_reason, image.answers[0].num_attempts) for image in done.images] == [
        ("stop", 1),
        ("loop", 3),
    ]
    with pytest.raises(EngineDiedError):
        climbed(demo_model, LoopingEngine(EngineDiedError("gone")), [0, 1], retries=2)
