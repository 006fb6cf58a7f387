"""Exact match, the score of GQA: the `exact_match` metric of Hugging Face evaluate, without case and punctuation."""

import string

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(prediction: str, target: str) -> bool:
    """Whether the two are equal in lower case and without ASCII punctuation.

    Punctuation is deleted, not replaced by a space. White space is stripped around the prediction only. Articles and
    number words stay. Two texts that hold only punctuation match if they are the same text.
    """
    prediction = prediction.strip()
    left, right = (text.lower().translate(_NO_PUNCTUATION) for text in (prediction, target))
    return left == right if left or right else prediction == target
