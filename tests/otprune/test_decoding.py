"""The decoding loop beside transformers' own, and its sampling beside the definition of nucleus sampling."""

from collections import Counter
from collections.abc import Container
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from otprune.layerwise import steps
from otprune.models import decoding
from otprune.models.decoding import decode, draw

END = [1, 2, 3, 4]  # of 24 tokens: answers end at many lengths


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_model()


@pytest.fixture(scope="module")
def prompts() -> tuple[torch.Tensor, torch.Tensor]:
    return make_prompts()


def make_model(model_class=LlamaForCausalLM, config_class=LlamaConfig, **settings):
    torch.manual_seed(0)
    config = config_class(
        vocab_size=24, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, **settings,
    )  # fmt: skip
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.dim() > 1 else 1)  # decided answers, which end at different lengths
    return model


def make_prompts() -> tuple[torch.Tensor, torch.Tensor]:
    """16 left-padded prompts of 3 to 18 tokens."""
    embeds = torch.randn(16, 18, 32, generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(18) >= 18 - torch.arange(3, 19)[:, None]).long()
    return embeds * mask[..., None], mask


class Looks(TorchDispatchMode):
    """Counts the calls for which a GPU's host would wait."""

    NAMES = ("aten::is_nonzero", "aten::_local_scalar_dense", "aten::nonzero")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.name() in self.NAMES
        return func(*args, **(kwargs or {}))


@contextmanager
def nan_for_rows_that_see_nothing(monkeypatch):
    """SDPA as some CUDA kernels compute it; yields the masks that it was given."""
    attend, masks = torch.nn.functional.scaled_dot_product_attention, []

    def spoilt(query, key, value, attn_mask=None, **options):
        masks.append(attn_mask)
        out = attend(query, key, value, attn_mask=attn_mask, **options)
        return out if attn_mask is None else out.masked_fill(~attn_mask.any(-1, keepdim=True), torch.nan)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spoilt)
        yield masks


@contextmanager
def broken_logits(model, monkeypatch, at: Container[int], rows: list[int], value: float = torch.nan):
    """At the calls `at` of the model, its logits for one token are `value` in `rows`."""
    calls, forward = Counter(), model.lm_head.forward

    def spoilt(hidden):
        logits = forward(hidden)
        if calls["model"] in at:
            logits[rows, ..., 5] = value
        calls["model"] += 1
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(model.lm_head, "forward", spoilt)
        yield calls


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


def test_no_row_of_a_mask_is_empty(model, prompts, monkeypatch):
    """So a kernel that makes NaN of an empty row changes no answer."""
    options = {"max_new_tokens": 20, "end_tokens": END}
    expected = decode(model, *prompts, **options)
    with nan_for_rows_that_see_nothing(monkeypatch) as masks:
        assert decode(model, *prompts, **options) == expected
    assert masks[0].shape == (16, 1, 18, 18)
    assert masks[-1].shape[2] == 1
    assert all(mask.any(-1).all() for mask in masks)


def test_without_padding_there_is_no_mask(model, prompts, monkeypatch):
    embeds, _ = prompts
    full = embeds, torch.ones(16, 18, dtype=torch.long)
    with nan_for_rows_that_see_nothing(monkeypatch) as masks:
        ours = decode(model, *full, max_new_tokens=20, end_tokens=END)
    assert set(masks) == {None}
    assert ours == generated(model, *full, 20)


@pytest.mark.parametrize(
    "settings",
    [
        {"model_class": MistralForCausalLM, "config_class": MistralConfig, "sliding_window": 6},
        {"attn_implementation": "eager"},
    ],
)
def test_models_that_need_masks_of_their_own_get_them(prompts, settings):
    model = make_model(**settings)
    assert decoding.needs_2d_mask(model.config)
    assert decode(model, *prompts, max_new_tokens=20, end_tokens=END) == generated(model, *prompts, 20)


@pytest.mark.parametrize("padded", [True, False])
def test_a_gpu_is_looked_at_once_in_some_steps(model, prompts, monkeypatch, padded):
    monkeypatch.setattr(decoding, "check_every", lambda device: steps.CHECK_EVERY)
    embeds, mask = prompts
    with Looks() as looks:
        decode(model, embeds, mask if padded else torch.ones_like(mask), max_new_tokens=17, end_tokens=[999])
    assert looks.count <= 1 + 17 // steps.CHECK_EVERY  # the first asks whether there is padding


def test_looking_seldom_changes_no_answer(model, prompts, monkeypatch):
    for options in ({}, {"seeds": range(16), "temperature": 1.3, "top_p": 0.9}):
        expected = decode(model, *prompts, max_new_tokens=40, end_tokens=END, **options)
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "check_every", lambda device: steps.CHECK_EVERY)
            assert decode(model, *prompts, max_new_tokens=40, end_tokens=END, **options) == expected


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("sampling", [{}, {"seeds": range(16), "temperature": 1.3, "top_p": 0.9}])
@pytest.mark.parametrize(("step", "ends"), [(0, END), (3, [])])
def test_logits_that_are_not_finite_give_no_answer(model, prompts, monkeypatch, value, sampling, step, ends):
    options = {"max_new_tokens": 6, "end_tokens": ends, **sampling}
    with (
        broken_logits(model, monkeypatch, [step], [2, 7], value),
        pytest.raises(FloatingPointError, match="not finite in 2 of 16 prompts"),
    ):
        decode(model, *prompts, **options)


def test_a_batch_without_any_finite_logits_ends_at_once(model, prompts, monkeypatch):
    with broken_logits(model, monkeypatch, [0], list(range(16))) as calls:
        with pytest.raises(FloatingPointError, match="16 of 16"):
            decode(model, *prompts, max_new_tokens=40, end_tokens=END)
        assert calls["model"] == 1


def test_a_token_that_is_ruled_out_is_no_broken_logit(model, prompts, monkeypatch):
    with broken_logits(model, monkeypatch, range(4), list(range(16)), -torch.inf):
        answers = decode(model, *prompts, max_new_tokens=4, end_tokens=[])
    assert not any(5 in row for row in answers)


def test_what_follows_an_answer_may_be_broken(model, prompts, monkeypatch):
    """Its row is still computed until it leaves the batch."""
    monkeypatch.setattr(decoding, "check_every", lambda device: 1000)
    options = {"max_new_tokens": 20, "end_tokens": END}
    expected = decode(model, *prompts, **options)
    row = min(range(16), key=lambda row: len(expected[row]))
    with broken_logits(model, monkeypatch, range(len(expected[row]), 20), [row]):
        assert decode(model, *prompts, **options) == expected


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
