"""The text side of a checkpoint: conversation formats, token ids of prompts around their images, answers from ids."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from otprune.models.bounded_template import TemplateError, check_template
from otprune.models.checkpoint import Checkpoint, CheckpointError, read_checkpoint

CONVERSATIONS = ("auto", "vicuna_v1", "plain")
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

Prompt = tuple[list[int], ...]
"""Token ids of the text before, between and after the images: n + 1 lists for n images."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """One generated text. `num_generated_tokens` counts the end token; `finish_reason` is stop or length."""

    text: str
    num_prompt_tokens: int
    num_generated_tokens: int
    finish_reason: str


def load_prompter(checkpoint: Checkpoint | Path) -> "Prompter":
    """Loads the tokenizer and end tokens of a checkpoint (as read already, or its folder), without reading weights.

    Raises:
        CheckpointError: if the checkpoint names no end token.
    """
    if isinstance(checkpoint, Path):
        checkpoint = read_checkpoint(str(checkpoint))
    try:
        end: Any = GenerationConfig.from_pretrained(checkpoint.path).eos_token_id
    except OSError:  # no generation_config.json
        config: Any = AutoConfig.from_pretrained(checkpoint.path)
        end = getattr(config.text_config, "eos_token_id", None)
    return Prompter(checkpoint, AutoTokenizer.from_pretrained(checkpoint.path), end)


class Prompter:
    """Encodes prompts to token ids and decodes generated ids to answers, for one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, end: int | list[int] | None):
        self.tokenizer, self.folder = tokenizer, checkpoint.path
        self.image_token, self.max_length = checkpoint.image_token, checkpoint.max_length
        self.image_text, self.finish_prompt = checkpoint.record.image_text, checkpoint.record.finish_prompt
        self.image_mark = checkpoint.record.image_mark
        # Both count: without generation_config.json, Qwen3.5's config.json names the end of a document alone, and its
        # tokenizer the end of a turn.
        ends: list[Any] = [*(end if isinstance(end, list) else [end]), tokenizer.eos_token_id]
        self.end_tokens: list[int] = list(dict.fromkeys(token for token in ends if token is not None))
        if not self.end_tokens:
            raise CheckpointError(f"model.path must name an end token (eos_token_id), found none in {checkpoint.path}")
        self._control = _control_tokens(tokenizer, self.image_token)

    def encode_prompt(
        self, text: str, conversation: str = "auto", num_images: int = 1, system: str | None = None
    ) -> Prompt:
        """Token ids before, between and after the images, for the user text `text` in the model's conversation format.

        Raises:
            ValueError: as the function `encode_prompt`.
        """
        return encode_prompt(
            text,
            conversation,
            self.folder,
            self.tokenizer,
            self.image_token,
            num_images,
            system=system,
            image_text=self.image_text,
            mark=self.image_mark,
            finish=self.finish_prompt,
        )

    def quote(self, text: str, template: str = "") -> str:
        """The text with no control token in it, but for those that stand in `template` as often.

        What data say is text: an `</s>` in a title must not end the prompt, and an `<image>` is no picture. A
        zero-width space behind the first character keeps the tokenizer from reading the rest as one token.

        Raises:
            ValueError: if the text repeats a control token of the template, so that nobody can tell which is which.
        """

        def quoted(match: re.Match[str]) -> str:
            return match[0] if match[0] in own else f"{match[0][0]}\u200b{match[0][1:]}"

        own = set(self._control.findall(template))
        for token in own:
            if text.count(token) != template.count(token):
                raise ValueError(f"the prompt's columns must not hold {token}, which the template holds itself")
        return self._control.sub(quoted, text)

    def completion(self, num_prompt_tokens: int, ids: list[int]) -> Completion:
        """The answer in generated `ids`, up to the first end token; an answer without one was cut at its limit."""
        end = next((i for i, token in enumerate(ids) if token in self.end_tokens), None)
        kept = ids if end is None else ids[:end]
        return Completion(
            text=cast(str, self.tokenizer.decode(kept, skip_special_tokens=True)).strip(),
            num_prompt_tokens=num_prompt_tokens,
            num_generated_tokens=len(ids) if end is None else end + 1,
            finish_reason="length" if end is None else "stop",
        )


