"""Turns the prompts of a unit's images into requests, and stores the answers in the images. All engines share this."""

from dataclasses import dataclass, replace

from torch import Tensor

from otprune.models import Completion, Prompter
from otprune.models.prompts import Prompt
from pipelines.stages.unit_batch import Answer, Image, UnitBatch

Shown = list[list[list[Tensor]]]
"""For each image, for each prompt, one tensor for each picture: its kept tokens [K, D], or its pixels [H, H, 3]."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt of one image of a unit, ready to be decoded."""

    image: int  # index in the unit
    prompt: int  # index among the image's prompts
    ids: Prompt
    visual: list[Tensor]  # of each picture the kept tokens [K, D], or its pixels, uint8 [H, H, 3]
    num_visual: int  # visual tokens of all pictures in the prompt
    max_new_tokens: int

    @property
    def length(self) -> int:
        """Text and visual tokens of the prompt."""
        return sum(map(len, self.ids)) + self.num_visual


@dataclass(frozen=True, slots=True)
class RequestMaker:
    """Turns the images of units into requests."""

    prompter: Prompter
    conversation: str  # name of the conversation format
    max_new_tokens: int  # limit of a prompt that is not a benchmark's question
    max_length: int  # longest context of the model, prompt and answer

    def of_unit(
        self, unit_batch: UnitBatch, visual: Shown, *, num_tokens: int | None = None, one_picture: str | None = None
    ) -> tuple[list[Request], set[int]]:
        """Requests for all images, and the indices of the images that it rejected because a prompt does not fit.

        A picture takes as many places in a prompt as it has kept tokens or, where `visual` holds pixels, `num_tokens`
        places. `one_picture` names a method that accepts only prompts with one picture.
        """
        requests: list[Request] = []
        rejected: set[int] = set()
        for i, (image, pictures) in enumerate(zip(unit_batch.images, visual, strict=True)):
            try:
                if one_picture and image.num_pictures != 1:
                    raise ValueError(f"{one_picture} takes prompts with one image, got {image.num_pictures}")
                requests += self.of_image(i, image, pictures, num_tokens)
            except ValueError as error:
                unit_batch.reject(i, "prompt", str(error))
                rejected.add(i)
        return requests, rejected

    def of_image(
        self, index: int, image: Image, visual: list[list[Tensor]], num_tokens: int | None = None
    ) -> list[Request]:
        """One request for each prompt of the image. `visual` holds the pictures of each prompt.

        A caption must have room for `max_new_tokens`. A benchmark's question needs room for one token: its own limit
        only guards against endless answers, so the limit shrinks to the room that the prompt leaves.

        Raises:
            ValueError: if a prompt leaves too little room for its answer.
        """
        requests = []
        for j, text in enumerate(image.prompts):
            ids = self.prompter.encode_prompt(text, self.conversation, image.num_pictures)
            num_visual = sum(num_tokens or len(picture) for picture in visual[j])
            limit = image.questions[j].max_new_tokens if image.questions else self.max_new_tokens
            request = Request(index, j, ids, visual[j], num_visual, limit)
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
    """The answer to a request for which `num_kept` visual tokens were decoded."""
    return Answer(
        caption=completion.text,
        num_kept_tokens=num_kept,
        num_prompt_tokens=completion.num_prompt_tokens,
        num_generated_tokens=completion.num_generated_tokens,
        finish_reason=completion.finish_reason,
    )
