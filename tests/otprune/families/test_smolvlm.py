"""The two halves of SmolVLM2 and Idefics3 against the whole of them: the same tokens, the same answers.

All labels of tiles can be seen, whatever is pruned.
"""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Idefics3Processor
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.models.smolvlm.processing_smolvlm import get_image_prompt_string

from otprune.families import Options
from otprune.models import Prompt, read_checkpoint
from tests.otprune.families import parity
from tests.otprune.families.parity import NEAR, Model, Size, answer, pruned
from tests.tiny import MAKERS

LANDSCAPE, PORTRAIT, SQUARE = (150, 260), (310, 90), (60, 60)  # height, width: 2 x 3 tiles, 3 x 1 and 3 x 3
# One prompt of each shape, and one with two pictures, so that each row of the batch has its own number of tokens.
PROMPTS = (("describe the picture", [LANDSCAPE]), ("what?", [SQUARE]), ("compare the two", [PORTRAIT, SQUARE]))
SHARES = (0.5, 0.3, 0.06)  # of the last, some tiles keep nothing
IMAGES = {"smolvlm": SmolVLMImageProcessorPil, "idefics3": Idefics3ImageProcessorPil}


@pytest.fixture(scope="module", params=["smolvlm", "idefics3"])
def model(request, tmp_path_factory) -> Model:
    folder = MAKERS[request.param](tmp_path_factory.mktemp(request.param))
    images = images_of(request.param, folder)

    def inputs(sizes):
        return {"pixel_values": images([[parity.picture(size) for size in sizes]], return_tensors="pt")["pixel_values"]}

    def written(model, sizes):
        found = images([[parity.picture(size) for size in sizes]], return_row_col_info=True)
        texts = [text_of(*grid) for grid in zip(found["rows"][0], found["cols"][0], strict=True)]
        return [model.decoder.tokenizer(text).input_ids for text in texts]

    return parity.load(folder, inputs, written)


def images_of(family: str, folder: Path) -> Any:
    """transformers' image processor of a checkpoint."""
    return IMAGES[family].from_pretrained(folder)


def crops_of(model: Model, sizes: Sequence[Size], **keys: Any) -> Tensor:
    """[1, crops of all pictures, 3, side, side], as the processor of a prompt with these pictures has them."""
    images = images_of(model.checkpoint.family, model.checkpoint.path)
    return images([[parity.picture(size) for size in sizes]], return_tensors="pt", **keys)["pixel_values"]


def text_of(rows: int, columns: int) -> str:
    """What transformers' processor writes for a picture with such a grid of tiles; 0 x 0 for a lone tile."""
    names = {"fake_image_token": "<fake_token_around_image>", "image_token": "<image>", "image_seq_len": 16}
    processor: Any = SimpleNamespace(**names, global_image_tag="<global-img>")
    return Idefics3Processor.replace_image_token(processor, {"rows": [[rows]], "cols": [[columns]]}, 0)


def processor_ids(model: Model, text: str, sizes: Sequence[Size]) -> list[int]:
    """The ids that transformers' processor makes of a message with these pictures.

    SmolVLM's own processor needs num2words, which is no dependency here. It writes the same for pictures (see below).
    """
    template: Any = model.decoder.tokenizer.chat_template
    images = images_of(model.checkpoint.family, model.checkpoint.path)
    processor = Idefics3Processor(images, model.decoder.tokenizer, 16, chat_template=template)
    parts: Any = [*[{"type": "image"}] * len(sizes), {"type": "text", "text": text}]
    rendered = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
    return processor(text=rendered, images=[[parity.picture(size) for size in sizes]])["input_ids"][0]


# The tower


@pytest.mark.parametrize("tiles", [9, 4, 1])
@pytest.mark.parametrize("size", [LANDSCAPE, PORTRAIT, SQUARE, (31, 700), (20, 20), (58, 58), (997, 640), (1, 58)])
def test_crops_are_those_of_the_image_processor(model, size, tiles):
    """Pixel for pixel: a picture scaled to the longest edge, stretched to whole tiles, and squeezed into the overview.

    Of square numbers of tiles the limit is the processor's with a shorter edge.
    """
    checkpoint = read_checkpoint(str(model.checkpoint.path), Options(max_tiles=tiles))
    found = parity.frame(checkpoint, size)
    crops = found.reshape(-1, *found.shape[-3:])
    edge = next(edge for edge in (174, 116, 58) if num_tiles(model, size, edge) <= tiles)
    expected = crops_of(model, [size], size={"longest_edge": edge})[0]
    torch.testing.assert_close(parity.normalized(model, crops), expected, atol=1e-5, rtol=0)


