"""Tries looping captions again, each time at a higher temperature. All engines share this ladder.

    attempt 0    as configured
    attempt a    temperature + 0.3 a, nucleus of at most 0.9, a seed of the image, the prompt and the attempt

An answer climbs until an attempt ends by itself and says something. If none does, the least faulty is kept: one that
was cut before one that loops, the earliest among equals. The attempts of an answer depend on nothing but its image and
its prompt, so a unit that is run again, in other batches or by another actor, climbs the same steps. All attempts lie
within the stage, before the unit's commit: a kill in between leaves nothing behind.
"""

from dataclasses import dataclass, replace
from typing import Any

from pipelines.config.keys import GenerateConfig
from pipelines.engines.requests import Request
from pipelines.stages.seeds import sampling_seed
from pipelines.stages.unit_batch import Answer, Image

STEP = 0.3  # of the temperature, from one attempt to the next
TOP_P = 0.9  # largest nucleus of a retry: the tail of a hot distribution is noise
FAULTS = ("stop", "length", "loop")  # finish reasons, the best first


@dataclass(frozen=True, slots=True)
class Ladder:
    """The attempts at one answer."""

    retries: int
    retry_cut: bool  # whether answers that were cut are tried again, too
    temperature: float  # of attempt 0
    top_p: float
    seed: int

    @classmethod
    def of(cls, generate: GenerateConfig) -> "Ladder":
        return cls(generate.retries, generate.retry_cut, generate.temperature, generate.top_p, generate.seed)

    def sampling(self, attempt: int) -> dict[str, Any]:
        """Temperature and top_p of an attempt."""
        if not attempt:
            return {"temperature": self.temperature, "top_p": self.top_p}
        return {"temperature": self.temperature + STEP * attempt, "top_p": min(self.top_p, TOP_P)}

    def seed_of(self, image: Image, request: Request, attempt: int) -> int:
        """The seed of an attempt at the answer to `request`."""
        return sampling_seed(image.sha256, request.prompt, self.seed, attempt)

    def goes_on(self, answer: Answer) -> bool:
        """Whether the answer is to be tried again."""
        if answer.num_attempts > self.retries:
            return False
        return answer.finish_reason == "loop" or (self.retry_cut and answer.finish_reason == "length")


def failed_again(kept: Answer) -> Answer:
    """The answer after an attempt that raised: the same, with one attempt more."""
    return replace(kept, num_attempts=kept.num_attempts + 1)


def better_of(kept: Answer, new: Answer) -> Answer:
    """The less faulty of the answer kept so far and that of a new attempt, with the attempts and tokens of both."""
    is_better = bool(new.caption) and FAULTS.index(new.finish_reason) < FAULTS.index(kept.finish_reason)
    chosen, other = (new, kept) if is_better else (kept, new)
    return replace(
        chosen,
        num_attempts=kept.num_attempts + 1,
        num_discarded_tokens=kept.num_discarded_tokens + other.num_generated_tokens,
    )
