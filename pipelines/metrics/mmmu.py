"""MMMU: what a free answer says, for multiple-choice and for open questions, by the benchmark's own parsing rules.

Departures:
- The published fallback for an unreadable multiple-choice answer is a letter from Python's global random state. Here it
  is a letter drawn from a hash of the question id, so that no order of evaluation changes a score.
- An empty answer is wrong. The published code draws a letter for it as well.
"""

import hashlib
import re
from collections.abc import Sequence

_MIN_WORDS_FOR_TEXT = 6  # only a longer answer is searched for the text of an option
_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_TRIVIAL = frozenset(":,.!?;'")
_WITH_THOUSANDS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_PLAIN = re.compile(r"-?(?:\d*\.\d+|\d+\b)(?![eE][+-]?\d|[,\d])")


def mmmu_letter(prediction: str, choices: Sequence[str], question_id: str) -> tuple[str | None, bool]:
    """(letter, whether it was drawn because the rules found none); (None, False) for an empty answer.

    The first rule that finds a letter: `(X)`; a letter before a space, even at the end of a word; `X.`; in an answer of
    more than five words the text of an option. Of several letters the one that stands last.

    Raises:
        ValueError: if there are no choices.
    """
    if not choices:
        raise ValueError(f"choices of MMMU question {question_id} must not be empty")
    if not prediction.strip():
        return None, False
    for mark in ",.!?;:'":
        prediction = prediction.strip(mark)
    text = f" {prediction} "
    letters = [chr(ord("A") + i) for i in range(len(choices))]
    lowered = text.lower()
    options = {letter: option.lower() for letter, option in zip(letters, choices, strict=True)}

    if found := [letter for letter in letters if f"({letter})" in text]:
        return max(found, key=lambda letter: text.rfind(f"({letter})")), False
    found = [letter for letter in letters if f"{letter} " in text] or [x for x in letters if f"{x}." in text]
    if found:
        return max(found, key=lambda letter: text.rfind(f" {letter} ")), False
    if len(text.split()) >= _MIN_WORDS_FOR_TEXT and (found := [x for x in letters if options[x] in lowered]):
        return max(found, key=lambda letter: lowered.rfind(options[letter])), False
    return letters[_hash(question_id) % len(letters)], True


def mmmu_open(prediction: str) -> list[str | float]:
    """The candidate answers in an open answer: tails after cue words, and every number in them, normalised."""
    whole = prediction.strip().strip(".").lower()
    *heads, last = whole.split("\n")
    tails = [tail for head in heads if (tail := _tail(head, _CUES))]
    tails += [tail] if (tail := _tail(last, (*_CUES, "="))) else []
    texts = tails or [whole]
    numbers = [n for text in texts for kind in (_WITH_THOUSANDS, _SCIENTIFIC, _PLAIN) for n in kind.findall(text)]
    return list(dict.fromkeys(value for text in [*texts, *numbers] for value in _normalize(text)))


def mmmu_open_correct(prediction: str, answer: str) -> bool:
    """Whether a candidate answer equals the number, or contains the text, of the right one."""
    right = _normalize(answer)
    texts = [value for value in right if isinstance(value, str)]
    return any(
        any(text in candidate for text in texts) if isinstance(candidate, str) else candidate in right
        for candidate in mmmu_open(prediction)
    )


def _tail(text: str, cues: Sequence[str]) -> str | None:
    """The shortest text after the last occurrence of a cue; None if there is no cue, or nothing but a mark after it.

    As published, an empty tail is the shortest so far until the next cue replaces it.
    """
    shortest = ""
    for cue in cues:
        if cue in text:
            tail = text.rsplit(cue, 1)[1].strip()
            if not shortest or len(tail) < len(shortest):
                shortest = tail
    return shortest if shortest and shortest not in _TRIVIAL else None


def _normalize(text: str) -> list[str | float]:
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
    return [f" {text}", f"{text} "] if len(text) == 1 else [text]  # a lone letter is in almost any text


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8])
