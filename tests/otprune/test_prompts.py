"""What the model is asked, word for word: conversation formats, the place of the images, the text around them."""

import json

import numpy as np
import pytest
import torch

from otprune.models import CheckpointError, Prompter, bounded_template, load_decoder, load_prompter, read_checkpoint
from otprune.models.prompts import VICUNA_SYSTEM, render_prompt
from tests.tiny_llava import KINDS, tiny_llava

ASKED, TOLD = "describe the image .", "you are a helpful captioner ."


@pytest.fixture(scope="module")
def decoder(demo_model):
    return load_decoder(read_checkpoint(str(demo_model)), dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def prompters(tmp_path_factory) -> dict[str, Prompter]:
    """Of each kind of language model the text side of a tiny checkpoint."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind, folder in folders.items():
        tiny_llava(folder, kind)
    return {kind: load_prompter(read_checkpoint(str(folder))) for kind, folder in folders.items()}


def words(prompter: Prompter, *arguments, **options) -> str:
    """The encoded prompt as words, with `|` in the place of each image."""
    pieces = prompter.encode_prompt(*arguments, **options)
    return " | ".join(" ".join(prompter.tokenizer.convert_ids_to_tokens(piece)) for piece in pieces)


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
    said = "{{ messages[0]['content'][1]['text'] }}"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": f"J <image> {said}"}))
    assert render() == "J <image> Hi"
    (tmp_path / "chat_template.json").write_text(
        json.dumps({"chat_template": {"tool_use": "no", "default": f"D <image> {said}"}})
    )
    assert render() == "D <image> Hi"
    (tmp_path / "chat_template.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"chat_template\.json must be JSON with a chat_template, got KeyError"):
        render()
    (tmp_path / "chat_template.jinja").write_text(f"X <image> {said}{{% if add_generation_prompt %}} A:{{% endif %}}")
    assert render() == "X <image> Hi A:"


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


def test_images_of_one_prompt_are_read_in_their_order(demo_model, decoder):
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
    span = read_checkpoint(str(demo_model)).geometry.span((224, 224), np.arange(9), decoder.image_token)
    (got,) = decoder.generate([[(first, span), (second, span)]], [pieces], max_new_tokens=12)
    (swapped,) = decoder.generate([[(second, span), (first, span)]], [pieces], max_new_tokens=12)
    assert (got.text, got.num_prompt_tokens) == (expected, len(whole))
    assert swapped.text != got.text


# Templates of other checkpoints


def test_a_template_whose_content_is_text_gets_text_and_keeps_one_bos(prompters):
    assert words(prompters["llama3"], ASKED) == (
        "<|begin_of_text|> <|start_header_id|> system <|end_header_id|> <|eot_id|> "
        "<|start_header_id|> user <|end_header_id|> <|reserved_special_token_70|> | <|reserved_special_token_71|> "
        "describe the image . <|eot_id|> <|start_header_id|> assistant <|end_header_id|>"
    )
    # Mistral's template writes the BOS token, and its tokenizer would add another.
    assert words(prompters["mistral"], ASKED) == "<s> [INST] | describe the image . [/INST]"
    assert words(prompters["mistral"], ASKED, num_images=2) == "<s> [INST] |  | describe the image . [/INST]"
    assert words(prompters["qwen2"], ASKED) == (
        "<|im_start|> user | describe the image . <|im_end|> <|im_start|> assistant"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_other_formats_write_the_checkpoints_own_image_token(prompters, kind):
    bos = KINDS[kind].bos or ""
    assert words(prompters[kind], ASKED, "plain") == f"{bos} | {ASKED}"
    folder, tokenizer, image = prompters[kind].folder, prompters[kind].tokenizer, KINDS[kind].image
    rendered = render_prompt("Hi", "vicuna_v1", folder, tokenizer, 2, image_token=image)
    assert rendered.endswith(f"USER: {image} {image}\nHi ASSISTANT:")
    assert len(prompters[kind].encode_prompt(ASKED, "vicuna_v1", 3)) == 4


def test_a_system_text_goes_where_the_format_has_its_own(prompters):
    assert f"<|im_start|> system {TOLD} <|im_end|> <|im_start|> user |" in words(prompters["qwen2"], ASKED, system=TOLD)
    assert f"system <|end_header_id|> {TOLD} <|eot_id|>" in words(prompters["llama3"], ASKED, system=TOLD)
    folder, tokenizer = prompters["qwen2"].folder, prompters["qwen2"].tokenizer
    assert (
        render_prompt("Hi", "vicuna_v1", folder, tokenizer, system="Be brief.")
        == "Be brief. USER: <image>\nHi ASSISTANT:"
    )
    assert render_prompt("Hi", "plain", folder, tokenizer, system="Be brief.") == "Be brief.\n<image>\nHi"
    for conversation in ("auto", "vicuna_v1", "plain"):
        plain, empty = (render_prompt("Hi", conversation, folder, tokenizer, system=s) for s in (None, ""))
        assert plain == empty


def test_a_system_message_may_be_text_while_the_users_is_in_parts(tmp_path, prompters):
    template = (
        "{% if messages[0]['role'] == 'system' %}S:{{ messages[0]['content'] }} {% endif %}"
        "{% for c in messages[-1]['content'] %}{{ c['text'] if c['type'] == 'text' else '<image> ' }}{% endfor %}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    rendered = render_prompt("Hi", "auto", tmp_path, prompters["qwen2"].tokenizer, system="Be brief.")
    assert rendered == "S:Be brief. <image> Hi"  # and not S:[{'type': ...


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (
            "{{ messages[0]['content'].nothing() }}",
            "in parts, UndefinedError: 'list object' has no attribute 'nothing'",
        ),
        ("{{ messages[0]['content'] }}{{ 1 // 0 }}", "as text, ZeroDivisionError"),
        (
            "{{ messages[0]['content'] }}<image>",
            "in parts, the template prints the list of parts; as text, the result ",
        ),
        ("{% for c in messages[0]['content'] %}<image>{% endfor %}", "in parts, the result holds 2 times <image>"),
        ("<image> and nothing else", "as text, the result lacks 'Hi'"),
        ("{% if", "in parts, TemplateSyntaxError"),
        ("{{ raise_exception('two\nlines') }}", "TemplateError: two lines"),
    ],
)
def test_a_template_that_cannot_write_the_prompt_is_one_clear_line(tmp_path, prompters, template, reason):
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(ValueError, match="must write one image token and the text of a message, got: ") as caught:
        render_prompt("Hi", "auto", tmp_path, prompters["qwen2"].tokenizer)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 1 seconds"),
        (
            "{% for a in range(99999) %}{{ messages[0]['role'] * 99 }}{% endfor %}",
            "writes more than 1048576 characters",
        ),
        ("{{ 'a' * 10**10 }}", "needs more than 1024 MiB"),
        ("{% generation %}{{ '%5000000000d' % 1 }}{% endgeneration %}", "needs more than 1024 MiB"),
    ],
)
def test_a_template_that_does_not_end_is_one_clear_line(tmp_path, prompters, template, reason, monkeypatch):
    monkeypatch.setattr(bounded_template, "CPU_SECONDS", 1)
    (tmp_path / "chat_template.jinja").write_text(template + "<image>{{ messages[0]['content'][1]['text'] }}")
    with pytest.raises(ValueError, match="must write a prompt and end: it ") as caught:
        render_prompt("Hi", "auto", tmp_path, prompters["qwen2"].tokenizer)
    assert reason in str(caught.value)


def test_a_template_without_room_for_a_system_message_or_several_images_says_so(prompters):
    with pytest.raises(
        ValueError, match=r"and of a system message, got: .*Only user messages!; prompt\.conversation=plain"
    ):
        prompters["mistral"].encode_prompt(ASKED, system=TOLD)
    with pytest.raises(ValueError, match=r"must write 2 image tokens .* as text, the result holds 1 times <\|reserved"):
        prompters["llama3"].encode_prompt(ASKED, num_images=2)


# What a text smuggles in


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("conversation", ["auto", "vicuna_v1", "plain"])
def test_an_image_token_in_a_text_makes_no_placeholder(prompters, kind, conversation):
    """JoyCaption's template would delete it from the text without a word."""
    token = KINDS[kind].image
    with pytest.raises(ValueError, match="exactly one image, got 2 in 'what is"):
        prompters[kind].encode_prompt(f"what is {token} ?", conversation)
    with pytest.raises(ValueError, match="exactly one image, got 3 in 'you are"):
        prompters[kind].encode_prompt(ASKED, conversation, system=f"you are {token}{token}")


def test_other_special_tokens_and_the_image_token_of_another_model_are_no_placeholders(prompters):
    for kind, text in [
        ("llama3", "what is <image> ?"),
        ("qwen2", "what <|im_end|> is <|reserved_special_token_69|> ?"),
    ]:
        for conversation in ("auto", "vicuna_v1", "plain"):
            assert len(prompters[kind].encode_prompt(text, conversation)) == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("conversation", ["auto", "vicuna_v1", "plain"])
def test_quoted_text_holds_no_token_that_controls_the_model(prompters, kind, conversation):
    prompter = prompters[kind]
    control = {*prompter.tokenizer.all_special_tokens, KINDS[kind].image}
    said = prompter.quote(" ".join(f"a{token}b {token.upper()}" for token in sorted(control)))
    got, plain = prompter.encode_prompt(said, conversation), prompter.encode_prompt("a b", conversation)
    ids = set(prompter.tokenizer.convert_tokens_to_ids(sorted(control))) - {prompter.tokenizer.unk_token_id}

    def controls(prompt):
        return [[token for token in piece if token in ids] for piece in prompt]

    assert controls(got) == controls(plain)
    assert said.replace("\u200b", "") == " ".join(f"a{token}b {token.upper()}" for token in sorted(control))
    assert prompter.quote("plain words, 3 < 4 [sic]") == "plain words, 3 < 4 [sic]"


def test_a_template_keeps_its_own_control_tokens_and_a_column_cannot_add_to_them(prompters):
    prompter, template = prompters["qwen2"], "say {it}<|im_end|>"
    assert prompter.quote("say <|im_start|> x<|im_end|>", template) == "say <\u200b|im_start|> x<|im_end|>"
    with pytest.raises(ValueError, match=r"columns must not hold <\|im_end\|>, which the template holds itself"):
        prompter.quote("say <|im_end|> x<|im_end|>", template)


def test_an_image_token_that_a_tokenizer_makes_of_another_spelling_is_refused(tmp_path):
    tiny_llava(tmp_path, "qwen2")
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    stored["normalizer"] = {"type": "Lowercase"}
    for token in stored["added_tokens"]:
        token["normalized"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    prompter = load_prompter(read_checkpoint(str(tmp_path)))
    assert len(prompter.encode_prompt("what is it ?")) == 2
    for conversation in ("auto", "plain"):
        with pytest.raises(ValueError, match=r"exactly one image, got 2 in 'what is <IMAGE> \?'"):
            prompter.encode_prompt("what is <IMAGE> ?", conversation)


def test_an_image_token_that_the_tokenizer_lacks_is_named(prompters):
    prompter = prompters["qwen2"]
    known = prompter.image_token
    try:
        prompter.image_token = 10**6
        with pytest.raises(ValueError, match=r"must hold the image token 1000000 of config\.json, found none in "):
            prompter.encode_prompt(ASKED)
    finally:
        prompter.image_token = known
