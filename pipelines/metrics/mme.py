"""MME: two yes/no questions about each image. Accuracy plus accuracy+ (both right) is at most 200 in each category."""

from collections.abc import Sequence

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def mme_answer(prediction: str) -> str:
    """`yes`, `no` or `other`.

    The prediction is lower-cased and stripped, and its dots are deleted. Then the answer is the word itself, or the
    word of which the prediction is the first letter, or the word in the first four characters, yes before no. So "not"
    and "none" are no.
    """
    text = prediction.lower().strip().replace(".", "")
    if text in ("yes", "no"):
        return text
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text, "other")
    head = text[:4]
    return "yes" if "yes" in head else "no" if "no" in head else "other"


def mme_image_score(correct: Sequence[bool]) -> float:
    """Score of one image: 100 * share of right answers, plus 100 if both are right. One of 0, 50, 200.

    Raises:
        ValueError: if there are not exactly two answers.
    """
    if len(correct) != 2:
        raise ValueError(f"an MME image must have 2 questions, got {len(correct)}")
    return 50.0 * sum(correct) + 100.0 * all(correct)
