"""MMBench: finds the option letter in a free answer by rules alone, and computes the circular score.

A question is asked several times with rotated options. The question is solved only if every copy is answered right.

Departures:
- If the rules do not decide, the published evaluation asks a GPT judge. Here an undecided answer is wrong, and the
  number of undecided answers is reported. Models of the LLaVA-1.5 kind practically always answer with a letter.
"""

from collections.abc import Sequence

LETTERS = "ABCDE"  # five, however many options there are
MAX_WORDS_WITH_A = 3  # in a longer answer "A" may be the article
# Words in which the letter stands at {}. The first shape that exactly one letter fits decides.
_SHAPES = ("{}.", "{},", "{}:", "{})", "{}).", "({})", "({}).", ":{}", ":{},", ":{}.", ":{})", ":{}).")


def mmbench_letter(prediction: str, choices: Sequence[str]) -> str | None:
    """The letter in the answer, or None if the rules do not decide.

    The rules in their order: exactly one letter stands alone as a word; exactly one letter fits a shape; the answer
    contains the text of exactly one option. `choices` are the texts of options A, B, .... Where the data set writes
    `nan` for an absent option, `nan` counts as a text, as in the published rules; a null option has no text.
    """
    words = prediction.split()
    alone = [letter for letter in LETTERS if letter in words]
    if len(alone) == 1 and not ("A" in words and len(words) > MAX_WORDS_WITH_A):
        return alone[0]
    for shape in _SHAPES:
        fitting = [letter for letter in LETTERS if shape.format(letter) in words]
        if len(fitting) == 1:
            return fitting[0]
    lowered = prediction.lower()
    contained = [letter for letter, text in zip("ABCDEFGHIJ", choices, strict=False) if text.lower() in lowered]
    return contained[0] if len(contained) == 1 else None


def circular_hit(letters: Sequence[str | None], answers: Sequence[str]) -> bool:
    """Whether every copy of one question is answered right.

    Raises:
        ValueError: if there is no copy, or another number of answers.
    """
    if not letters or len(letters) != len(answers):
        raise ValueError(
            f"letters and answers must be of one length, at least 1, got {len(letters)} and {len(answers)}"
        )
    return all(letter == answer for letter, answer in zip(letters, answers, strict=True))
