"""Find the setting to buy: caption a corpus with a grid of settings, and compare their costs and their quality.

Usage: python jobs/sweep.py [--config FILE] [section.key=value ...]

Examples:
    python jobs/sweep.py                                            # the demo's grid
    python jobs/sweep.py --config conf/llava15_7b.yaml input.path=s3://bucket/images input.limit=2000 output.path=OUT \\
        "sweep.grid={method: [otprune], retention: [0.05, 0.1, 0.2]}"
    python jobs/sweep.py ... sweep.dry_run=true                     # list the points with estimated dollars

Prints a table and writes report.html. Finished points are skipped, so the same command resumes.

Exit codes:
    0    every point finished
    1    some points failed; the table and the report have their reasons
    2    bad configuration
    4    stopped by the spend cap
    130  interrupted
"""

import sys

from pipelines.config.load import REPOSITORY
from pipelines.entry import enter
from pipelines.sweep.config import SweepConfig

DEMO_CONFIG = REPOSITORY / "conf" / "sweep_demo.yaml"


def run(config: SweepConfig) -> int:
    from demo import ensure_corpus
    from pipelines.sweep.checked import prepare_sweep
    from pipelines.sweep.dry_run import estimate_points
    from pipelines.sweep.run import run_sweep
    from pipelines.sweep.summary import print_estimates, print_sweep

    ensure_corpus(config.input.path)
    sweep = prepare_sweep(config)
    if config.sweep.dry_run:
        print_estimates(estimate_points(sweep))
        return 0
    outcome = run_sweep(sweep)
    print_sweep(sweep, outcome)
    return outcome.code


def main(argv: list[str]) -> int:
    return enter(argv, run, __doc__, SweepConfig, DEMO_CONFIG)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
