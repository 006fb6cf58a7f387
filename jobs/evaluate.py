"""Score a LLaVA model with pruned visual tokens on the papers' benchmarks, or on the demo world's.

    python jobs/evaluate.py                                         # the demo's nine tasks
    python jobs/evaluate.py --config conf/evaluate_llava15_7b.yaml input.path=s3://bucket/lmms-lab benchmarks=[pope,gqa]
    python jobs/evaluate.py ... prune.method=none output.path=b     # unpruned, and then compared with
    python jobs/evaluate.py ... output.path=a baseline.path=b

Exit codes: 0 done; 2 bad configuration or input; 4 stopped by the spend cap; 130 interrupted; 1 anything else.
"""

import logging
import sys

from demo import ensure_corpus
from pipelines.accuracy.evaluate import prepare_evaluation, run_evaluation
from pipelines.accuracy.summary import print_scores
from pipelines.config.keys import NOT_IN_EVALUATION, EvaluateConfig
from pipelines.config.load import REPOSITORY, help_text, load_config
from pipelines.errors import UserError

DEMO_CONFIG = REPOSITORY / "conf" / "evaluate_demo.yaml"


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if {"-h", "--help"} & set(argv):
        print(help_text(__doc__ or "", EvaluateConfig, NOT_IN_EVALUATION))
        return 0
    try:
        config = load_config(argv, EvaluateConfig, DEMO_CONFIG)
        ensure_corpus(config.input.path)
        evaluation = prepare_evaluation(config)
        outcome, results = run_evaluation(evaluation)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_scores(evaluation, outcome, results)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
