"""Score every method at every retention on benchmarks: one table and one page with scores, costs and losses.

Usage: python jobs/evaluate_grid.py [--config FILE] [section.key=value ...]

Examples:
    python jobs/evaluate_grid.py                                    # the demo: six methods, four retentions
    python jobs/evaluate_grid.py --config conf/accuracy_grid_demo.yaml limit=null "grid.methods=[otprune,random]"
    python jobs/evaluate_grid.py --config conf/evaluate_llava15_7b.yaml input.path=FOLDER output.path=OUT

Every point is an evaluation (jobs/evaluate.py) with a folder of its own. Run the same command again to resume.

Exit codes:
    0    done
    2    bad configuration or input
    4    stopped by the spend cap
    130  interrupted
    1    anything else
"""

import sys

from pipelines.accuracy.config import NOT_IN_EVALUATION, AccuracyConfig
from pipelines.config.load import REPOSITORY
from pipelines.entry import enter

DEMO_CONFIG = REPOSITORY / "conf" / "accuracy_grid_demo.yaml"


def run(config: AccuracyConfig) -> int:
    from demo import ensure_corpus
    from pipelines.accuracy.grid import GridStoppedError, run_accuracy_grid
    from pipelines.accuracy.page import print_accuracy

    ensure_corpus(config.input.path)
    try:
        table = run_accuracy_grid(config)
    except GridStoppedError as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        return stopped.code
    print_accuracy(table, config.output.path)
    return 0


def main(argv: list[str]) -> int:
    return enter(argv, run, __doc__, AccuracyConfig, DEMO_CONFIG, NOT_IN_EVALUATION)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
