"""The span plugin with Qwen3.5, most of whose layers have linear attention.

vLLM's CPU build runs these layers in bfloat16 alone, and the references are float32 with the same weights. How far
apart the two may be is not guessed: transformers itself answers in bfloat16, and vLLM may be twice as far away.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.vllm import tiny
from tests.vllm.references import RATIOS, Case, Picture, case, picture, stock_answer
from tests.vllm.span_engine import ask, start, stop

pytestmark = pytest.mark.timeout(600)


@dataclass(frozen=True)
class Distance:
    """How far an answer is from its reference."""

    first: float  # largest difference of a log-probability among the five likeliest first words
    margin: float  # how much likelier the reference's word is where the answer has its first other word; 0: nowhere


def distance(reference: Case, tokens: list[int], likely: dict[int, float]) -> Distance:
    """`likely` holds the log-probabilities of the answer's first word, at least of the five likeliest."""
    first = max(abs(value - float(reference.logprobs[0, i])) for i, value in likely.items())
    for step, (ours, theirs) in enumerate(zip(reference.tokens, tokens, strict=True)):
        if ours != theirs:
            return Distance(first, float(reference.logprobs[step, ours] - reference.logprobs[step, theirs]))
    return Distance(first, 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("qwen3_5")


@pytest.fixture(scope="module")
def model(folder) -> Any:
    return tiny.make("qwen3_5", folder)


@pytest.fixture(scope="module")
def pictures(model) -> list[Picture]:
    return [picture(model, number) for number in range(4)]


@pytest.fixture(scope="module")
def cases(model, pictures) -> list[Case]:
    """Each picture at three retentions, and two pictures in one prompt."""
    return [case(model, shown, ratio) for shown, ratio in prompts(pictures)]


@pytest.fixture(scope="module")
def noise(model, pictures, cases) -> list[Distance]:
    """Of transformers in bfloat16."""
    rounded = tiny.HYBRID["qwen3_5"]().eval()
    rounded.load_state_dict(model.state_dict())
    shown = [replace(each, rows=each.rows.bfloat16()) for each in pictures]
    answers = [case(rounded.bfloat16(), some, ratio) for some, ratio in prompts(shown)]
    return [
        distance(each, answer.tokens, five(answer.logprobs[0])) for each, answer in zip(cases, answers, strict=True)
    ]


@pytest.fixture(scope="module")
def engine(model, folder) -> Iterator[Any]:
    running = start(folder, dtype="bfloat16")
    yield running
    stop(running)


def prompts(pictures: list[Picture]) -> list[tuple[list[Picture], float]]:
    return [*(([each], ratio) for each in pictures for ratio in RATIOS), (pictures[1:3], 0.5)]


def five(logprobs: Tensor) -> dict[int, float]:
    values, tokens = logprobs.float().topk(5)
    return dict(zip(tokens.tolist(), values.tolist(), strict=True))


def answered(engine: Any, asked: list[Case], cases: list[Case]) -> list[Distance]:
    outputs = ask(engine, asked)
    return [
        distance(each, list(output.token_ids), {i: one.logprob for i, one in output.logprobs[0].items()})
        for output, each in zip(outputs, cases, strict=True)
    ]


def assert_as_near(found: list[Distance], noise: list[Distance]) -> None:
    assert median(each.first for each in found) <= 2 * median(each.first for each in noise)
    assert max(each.first for each in found) <= 2 * max(each.first for each in noise)
    assert max(each.margin for each in found) <= 2 * max(each.first for each in noise)


def test_the_references_of_whole_pictures_are_transformers_own_answers(model, pictures, cases):
    whole = [each for each in cases if each.whole]
    assert [each.tokens for each in whole] == [stock_answer(model, [each]) for each in pictures]
    assert len({tuple(each.tokens) for each in cases}) == len(cases)


def test_any_numbers_of_tokens_in_one_step_are_answered_as_by_transformers(engine, cases, noise):
    assert_as_near(answered(engine, cases, cases), noise)
    assert_as_near(answered(engine, cases, cases), noise)  # what vLLM's caches hold by now


def test_wrong_positions_give_other_answers(engine, cases, noise):
    """Though only half of the layers read positions."""
    counted = [
        replace(
            each,
            fields=each.fields
            | {
                "image_positions": torch.arange(len(each.fields["image_tokens"]))[:, None].expand(-1, 3).contiguous(),
                "image_extents": each.fields["image_lengths"],
            },
        )
        for each in cases[:-1]
    ]
    found = answered(engine, counted, cases[:-1])
    assert median(each.first for each in found) > 4 * median(each.first for each in noise)


def test_a_prefill_in_chunks_is_answered_as_by_transformers(engine, model, folder, cases, noise):
    """Last, because an engine that stops in this process takes the groups of the other along."""
    small = start(folder, dtype="bfloat16", max_num_batched_tokens=32, max_num_seqs=4)
    try:
        assert_as_near(answered(small, cases, cases), noise)
    finally:
        stop(small)
