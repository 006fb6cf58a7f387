"""The generator: kept tokens and prompts to captions, each image's own, whatever batch or company it comes in."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from otprune.models import Kept, read_checkpoint
from otprune.models.llava_encoder import load
from pipelines.config.keys import GenerateConfig, PromptConfig, PruneConfig
from pipelines.engines.transformers_actor import Generator
from pipelines.output.unit import Unit
from pipelines.stages.batches import SYSTEMATIC
from pipelines.stages.gpu import Place
from pipelines.stages.token_arrays import pack
from pipelines.stages.unit_batch import Answer, Image, QuestionSet, UnitBatch
from tests.helpers import question

CAPTION = "describe the image ."
SIZE = (224, 224)
QUESTIONS = ["is there a circle ?", "how many shapes are there ?"]


@pytest.fixture(scope="module")
def loaded(demo_model):
    return make_generator(demo_model)


def make_generator(model: Path, method: str = "none", settings: dict | None = None, **generate) -> Generator:
    return Generator(
        checkpoint=read_checkpoint(str(model)),
        prompt=PromptConfig(),
        generate=GenerateConfig(**{"max_new_tokens": 40} | generate),
        prune=PruneConfig(method=method),
        settings=settings or {},
        place=Place("cpu", "float32"),
    )


@pytest.fixture
def generator(loaded, monkeypatch):
    """The loaded generator, with some settings changed for one test by calling it."""

    def change(temperature=0.0, top_p=1.0, seed=0, **settings) -> Generator:
        ladder = replace(loaded.ladder, temperature=temperature, top_p=top_p, seed=seed)
        monkeypatch.setattr(loaded, "ladder", ladder)
        for name, value in settings.items():
            monkeypatch.setattr(loaded, name, value)
        return loaded

    return change


@pytest.fixture(scope="module")
def tokens(demo_model, scene_pixels) -> torch.Tensor:
    """Every fifth token of six scenes, [6, 52, 192]."""
    return encoded(demo_model, scene_pixels)[:, ::5].clone()


def encoded(demo_model: Path, scene_pixels) -> torch.Tensor:
    encoder = load(read_checkpoint(str(demo_model)), dtype=torch.float32, device="cpu")
    return encoder(torch.from_numpy(scene_pixels))


def work_of(
    tokens: Sequence[torch.Tensor] | torch.Tensor, prompts: list[list[str]] | None = None, first: int = 0
) -> UnitBatch:
    """A unit of images with these visual tokens; an image takes one row of them, unless the test changes that."""
    prompts = prompts or [[CAPTION]] * len(tokens)
    images = [Image(f"id{i}", "a.parquet", first + i, "0" * 64, texts, sizes=[SIZE]) for i, texts in enumerate(prompts)]
    dtype = tokens[0].dtype if len(tokens) else torch.float32
    arrays = pack([Kept(row, torch.arange(len(row)), 256) for row in tokens], 192, dtype)
    unit = Unit("0123456789ab", first, first + len(tokens), ("a.parquet",))
    return UnitBatch(unit, images=images, arrays=arrays)


def about_two(image: Image) -> Image:
    """The image with prompts about two pictures."""
    image.question_set, image.sizes = QuestionSet([], num_pictures=2), [SIZE] * 2
    return image


def generated(generator: Generator, unit_batch: UnitBatch) -> UnitBatch:
    return UnitBatch.from_row(generator(unit_batch.to_row()))


def texts(unit_batch: UnitBatch) -> dict[int, list[str]]:
    return {image.row: [answer.caption for answer in image.answers] for image in unit_batch.images}


def test_captions_are_those_of_the_model_with_their_numbers(generator, tokens):
    unit_batch = generated(generator(), work_of(tokens))
    prompt = generator().decoder.encode_prompt(CAPTION)
    for image, visual in zip(unit_batch.images, tokens, strict=True):
        (expected,) = generator().decoder.generate([visual], [prompt], max_new_tokens=40)
        num_prompt = sum(map(len, prompt)) + 52
        assert image.answers == [Answer(expected.text, 52, num_prompt, expected.num_generated_tokens, "stop")]
    assert len({captions[0] for captions in texts(unit_batch).values()}) > 3
    assert (unit_batch.error, unit_batch.arrays) == (None, {})
    assert unit_batch.seconds["generate"] > 0


def test_several_prompts_share_an_encoding_and_answers_keep_their_order(generator, tokens):
    prompts = [QUESTIONS[0], CAPTION, QUESTIONS[1]]
    unit_batch = generated(generator(), work_of(tokens, [prompts] * 6))
    alone = [texts(generated(generator(), work_of(tokens, [[prompt]] * 6))) for prompt in prompts]
    assert texts(unit_batch) == {row: [answers[row][0] for answers in alone] for row in range(6)}
    assert len(unit_batch.images[0].answers) == 3


def test_images_may_have_prompts_of_their_own(generator, tokens):
    prompts = [[CAPTION], [QUESTIONS[0], QUESTIONS[1]], [QUESTIONS[1]], [CAPTION], [CAPTION], [QUESTIONS[0]]]
    unit_batch = generated(generator(), work_of(tokens, prompts))
    for i, row in enumerate(prompts):
        assert texts(generated(generator(), work_of(tokens[i : i + 1], [row], first=i)))[i] == texts(unit_batch)[i]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_batch_does_not_change_what_is_said(generator, tokens, batch_size):
    prompts = [[CAPTION, QUESTIONS[i % 2]] for i in range(6)]
    together = generated(generator(), work_of(tokens, prompts))
    assert texts(generated(generator(batch_size=batch_size), work_of(tokens, prompts))) == texts(together)


def test_images_of_unequal_numbers_of_tokens_share_a_unit_and_are_captioned_as_alone(generator, tokens):
    rows = [row[:count] for row, count in zip(tokens, (52, 7, 30, 7, 1, 52), strict=True)]
    together = generated(generator(), work_of(rows))
    assert [image.answers[0].num_kept_tokens for image in together.images] == [52, 7, 30, 7, 1, 52]
    for i, row in enumerate(rows):
        assert texts(generated(generator(), work_of([row], first=i)))[i] == texts(together)[i]


def test_bfloat16_tokens_are_taken(generator, tokens):
    unit_batch = generated(generator(), work_of(tokens.to(torch.bfloat16)))
    assert unit_batch.error is None
    rounded = generated(generator(), work_of(tokens.to(torch.bfloat16).float()))
    assert texts(unit_batch) == texts(rounded)


def test_a_prompt_without_room_for_its_answer_is_rejected_alone(generator, tokens):
    room = 1024 - 40 - 52 - len(["USER", ":", "ASSISTANT", ":", "<s>"])
    prompts = [[CAPTION], ["a " * room], ["a " * (room + 1)], [CAPTION, "a " * 2000], [CAPTION], [CAPTION]]
    unit_batch = generated(generator(), work_of(tokens, prompts))
    assert [(r.row, r.reason) for r in unit_batch.rejected] == [(2, "prompt"), (3, "prompt")]
    assert unit_batch.rejected[0].detail == "prompt must leave room for 40 new tokens: at most 984, got 985"
    assert [image.row for image in unit_batch.images] == [0, 1, 4, 5]
    assert all(image.answers for image in unit_batch.images)


def test_the_name_of_an_image_token_in_a_prompt_is_text(generator, tokens):
    unit_batch = generated(generator(), work_of(tokens[:2], [["what is <image> ?"], [CAPTION]]))
    assert unit_batch.rejected == []
    alone = generated(generator(), work_of(tokens[1:2], [[CAPTION]]))
    assert texts(unit_batch)[1] == texts(alone)[0]


def test_an_answer_that_does_not_end_is_cut_and_says_so(generator, tokens):
    requests = replace(generator().requests, max_new_tokens=4)
    unit_batch = generated(generator(requests=requests), work_of(tokens[:2]))
    assert {(a.finish_reason, a.num_generated_tokens) for i in unit_batch.images for a in i.answers} == {("length", 4)}


def test_sampling_depends_on_image_prompt_and_seed_never_on_the_unit_or_the_batch(generator, tokens):
    def sample(first: int = 0, seed: int = 0, rows: slice = slice(None), **settings) -> list[list[str]]:
        unit_batch = work_of(tokens[rows, :6], first=first)
        return list(texts(generated(generator(temperature=2.0, seed=seed, **settings), unit_batch)).values())

    once = sample()
    assert sample(first=6) == once
    assert sample(rows=slice(0, 2)) == once[:2]
    assert sample(seed=1) != once
    assert sample(seed=1) == sample(seed=1)
    twice = generated(generator(temperature=2.0), work_of(tokens[:1, :6], [[CAPTION, CAPTION]])).images[0].answers
    assert twice[0].caption != twice[1].caption


def break_on(generator: Generator, monkeypatch, guilty: torch.Tensor, error: Exception) -> None:
    """Decoding fails for every batch that holds these visual tokens."""
    decode = generator.decoder.generate

    def generate(visual, *args, **options):
        if any(torch.equal(rows, guilty) for ((rows, _),) in visual):
            raise error
        return decode(visual, *args, **options)

    monkeypatch.setattr(generator.decoder, "generate", generate)


def test_an_image_that_breaks_decoding_is_rejected_and_the_others_keep_their_captions(generator, tokens, monkeypatch):
    prompts = [[CAPTION, QUESTIONS[0]]] * 6
    expected = texts(generated(generator(), work_of(tokens, prompts)))
    break_on(generator(), monkeypatch, tokens[2], RuntimeError("kernel failed\nat line 7"))
    unit_batch = generated(generator(), work_of(tokens, prompts))
    assert [(r.row, r.reason, r.detail) for r in unit_batch.rejected] == [
        (2, "generate", "RuntimeError: kernel failed")
    ]
    assert texts(unit_batch) == {row: captions for row, captions in expected.items() if row != 2}


def test_when_every_image_fails_the_unit_fails(generator, tokens, monkeypatch):
    same = tokens[:1].expand(SYSTEMATIC, -1, -1)
    break_on(generator(), monkeypatch, tokens[0], RuntimeError("no kernel image"))
    unit_batch = generated(generator(), work_of(same))
    assert (unit_batch.error, unit_batch.arrays) == ("generate: RuntimeError: no kernel image", {})


def test_a_unit_without_images_and_one_that_failed_before_pass_through(generator, tokens):
    unit_batch = generated(generator(), work_of(tokens[:0]))
    assert (unit_batch.error, unit_batch.images, unit_batch.arrays) == (None, [], {})
    failed = UnitBatch(Unit("0123456789ab", 0, 1, ("f",)), error="encode: gone")
    unit_batch = generated(generator(), failed)
    assert (unit_batch.error, unit_batch.seconds) == ("encode: gone", {})


# Several pictures in one prompt


def test_a_question_about_two_pictures_reads_both_and_each_image_keeps_its_own(generator, tokens):
    def ask(order: list[int]) -> UnitBatch:
        unit_batch = work_of(tokens[order], [[CAPTION], [CAPTION]])
        about_two(unit_batch.images[0])
        return generated(generator(), unit_batch)

    unit_batch = ask([0, 1, 2])
    assert [image.answers[0].num_kept_tokens for image in unit_batch.images] == [104, 52]
    assert texts(unit_batch)[1] == texts(generated(generator(), work_of(tokens[2:3])))[0]
    assert texts(ask([1, 0, 2]))[0] != texts(unit_batch)[0]


def test_a_limit_of_new_tokens_may_stand_with_the_prompt_and_yields_to_the_context(generator, tokens):
    unit_batch = work_of(tokens[:2], [[CAPTION, CAPTION], ["a " * 960]])
    unit_batch.images[0].question_set = QuestionSet([question(max_new_tokens=n) for n in (3, 5)])
    unit_batch.images[1].question_set = QuestionSet([question(max_new_tokens=100)])
    unit_batch = generated(generator(), unit_batch)
    assert [answer.num_generated_tokens for answer in unit_batch.images[0].answers] == [3, 5]
    (cut,) = unit_batch.images[1].answers
    assert cut.num_prompt_tokens + 100 > 1024 >= cut.num_prompt_tokens + cut.num_generated_tokens


# Methods inside the model


@pytest.fixture(scope="module")
def all_tokens(demo_model, scene_pixels) -> torch.Tensor:
    return encoded(demo_model, scene_pixels).clone()


INSIDE = {
    "fastv": {"layer": 2, "kept": 256},
    "vtw": {"layer": 4},
    "fitprune": {"recipe": {1: 0}},
    "pyramiddrop": {"stages": {1: 256}},
}


@pytest.mark.slow
@pytest.mark.parametrize("method", INSIDE)
def test_a_method_inside_the_model_that_keeps_everything_captions_as_without(demo_model, generator, all_tokens, method):
    prompts = [[CAPTION, QUESTIONS[0]], [QUESTIONS[1]]] * 3
    inside = make_generator(demo_model, method, INSIDE[method])
    unit_batch = generated(inside, work_of(all_tokens, prompts))
    assert (unit_batch.error, unit_batch.rejected) == (None, [])
    plain = generated(generator(), work_of(all_tokens, prompts))
    assert [image.answers for image in unit_batch.images] == [image.answers for image in plain.images]


@pytest.mark.slow
def test_a_method_inside_the_model_samples_as_without(demo_model, generator, all_tokens):
    sampled = {"temperature": 2.0, "top_p": 0.9}
    inside = make_generator(demo_model, "vtw", {"layer": 4}, **sampled)
    unit_batch = generated(inside, work_of(all_tokens))
    assert texts(unit_batch) == texts(generated(generator(**sampled), work_of(all_tokens)))
    assert texts(unit_batch) != texts(generated(generator(), work_of(all_tokens)))


def test_a_method_inside_the_model_counts_the_tokens_of_its_layers_on_average(demo_model, all_tokens):
    inside = make_generator(demo_model, "fastv", {"layer": 1, "kept": 16})
    (answer,) = generated(inside, work_of(all_tokens[:1])).images[0].answers
    assert answer.num_kept_tokens == (256 + 3 * 16) / 4
    assert answer.num_prompt_tokens > 256


def test_a_method_inside_the_model_takes_one_image_a_prompt(demo_model, all_tokens):
    inside = make_generator(demo_model, "vtw", {"layer": 2})
    unit_batch = work_of(all_tokens[:3])
    unit_batch.images = [about_two(unit_batch.images[0]), unit_batch.images[2]]
    done = generated(inside, unit_batch)
    assert [(rejected.id, rejected.reason) for rejected in done.rejected] == [("id0", "prompt")]
    assert "vtw takes prompts with one image, got 2" in done.rejected[0].detail
    assert len(done.images) == 1
