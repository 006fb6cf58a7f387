"""The texts that follow the image in a prompt, as the published evaluation of LLaVA-1.5 writes them.

The text around them (system text, roles, image tokens) belongs to the model's conversation template.
"""

from collections.abc import Sequence

CAPTION = "Provide a one-sentence caption for the provided image."
SINGLE_WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def options_text(choices: Sequence[str]) -> str:
    """One line for each option: `A. ...`, `B. ...`."""
    return "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False))
