"""What every engine does alike: the prompts of a unit's images as requests, and the answers back into the images."""

from dataclasses import dataclass, replace

from torch import Tensor

from otprune.models import Completion, Prompter
from otprune.models.prompts import Prompt
from pipelines.stages.unit_batch import Answer, Image, UnitBatch

Shown = list[list[list[Tensor]]]
"""What each prompt of each image of a unit is about: a tensor for each picture."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt of one image of the unit, ready to be decoded."""

    image: int
    prompt: int
    ids: Prompt
    visual: list[Tensor]  # [K, D] kept tokens of each picture; or its pixels, uint8 [H, H, 3]
    num_visual: int  # tokens that stand for all pictures in the prompt
    max_new_tokens: int

    @property
    def length(self) -> int:
        return sum(map(len, self.ids)) + self.num_visual


@dataclass(frozen=True, slots=True)
class RequestMaker:
    """Turns images into requests: a conversation format, the configured limit of new tokens, the longest context."""

    prompter: Prompter
    conversation: str
    max_new_tokens: int
    max_length: int

    def of_unit(
        self, unit_batch: UnitBatch, visual: Shown, *, num_tokens: int | None = None, one_picture: str | None = None
    ) -> tuple[list[Request], set[int]]:
        """Requests for all images, and the images whose prompts do not fit, which are rejected.

        Each picture stands for as many tokens of a prompt as it has, or, where `visual` are pixels, for `num_tokens`.
        `one_picture` names a method that takes prompts with one picture only.
        """
        requests: list[Request] = []
        bad: set[int] = set()
        for i, (image, pictures) in enumerate(zip(unit_batch.images, visual, strict=True)):
            try:
                if one_picture and image.num_pictures != 1:
                    raise ValueError(f"{one_picture} takes prompts with one image, got {image.num_pictures}")
                requests += self.of_image(i, image, pictures, num_tokens)
            except ValueError as error:
                unit_batch.reject(i, "prompt", str(error))
                bad.add(i)
        return requests, bad

    def of_image(
        self, index: int, image: Image, visual: list[list[Tensor]], num_tokens: int | None = None
    ) -> list[Request]:
        """One for each prompt of the image, whose pictures are `visual`.

        A question's own limit of new tokens only guards against answers without end: where a prompt leaves less room,
        the question is asked with what there is.

        Raises:
            ValueError: if a prompt leaves no room for its answer.
        """
        requests = []
        for j, text in enumerate(image.prompts):
            ids = self.prompter.encode_prompt(text, self.conversation, image.num_pictures)
            num_visual = sum(num_tokens or len(picture) for picture in visual[j])
            wanted = image.questions[j].max_new_tokens if image.questions else self.max_new_tokens
            request = Request(index, j, ids, visual[j], num_visual, wanted)
            needed = 1 if image.questions else wanted
            room = self.max_length - request.length
            if room < needed:
                most = self.max_length - needed
                raise ValueError(
                    f"prompt must leave room for {needed} new tokens: at most {most}, got {request.length}"
                )
            requests.append(replace(request, max_new_tokens=min(wanted, room)))
        return requests


def give_answers(unit_batch: UnitBatch, done: dict[tuple[int, int], Answer], bad: set[int]) -> None:
    """Gives every image the answers to its prompts, by (image, prompt), and drops those in `bad` from the unit."""
    for i, image in enumerate(unit_batch.images):
        if i not in bad:
            image.answers = [done[i, j] for j in range(len(image.prompts))]
    unit_batch.arrays = {}
    unit_batch.drop(bad)


def as_answer(completion: Completion, num_kept: int) -> Answer:
    """What a request was answered; `num_kept` visual tokens were decoded for it."""
    return Answer(
        caption=completion.text,
        num_kept_tokens=num_kept,
        num_prompt_tokens=completion.num_prompt_tokens,
        num_generated_tokens=completion.num_generated_tokens,
        finish_reason=completion.finish_reason,
    )
