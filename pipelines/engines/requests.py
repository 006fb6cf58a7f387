"""Turns the prompts of a unit's images into requests, and stores the answers in the images. All engines share this."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from otprune.families import Geometry, Span
from otprune.models import Completion, Prompter
from otprune.models.prompts import Prompt
from pipelines.config.keys import PromptConfig
from pipelines.metrics.repetition import is_loop
from pipelines.stages.token_arrays import KeptRows
from pipelines.stages.unit_batch import Answer, Image, UnitBatch


@dataclass(frozen=True, slots=True)
class Shown:
    """One picture of a prompt, as an engine gets it."""

    content: Tensor | np.ndarray  # its kept tokens [K, R], or its pixels, uint8 [H, W, 3]
    num_tokens: int  # visual tokens that the language model reads of it
    span: Span  # what stands for it in the prompt


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt of one image of a unit, ready to be decoded."""

    image: int  # index in the unit
    prompt: int  # index among the image's prompts
    ids: Prompt
    pictures: list[Shown]
    max_new_tokens: int

    @property
    def key(self) -> tuple[int, int]:
        """(image, prompt)."""
        return self.image, self.prompt

    @property
    def num_visual(self) -> int:
        """Visual tokens of all pictures in the prompt."""
        return sum(picture.num_tokens for picture in self.pictures)

    @property
    def length(self) -> int:
        """Tokens of the prompt: text, visual tokens and what separates them."""
        return sum(map(len, self.ids)) + sum(len(picture.span) for picture in self.pictures)


@dataclass(frozen=True, slots=True)
class RequestMaker:
    """Turns the images of units into requests."""

    prompter: Prompter
    prompt: PromptConfig
    geometry: Geometry
    max_new_tokens: int  # limit of a prompt that is not a benchmark's question
    max_length: int  # longest context of the model, prompt and answer

    def of_unit(
        self,
        unit_batch: UnitBatch,
        shown: Sequence[Sequence[Sequence[Shown]]],
        *,
        one_picture: str | None = None,
    ) -> tuple[list[Request], set[int]]:
        """Requests for all images, and the indices of the images that it rejected because a prompt does not fit.

        `shown` holds, for each image, for each prompt, its pictures. `one_picture` names a method that accepts only
        prompts with one picture.
        """
        requests: list[Request] = []
        rejected: set[int] = set()
        for i, (image, pictures) in enumerate(zip(unit_batch.images, shown, strict=True)):
            try:
                if one_picture and image.num_pictures != 1:
                    raise ValueError(f"{one_picture} takes prompts with one image, got {image.num_pictures}")
                requests += self.of_image(i, image, pictures)
            except ValueError as error:
                unit_batch.reject(i, "prompt", str(error))
                rejected.add(i)
        return requests, rejected

    def shown(self, kept: Sequence[Sequence[Sequence[KeptRows]]]) -> list[list[list[Shown]]]:
        """The pictures of each prompt of each image, from their kept tokens."""
        return [[[self._shown(picture) for picture in prompt] for prompt in image] for image in kept]

    def _shown(self, rows: KeptRows) -> Shown:
        span = self.geometry.span(rows.size, rows.kept, self.prompter.image_token)
        return Shown(rows.tokens, len(rows.kept), span)

    def of_image(self, index: int, image: Image, pictures: Sequence[Sequence[Shown]]) -> list[Request]:
        """One request for each prompt of the image. `pictures` holds those of each prompt.

        A caption must have room for `max_new_tokens`. A benchmark's question needs room for one token: its own limit
        only guards against endless answers, so the limit shrinks to the room that the prompt leaves.

        Raises:
            ValueError: if a prompt leaves too little room for its answer, or as of `Prompter.quote`.
        """
        templates = [self.prompt.template, *self.prompt.more]
        if image.questions or len(image.prompts) != len(templates):  # prompts that no template wrote
            templates = [""] * len(image.prompts)
        requests = []
        for j, (text, template) in enumerate(zip(image.prompts, templates, strict=True)):
            style = {"conversation": self.prompt.conversation, "system": self.prompt.system}
            # A template's own control tokens are its author's; those of columns and of questions are text.
            said = self.prompter.quote(text, template)
            ids = self.prompter.encode_prompt(said, num_images=image.num_pictures, **style)
            limit = image.questions[j].max_new_tokens if image.questions else self.max_new_tokens
            request = Request(index, j, ids, list(pictures[j]), limit)
            needed = 1 if image.questions else limit
            room = self.max_length - request.length
            if room < needed:
                longest = self.max_length - needed
                raise ValueError(
                    f"prompt must leave room for {needed} new tokens: at most {longest}, got {request.length}"
                )
            requests.append(replace(request, max_new_tokens=min(limit, room)))
        return requests


def give_answers(unit_batch: UnitBatch, answers: dict[tuple[int, int], Answer], rejected: set[int]) -> None:
    """Stores the answers, keyed by (image, prompt), in the images, and drops the `rejected` images from the unit."""
    for i, image in enumerate(unit_batch.images):
        if i not in rejected:
            image.answers = [answers[i, j] for j in range(len(image.prompts))]
    unit_batch.arrays = {}
    unit_batch.drop(rejected)


def as_answer(completion: Completion, num_kept: int) -> Answer:
    """The answer to a request for which `num_kept` visual tokens were decoded. A loop is noticed by its text."""
    return Answer(
        caption=completion.text,
        num_kept_tokens=num_kept,
        num_prompt_tokens=completion.num_prompt_tokens,
        num_generated_tokens=completion.num_generated_tokens,
        finish_reason="loop" if is_loop(completion.text) else completion.finish_reason,
    )
