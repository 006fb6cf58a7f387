"""The tables of the OTPrune paper (arXiv 2602.20205) as numbers, as printed and as rounded there.

The rows of Table 1 equal those of the DivPrune paper (arXiv 2503.02175), except for OTPrune's own. CIDEr is on the raw
0-10 scale, MME in points, every other score in percent.
"""

from dataclasses import dataclass

BENCHMARKS = ("COCO", "Flickr30k", "GQA", "MMBench", "MME", "MMMU", "NoCaps", "OK-VQA", "POPE", "ScienceQA", "SEED")


@dataclass(frozen=True)
class Row:
    """One line of Table 1. Scores are in the order of BENCHMARKS. None: the paper prints nothing, or "variable"."""

    scores: tuple[float, ...]
    tflops: float | None
    ratio_percent: float | None
    average_rank: float | None = None
    one_shot_rank: float | None = None


ORIGINAL = "Original"
ONE_SHOT = ("VTW", "FastV", "DivPrune", "OTPrune")
"""The methods with a one-shot rank: they prune at a fixed ratio, without calibration or training."""

TABLE_1 = {
    "llava-1.5-7b": {
        ORIGINAL: Row((1.10, 0.75, 61.96, 64.09, 1506, 36.44, 1.06, 53.39, 85.84, 69.41, 66.17), 3.228, 100.0),
        "VTW": Row((0.05, 0.03, 38.94, 21.31, 681, 32.60, 0.03, 18.64, 25.35, 65.29, 36.13), 0.603, 18.46, 8.23, 3.41),
        "FastV": Row(
            (0.06, 0.03, 38.73, 20.62, 696, 32.00, 0.04, 18.32, 32.84, 65.15, 35.69), 0.514, 15.69, 8.41, 3.59
        ),
        "DivPrune": Row(
            (0.96, 0.62, 56.85, 59.19, 1328, 35.89, 0.92, 46.98, 86.02, 68.27, 59.47), 0.512, 15.63, 3.23, 1.64
        ),
        "OTPrune": Row(
            (1.00, 0.68, 56.62, 60.40, 1368, 35.44, 0.99, 47.09, 79.59, 68.42, 59.31), 0.512, 15.63, 2.36, 1.36
        ),
        "PruMerge": Row((0.77, 0.50, 51.30, 54.47, 1259, 35.11, 0.73, 41.74, 66.89, 68.91, 53.26), None, None, 6.09),
        "DivPrune*": Row((0.91, 0.56, 55.25, 58.16, 1330, 35.44, 0.87, 44.38, 83.06, 67.87, 57.88), None, None, 4.73),
        "FitPrune": Row((0.90, 0.56, 52.39, 57.65, 1197, 36.00, 0.86, 42.53, 60.89, 68.02, 54.84), 0.513, 15.65, 5.59),
        "M3": Row((1.00, 0.67, 60.81, 65.81, 1391, 31.80, 0.95, 55.12, 86.33, 64.65, 64.93), 0.512, 15.63, 2.68),
        "PruMerge-LoRA": Row(
            (0.96, 0.63, 55.96, 59.88, 1334, 34.89, 0.90, 47.99, 77.13, 68.32, 57.93), None, None, 3.68
        ),
    },
    "llava-1.5-13b": {
        ORIGINAL: Row((1.16, 0.80, 63.33, 68.64, 1522, 35.67, 1.09, 58.28, 85.99, 72.88, 66.82), 6.281, 100.0),
        "VTW": Row((0.08, 0.05, 39.71, 21.91, 622, 32.10, 0.05, 22.49, 0.40, 66.24, 38.59), 1.030, 16.16, 6.00, 4.00),
        "FastV": Row(
            (0.38, 0.18, 44.98, 37.80, 942, 35.11, 0.33, 32.14, 30.02, 69.96, 44.95), 1.003, 15.73, 4.82, 2.91
        ),
        "DivPrune": Row(
            (1.00, 0.66, 57.29, 63.40, 1407, 34.89, 0.95, 53.29, 83.43, 72.34, 62.04), 1.002, 15.71, 2.14, 1.91
        ),
        "OTPrune": Row(
            (1.03, 0.71, 57.11, 65.55, 1411, 37.00, 1.01, 54.56, 79.39, 73.82, 62.08), 1.002, 15.71, 1.27, 1.18
        ),
        "PruMerge": Row((0.80, 0.53, 52.01, 58.93, 1256, 36.56, 0.77, 49.15, 64.36, 72.53, 56.10), None, None, 3.64),
        "DivPrune*": Row((0.94, 0.59, 56.09, 61.77, 1344, 34.89, 0.91, 50.86, 79.60, 71.34, 60.00), None, None, 3.14),
    },
    "llava-1.6-7b": {
        ORIGINAL: Row((1.00, 0.68, 64.28, 67.01, 1520, 36.44, 0.88, 44.20, 86.38, 70.15, 70.16), 11.849, 100.0),
        "VTW": Row((0.06, 0.03, 38.62, 19.76, 606, 31.30, 0.03, 8.66, 7.13, 65.74, 37.48), 1.318, 11.23, 3.82, 3.82),
        "FastV": Row((0.06, 0.03, 38.79, 20.36, 619, 32.56, 0.04, 8.80, 7.78, 65.49, 37.62), 1.327, 11.30, 3.18, 3.18),
        "DivPrune": Row(
            (0.89, 0.61, 58.69, 63.49, 1362, 37.11, 0.76, 41.92, 82.97, 68.57, 64.11), 1.266, 10.79, 1.77, 1.77
        ),
        "OTPrune": Row(
            (0.89, 0.64, 60.28, 63.75, 1414, 38.33, 0.84, 43.26, 81.41, 68.07, 64.79), 1.266, 10.79, 1.23, 1.23
        ),
    },
}
"""Table 1: model -> method -> row."""

WILCOXON_P = 0.028
"""The one-sided p of OTPrune over DivPrune in section 5. The paper does not say of which scores."""


@dataclass(frozen=True)
class SyntheticRow:
    """One line of Table 2, in percent: share of random subsets beaten, and objective relative to the best subset."""

    num_tokens: int
    width: int
    keep: int
    num_subsets: int
    exhaustive: bool
    divprune_win: float
    divprune_ratio: float
    otprune_win: float
    otprune_ratio: float


TABLE_2 = (
    SyntheticRow(20, 10, 5, 15_504, True, 60.14, 74.53, 94.56, 87.81),
    SyntheticRow(30, 20, 10, 30_045_015, True, 84.62, 76.48, 99.49, 93.98),
    SyntheticRow(100, 50, 30, 10_000_000, False, 88.77, 92.20, 99.99, 100.00),
    SyntheticRow(100, 80, 50, 10_000_000, False, 92.14, 95.80, 100.00, 100.00),
    SyntheticRow(1000, 256, 100, 10_000_000, False, 97.59, 97.71, 100.00, 100.00),
)
"""Table 2. The paper does not state the distribution of the data, the number of data sets or gamma."""
