"""The pieces that recompute the printed ranks and the printed p-value from the printed scores."""

from dataclasses import asdict

from pipelines.study.pieces import Row
from pipelines.study.published import published_ranks, wilcoxon_variants
from pipelines.study.published_tables import TABLE_1, WILCOXON_P


def recomputed_ranks() -> list[Row]:
    """One row for each printed rank: model, method, kind (average | one-shot), printed, recomputed, agrees."""
    rows = []
    for model, block in TABLE_1.items():
        for method, recomputed in published_ranks(model).items():
            printed = (block[method].average_rank, block[method].one_shot_rank)
            for kind, rank, value in zip(("average", "one-shot"), printed, recomputed, strict=True):
                if rank is not None and value is not None:
                    agrees = abs(value - rank) <= 0.005 + 1e-9  # two decimals are printed
                    rows.append(
                        {
                            "model": model,
                            "method": method,
                            "kind": kind,
                            "printed": rank,
                            "recomputed": value,
                            "agrees": agrees,
                        }
                    )
    return rows


def recomputed_p_values() -> list[Row]:
    """One row for each reading of the signed-rank test, and whether it rounds to the printed p."""
    return [
        {**asdict(variant), "printed": WILCOXON_P, "agrees": round(variant.p_value, 3) == WILCOXON_P}
        for variant in wilcoxon_variants()
    ]
