"""Generation with spans: the other tokens of a span are text, and DeepStack's rows of a batch follow its padding.

Where the rows of one prompt stand is in test_place.py.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from otprune.families.geometry import line_span
from otprune.models import Decoder, load_decoder
from otprune.models.decoder import deep_stack

WIDTH = 192
SEPARATOR = 20  # any token of the demo's text


@pytest.fixture(scope="module")
def decoder(demo_model) -> Decoder:
    return load_decoder(demo_model, dtype=torch.float32, device="cpu")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_spans_other_tokens_answer_as_if_they_stood_in_the_text(decoder):
    before, after = decoder.encode_prompt("describe the image .")
    rows, image = randn(6, WIDTH), decoder.image_token
    span = line_span(np.array([SEPARATOR, *[image] * 6, SEPARATOR + 1]))
    other = randn(2, WIDTH, seed=1)  # a shorter prompt in the same batch
    got = decoder.generate(
        [[(rows, span)], [(other, line_span(np.full(2, image)))]], [(before, after)] * 2, max_new_tokens=12
    )
    texts = ([*before, SEPARATOR], [SEPARATOR + 1, *after])
    expected = [
        decoder.generate([visual], [prompt], max_new_tokens=12)[0]
        for visual, prompt in ((rows, texts), (other, (before, after)))
    ]
    assert got == expected
    assert got[0].num_prompt_tokens == len(before) + len(span) + len(after)


def test_a_batchs_levels_follow_its_left_padded_mask(decoder):
    rows = [randn(count, 2 * WIDTH, seed=count) for count in (4, 1)]
    placed = [decoder.place(visual, ([1, 11, 12], [13, 14])) for visual in rows]
    arguments = deep_stack(placed)
    mask = arguments["visual_pos_masks"]
    assert mask.tolist() == [[False] * 3 + [True] * 4 + [False] * 2, [False] * 6 + [True] + [False] * 2]
    (level,) = arguments["deepstack_visual_embeds"]
    assert torch.equal(level, torch.cat([visual[:, WIDTH:] for visual in rows]))


def test_without_levels_the_model_gets_no_further_argument(decoder):
    assert deep_stack([decoder.place(randn(4, WIDTH), ([1, 11], [13]))]) == {}
