"""The stage around vLLM's engine, with an engine that names what it was given: units overlap, faults stay put.

vLLM itself is in tests/vllm/.
"""

import asyncio
import hashlib
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from otprune.models import Checkpoint, Kept, load_prompter, read_checkpoint
from pipelines.config.keys import EngineConfig, GenerateConfig, PromptConfig
from pipelines.engines.kill_with_parent import guard
from pipelines.engines.vllm_actor import VllmGenerator
from pipelines.engines.vllm_client import EngineDiedError, Generated
from pipelines.output.unit import Unit
from pipelines.stages.batches import SYSTEMATIC
from pipelines.stages.gpu import Place
from pipelines.stages.ragged import Ragged
from pipelines.stages.token_arrays import pack
from pipelines.stages.unit_batch import Answer, Image, QuestionSet, UnitBatch
from tests.helpers import question

CAPTION = "describe the image ."
SIZE = (224, 224)
Complete = Callable[[dict[str, Any], dict[str, Any]], Any]


class FakeEngine:
    """Answers with the words for the digits of its picture's hash."""

    max_length = 400

    def __init__(self, num_slots: int = 8, complete: Complete | None = None, seconds: float = 0.001):
        self.num_slots, self.told, self.seconds = num_slots, complete, seconds
        self.sizes: list[int] = []  # visual tokens, or pictures, of each request in the engine
        self.most, self.mixed = 0, False
        self.asked: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.killed = False

    async def complete(self, prompt: dict[str, Any], sampling: dict[str, Any], name: str) -> Generated:
        pictures = prompt["multi_modal_data"]["image"]
        size = len(pictures["image_embeds"] if isinstance(pictures, dict) else pictures)
        self.sizes.append(size)
        self.most, self.mixed = max(self.most, len(self.sizes)), self.mixed or len(set(self.sizes)) > 1
        self.asked.append((prompt, sampling))
        try:
            await asyncio.sleep(self.seconds)
            if self.told and (answer := self.told(prompt, sampling)) is not None:
                return await answer if asyncio.iscoroutine(answer) else answer
        finally:
            self.sizes.remove(size)
        return Generated([*said(pictures), 2], "stop")

    def kill(self) -> None:
        self.killed = True


class DiedError(Exception):
    """Stands for the end of the process."""


class Stage(VllmGenerator):
    """The stage with a given engine; its death is an exception."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        fake: FakeEngine,
        *,
        images: bool = False,
        sampling: dict[str, Any] | None = None,
        timeout_seconds: float = 60.0,
        **generate: Any,
    ):
        self.fake = fake
        super().__init__(
            checkpoint=checkpoint,
            prompt=PromptConfig(),
            generate=GenerateConfig(**{"max_new_tokens": 40} | generate),
            engine=EngineConfig(name="vllm", sampling=sampling or {}, timeout_seconds=timeout_seconds),
            images=images,
            place=Place("cpu"),
        )

    def start_engine(self, model_path: str, arguments: dict[str, Any]) -> FakeEngine:
        return self.fake

    def die(self, reason: str):
        self.engine.kill()
        raise DiedError(reason)


@pytest.fixture(scope="module")
def prompter(demo_model):
    return load_prompter(demo_model)


@pytest.fixture
def stage(demo_model) -> Callable[..., Stage]:
    checkpoint = read_checkpoint(str(demo_model))

    def make(engine: FakeEngine | None = None, **settings: Any) -> Stage:
        return Stage(checkpoint, engine or FakeEngine(), **settings)

    return make


def said(pictures: Any) -> list[int]:
    """Token ids that name the pictures: the rows of their tokens, an engine's fields, or images."""
    if isinstance(pictures, dict):
        pictures = pictures["image_embeds"]
    data = np.ascontiguousarray(np.stack([np.asarray(picture) for picture in pictures])).tobytes()
    return [10 + int(digit, 16) for digit in hashlib.sha256(data).hexdigest()[:6]]


def tokens(n: int, k: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, 192, generator=torch.Generator().manual_seed(seed))


