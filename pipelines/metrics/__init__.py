"""Scores of captions and answers: pure functions, one file for each family of metrics.

Callers import `compare` inside the function that uses it, because `compare` needs scipy.
"""

from pipelines.metrics.chair import chair
from pipelines.metrics.cider import cider_d, cider_d_scores
from pipelines.metrics.vqa import vqa_accuracy, vqa_normalize

__all__ = ["chair", "cider_d", "cider_d_scores", "vqa_accuracy", "vqa_normalize"]
