"""Run the paper's experiments again: Table 2, greedy against brute force, gamma, distance against accuracy, ranks.

    python jobs/study.py                                            # about ten minutes on 2 cores
    python jobs/study.py --config conf/study.yaml output.path=s3://bucket/study        # in full
    python jobs/study.py experiments=[table2,ranks] table2.seeds=50

Writes study.html and results/*.parquet. The same command resumes: finished pieces are never computed again.
Exit codes: 0 done; 1 a piece failed; 2 bad configuration or input; 130 interrupted.
"""

import logging
import sys

from pipelines.config.load import REPOSITORY, help_text, load_config
from pipelines.errors import UserError
from pipelines.study.config import NOT_IN_STUDY, StudyConfig
from pipelines.study.run import prepare_study, run_study
from pipelines.study.summary import print_study

QUICK = REPOSITORY / "conf" / "study_quick.yaml"


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if {"-h", "--help"} & set(argv):
        print(help_text(__doc__ or "", StudyConfig, NOT_IN_STUDY))
        return 0
    try:
        study = prepare_study(load_config(argv, StudyConfig, QUICK))
        outcome, conclusions = run_study(study)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print_study(study, outcome, conclusions)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
