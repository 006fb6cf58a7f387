"""The in-LLM executor against a model that only hides tokens, against transformers, and against itself alone."""

import inspect

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from otprune.layerwise import KeepAll, executor, generate_layerwise, prefill_logits, steps
from otprune.layerwise.executor import prefill
from otprune.layerwise.layout import pad_prompts
from otprune.layerwise.policy import keep_top
from otprune.methods import METHODS, InModel, get_method
from otprune.methods.fastv import FastV
from otprune.methods.fitprune import FitPrune
from otprune.methods.pyramiddrop import PyramidDrop
from otprune.methods.vtw import VTW
from tests import llama_oracle
from tests.llama_oracle import WIDTH, tiny_model
from tests.otprune.test_decoding import Looks, broken_logits, nan_for_rows_that_see_nothing

SPANS = [(3, 15), (0, 12), (5, 17), (1, 13)]  # one image behind nothing
LENGTHS = [21, 13, 30, 18]

CASES = {
    "fastv": (FastV, {"layer": 2, "kept": 4}),
    "fastv-1": (FastV, {"layer": 1, "kept": 11}),
    "vtw": (VTW, {"layer": 2}),
    "vtw-0": (VTW, {"layer": 0}),
    "fitprune": (FitPrune, {"recipe": {0: 5, 1: 3, 3: 1}}),
    "pyramiddrop": (PyramidDrop, {"stages": {0: 10, 1: 6, 3: 2}}),
    "pyramiddrop-original": (PyramidDrop, {"stages": {0: 10, 1: 6, 3: 2}, "positions": "original"}),
}


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, WIDTH, generator=generator) for length in LENGTHS]


def oracle(model, name, rows, span, num_prompt):
    method, settings = name.split("-")[0], {k: v for k, v in CASES[name][1].items() if k != "positions"}
    rule = getattr(llama_oracle, f"{method}_rule")(range(*span), num_prompt - 1, **settings)
    return llama_oracle.forward(model, rows, rule, renumber=name == "pyramiddrop")


