"""Repeat the paper's experiments: Table 2, greedy against brute force, gamma, distance against accuracy, ranks.

Usage: python jobs/study.py [--config FILE] [section.key=value ...]

Examples:
    python jobs/study.py                                            # on a small scale: about ten minutes on 2 cores
    python jobs/study.py --config conf/study.yaml output.path=s3://bucket/study        # in full
    python jobs/study.py experiments=[table2,ranks] table2.seeds=50

Writes study.html and results/*.parquet. Run the same command again to resume; finished pieces are not computed again.

Exit codes:
    0    done
    1    a piece failed
    2    bad configuration or input
    130  interrupted
"""

import sys

from pipelines.config.load import REPOSITORY
from pipelines.entry import enter
from pipelines.study.config import NOT_IN_STUDY, StudyConfig

QUICK = REPOSITORY / "conf" / "study_quick.yaml"


def run(config: StudyConfig) -> int:
    from pipelines.study.run import prepare_study, run_study
    from pipelines.study.summary import print_study

    study = prepare_study(config)
    outcome, conclusions = run_study(study)
    print_study(study, outcome, conclusions)
    return outcome.code


def main(argv: list[str]) -> int:
    return enter(argv, run, __doc__, StudyConfig, QUICK, NOT_IN_STUDY)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
