"""MMBench: the option letter that a free answer names, by rules alone, and the circular score.

A question is asked several times with its options rotated; it counts as solved only if every copy is answered right.

Departures:
- The published evaluation asks a GPT judge where the rules do not decide. Here undecided is wrong, and the number of
  undecided answers is reported; models of the LLaVA-1.5 kind practically always answer with a letter.
"""

from collections.abc import Sequence

LETTERS = "ABCDE"  # five, however many options there are
MAX_WORDS_WITH_A = 3  # in a longer answer "A" may be the article
# The letter stands where {} is; the first shape that exactly one letter takes wins.
_SHAPES = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")


def mmbench_letter(prediction: str, choices: Sequence[str]) -> str | None:
    """The letter that the answer names, or None if the rules do not decide.

    `choices` are the texts of options A, B, ...; the string `nan`, which the data set puts for an absent option, counts
    as a text, as it does in the published rules.
    """
    words = prediction.split()
    alone = [letter for letter in LETTERS if letter in words]
    if len(alone) == 1 and not ("A" in words and len(words) > MAX_WORDS_WITH_A):
        return alone[0]
    for shape in _SHAPES:
        fitting = [letter for letter in LETTERS if shape.format(letter) in words]
        if len(fitting) == 1:
            return fitting[0]
    said = prediction.lower()
    contained = [letter for letter, text in zip("ABCDEFGHIJ", choices, strict=False) if text.lower() in said]
    return contained[0] if len(contained) == 1 else None


def circular_hit(letters: Sequence[str | None], answers: Sequence[str]) -> bool:
    """Whether every copy of one question is answered right.

    Raises:
        ValueError: if there is no copy, or not one answer for each.
    """
    if not letters or len(letters) != len(answers):
        raise ValueError(
            f"letters and answers must be of one length, at least 1, got {len(letters)} and {len(answers)}"
        )
    return all(letter == answer for letter, answer in zip(letters, answers, strict=True))