def _control_tokens(tokenizer: PreTrainedTokenizerBase, image_token: int) -> re.Pattern[str]:
    """What matches every text that the tokenizer may read as one special or added token, in any case."""
    added: Any = tokenizer.get_added_vocab  # which the base class declares through an untyped attribute
    names: set[Any] = {*tokenizer.all_special_tokens, *added()}
    names.add(tokenizer.convert_ids_to_tokens(image_token))
    marked = [name for name in names if isinstance(name, str) and len(name) > 1 and re.match(r"\W", name.strip())]
    return re.compile("|".join(re.escape(name) for name in sorted(marked, key=len, reverse=True)) or r"(?!)", re.I)


def encode_prompt(
    text: str,
    conversation: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    image_token: int,
    num_images: int = 1,
    *,
    system: str | None = None,
    image_text: Callable[[str], str] = str,
    mark: str | None = None,
    finish: Callable[[str, str], str] = lambda prompt, image_token: prompt,
) -> Prompt:
    """Token ids before, between and after the images, for the user text `text` in a conversation format.

    One BOS token begins the prompt if the tokenizer or the chat template writes one, or both.

    Args:
        system: as of `render_prompt`.
        image_text: the family's (text of the image token) -> what stands for a picture, where no template writes it.
        mark: what the family's templates write for a picture (`Family.image_mark`); None: the image token.
        finish: the family's (rendered prompt, text of the image token) -> the whole prompt (`Family.finish_prompt`).

    Raises:
        ValueError: as `render_prompt`, or if the result does not hold exactly `num_images` image placeholders.
    """
    token = tokenizer.convert_ids_to_tokens(image_token)
    if not isinstance(token, str):
        raise ValueError(
            f"the tokenizer must hold the image token {image_token} of config.json, found none in {folder}"
        )
    rendered = render_prompt(
        text,
        conversation,
        folder,
        tokenizer,
        num_images,
        system=system,
        image_token=mark or token,
        image_text=image_text,
    )
    rendered = finish(rendered, token)
    ids: Any = tokenizer(rendered).input_ids
    begin: Any = tokenizer.bos_token
    if begin and rendered.startswith(begin) and ids[:2] == [tokenizer.bos_token_id] * 2:
        ids = ids[1:]  # the template wrote one, and the tokenizer another in front of it
    placeholders = [i for i, token in enumerate(ids) if token == image_token]
    if len(placeholders) != num_images:
        raise _other_number(num_images, len(placeholders), text)
    starts, ends = [0, *(i + 1 for i in placeholders)], [*placeholders, len(ids)]
    return tuple(ids[start:end] for start, end in zip(starts, ends, strict=True))


def _other_number(num_images: int, got: int, text: str) -> ValueError:
    wanted = "one image" if num_images == 1 else f"{num_images} images"
    return ValueError(f"a prompt must hold exactly {wanted}, got {got} in {text!r}")


