"""What the model is asked, word for word: conversation formats, the place of the images, the text around them."""

import pytest
import torch

from otprune.models import load_decoder
from otprune.models.prompts import VICUNA_SYSTEM, render_prompt


@pytest.fixture(scope="module")
def decoder(demo_model):
    return load_decoder(demo_model, dtype=torch.float32, device="cpu")


def test_conversation_formats_word_for_word(demo_model, decoder):
    def render(text: str, conversation: str) -> str:
        return render_prompt(text, conversation, demo_model, decoder.tokenizer)

    assert VICUNA_SYSTEM == (
        "A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions."
    )
    assert render("What?", "vicuna_v1") == f"{VICUNA_SYSTEM} USER: <image>\nWhat? ASSISTANT:"
    assert render("What?", "plain") == "<image>\nWhat?"
    assert render("What?", "auto") == "USER: <image>\nWhat? ASSISTANT:"
    with pytest.raises(ValueError, match=r"prompt\.conversation must be one of auto, vicuna_v1, plain, got 'v1'"):
        render("What?", "v1")


def test_auto_takes_the_checkpoints_template_wherever_it_stands_and_vicuna_without_one(tmp_path, demo_model, decoder):
    def render() -> str:
        return render_prompt("Hi", "auto", tmp_path, decoder.tokenizer)

    template = decoder.tokenizer.chat_template
    try:
        decoder.tokenizer.chat_template = None
        assert render() == f"{VICUNA_SYSTEM} USER: <image>\nHi ASSISTANT:"
        decoder.tokenizer.chat_template = "T {{ messages[0]['content'][1]['text'] }} <image>"
        assert render() == "T Hi <image>"
    finally:
        decoder.tokenizer.chat_template = template
    (tmp_path / "chat_template.json").write_text('{"chat_template": "J <image> {{ messages[0][\'role\'] }}"}')
    assert render() == "J <image> user"
    (tmp_path / "chat_template.jinja").write_text("X <image>{% if add_generation_prompt %} A:{% endif %}")
    assert render() == "X <image> A:"


def test_a_prompt_is_split_at_its_image(decoder):
    before, after = decoder.encode_prompt("describe the image .")
    assert decoder.tokenizer.decode(before) == "<s> USER :"
    assert decoder.tokenizer.decode(after) == "describe the image . ASSISTANT :"


def test_a_prompt_with_an_image_of_its_own_is_refused(decoder):
    with pytest.raises(ValueError, match=r"exactly one image, got 2 in 'what is <image> \?'"):
        decoder.encode_prompt("what is <image> ?")


@pytest.mark.parametrize("conversation", ["auto", "vicuna_v1", "plain"])
def test_several_images_stand_before_the_text_and_cut_the_prompt_into_one_piece_more(decoder, conversation):
    pieces = decoder.encode_prompt("what is it ?", conversation, num_images=3)
    assert len(pieces) == 4
    assert not any(decoder.image_token in piece for piece in pieces)
    assert decoder.tokenizer.decode(pieces[-1]).startswith("what is it ?")
    if conversation == "vicuna_v1":  # as the released evaluation code joins them
        text = render_prompt("Hi", conversation, decoder.folder, decoder.tokenizer, 2)
        assert text.endswith("USER: <image> <image>\nHi ASSISTANT:")


def test_images_of_one_prompt_are_read_in_their_order(decoder):
    torch.manual_seed(0)
    first, second = 3 * torch.randn(2, 9, 192)
    pieces = decoder.encode_prompt("describe the image .", num_images=2)
    embed = decoder.model.get_input_embeddings()
    texts = [embed(torch.tensor(piece, dtype=torch.long)) for piece in pieces]
    whole = torch.cat([texts[0], first, texts[1], second, texts[2]])
    new_ids = decoder.model.generate(
        inputs_embeds=whole[None], attention_mask=torch.ones(1, len(whole)), max_new_tokens=12, do_sample=False
    )
    expected = decoder.tokenizer.decode(new_ids[0], skip_special_tokens=True).strip()
    (got,) = decoder.generate([torch.stack([first, second])], [pieces], max_new_tokens=12)
    (swapped,) = decoder.generate([torch.stack([second, first])], [pieces], max_new_tokens=12)
    assert (got.text, got.num_prompt_tokens) == (expected, len(whole))
    assert swapped.text != got.text