def unit(
    rows: Sequence[torch.Tensor] | torch.Tensor, prompts: list[list[str]] | None = None, first: int = 0
) -> UnitBatch:
    """A unit of images with these visual tokens [K, 192]."""
    unit_batch = unit_of_images(len(rows), prompts, first)
    unit_batch.arrays = pack([Kept(row, torch.arange(len(row)), 256) for row in rows], 192, torch.float32)
    return unit_batch


def unit_of_images(num_rows: int, prompts: list[list[str]] | None = None, first: int = 0) -> UnitBatch:
    prompts = prompts or [[CAPTION]] * num_rows
    images = [
        Image(f"id{i}", "a.parquet", first + i, f"{first + i:064x}", texts, sizes=[SIZE])
        for i, texts in enumerate(prompts)
    ]
    return UnitBatch(Unit("0123456789ab", first, first + len(images), ("a.parquet",)), images=images)


def run(stage: Stage, *units: UnitBatch) -> list[UnitBatch]:
    """All units at once, as Ray Data hands them to an actor."""

    async def together() -> list[dict[str, Any]]:
        return await asyncio.gather(*(stage(unit_batch.to_row()) for unit_batch in units))

    return [UnitBatch.from_row(row) for row in asyncio.run(together())]


def captions(unit_batch: UnitBatch) -> dict[int, list[str]]:
    return {image.row: [answer.caption for answer in image.answers] for image in unit_batch.images}


def test_each_image_gets_the_answer_to_its_own_tokens(stage, prompter):
    units = [unit(tokens(6, seed=s), first=10 * s) for s in range(3)]
    for unit_batch, array in zip(run(stage(), *units), (tokens(6, seed=s) for s in range(3)), strict=True):
        assert (unit_batch.error, unit_batch.arrays) == (None, {})
        expected = [[prompter.completion(0, said(array[i])).text] for i in range(6)]
        assert list(captions(unit_batch).values()) == expected
        num_prompt = 5 + sum(map(len, prompter.encode_prompt(CAPTION)))
        assert unit_batch.images[0].answers == [Answer(expected[0][0], 5, num_prompt, 7, "stop")]


def test_the_prompt_holds_one_placeholder_for_each_picture_between_its_texts(stage, prompter):
    engine, visual = FakeEngine(), tokens(3)
    unit_batch = unit(visual, [[CAPTION], [CAPTION]])
    unit_batch.images[0].question_set, unit_batch.images[0].sizes = QuestionSet([], num_pictures=2), [SIZE] * 2
    (done,) = run(stage(engine), unit_batch)
    assert [image.answers[0].num_kept_tokens for image in done.images] == [10, 5]
    (two, _), (one, _) = sorted(
        engine.asked, key=lambda asked: -len(asked[0]["multi_modal_data"]["image"]["image_rows"])
    )
    before, between, after = prompter.encode_prompt(CAPTION, num_images=2)
    image = [prompter.image_token]
    assert two["prompt_token_ids"] == before + image + between + image + after
    pictures = two["multi_modal_data"]["image"]
    assert torch.equal(pictures["image_embeds"], visual[:2].flatten(0, 1))
    assert (pictures["image_rows"].tolist(), pictures["image_lengths"].tolist()) == ([5, 5], [5, 5])
    assert pictures["image_tokens"].tolist() == image * 10
    assert one["prompt_token_ids"].count(prompter.image_token) == 1


def test_units_share_the_slots_and_never_more_than_the_engine_can_have_at_hand(stage):
    engine = FakeEngine(num_slots=8)
    run(stage(engine), *(unit(tokens(6, seed=s), first=6 * s) for s in range(5)))
    assert 8 < engine.most <= 10


def test_unequal_numbers_of_tokens_share_the_engine(stage, prompter):
    engine, given = FakeEngine(), {k: tokens(6, k, seed=k) for k in (5, 9, 3)}
    one_unit = [array[i] for i in range(2) for array in given.values()]
    units = [*(unit(array, first=10 * k) for k, array in given.items()), unit(one_unit, first=500)]
    rows = [*given.values(), one_unit]
    for unit_batch, expected in zip(run(stage(engine), *units), rows, strict=True):
        assert unit_batch.error is None
        told = [[prompter.completion(0, said(row)).text] for row in expected]
        assert list(captions(unit_batch).values()) == told
        assert [image.answers[0].num_kept_tokens for image in unit_batch.images] == [len(row) for row in expected]
    assert engine.mixed


