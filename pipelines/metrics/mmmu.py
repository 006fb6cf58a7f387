"""MMMU: parses free answers to multiple-choice and open questions by the benchmark's own rules.

Departures:
- For an unreadable multiple-choice answer, the published code draws a letter from Python's global random state. Here a
  hash of the question id draws the letter, so that the order of the evaluation does not change a score.
- An empty answer is wrong. The published code draws a letter for an empty answer as well.
"""

import hashlib
import re
from collections.abc import Sequence

_MIN_WORDS_FOR_TEXT = 6  # shorter answers are not searched for the text of an option
_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")
_WITH_THOUSANDS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_PLAIN = re.compile(r"-?(?:\d*\.\d+|\d+\b)(?![eE][+-]?\d|[,\d])")


def mmmu_letter(prediction: str, choices: Sequence[str], question_id: str) -> tuple[str | None, bool]:
    """(letter, whether the letter was drawn because no rule found one); (None, False) for an empty answer.

    The first rule that finds a letter decides: `(X)`; a letter before a space, even at the end of a word; `X.`; the
    text of an option, in an answer of more than five words. If a rule finds several letters, the last one in the answer
    counts.

    Raises:
        ValueError: if there are no choices.
    """
    if not choices:
        raise ValueError(f"choices of MMMU question {question_id} must not be empty")
    prediction = prediction.strip()
    if not prediction:
        return None, False
    for mark in ",.!?;:'":  # one mark after the other, as published: a mark freed by a later one stays
        prediction = prediction.strip(mark)
    text = f" {prediction} "
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    lowered = text.lower()
    options = {letter: option.lower() for letter, option in zip(letters, choices, strict=True)}

    if found := [letter for letter in letters if f"({letter})" in text]:
        return max(found, key=lambda letter: text.rfind(f"({letter})")), False
    found = [letter for letter in letters if f"{letter} " in text] or [x for x in letters if f"{x}." in text]
    if found:
        # As published, letters of both rules are ranked by ` X `: a letter that never stands alone has the place -1.
        return max(found, key=lambda letter: text.rfind(f" {letter} ")), False
    if len(text.split()) >= _MIN_WORDS_FOR_TEXT and (found := [x for x in letters if options[x] in lowered]):
        return max(found, key=lambda letter: lowered.rfind(options[letter])), False
    return letters[_hash(question_id) % len(letters)], True


def mmmu_open(prediction: str) -> list[str | float]:
    """The candidates in an open answer, normalised: the tails after cue words, and every number in the tails.

    Without a tail, the whole answer is the candidate. `=` is a cue in the last line only.
    """
    answer = prediction.strip().strip(".").lower()
    *heads, last = answer.split("\n")
    tails = [tail for head in heads if (tail := _tail(head, _CUES))]
    tails += [tail] if (tail := _tail(last, (*_CUES, "="))) else []
    texts = tails or [answer]
    numbers = [n for text in texts for kind in (_WITH_THOUSANDS, _SCIENTIFIC, _PLAIN) for n in kind.findall(text)]
    return list(dict.fromkeys(value for text in [*texts, *numbers] for value in _normalize(text)))


def mmmu_open_correct(prediction: str, answer: str) -> bool:
    """Whether a candidate in the prediction equals the number of the right answer, or contains its text."""
    right = _normalize(answer)
    texts = [value for value in right if isinstance(value, str)]
    return any(
        any(text in candidate for text in texts) if isinstance(candidate, str) else candidate in right
        for candidate in mmmu_open(prediction)
    )


def _tail(text: str, cues: Sequence[str]) -> str | None:
    """The shortest text after the last occurrence of a cue; None without a cue, or if only a mark follows.

    As published, an empty tail counts as no tail: the tail of the next cue replaces it.
    """
    shortest = ""
    for cue in cues:
        if cue in text:
            tail = text.rsplit(cue, 1)[1].strip()
            if not shortest or len(tail) < len(shortest):
                shortest = tail
    return shortest if shortest and shortest not in _TRIVIAL else None


def _normalize(text: str) -> list[str | float]:
    """The number in the text, rounded to two decimals; else the text in lower case."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return (
        [f" {text}", f"{text} "] if len(text) == 1 else [text]
    )  # a lone letter is part of almost any text, so it needs a space at one side


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