def test_the_oracle_is_the_model(model, prompts):
    expected = model(inputs_embeds=prompts[0][None]).logits[0].double()
    torch.testing.assert_close(llama_oracle.forward(model, prompts[0])[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_deleting_a_token_is_hiding_it_from_later_layers(model, prompts, name):
    """A ragged batch; logits are about 10 in size, and float32 against float64 differs by about 1e-5."""
    policy, settings = CASES[name]
    logits = prefill_logits(model, prompts, SPANS, policy(**settings))
    for rows, span, row in zip(prompts, SPANS, logits, strict=True):
        expected, _ = oracle(model, name, rows, span, len(rows))
        torch.testing.assert_close(row.double(), expected[-1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_what_is_deleted_is_what_the_method_says(model, prompts, name):
    policy, settings = CASES[name]
    layouts = prefill(model, prompts, SPANS, policy(**settings)).layouts
    for b, (rows, span) in enumerate(zip(prompts, SPANS, strict=True)):
        _, deleted = oracle(model, name, rows, span, len(rows))
        for layout, gone in zip(layouts, deleted, strict=False):  # the event after the last layer changes no layout
            left = [i for i in range(len(rows)) if i not in gone]
            renumbered = list(range(len(left))) if name == "pyramiddrop" else left
            assert layout.position[b, layout.valid[b]].tolist() == renumbered
            assert layout.end[b] == (len(left) if name == "pyramiddrop" else len(rows))


@pytest.mark.parametrize("name", CASES)
def test_decoding_goes_on_behind_the_prompt_and_sees_what_was_kept(model, prompts, name):
    """Teacher forcing through the oracle, where nothing is ever cached, gives the same greedy answer. Where a stage
    numbers its rows anew, a new token has another position in every stage."""
    policy, settings = CASES[name]
    answers = generate_layerwise(model, prompts, SPANS, policy(**settings), max_new_tokens=6)
    for rows, span, answer in zip(prompts, SPANS, answers, strict=True):
        spoken = model.get_input_embeddings()(torch.tensor(answer[:-1]))
        logits, _ = oracle(model, name, torch.cat([rows, spoken]), span, len(rows))
        assert logits[len(rows) - 1 :].argmax(dim=-1).tolist() == answer


@pytest.mark.parametrize("name", CASES)
def test_a_left_padded_batch_equals_its_prompts_alone(model, prompts, name):
    policy = CASES[name][0](**CASES[name][1])
    together = generate_layerwise(model, prompts, SPANS, policy, max_new_tokens=6)
    alone = [
        generate_layerwise(model, [rows], [span], policy, max_new_tokens=6)[0]
        for rows, span in zip(prompts, SPANS, strict=True)
    ]
    assert together == alone
    logits = torch.cat([prefill_logits(model, [r], [s], policy) for r, s in zip(prompts, SPANS, strict=True)])
    torch.testing.assert_close(prefill_logits(model, prompts, SPANS, policy), logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_every_layer_caches_what_the_cost_model_says(model, prompts, name):
    policy, settings = CASES[name]
    state = prefill(model, prompts[:1], SPANS[:1], policy(**settings))
    rows = get_method(name.split("-")[0]).visual_rows(12, 4, **settings)
    assert state.cache.lengths == [LENGTHS[0] - 12 + attention for attention, _ in rows]


def test_a_policy_takes_the_settings_that_its_cost_is_counted_from():
    for method in METHODS.values():
        if isinstance(method, InModel):
            assert set(method.scheduled_by) <= set(inspect.signature(method.policy).parameters)


def test_among_equal_scores_the_earlier_tokens_stay(prompts):
    _, layout = pad_prompts(prompts[:2], SPANS[:2])
    keep = keep_top(torch.zeros(2, LENGTHS[0]), layout, [4, 1])
    assert [layout.position[b, keep[b]].tolist() for b in range(2)] == [[3, 4, 5, 6], [0]]


def test_images_of_different_sizes_keep_their_own_share(model, prompts):
    spans = [(3, 15), (0, 6), (5, 27), (1, 11)]
    layouts = prefill(model, prompts, spans, FastV(layer=2, retention=0.5)).layouts
    assert layouts[1].num_image == [12, 6, 22, 10]
    assert layouts[2].num_image == [6, 3, 11, 5]


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [("llama", {}), ("mistral", {"sliding_window": None}), ("qwen2", {}), ("qwen3", {})],
)
def test_keeping_everything_is_the_model_itself(model_type, settings, prompts):
    model = tiny_model(model_type, **settings)
    embeds = pad_sequence(prompts, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones(len(rows)) for rows in prompts], batch_first=True, padding_side="left").long()
    expected = model.generate(
        inputs_embeds=embeds,
        attention_mask=mask,
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    ).tolist()
    for policy in (KeepAll(), FastV(layer=2, kept=12), VTW(layer=4), FitPrune(recipe={}), PyramidDrop(stages={1: 12})):
        assert generate_layerwise(model, prompts, SPANS, policy, max_new_tokens=8) == expected


@pytest.mark.parametrize("model_type", ["mistral", "qwen2", "qwen3"])
def test_other_families_show_their_own_attention(model_type, prompts):
    """FastV's row and FitPrune's matrix against the eager attention of the same weights."""
    from otprune.layerwise.attention import headmax, last_row
    from otprune.layerwise.cache import LayerCache
    from otprune.layerwise.executor import run_layers

    model = tiny_model(model_type, **({"sliding_window": None} if model_type == "mistral" else {}))
    hidden, layout = pad_prompts(prompts[:1], SPANS[:1])
    run_layers(model, hidden, layout, KeepAll(), cache := LayerCache(4, room=0))
    rotary, first = model.model.rotary_emb(hidden, layout.position), model.model.layers[0]
    model.set_attn_implementation("eager")
    expected = model(inputs_embeds=hidden, output_attentions=True).attentions[0]
    for keys in (cache.keys(0), None):
        row = last_row(first, hidden, rotary, layout, keys)
        torch.testing.assert_close(row, expected[:, :, -1].mean(dim=1), atol=1e-5, rtol=0)
    matrix = headmax(first, hidden, rotary, layout, cache.keys(0))
    torch.testing.assert_close(matrix, expected.amax(dim=1), atol=1e-5, rtol=0)


def test_bfloat16_keeping_everything_is_the_model_itself(prompts):
    model = tiny_model().bfloat16()
    rows = prompts[0].bfloat16()
    expected = model(inputs_embeds=rows[None]).logits[:, -1]
    torch.testing.assert_close(prefill_logits(model, [rows], SPANS[:1]), expected, atol=0, rtol=0)
    assert len(generate_layerwise(model, [rows], SPANS[:1], FastV(layer=2, kept=3), max_new_tokens=4)[0]) == 4


def test_an_answer_ends_with_its_end_token_and_the_others_go_on(model, prompts):
    policy = FastV(layer=2, kept=4)
    free = generate_layerwise(model, prompts, SPANS, policy, max_new_tokens=10)
    end = next(token for token in free[0][1:] if token != free[0][0])
    expected = [ids[: ids.index(end) + 1] if end in ids else ids for ids in free]
    assert generate_layerwise(model, prompts, SPANS, policy, max_new_tokens=10, end_tokens=[end]) == expected
    assert len(expected[0]) < 10
    first_tokens = {ids[0] for ids in free}
    ended = generate_layerwise(model, prompts, SPANS, policy, max_new_tokens=10, end_tokens=first_tokens)
    assert ended == [ids[:1] for ids in free]


def test_a_gpu_is_looked_at_once_in_some_steps(model, prompts, monkeypatch):
    policy = FastV(layer=2, kept=4)
    with Looks() as before:
        prefill(model, prompts, SPANS, policy)
    monkeypatch.setattr(executor, "check_every", lambda device: steps.CHECK_EVERY)
    with Looks() as looks:
        generate_layerwise(model, prompts, SPANS, policy, max_new_tokens=17, end_tokens=[999])
    assert looks.count - before.count <= 17 // steps.CHECK_EVERY


def test_looking_seldom_changes_no_answer(model, prompts, monkeypatch):
    policy = FastV(layer=2, kept=4)
    free = generate_layerwise(model, prompts, SPANS, policy, max_new_tokens=20)
    for ends in ([ids[3] for ids in free], [free[0][2]], [ids[0] for ids in free]):
        expected = generate_layerwise(model, prompts, SPANS, policy, max_new_tokens=20, end_tokens=ends)
        with monkeypatch.context() as patch:
            patch.setattr(executor, "check_every", lambda device: steps.CHECK_EVERY)
            assert generate_layerwise(model, prompts, SPANS, policy, max_new_tokens=20, end_tokens=ends) == expected


@pytest.mark.parametrize("name", CASES)
def test_no_row_of_a_mask_is_empty(model, prompts, monkeypatch, name):
    policy, settings = CASES[name]
    expected = generate_layerwise(model, prompts, SPANS, policy(**settings), max_new_tokens=4)
    with nan_for_rows_that_see_nothing(monkeypatch) as masks:
        assert generate_layerwise(model, prompts, SPANS, policy(**settings), max_new_tokens=4) == expected
    assert all(mask is None or mask.any(-1).all() for mask in masks)
    assert any(mask is not None for mask in masks)


@pytest.mark.parametrize(("step", "broken"), [(0, [1]), (3, [0, 2])])
def test_logits_that_are_not_finite_give_no_answer(model, prompts, monkeypatch, step, broken):
    with (
        broken_logits(model, monkeypatch, [step], broken),
        pytest.raises(FloatingPointError, match=f"not finite in {len(broken)} of 4 prompts"),
    ):
        generate_layerwise(model, prompts, SPANS, FastV(layer=2, kept=4), max_new_tokens=6)


@pytest.mark.parametrize(
    ("span", "message"),
    [
        ((4, 4), "must hold an image"),
        ((5, 2), "must hold an image"),
        ((-1, 4), "inside its prompt"),
        ((3, 21), "text behind it"),
        ((3, 40), "inside its prompt"),
    ],
)
def test_a_prompt_is_text_around_an_image(model, prompts, span, message):
    with pytest.raises(ValueError, match=message):
        prefill_logits(model, prompts[:1], [span])


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (lambda: FastV(layer=5, kept=1), r"layer must be in \[1, 4\]"),
        (lambda: FastV(layer=0, kept=1), r"layer must be in \[1, 4\]"),
        (lambda: FastV(layer=2, kept=13), r"must be in \[0, 12\].*got 13"),
        (lambda: FastV(layer=2, kept=0), "kept must be at least 1"),
        (lambda: FastV(layer=2), "kept or retention"),
        (lambda: FastV(layer=2, kept=1, retention=0.5), "kept or retention"),
        (lambda: FastV(layer=2, retention=1.5), "retention must be in"),
        (lambda: VTW(layer=-1), r"layer must be in \[0, 4\]"),
        (lambda: VTW(layer=5), r"layer must be in \[0, 4\]"),
        (lambda: FitPrune(recipe={4: 1}), "recipe must name layers"),
        (lambda: FitPrune(recipe={1: -1}), "recipe must delete 0 tokens or more"),
        (lambda: FitPrune(recipe={0: 7, 1: 6}), r"must be in \[0, 5\].*got -1"),
        (lambda: PyramidDrop(stages={4: 1}), "stages must start at layers"),
        (lambda: PyramidDrop(stages={1: 4, 2: 5}), r"must be in \[0, 4\].*got 5"),
    ],
)
def test_settings_that_do_not_fit_are_named(model, prompts, policy, message):
    with pytest.raises(ValueError, match=message):
        prefill_logits(model, prompts[:1], SPANS[:1], policy())


@pytest.mark.parametrize(
    ("events", "message"),
    [({-1: "last_row"}, "cannot see"), ({3: "next_row"}, "cannot see"), ({4: "none"}, "must come after layers")],
)
def test_a_policy_can_only_ask_for_what_there_is(model, prompts, events, message):
    class Wrong(KeepAll):
        def events(self, num_layers):
            return events

    with pytest.raises(ValueError, match=message):
        prefill_logits(model, prompts[:1], SPANS[:1], Wrong())


def test_calls_that_make_no_sense_are_refused(model, prompts):
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got 0"):
        generate_layerwise(model, prompts, SPANS, KeepAll(), max_new_tokens=0)
    with pytest.raises(ValueError, match="equally many, got 4 and 1"):
        prefill_logits(model, prompts, SPANS[:1])
    with pytest.raises(ValueError, match="equally many, got 0 and 0"):
        prefill_logits(model, [], [])
    with pytest.raises(ValueError, match=r"\[rows, width\]"):
        prefill_logits(model, [prompts[0][None]], SPANS[:1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_type": "mistral", "sliding_window": 8}, "sliding window"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "attend to everything"),
        ({"model_type": "gemma"}, "model must be one of llama"),
    ],
)
def test_models_that_attend_otherwise_are_refused(prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        prefill_logits(tiny_model(layers=2, **settings), prompts[:1], SPANS[:1])


def test_eager_attention_is_refused(prompts):
    model = tiny_model(layers=1)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="sdpa attention, got eager"):
        prefill_logits(model, prompts[:1], SPANS[:1])