def num_tiles(model: Model, size: tuple[int, int], edge: int) -> int:
    crops = crops_of(model, [size], size={"longest_edge": edge}).shape[1]
    return max(1, crops - 1)


def test_pictures_of_different_sizes_in_one_call_have_the_tokens_of_the_whole_model(model):
    parity.assert_tokens(model, [LANDSCAPE, PORTRAIT, SQUARE], [112, 64, 160])


@pytest.mark.parametrize(("way", "regions"), [("joint", [1, 1]), ("tiles", [7, 4]), ("grid", [7, 4])])
def test_each_way_has_all_tokens_in_the_order_of_the_whole_model(model, way, regions):
    parity.assert_half_of_each_region_joins(model, [LANDSCAPE, PORTRAIT], way, regions)


# Prompts


def whole_ids(model: Model, prompt: Prompt, sizes: Sequence[tuple[int, int]]) -> list[int]:
    ids = list(prompt[0])
    for size, text in zip(sizes, prompt[1:], strict=True):
        everything = torch.arange(model.checkpoint.geometry.num_visual(size))
        ids += [*model.span(size, everything).tokens.tolist(), *text]
    return ids


@pytest.mark.parametrize("sizes", [[LANDSCAPE], [PORTRAIT], [SQUARE, LANDSCAPE], [(31, 700)]])
def test_a_prompt_with_whole_spans_is_the_one_that_transformers_processor_makes(model, sizes):
    prompt = model.decoder.encode_prompt("what?", num_images=len(sizes))
    assert (
        whole_ids(model, prompt, sizes) == processor_ids(model, "what?", sizes) == model.ids(prompt, sizes)[0].tolist()
    )


@pytest.mark.parametrize("tiles", [9, 1])
def test_a_span_is_what_both_processors_write_for_a_picture(model, tiles):
    checkpoint = read_checkpoint(str(model.checkpoint.path), Options(max_tiles=tiles))
    geometry: Any = checkpoint.geometry
    tokenizer = model.decoder.tokenizer
    for size in (LANDSCAPE, PORTRAIT, SQUARE):
        rows, columns = geometry.tiles(size) if tiles > 1 else (0, 0)
        written = text_of(rows, columns)
        names = ("<fake_token_around_image>", "<image>", "<global-img>")
        assert written == get_image_prompt_string(rows, columns, 16, *names)
        span = geometry.span(size, np.arange(geometry.num_visual(size)), checkpoint.image_token)
        assert span.tokens.tolist() == tokenizer(written).input_ids


# Answers


def test_all_tokens_kept_give_the_answers_of_transformers_own_generate(model):
    parity.assert_whole_answers(model, PROMPTS)


def test_kept_tokens_give_the_answers_of_the_whole_prompt_with_the_others_hidden(model):
    kept, visual = pruned(model, PROMPTS, SHARES)
    assert {0, 1, 2, 3} - set((kept[2][0] // 16).tolist())  # a tile without tokens
    parity.assert_pruned_answers(model, PROMPTS, kept, visual)


def test_the_same_tokens_in_another_order_or_under_other_labels_give_other_answers(model):
    kept, visual = pruned(model, PROMPTS, SHARES)
    found = answer(model, visual, model.prompts(PROMPTS))
    moved = [[(rows.roll(1, 0), span) for rows, span in pictures] for pictures in visual]
    far = (answer(model, moved, model.prompts(PROMPTS)) - found)[:, 0].abs().amax(dim=-1)
    assert (far > 100 * NEAR).all(), far
    first = [
        [
            (rows, model.span(size, torch.arange(len(index))))
            for (rows, _), size, index in zip(each, sizes, indices, strict=True)
        ]
        for each, (_, sizes), indices in zip(visual, PROMPTS, kept, strict=True)
    ]
    far = (answer(model, first, model.prompts(PROMPTS)) - found)[:, 0].abs().amax(dim=-1)
    assert (far > 100 * NEAR).all(), far
