"""Multiple choice answered by the letter of the option: ScienceQA and SEED-Bench."""


def scienceqa_correct(prediction: str, letter: str) -> bool:
    """Whether the stripped answer is the letter, or starts with `X.` for the letter X. Case counts."""
    answer = prediction.strip()
    if answer == letter:
        return True
    return len(answer) >= 2 and answer[0].isupper() and answer[1] == "." and answer[0] == letter


def seed_correct(prediction: str, letter: str) -> bool:
    """Whether the first character of the stripped answer is the letter. Case counts."""
    return prediction.strip()[:1] == letter
