"""MME: two yes/no questions an image; accuracy and accuracy+ (both right) add up to at most 200 in each category."""

from collections.abc import Sequence

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def mme_answer(prediction: str) -> str:
    """`yes`, `no` or `other`.

    After lower-casing, stripping and deleting dots: the word itself, or its first letter alone, or else whatever of the
    two the first four characters contain, yes before no (so "not" and "none" are no).
    """
    text = prediction.lower().strip().replace(".", "")
    if text in ("yes", "no"):
        return text
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    head = text[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def mme_image_score(correct: Sequence[bool]) -> float:
    """Score of one image: 100 * mean of its two answers, plus 100 if both are right. One of 0, 50, 200.

    Raises:
        ValueError: if there are not exactly two answers.
    """
    if len(correct) != 2:
        raise ValueError(f"an MME image must have 2 questions, got {len(correct)}")
    return 50.0 * sum(correct) + 100.0 * all(correct)