def test_prompts_have_limits_of_their_own_and_sampling_has_seeds_of_the_image(stage):
    def ask(first: int, **settings: Any) -> list[dict[str, Any]]:
        engine = FakeEngine()
        unit_batch = unit(tokens(2), [[CAPTION, CAPTION], [CAPTION]], first=first)
        unit_batch.images[0].question_set = QuestionSet([question(max_new_tokens=n) for n in (3, 7)])
        run(stage(engine, **settings), unit_batch)
        return [sampling for _, sampling in engine.asked]

    greedy = ask(0)
    assert [sampling["max_tokens"] for sampling in greedy] == [3, 7, 40]
    assert not any("seed" in sampling for sampling in greedy)
    assert greedy[0]["stop_token_ids"] == [2]
    once, again, other = ask(0, temperature=1.0), ask(0, temperature=1.0), ask(5, temperature=1.0)
    assert len({sampling["seed"] for sampling in once}) == 3
    assert once == again
    assert not {sampling["seed"] for sampling in once} & {sampling["seed"] for sampling in other}
    (first, *_) = ask(0, sampling={"top_k": 3, "structured_outputs": {"regex": "[a-z]+"}})
    assert (first["top_k"], first["structured_outputs"]) == (3, {"regex": "[a-z]+"})


def test_a_text_cut_by_a_stop_string_is_taken_as_the_engine_cut_it(stage):
    engine = FakeEngine(complete=lambda *_: Generated([11, 12], "stop", "a red "))
    (unit_batch,) = run(stage(engine, sampling={"stop": ["."]}), unit(tokens(1)))
    done = unit_batch.images[0].answers[0]
    assert (done.caption, done.finish_reason, done.num_generated_tokens) == ("a red", "stop", 2)


def test_an_answer_that_was_cut_says_so(stage):
    engine = FakeEngine(complete=lambda *_: Generated(list(range(11, 51)), "length"))
    (unit_batch,) = run(stage(engine), unit(tokens(1)))
    assert unit_batch.images[0].answers[0].finish_reason == "length"


# Faults


def failing_on(guilty: torch.Tensor, error: Exception) -> Complete:
    def complete(prompt: dict[str, Any], _: Any) -> None:
        if said(prompt["multi_modal_data"]["image"]) == said(guilty):
            raise error

    return complete


def test_a_request_that_the_engine_refuses_rejects_its_image_alone(stage):
    array = tokens(6)
    engine = FakeEngine(complete=failing_on(array[2], ValueError("tokens must be finite\nat line 7")))
    unit_batch, other = run(stage(engine), unit(array, [[CAPTION, CAPTION]] * 6), unit(tokens(6, seed=1), first=10))
    assert [(r.row, r.reason, r.detail) for r in unit_batch.rejected] == [
        (2, "generate", "ValueError: tokens must be finite")
    ]
    assert [image.row for image in unit_batch.images] == [0, 1, 3, 4, 5]
    assert (other.error, len(other.images)) == (None, 6)


def test_a_prompt_that_does_not_fit_the_engine_is_rejected_before_it_is_asked(stage):
    engine = FakeEngine()
    (unit_batch,) = run(stage(engine), unit(tokens(3), [[CAPTION], ["a " * 400], ["b " * 400]]))
    assert [(r.row, r.reason) for r in unit_batch.rejected] == [(1, "prompt"), (2, "prompt")]
    assert len(engine.asked) == 1


def refuse_all(*_: Any) -> None:
    raise ValueError("no")


def test_when_every_image_fails_the_unit_fails(stage):
    (unit_batch,) = run(stage(FakeEngine(complete=refuse_all)), unit(tokens(SYSTEMATIC)))
    assert (unit_batch.error, unit_batch.arrays) == ("generate: ValueError: no", {})


def test_when_every_image_fails_from_the_first_on_a_small_unit_fails_too(stage):
    small = SYSTEMATIC // 2
    generator = stage(FakeEngine(complete=refuse_all))
    first, second = (run(generator, unit(tokens(small)))[0] for _ in range(2))
    assert (first.error, len(first.rejected)) == (None, small)
    assert second.error == "generate: ValueError: no"


