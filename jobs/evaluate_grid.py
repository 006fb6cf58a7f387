"""Score methods x retentions on benchmarks, and say what each keeps, costs and loses: one table, one page.

    python jobs/evaluate_grid.py                                    # the demo: six methods, four retentions
    python jobs/evaluate_grid.py --config conf/accuracy_grid_demo.yaml limit=null "grid.methods=[otprune,random]"
    python jobs/evaluate_grid.py --config conf/evaluate_llava15_7b.yaml input.path=FOLDER output.path=OUT

Every point is an evaluation (jobs/evaluate.py) in a folder of its own; the same command again goes on where it stopped.
Exit codes: 0 done; 2 bad configuration or input; 4 stopped by the spend cap; 130 interrupted; 1 anything else.
"""

import logging
import sys

from demo import ensure_corpus
from pipelines.accuracy.grid import GridStoppedError, run_accuracy_grid
from pipelines.accuracy.page import print_accuracy
from pipelines.config.keys import NOT_IN_EVALUATION, AccuracyConfig
from pipelines.config.load import REPOSITORY, help_text, load_config
from pipelines.errors import UserError

DEMO_CONFIG = REPOSITORY / "conf" / "accuracy_grid_demo.yaml"


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if {"-h", "--help"} & set(argv):
        print(help_text(__doc__ or "", AccuracyConfig, NOT_IN_EVALUATION))
        return 0
    try:
        config = load_config(argv, AccuracyConfig, DEMO_CONFIG)
        ensure_corpus(config.input.path)
        table = run_accuracy_grid(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except GridStoppedError as stopped:
        print(f"stopped: {stopped}", file=sys.stderr)
        return stopped.code
    print_accuracy(table, config.output.path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
