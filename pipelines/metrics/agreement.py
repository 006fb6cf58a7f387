"""Quality of captions without references: agreement with other captions of the same images, length, loops, a canary.

"Other" captions are usually those of the unpruned model for the same sample. Agreement is not accuracy: it says how
much pruning changed, not which of the two is right.
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
    """Per image, `captions` against `others` as the only reference; the mean over images is the corpus value.

    `cider` (raw scale, at most 10), `rouge_l` and `exact_match` (0 or 1; of the tokens, so case and final dots do not
    count) and `extra_tokens` (length drift; positive where the caption is longer than the other).

    Raises:
        ValueError: if the ids differ or there are none.
    """
    check_pairs(captions, {key: [text] for key, text in others.items()})
    ours = {key: tokenize(text) for key, text in captions.items()}
    theirs = {key: tokenize(others[key]) for key in captions}
    return {
        "cider": cider_d_scores(ours, {key: [tokens] for key, tokens in theirs.items()}),
        "rouge_l": {key: rouge_l(ours[key], [theirs[key]]) for key in ours},
        "exact_match": {key: float(ours[key] == theirs[key]) for key in ours},
        "extra_tokens": {key: float(len(ours[key]) - len(theirs[key])) for key in ours},
    }


def health(captions: Sequence[str], finish_reasons: Sequence[str]) -> dict[str, float]:
    """What a corpus of captions shows by itself, as shares of the captions unless said otherwise.

    `empty`; `truncated` (finish_reason is "length"); `looping` (ends in the same words three times or more);
    `repeated_4grams` (mean share of a caption's 4-grams that came before); `distinct` (different captions / captions:
    near 0 if the model says the same of every image); `mean_tokens` (a number).

    Raises:
        ValueError: if there are no captions, or not one finish reason for each.
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
    """Did the model look? Shares of images whose caption stayed the same with other pixels in their place."""

    same_as_blank: float
    same_as_swapped: float
    max_same: float

    @property
    def saw_the_images(self) -> bool:
        return max(self.same_as_blank, self.same_as_swapped) <= self.max_same


def canary(
    captions: Mapping[Key, str],
    of_blank: Mapping[Key, str],
    of_swapped: Mapping[Key, str],
    max_same: float = 0.1,
) -> Canary:
    """Compares captions with those of a blank image and of another image under the same ids, token by token.

    A pipeline that feeds wrong or constant visual tokens still writes fluent captions; they just do not change. The
    swapped images should show something else; `max_same` leaves room for pairs that truly deserve one caption.

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
