"""Which setting should I buy? Captions a corpus with a grid of settings, and says what each costs and loses.

    python jobs/sweep.py                                            # the demo's grid
    python jobs/sweep.py --config conf/llava15_7b.yaml input.path=s3://bucket/images input.limit=2000 output.path=OUT \\
        "sweep.grid={method: [otprune], retention: [0.05, 0.1, 0.2]}"
    python jobs/sweep.py ... sweep.dry_run=true                     # lists the points with estimated dollars

Finished points are skipped, so the same command resumes. Prints a table and writes report.html.
Exit codes: 0 every point finished; 1 some failed, with their reasons; 2 bad configuration; 4 stopped by the spend cap;
130 interrupted.
"""

import logging
import sys

from demo import ensure_corpus
from pipelines.config.keys import SweepConfig
from pipelines.config.load import REPOSITORY, help_text, load_config
from pipelines.errors import UserError
from pipelines.sweep.checked import prepare_sweep
from pipelines.sweep.dry_run import estimate_points
from pipelines.sweep.run import run_sweep
from pipelines.sweep.summary import print_estimates, print_sweep

DEMO_CONFIG = REPOSITORY / "conf" / "sweep_demo.yaml"


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if {"-h", "--help"} & set(argv):
        print(help_text(__doc__ or "", SweepConfig))
        return 0
    try:
        config = load_config(argv, SweepConfig, DEMO_CONFIG)
        ensure_corpus(config.input.path)
        sweep = prepare_sweep(config)
        if config.sweep.dry_run:
            print_estimates(estimate_points(sweep))
            return 0
        outcome = run_sweep(sweep)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_sweep(sweep, outcome)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
