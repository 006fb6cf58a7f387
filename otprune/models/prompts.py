"""The text side of a checkpoint: conversation formats, token ids of prompts around their images, answers from ids."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

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
        ends: Any = tokenizer.eos_token_id if end is None else end
        if ends is None:
            raise CheckpointError(f"model.path must name an end token (eos_token_id), found none in {checkpoint.path}")
        self.end_tokens: list[int] = [ends] if isinstance(ends, int) else list(ends)

    def encode_prompt(self, text: str, conversation: str = "auto", num_images: int = 1) -> Prompt:
        """Token ids before, between and after the images, for the user text `text` in the model's conversation format.

        Raises:
            ValueError: if the result does not hold exactly `num_images` image placeholders.
        """
        return encode_prompt(text, conversation, self.folder, self.tokenizer, self.image_token, num_images)

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


def encode_prompt(
    text: str,
    conversation: str,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    image_token: int,
    num_images: int = 1,
) -> Prompt:
    """Token ids before, between and after the images, for the user text `text` in a conversation format.

    Raises:
        ValueError: if the result does not hold exactly `num_images` image placeholders.
    """
    ids = tokenizer(render_prompt(text, conversation, folder, tokenizer, num_images)).input_ids
    placeholders = [i for i, token in enumerate(ids) if token == image_token]
    if len(placeholders) != num_images:
        wanted = "one image" if num_images == 1 else f"{num_images} images"
        raise ValueError(f"a prompt must hold exactly {wanted}, got {len(placeholders)} in {text!r}")
    starts, ends = [0, *(i + 1 for i in placeholders)], [*placeholders, len(ids)]
    return tuple(ids[start:end] for start, end in zip(starts, ends, strict=True))


def render_prompt(
    text: str, conversation: str, folder: Path, tokenizer: PreTrainedTokenizerBase, num_images: int = 1
) -> str:
    """The whole prompt, with a literal `<image>` for each image before the user text `text`.

    Conversation formats:
        auto        the checkpoint's own chat template, or vicuna_v1 if it has none
        vicuna_v1   the format of the LLaVA-1.5 papers and the published benchmark numbers: 35 tokens stand before the
                    image, and spaces join several images
        plain       the text unchanged, after the images

    Raises:
        ValueError: if `conversation` is not one of these.
    """
    if conversation not in CONVERSATIONS:
        raise ValueError(f"prompt.conversation must be one of {', '.join(CONVERSATIONS)}, got {conversation!r}")
    images = " ".join(["<image>"] * num_images)
    if conversation == "plain":
        return f"{images}\n{text}"
    template = chat_template(folder, tokenizer) if conversation == "auto" else None
    if template is None:
        return f"{VICUNA_SYSTEM} USER: {images}\n{text} ASSISTANT:"
    content = [*[{"type": "image"}] * num_images, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)  # pyright: ignore[reportReturnType]


def chat_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The checkpoint's chat template: chat_template.jinja, else chat_template.json, else the tokenizer's, else None."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text()
    if (file := folder / "chat_template.json").is_file():
        return json.loads(file.read_text())["chat_template"]
    return tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None