def test_a_dead_engine_ends_the_process(stage):
    array = tokens(3)
    engine = FakeEngine(complete=failing_on(array[1], EngineDiedError("EngineCore encountered an issue")))
    with pytest.raises(DiedError, match="the engine died: EngineCore encountered an issue"):
        run(stage(engine), unit(array))
    assert engine.killed


def test_an_engine_that_hangs_is_cut_off(stage):
    async def forever() -> Generated:
        await asyncio.sleep(3600)
        raise AssertionError

    engine = FakeEngine(complete=lambda *_: forever())
    generator = stage(engine, timeout_seconds=0.4)
    start = time.monotonic()

    async def hang() -> None:
        unit_done = asyncio.create_task(generator(unit(tokens(3)).to_row()))
        await asyncio.sleep(0)
        assert generator.watchdog is not None
        async with asyncio.timeout(10):
            await generator.watchdog
        unit_done.cancel()

    with pytest.raises(DiedError, match=r"finished no request for engine\.timeout_seconds=0\.4"):
        asyncio.run(hang())
    assert engine.killed
    assert 0.4 <= time.monotonic() - start < 5


def test_an_engine_that_is_slow_but_alive_or_has_nothing_to_do_is_left_alone(stage):
    generator = stage(FakeEngine(num_slots=1, seconds=0.08), timeout_seconds=0.4)

    async def slow() -> list[UnitBatch]:
        rows = [await generator(unit(tokens(8)).to_row())]  # 0.64 s altogether
        await asyncio.sleep(0.6)
        rows.append(await generator(unit(tokens(2), first=10).to_row()))
        return [UnitBatch.from_row(row) for row in rows]

    assert [len(unit_batch.images) for unit_batch in asyncio.run(slow())] == [8, 2]


def test_a_unit_without_images_and_one_that_failed_before_pass_through(stage):
    failed = UnitBatch(Unit("0123456789ab", 0, 1, ("f",)), error="encode: gone")
    empty, passed = run(stage(), unit(tokens(0)), failed)
    assert (empty.error, empty.images, empty.arrays) == (None, [], {})
    assert (passed.error, passed.seconds) == ("encode: gone", {})


def test_the_seconds_of_units_at_work_together_add_up_to_the_actors(stage):
    start = time.perf_counter()
    done = run(stage(FakeEngine(seconds=0.05)), *(unit(tokens(6, seed=s), first=6 * s) for s in range(4)))
    wall = time.perf_counter() - start
    assert 0.1 < sum(unit_batch.seconds["generate"] for unit_batch in done) <= wall


# Whole images


def test_unpruned_the_engine_gets_the_images_themselves(stage, prompter, scene_pixels):
    engine = FakeEngine()
    unit_batch = unit_of_images(len(scene_pixels))
    unit_batch.arrays = {"pixels": Ragged.of([picture.reshape(-1) for picture in scene_pixels], np.empty(0, np.uint8))}
    unit_batch.images[1].sampled = True
    (done,) = run(stage(engine, images=True), unit_batch)
    assert {image.num_visual_tokens for image in done.images} == {256}
    pictures = [prompt["multi_modal_data"]["image"] for prompt, _ in engine.asked]
    assert all(np.array_equal(np.asarray(p[0]), pixels) for p, pixels in zip(pictures, scene_pixels, strict=True))
    assert done.images[0].answers[0].num_kept_tokens == 256
    assert done.images[0].answers[0].num_prompt_tokens == 256 + sum(map(len, prompter.encode_prompt(CAPTION)))
    sample = done.images[1].sample
    assert sample is not None
    assert (sample.kept, sample.rows, sample.columns, sample.jpeg[:4]) == (list(range(256)), 16, 16, "/9j/")


def test_an_engine_does_not_outlive_the_process_that_started_it():
    """Even killed outright: what the guard watches goes with whoever holds its pipe."""
    engine, bystander = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    holder = guard([psutil.Process(engine.pid)])
    assert holder.stdin is not None
    time.sleep(0.1)
    assert engine.poll() is None
    holder.stdin.close()  # as the kernel does when the holder dies
    assert engine.wait(20) == -signal.SIGKILL
    assert holder.wait(20) == 0
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()
