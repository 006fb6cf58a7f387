"""The text of a question after its image, as LLaVA-1.5's published evaluation asks it.

Whatever surrounds it (system text, roles, image tokens) belongs to the model's conversation template.
"""

from collections.abc import Sequence

CAPTION = "Provide a one-sentence caption for the provided image."
SINGLE_WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def options_text(choices: Sequence[str]) -> str:
    """`A. ...` and so on, one option a line."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