def render_prompt(
    text: str,
    conversation: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    num_images: int = 1,
    *,
    system: str | None = None,
    image_token: str = "<image>",
    image_text: Callable[[str], str] = str,
) -> str:
    """The whole prompt, with the checkpoint's own image token for each image before the user text `text`.

    Conversation formats:
        auto        the checkpoint's own chat template, or vicuna_v1 if it has none
        vicuna_v1   the format of the LLaVA-1.5 papers and the published benchmark numbers: 35 tokens stand before the
                    image, and spaces join several images
        plain       the text unchanged, after the images

    Args:
        system: what the model is told before the user speaks; None or empty: the format's own, if it has any. A chat
            template gets a system message; vicuna_v1 puts the text in the place of its own; plain puts it on a line in
            front.
        image_token: text of the token that stands for a picture.
        image_text: (`image_token`) -> what is written for a picture where no template does it.

    Raises:
        ValueError: if `conversation` is not one of these, a text holds the image token, or the chat template cannot
            write such a prompt, or does not end.
    """
    if conversation not in CONVERSATIONS:
        raise ValueError(f"prompt.conversation must be one of {', '.join(CONVERSATIONS)}, got {conversation!r}")
    for said in (text, system or ""):
        if image_token in said:  # checked here because a template may delete it from the text
            raise _other_number(num_images, num_images + said.count(image_token), said)
    images = " ".join([image_text(image_token)] * num_images)
    if conversation == "plain":
        return f"{system}\n{images}\n{text}" if system else f"{images}\n{text}"
    template = chat_template(folder, tokenizer) if conversation == "auto" else None
    if template is None:
        return f"{system or VICUNA_SYSTEM} USER: {images}\n{text} ASSISTANT:"
    parts = [*[{"type": "image"}] * num_images, {"type": "text", "text": text}]
    return _fill(template, folder, tokenizer, parts, f"{images}\n{text}", system, image_token)


def _fill(
    template: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    parts: list[dict[str, str]],
    line: str,
    system: str | None,
    image_token: str,
) -> str:
    """The prompt that a chat template makes of a user message, given as `parts` or, if that fails, as the text `line`.

    Templates differ in what they take as a message's content: some take a list of parts, others a string, in which the
    caller writes the image tokens himself.
    """
    num_images, text = len(parts) - 1, parts[-1]["text"]
    contents: list[tuple[Any, Any]] = [(parts, system), (line, system)]
    if system:
        contents.insert(0, (parts, [{"type": "text", "text": system}]))
    names: Any = tokenizer.special_tokens_map
    try:
        check_template(template, {name: str(token) for name, token in names.items()})
    except TemplateError as error:
        raise ValueError(f"the chat template of {folder} must write a prompt and end: {error}") from error
    failures = {}
    for content, system_content in contents:
        messages = [{"role": "system", "content": system_content}] if system else []
        messages.append({"role": "user", "content": content})
        form = "as text" if content is line else "in parts"
        try:
            rendered: Any = tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,  # a caption needs no reasoning; templates that know no such switch ignore it
            )
        except Exception as error:  # a template is a program of the checkpoint's, which may raise anything
            failures[form] = " ".join(f"{type(error).__name__}: {error}".split())
            continue
        if any(isinstance(c, list) and str(c) in rendered for c in (content, system_content)):
            failures[form] = "the template prints the list of parts"
        elif (count := rendered.count(image_token)) != num_images:
            failures[form] = f"the result holds {count} times {image_token}"
        elif lost := [said for said in (text, system or "") if said.strip() not in rendered]:
            failures[form] = f"the result lacks {lost[0]!r}"
        else:
            return rendered
    reasons = "; ".join(f"{form}, {reason}" for form, reason in failures.items())
    wanted = "one image token" if num_images == 1 else f"{num_images} image tokens"
    told = " and of a system message" if system else ""
    raise ValueError(
        f"the chat template of {folder} must write {wanted} and the text of a message{told}, got: {reasons}; "
        "prompt.conversation=plain and vicuna_v1 use no template"
    )


def chat_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The checkpoint's chat template: chat_template.jinja, else chat_template.json, else the tokenizer's, else None.

    Of several templates, it is the one named `default`.

    Raises:
        CheckpointError: if chat_template.json holds none.
    """
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text()
    stored: Any = tokenizer.chat_template
    if (file := folder / "chat_template.json").is_file():
        try:
            stored = json.loads(file.read_text())["chat_template"]
        except (ValueError, LookupError, TypeError) as error:
            raise CheckpointError(f"{file} must be JSON with a chat_template, got {error!r}") from error
    if isinstance(stored, dict):
        stored = stored.get("default")
    return stored if isinstance(stored, str) else None
