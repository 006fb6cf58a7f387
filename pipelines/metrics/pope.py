"""POPE, questions whether an object is there: accuracy, precision, recall and F1 of "yes", over all questions.

The counts of an answer are additive, so pooling, categories and resampling are sums of the same array.
"""

import numpy as np

from pipelines.metrics.sums import ratio


def pope_counts(prediction: str, answer: str) -> np.ndarray:
    """Counts of one answer, float64 [7]: asked, right, true yes, false yes, missed yes, right answer yes, answered yes.

    The prediction is only lower-cased and stripped: `yes.` is neither yes nor no. Only a clear `no` misses a yes, so
    any other text lowers the accuracy and does not change the recall.

    Raises:
        ValueError: if the right answer is not yes or no.
    """
    predicted, right = prediction.lower().strip(), answer.lower().strip()
    if right not in ("yes", "no"):
        raise ValueError(f"answer must be yes or no, got {answer!r}")
    yes, true_yes = predicted == "yes", right == "yes"
    return np.array(
        [1, predicted == right, yes and true_yes, yes and not true_yes, predicted == "no" and true_yes, true_yes, yes],
        np.float64,
    )


def pope_metrics(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics [...] from summed counts [..., 7]. A ratio whose denominator is 0 is 0.

    `pope_yes_ratio` is the share of yes among the right answers, as published; `said_yes_ratio` is the share of yes
    among the model's answers.
    """
    asked, right, true_yes, false_yes, missed, right_yes, predicted_yes = np.moveaxis(counts, -1, 0)
    precision, recall = ratio(true_yes, true_yes + false_yes), ratio(true_yes, true_yes + missed)
    return {
        "pope_accuracy": ratio(right, asked),
        "pope_precision": precision,
        "pope_recall": recall,
        "pope_f1_score": ratio(2 * precision * recall, precision + recall),
        "pope_yes_ratio": ratio(right_yes, asked),
        "said_yes_ratio": ratio(predicted_yes, asked),
    }
