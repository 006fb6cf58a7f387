"""The span plugin with Qwen3.5, most of whose layers have linear attention.

vLLM's CPU build runs these layers in bfloat16 alone, and the references are float32 with the same weights. So an answer
is compared up to its first word that is another: until there the log-probabilities agree within NOISE, and there the two
words are as likely as each other within NOISE.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.vllm import tiny
from tests.vllm.references import RATIOS, Case, case, picture, stock_answer
from tests.vllm.span_engine import ask, start, stop

NOISE = 0.3

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("qwen3_5")


@pytest.fixture(scope="module")
def model(folder) -> Any:
    return tiny.make("qwen3_5", folder)


@pytest.fixture(scope="module")
def cases(model) -> list[Case]:
    pictures = [picture(model, number) for number in range(4)]
    pair = case(model, pictures[1:3], 0.5)
    return [case(model, [each], ratio) for each in pictures for ratio in RATIOS] + [pair]


@pytest.fixture(scope="module")
def engine(model, folder) -> Iterator[Any]:
    running = start(folder, dtype="bfloat16")
    yield running
    stop(running)


def compare(outputs: Sequence[Any], cases: Sequence[Case]) -> tuple[list[float], list[int]]:
    """(largest difference of a log-probability, equal words) of each answer up to its first word that is another."""
    differences, lengths = [], []
    for output, each in zip(outputs, cases, strict=True):
        far, equal = 0.0, 0
        for step, (likely, token) in enumerate(zip(output.logprobs, output.token_ids, strict=True)):
            far = max(far, *(abs(one.logprob - float(each.logprobs[step, i])) for i, one in likely.items()))
            if token != each.tokens[step]:
                break
            equal += 1
        differences.append(far)
        lengths.append(equal)
    return differences, lengths


def test_the_references_of_whole_pictures_are_transformers_own_answers(model, cases):
    whole = [each for each in cases if each.whole]
    assert [each.tokens for each in whole] == [stock_answer(model, [picture(model, n)]) for n in range(4)]
    assert len({tuple(each.tokens) for each in cases}) == len(cases)


def test_any_numbers_of_tokens_in_one_step_are_answered_as_by_transformers(engine, cases):
    print(compare(ask(engine, cases), cases))
    print(compare(ask(engine, cases), cases))
    pruned = [each for each in cases if not each.whole and len(each.fields["image_rows"]) == 1]
    wrong = [
        replace(
            each,
            fields=each.fields
            | {
                "image_positions": torch.arange(len(each.fields["image_tokens"]))[:, None].expand(-1, 3).contiguous(),
                "image_extents": each.fields["image_lengths"],
            },
        )
        for each in pruned
    ]
    print(compare(ask(engine, wrong), pruned))
