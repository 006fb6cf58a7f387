"""Score a vision-language model with pruned visual tokens on the benchmarks of the papers, or on the demo's tasks.

Usage: python jobs/evaluate.py [--config FILE] [section.key=value ...]

Examples:
    python jobs/evaluate.py                                         # the demo's nine tasks
    python jobs/evaluate.py --config conf/evaluate_llava15_7b.yaml input.path=s3://bucket/lmms-lab benchmarks=[pope,gqa]
    python jobs/evaluate.py ... prune.method=none output.path=b     # unpruned, as a baseline
    python jobs/evaluate.py ... output.path=a baseline.path=b             # compare with the baseline

Exit codes:
    0    done
    2    bad configuration or input
    4    stopped by the spend cap
    130  interrupted
    1    anything else
"""

import sys

from pipelines.accuracy.config import NOT_IN_EVALUATION, EvaluateConfig
from pipelines.config.load import REPOSITORY
from pipelines.entry import enter

DEMO_CONFIG = REPOSITORY / "conf" / "evaluate_demo.yaml"


def run(config: EvaluateConfig) -> int:
    from demo import ensure_corpus
    from pipelines.accuracy.evaluate import prepare_evaluation, run_evaluation
    from pipelines.accuracy.summary import print_scores

    ensure_corpus(config.input.path)
    evaluation = prepare_evaluation(config)
    outcome, results = run_evaluation(evaluation)
    print_scores(evaluation, outcome, results)
    return outcome.code


def main(argv: list[str]) -> int:
    return enter(argv, run, __doc__, EvaluateConfig, DEMO_CONFIG, NOT_IN_EVALUATION)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
