"""The five experiments of the study: the pieces of each, and the conclusion from the rows of its pieces.

`plan` makes pieces from the configuration and the model. `conclude` makes tables (written as Parquet), metrics (for
MLflow) and findings: sentences built from the numbers, which say what agrees with the paper and what does not.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import fmean

from pipelines.study import findings
from pipelines.study.config import StudyConfig
from pipelines.study.greedy import greedy_ratio, summarize_greedy
from pipelines.study.on_demo import conclude_distance, conclude_gamma, plan_distance, plan_gamma
from pipelines.study.pieces import Conclusion, Model, Piece, Row
from pipelines.study.published_tables import TABLE_2
from pipelines.study.ranks import recomputed_p_values, recomputed_ranks
from pipelines.study.synthetic import TABLE_2_POOLS, DataSetResult, judge_data_set, summarize_data_sets


@dataclass(frozen=True)
class Experiment:
    """One experiment: `plan(config, model)` makes its pieces, `conclude(rows of all pieces, config)` its conclusion."""

    title: str
    plan: Callable[[StudyConfig, Model], list[Piece]]
    conclude: Callable[[list[Row], StudyConfig], Conclusion]
    needs_model: bool = False


def plan_table2(config: StudyConfig, _: Model) -> list[Piece]:
    """One piece for each line and seed; the pools of exhaustive lines are cut into blocks of one piece each."""
    pieces = []
    for line in sorted(set(config.table2.rows)):
        size = tuple(TABLE_2_POOLS)[line - 1]
        arguments: Row = {"num_tokens": size[0], "width": size[1], "keep": size[2]}
        if line in config.table2.exhaustive:
            total, step = math.comb(size[0], size[2]), config.table2.block
            arguments |= {"num_subsets": None, "best": "pool"}
            blocks = [{"block": [start, min(start + step, total)]} for start in range(0, total, step)]
        else:
            subsets = config.table2.subsets // 5 if line == 5 else config.table2.subsets
            arguments |= {"num_subsets": max(2, subsets), "best": "search" if line <= 2 else "extrapolated"}
            blocks = [{}]
        for seed in range(config.table2.seeds):
            for i, block in enumerate(blocks):
                name = f"line{line}-seed{seed:03d}" + (f"-{i:03d}" if len(blocks) > 1 else "")
                pieces.append(Piece("table2", name, table2_piece, {**arguments, **block, "seed": seed}))
    return pieces


def table2_piece(*, seed: int, **arguments: object) -> list[Row]:
    """Both methods on the data set of one seed; `arguments` as `judge_data_set`."""
    return [asdict(result) for result in judge_data_set(seed=seed, **arguments)]  # type: ignore[arg-type]


def conclude_table2(rows: list[Row], _: StudyConfig) -> Conclusion:
    """Win rates and ratios beside the printed ones."""
    printed = {(line.num_tokens, line.width, line.keep): line for line in TABLE_2}
    table = []
    for line in summarize_data_sets([DataSetResult(**row) for row in rows]):
        in_paper = printed[line.num_tokens, line.width, line.keep]
        win, ratio = (getattr(in_paper, f"{line.method}_{kind}") for kind in ("win", "ratio"))
        table.append({**asdict(line), "printed_win": win, "printed_ratio": ratio})
    metrics = {
        f"{name}/{row['num_tokens']}-{row['width']}-{row['keep']}/{row['method']}": row[name]
        for row in table
        if row["centered"]
        for name in ("win", "q_ratio", "f_ratio")
    }
    return Conclusion({"table2": table}, metrics, findings.of_table2(table))


def plan_greedy(config: StudyConfig, _: Model) -> list[Piece]:
    return [
        Piece(
            "greedy",
            f"{size[0]}-{size[1]}-{size[2]}-seed{seed:03d}",
            greedy_piece,
            {"size": list(size), "seed": seed, "gammas": list(config.greedy.gammas)},
        )
        for size in config.greedy.sizes
        for seed in range(config.greedy.seeds)
    ]


def greedy_piece(*, size: list[int], seed: int, gammas: list[float]) -> list[Row]:
    """The ratio of the greedy to the best value, on one data set at each gamma."""
    num_tokens, width, keep = size
    data_set = {"num_tokens": num_tokens, "width": width, "keep": keep, "seed": seed}
    return [
        {**data_set, "gamma": gamma, "ratio": greedy_ratio(num_tokens, width, keep, seed, gamma=gamma)}
        for gamma in gammas
    ]


def conclude_greedy(rows: list[Row], _: StudyConfig) -> Conclusion:
    ratios: dict[tuple[int, int, int, float], list[float]] = {}
    for row in rows:
        ratios.setdefault((row["num_tokens"], row["width"], row["keep"], row["gamma"]), []).append(row["ratio"])
    table = [asdict(summarize_greedy(*line, values)) for line, values in ratios.items()]
    metrics = {
        "worst_ratio": min(row["worst_ratio"] for row in table),
        "mean_ratio": fmean(row["mean_ratio"] for row in table),
        "guarantee": 1 - 1 / math.e,
    }
    return Conclusion({"greedy": table, "greedy_ratios": rows}, metrics, findings.of_greedy(table))


def plan_ranks(_: StudyConfig, __: Model) -> list[Piece]:
    return [Piece("ranks", "ranks", recomputed_ranks, {}), Piece("ranks", "p-values", recomputed_p_values, {})]


def conclude_ranks(rows: list[Row], _: StudyConfig) -> Conclusion:
    ranks = [row for row in rows if "kind" in row]
    p_values = [row for row in rows if "p_value" in row]
    metrics = {"ranks": float(len(ranks)), "ranks_reproduced": float(sum(row["agrees"] for row in ranks))}
    return Conclusion({"ranks": ranks, "p_values": p_values}, metrics, findings.of_ranks(ranks, p_values))


EXPERIMENTS = {
    "table2": Experiment("Table 2: synthetic tokens", plan_table2, conclude_table2),
    "greedy": Experiment("Greedy search against brute force", plan_greedy, conclude_greedy),
    "gamma": Experiment("What gamma means", plan_gamma, conclude_gamma, needs_model=True),
    "distance": Experiment("Distance against accuracy", plan_distance, conclude_distance, needs_model=True),
    "ranks": Experiment("Ranks and significance of Table 1", plan_ranks, conclude_ranks),
}
