"""POPE: is the object there? Accuracy, precision, recall and F1 of "yes", pooled over all questions.

Counts are per answer and additive, so pooling, categories and resampling are sums of the same array.
"""

import numpy as np

from pipelines.metrics.sums import ratio


def pope_counts(prediction: str, answer: str) -> np.ndarray:
    """Counts of one answer, float64 [7]: asked, right, true yes, false yes, missed yes, right answer yes, said yes.

    The prediction is lower-cased and stripped and nothing else: `yes.` is neither yes nor no. A yes is missed only by a
    clear `no`, so any other text lowers the accuracy and leaves the recall alone.

    Raises:
        ValueError: if the right answer is not yes or no.
    """
    said, right = prediction.lower().strip(), answer.lower().strip()
    if right not in ("yes", "no"):
        raise ValueError(f"answer must be yes or no, got {answer!r}")
    yes, true_yes = said == "yes", right == "yes"
    return np.array(
        [1, said == right, yes and true_yes, yes and not true_yes, said == "no" and true_yes, true_yes, yes], np.float64
    )


def pope_metrics(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics [...] from summed counts [..., 7]; a ratio without a denominator is 0.

    `pope_yes_ratio` is the share of yes among the right answers, as published; `said_yes_ratio` is the model's own.
    """
    asked, right, true_yes, false_yes, missed, asked_yes, said_yes = np.moveaxis(counts, -1, 0)
    precision, recall = ratio(true_yes, true_yes + false_yes), ratio(true_yes, true_yes + missed)
    return {
        "pope_accuracy": ratio(right, asked),
        "pope_precision": precision,
        "pope_recall": recall,
        "pope_f1_score": ratio(2 * precision * recall, precision + recall),
        "pope_yes_ratio": ratio(asked_yes, asked),
        "said_yes_ratio": ratio(said_yes, asked),
    }
