"""Fields of a request for vLLM: built from rows and spans; a malformed one is refused in one line. Needs no vLLM."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from otprune.families import FAMILIES
from otprune.families.geometry import Span, line_span
from otprune.vllm.architectures import ARCHITECTURES, span_name
from otprune.vllm.fields import Rules
from otprune.vllm.request import engine_arguments, image_fields

IMAGE, BREAK = 4, 9
LINE = Rules(image_token=IMAGE, width=8, vocabulary=50, mrope=False, max_positions=100)
MROPE = replace(LINE, mrope=True)


def place(tokens: list[int], positions: list[list[int]], extent: int) -> Span:
    return Span(np.array(tokens), np.array(positions).T, extent)


def two_pictures(axes: int) -> dict[str, torch.Tensor]:
    """Three rows with a break among them, and one row."""
    rows = [torch.ones(3, 8), torch.zeros(1, 8)]
    first, second = [IMAGE, IMAGE, BREAK, IMAGE], [IMAGE]
    if axes == 1:
        return image_fields(rows, [line_span(np.array(first)), line_span(np.array(second))], axes)
    spans = [place(first, [[0, 0, 1], [0, 2, 3], [0, 2, 4], [0, 5, 0]], 6), place(second, [[0, 1, 1]], 2)]
    return image_fields(rows, spans, axes)


def test_fields_hold_the_pictures_one_after_the_other():
    fields = two_pictures(3)
    assert fields["image_embeds"].tolist() == [[1.0] * 8] * 3 + [[0.0] * 8]
    assert fields["image_rows"].tolist() == [3, 1]
    assert fields["image_tokens"].tolist() == [IMAGE, IMAGE, BREAK, IMAGE, IMAGE]
    assert fields["image_lengths"].tolist() == [4, 1]
    assert fields["image_positions"].tolist() == [[0, 0, 1], [0, 2, 3], [0, 2, 4], [0, 5, 0], [0, 1, 1]]
    assert fields["image_extents"].tolist() == [6, 2]
    assert "image_positions" not in two_pictures(1)


@pytest.mark.parametrize(("rules", "axes"), [(LINE, 1), (MROPE, 3)])
def test_fields_of_a_prompt_fit_the_rules(rules, axes):
    fields = two_pictures(axes)
    checked = rules.check({name: value.int() if value.dtype == torch.long else value for name, value in fields.items()})
    assert all(
        torch.equal(checked[name], value) and checked[name].dtype == value.dtype for name, value in fields.items()
    )


def change(name: str, value: object) -> dict[str, object]:
    return two_pictures(3) | {name: value}


POSITIONS = two_pictures(3)["image_positions"]
MALFORMED = [
    (torch.zeros(4, 8), "must be the fields image_embeds, .*, got Tensor"),
    ([torch.zeros(4, 8)], "must be the fields .*, got list"),
    ({}, "must have the fields .*, got $"),
    (two_pictures(1), "must have the fields .*image_positions, image_extents, got image_embeds, "),
    (change("pixel_values", torch.zeros(1)), "must have the fields .*, got .*pixel_values"),
    (change("image_embeds", [[0.0] * 8] * 4), "image_embeds must be a tensor of floats, got list"),
    (change("image_embeds", torch.zeros(4, 8, dtype=torch.long)), "tensor of floats, got a tensor of torch.int64"),
    (change("image_embeds", torch.zeros(4, 7)), r"must be \[K, 8\], got \[4, 7\]"),
    (change("image_embeds", torch.zeros(1, 4, 8)), r"must be \[K, 8\], got \[1, 4, 8\]"),
    (change("image_embeds", torch.zeros(5, 8)), r"image_rows must add up to 5, .* got \[3, 1\]"),
    (
        change("image_rows", torch.tensor([3.0, 1.0])),
        "image_rows must be a tensor of integers, got a tensor",
    ),
    (change("image_rows", [3, 1]), "image_rows must be a tensor of integers, got list"),
    (change("image_rows", torch.tensor([[3, 1]])), r"image_rows must have 1 dimensions, got \[1, 2\]"),
    (change("image_rows", torch.tensor([4, 0])), r"image_rows must hold numbers of at least 1, got \[4, 0\]"),
    (change("image_rows", torch.tensor([5, -1])), r"image_rows must hold numbers of at least 1, got \[5, -1\]"),
    (change("image_rows", torch.tensor([], dtype=torch.long)), "must hold one number a picture, got 0 and 2"),
    (change("image_rows", torch.tensor([4])), "must hold one number a picture, got 1 and 2"),
    (change("image_rows", torch.tensor([2, 2])), "image token 4 once for each row: 2 times for picture 0, got 3"),
    (change("image_lengths", torch.tensor([4, 2])), r"image_lengths must add up to 5, .* got \[4, 2\]"),
    (change("image_lengths", torch.tensor([3, 2])), "3 times for picture 0, got 2"),
    (change("image_tokens", torch.tensor([4, 4, 50, 4, 4])), r"image_tokens must be in \[0, 50\), got 4 to 50"),
    (change("image_tokens", torch.tensor([4, 4, -1, 4, 4])), r"image_tokens must be in \[0, 50\), got -1 to 4"),
    (change("image_tokens", torch.tensor([4, 4, 9, 4, 9])), "1 times for picture 1, got 0"),
    (change("image_positions", POSITIONS.T), r"image_positions must be \[5, 3\], got \[3, 5\]"),
    (change("image_positions", POSITIONS[:4]), r"image_positions must be \[5, 3\], got \[4, 3\]"),
    (change("image_positions", POSITIONS.float()), "image_positions must be a tensor of integers"),
    (change("image_positions", POSITIONS - 1), r"positions of picture 0 must be in \[0, 6\), its extent; got -1 to 4"),
    (
        change("image_extents", torch.tensor([5, 2])),
        r"of picture 0 must be in \[0, 5\), its extent; got 0 to 5",
    ),
    (change("image_extents", torch.tensor([6])), r"image_extents must be \[2\], got \[1\]"),
    (change("image_extents", torch.tensor([6, 95])), r"must add up to at most 100, .* got \[6, 95\]"),
]


@pytest.mark.parametrize(("data", "message"), MALFORMED)
def test_malformed_fields_are_refused_in_one_line(data, message):
    with pytest.raises(ValueError, match=message) as caught:
        MROPE.check(data)
    assert "\n" not in str(caught.value)


def test_positions_are_refused_where_the_model_counts_along_one_axis():
    with pytest.raises(ValueError, match=r"must have the fields .*image_lengths, got .*image_positions"):
        LINE.check(two_pictures(3))


@pytest.mark.parametrize(
    ("rows", "spans", "axes", "message"),
    [
        ([], [], 1, "must have rows and a span, got 0 and 0"),
        ([torch.zeros(1, 8)], [], 1, "must have rows and a span, got 1 and 0"),
        ([torch.zeros(1, 8)], [line_span(np.array([4]))], 2, "axes must be 1 or 3, got 2"),
        ([torch.zeros(1, 8)], [line_span(np.array([4]))], 3, r"positions of a span must be \[3, 1\], got \[1, 1\]"),
        ([torch.zeros(1, 8), torch.zeros(1, 9)], [line_span(np.array([4]))] * 2, 1, "must have the same width"),
    ],
)
def test_rows_and_spans_that_do_not_fit_are_refused(rows, spans, axes, message):
    with pytest.raises(ValueError, match=message):
        image_fields(rows, spans, axes)


def test_an_architecture_without_spans_is_refused_by_name():
    assert {engine_arguments(name)["hf_overrides"]["architectures"][0] for name in ARCHITECTURES} == {
        f"Span{name}" for name in ARCHITECTURES
    }
    with pytest.raises(ValueError, match=r"model of .*LlavaForConditionalGeneration, .*; got PixtralForConditionalG"):
        engine_arguments("PixtralForConditionalGeneration")


def test_the_plugin_is_light():
    """vLLM imports it in each of its processes, whichever model they run."""
    code = "import sys, otprune.vllm.plugin, otprune.vllm.found; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "numpy", "vllm"} & set(done.stdout.split())


def test_every_family_that_runs_in_vllm_has_a_class_that_takes_spans():
    runs = [family for family in FAMILIES.values() if family.refuses_vllm is None]
    assert {family.name for family in FAMILIES.values()} - {family.name for family in runs} == {"gemma3"}
    for family in runs:
        assert span_name(family.architecture).startswith("Span")
