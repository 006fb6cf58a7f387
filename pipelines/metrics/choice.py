"""Multiple choice where the answer has to be the letter: ScienceQA and SEED-Bench."""


def scienceqa_correct(prediction: str, letter: str) -> bool:
    """Whether the stripped answer is the letter, or starts with it as `X.`; case counts."""
    said = prediction.strip()
    if said == letter:
        return True
    return len(said) >= 2 and said[0].isupper() and said[1] == "." and said[0] == letter


def seed_correct(prediction: str, letter: str) -> bool:
    """Whether the first character of the stripped answer is the letter; case counts."""
    return prediction.strip()[:1] == letter
