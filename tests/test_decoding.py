"""The decoding loop beside transformers' own, and its sampling beside the definition of nucleus sampling."""

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from otprune.models.decoding import decode, draw

END = [1, 2, 3, 4]  # of 24 tokens: answers end at many lengths


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_model()


@pytest.fixture(scope="module")
def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    return make_prompts()


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)  # decided answers, which end at different lengths
    return model


def make_prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """16 left-padded prompts of 3 to 18 tokens."""
    embeds = torch.randn(16, 18, 32, generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(18) >= 18 - torch.arange(3, 19)[:, None]).long()
    return embeds * mask[..., None], mask


def generated(model, embeds, mask, max_new_tokens: int) -> list[list[int]]:
    config = GenerationConfig(max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=END, pad_token_id=0)
    ids = model.generate(inputs_embeds=embeds, attention_mask=mask, generation_config=config)
    return [until_end(row) for row in ids.tolist()]


def until_end(row: list[int]) -> list[int]:
    return row[: next((i + 1 for i, token in enumerate(row) if token in END), len(row))]


@pytest.mark.parametrize("max_new_tokens", [1, 2, 40])
def test_greedy_answers_are_those_of_transformers(model, prompts, max_new_tokens):
    ours = decode(model, *prompts, max_new_tokens=max_new_tokens, end_tokens=END)
    assert ours == generated(model, *prompts, max_new_tokens)
    if max_new_tokens == 40:
        lengths = {len(row) for row in ours}
        assert len(lengths) > 4, "all answers end at once: nothing leaves the batch"
        assert all(row == until_end(row) for row in ours)


def test_finished_rows_leave_the_batch(model, prompts, monkeypatch):
    sizes, forward = [], model.forward
    monkeypatch.setattr(
        model, "forward", lambda **inputs: sizes.append(len(inputs["attention_mask"])) or forward(**inputs)
    )
    answers = decode(model, *prompts, max_new_tokens=40, end_tokens=END)
    longest = max(map(len, answers))
    assert len(sizes) == longest
    for step, size in enumerate(sizes):
        open_rows = sum(len(answer) > step for answer in answers)
        assert open_rows <= size
        assert open_rows > 0.75 * size - 1, (step, size, open_rows)


def test_without_end_tokens_every_answer_has_its_full_length(model, prompts):
    assert {len(row) for row in decode(model, *prompts, max_new_tokens=7, end_tokens=[])} == {7}


def test_an_answer_does_not_depend_on_its_neighbours(model, prompts):
    embeds, mask = prompts
    options = {"max_new_tokens": 20, "end_tokens": END, "temperature": 1.3, "top_p": 0.9}
    together = decode(model, embeds, mask, seeds=range(16), **options)
    for i in (0, 7, 15):
        assert decode(model, embeds[i : i + 1], mask[i : i + 1], seeds=[i], **options) == [together[i]]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.8), (2.0, 0.3)])
def test_draws_follow_the_nucleus(temperature, top_p):
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(2)) * 2
    probabilities = (logits[0].double() / temperature).softmax(0)
    nucleus, mass = [], 0.0
    for token in probabilities.argsort(descending=True).tolist():  # the smallest set of mass top_p, by the definition
        nucleus.append(token)
        mass += probabilities[token].item()
        if mass >= top_p:
            break
    expected = torch.zeros(12, dtype=torch.float64)
    expected[nucleus] = probabilities[nucleus] / probabilities[nucleus].sum()
    uniform = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000  # evenly spread: frequencies without noise
    picks = draw(logits.expand(4000, -1), temperature, top_p, uniform)
    torch.testing.assert_close(picks.bincount(minlength=12) / 4000, expected, atol=1e-3, rtol=0, check_dtype=False)


def test_the_ends_of_the_unit_interval_draw_the_first_and_the_last_of_the_nucleus():
    logits = torch.tensor([[0.0, 2.0, 1.0, -5.0]])
    assert draw(logits, 1.0, 0.9, torch.tensor([0.0], dtype=torch.float64)).item() == 1
    assert draw(logits, 1.0, 0.9, torch.tensor([1.0], dtype=torch.float64).nextafter(torch.tensor(0.0))).item() == 2
