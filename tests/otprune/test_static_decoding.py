"""Decoding in fixed shapes gives the answers of the plain loop: with CUDA graphs on a GPU, elsewhere without them."""

import copy
import weakref

import pytest
import torch

from otprune.models import static_decoding
from otprune.models.decoding import decode
from otprune.models.static_decoding import MAX_SHAPES, StaticDecoder, check_model
from tests.otprune.test_decoding import END, broken_logits, make_model, make_prompts, nan_for_rows_that_see_nothing

SAMPLED = {"temperature": 1.3, "top_p": 0.9}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def prompts():
    return make_prompts()


def spoil(step):
    """What recording a graph does to the memory of a shape, without a graph."""
    step()
    step()
    return step


@pytest.fixture
def static(model) -> StaticDecoder:
    return StaticDecoder(model, spoil)


@pytest.mark.parametrize("max_new_tokens", [1, 2, 9, 40])
@pytest.mark.parametrize("num_rows", [1, 5, 16])
def test_answers_are_those_of_the_plain_loop(model, static, prompts, max_new_tokens, num_rows):
    embeds, mask = (values[:num_rows] for values in prompts)
    options = {"max_new_tokens": max_new_tokens, "end_tokens": END}
    assert static(embeds, mask, **options) == decode(model, embeds, mask, **options)


def test_sampled_answers_too(model, static, prompts):
    options = {"max_new_tokens": 30, "end_tokens": END, "seeds": range(16), **SAMPLED}
    assert static(*prompts, **options) == decode(model, *prompts, **options)


def test_nothing_of_a_batch_is_left_in_the_next(model, static, prompts):
    """The same memory serves batches of other prompts, other numbers of rows and other lengths."""
    embeds, mask = prompts
    options = {"max_new_tokens": 20, "end_tokens": END}
    for rows, first in ((slice(0, 16), 0), (slice(3, 14), 4), (slice(0, 16), 0), (slice(12, 15), 0)):
        part = embeds[rows, first:], mask[rows, first:]
        assert static(*part, **options) == decode(model, *part, **options)
    assert len(static._shapes) == 2  # of 16 and of 4 rows


def test_without_end_tokens_every_answer_has_its_full_length(static, prompts):
    assert {len(row) for row in static(*prompts, max_new_tokens=7, end_tokens=[])} == {7}


def test_few_shapes_are_kept(static, prompts):
    for longest in range(1, MAX_SHAPES + 3):
        static(*prompts, max_new_tokens=longest, end_tokens=END)
    assert len(static._shapes) == MAX_SHAPES


def test_memory_that_runs_out_frees_every_shape_and_is_tried_once_more(model, static, prompts, monkeypatch):
    for longest in (1, 2, 3):
        static(*prompts, max_new_tokens=longest, end_tokens=END)
    kept = []

    def record(step):
        kept.append(len(static._shapes))
        if len(kept) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step

    monkeypatch.setattr(static, "record", record)
    options = {"max_new_tokens": 9, "end_tokens": END}
    assert static(*prompts, **options) == decode(model, *prompts, **options)
    assert kept == [3, 0]
    monkeypatch.setattr(static, "record", lambda step: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        static(*prompts, max_new_tokens=4, end_tokens=END)
    assert not static._shapes


@pytest.mark.parametrize("fails", ["read", "record"])
def test_nothing_of_the_failed_attempt_is_left_when_it_is_tried_again(model, static, prompts, monkeypatch, fails):
    made = []

    class Batch(static_decoding._Batch):
        def __init__(self, *args):
            assert all(batch() is None for batch in made), "the memory of the failed attempt is still held"
            made.append(weakref.ref(self))
            super().__init__(*args)

        def read(self, *args):
            if fails == "read" and len(made) == 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().read(*args)

    def record(step):
        if fails == "record" and len(made) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step

    monkeypatch.setattr(static_decoding, "_Batch", Batch)
    monkeypatch.setattr(static, "record", record)
    options = {"max_new_tokens": 9, "end_tokens": END}
    assert static(*prompts, **options) == decode(model, *prompts, **options)
    assert len(made) == 2


def test_memory_that_runs_out_while_a_known_shape_reads_its_prompts(model, static, prompts, monkeypatch):
    options = {"max_new_tokens": 9, "end_tokens": END}
    expected = static(*prompts, **options)
    ((batch, _),) = static._shapes.values()
    monkeypatch.setattr(batch, "read", lambda *args: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    assert static(*prompts, **options) == expected == decode(model, *prompts, **options)
    assert len(static._shapes) == 1


def test_no_row_of_a_mask_is_empty(static, prompts, monkeypatch):
    options = {"max_new_tokens": 9, "end_tokens": END}
    expected = static(*prompts, **options)
    with nan_for_rows_that_see_nothing(monkeypatch) as masks:
        assert static(*prompts, **options) == expected
    assert all(mask.any(-1).all() for mask in masks)


@pytest.mark.parametrize("sampling", [{}, {"seeds": range(16), **SAMPLED}])
@pytest.mark.parametrize(("at", "ends"), [(range(20), END), ([6], [])])
def test_logits_that_are_not_finite_give_no_answer(model, static, prompts, monkeypatch, sampling, at, ends):
    """A new shape reads, is recorded in two steps and reads again: call 6 of the model gives the fourth token."""
    options = {"max_new_tokens": 6, "end_tokens": ends, **sampling}
    with (
        broken_logits(model, monkeypatch, at, [2, 7]),
        pytest.raises(FloatingPointError, match="not finite in 2 of 16 prompts"),
    ):
        static(*prompts, **options)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "one kind, got 'dynamic'"),
        ({"sliding_window": 8}, "layers that see everything"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "full_attention, sliding_attention"),
    ],
)
def test_models_that_a_fixed_shape_would_get_wrong_are_refused(model, changed, problem):
    config = copy.deepcopy(model.config)
    for name, value in changed.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=problem):
        check_model(config)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sampled", [False, True])
def test_graphs_give_the_answers_of_the_plain_loop(model, prompts, sampled):
    model = model.to("cuda")
    embeds, mask = (values.to("cuda") for values in prompts)
    options = {"max_new_tokens": 30, "end_tokens": END, **({"seeds": range(16), **SAMPLED} if sampled else {})}
    static = StaticDecoder(model)
    for rows in (slice(0, 16), slice(2, 13), slice(0, 16)):
        if sampled:
            options["seeds"] = range(16)[rows]
        part = embeds[rows], mask[rows]
        assert static(*part, **options) == decode(model, *part, **options)
    model.to("cpu")
