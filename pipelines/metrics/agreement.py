"""Quality of captions without references: agreement with other captions of the same images, health, a canary.

The other captions are usually those of the unpruned model for the same sample. Agreement is not accuracy: agreement
says how much pruning changed the captions, not which captions are right.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from pipelines.metrics.cider import cider_d_scores
from pipelines.metrics.pairs import Key, check_pairs
from pipelines.metrics.ptb import tokenize
from pipelines.metrics.repetition import is_loop, pieces, repeated_share
from pipelines.metrics.rouge import rouge_l


def agreement(captions: Mapping[Key, str], others: Mapping[Key, str]) -> dict[str, dict[Key, float]]:
    """Metric -> image -> value of `captions` with `others` as the only references. The mean is the corpus value.

    cider          CIDEr-D on the raw scale, at most 10
    rouge_l        ROUGE-L in [0, 1]
    exact_match    1 if the tokens are equal, so case and final dots do not count; else 0
    extra_tokens   length drift: tokens of the caption minus tokens of the other

    Raises:
        ValueError: if the ids of the two differ, or there are none.
    """
    check_pairs(captions, {key: [text] for key, text in others.items()})
    tokens = {key: tokenize(text) for key, text in captions.items()}
    other_tokens = {key: tokenize(others[key]) for key in captions}
    return {
        "cider": cider_d_scores(tokens, {key: [reference] for key, reference in other_tokens.items()}),
        "rouge_l": {key: rouge_l(tokens[key], [other_tokens[key]]) for key in tokens},
        "exact_match": {key: float(tokens[key] == other_tokens[key]) for key in tokens},
        "extra_tokens": {key: float(len(tokens[key]) - len(other_tokens[key])) for key in tokens},
    }


def health(captions: Sequence[str], finish_reasons: Sequence[str]) -> dict[str, float]:
    """Symptoms that a corpus of captions shows by itself. All values but the last are shares in [0, 1].

    empty             captions without a character other than white space
    truncated         captions whose finish reason is "length"
    looping           captions that end in a loop (repetition.py)
    repeated_4grams   mean share of a caption's 4-grams that occurred before in the same caption
    distinct          different captions / captions; near 0 if the model says the same of every image
    mean_tokens       mean number of tokens

    Raises:
        ValueError: if there are no captions, or another number of finish reasons.
    """
    if not captions or len(captions) != len(finish_reasons):
        lengths = f"{len(captions)} and {len(finish_reasons)}"
        raise ValueError(f"captions and finish_reasons must be of one length, at least 1, got {lengths}")
    return {
        "empty": fmean(not caption.strip() for caption in captions),
        "truncated": fmean(reason == "length" for reason in finish_reasons),
        "looping": fmean(map(is_loop, captions)),
        "repeated_4grams": fmean(repeated_share(pieces(caption)) for caption in captions),
        "distinct": len(set(captions)) / len(captions),
        "mean_tokens": fmean(len(tokenize(caption)) for caption in captions),
    }


@dataclass(frozen=True, slots=True)
class Canary:
    """Whether captions depend on their images: shares of captions that stay the same with other pixels."""

    same_as_blank: float
    same_as_swapped: float
    max_same: float

    @property
    def saw_the_images(self) -> bool:
        """Whether neither share is above `max_same`."""
        return max(self.same_as_blank, self.same_as_swapped) <= self.max_same


def canary(
    captions: Mapping[Key, str],
    of_blank: Mapping[Key, str],
    of_swapped: Mapping[Key, str],
    max_same: float = 0.1,
) -> Canary:
    """Compares captions, token by token, with the captions of a blank image and of a swapped image under the same ids.

    A pipeline that feeds wrong or constant visual tokens still writes fluent captions, but these captions do not change
    with the image. A swapped image should show something else; `max_same` leaves room for pairs of images that deserve
    the same caption.

    Raises:
        ValueError: if the ids differ, there are none, or max_same is outside [0, 1].
    """
    if not 0 <= max_same <= 1:
        raise ValueError(f"max_same must be in [0, 1], got {max_same}")
    shares = []
    for others in (of_blank, of_swapped):
        check_pairs(captions, {key: [text] for key, text in others.items()})
        shares.append(fmean(tokenize(text) == tokenize(others[key]) for key, text in captions.items()))
    return Canary(same_as_blank=shares[0], same_as_swapped=shares[1], max_same=max_same)
