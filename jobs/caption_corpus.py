"""Caption a corpus of images with a LLaVA model, visual tokens pruned, exactly once.

    python jobs/caption_corpus.py                                   # the demo
    python jobs/caption_corpus.py --config conf/llava15_7b.yaml input.path=s3://bucket/images output.path=s3://bucket/out
    ray job submit --working-dir . -- python jobs/caption_corpus.py --config ... dotted.key=value ...
    python jobs/caption_corpus.py ... run.estimate=true             # a sample only: what it would cost and take

Exit codes: 0 done; 2 bad configuration or input; 3 the gate failed; 4 stopped by the spend cap; 130 interrupted;
1 anything else.
"""

import logging
import sys

from demo import ensure_corpus
from pipelines.config.load import help_text, load_config
from pipelines.errors import UserError
from pipelines.preflight.estimate import run_estimate
from pipelines.preflight.gate import pass_gate
from pipelines.preflight.summary import print_estimate
from pipelines.report.terminal import print_summary
from pipelines.report.write import report_captions
from pipelines.run.job import prepare
from pipelines.run.run import run_job


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if {"-h", "--help"} & set(argv):
        print(help_text(__doc__))
        return 0
    try:
        config = load_config(argv)
        ensure_corpus(config.input.path)
        job = prepare(config)
        if config.run.estimate:
            print_estimate(job, *run_estimate(job))
            return 0
        outcome = run_job(job, before=pass_gate, conclude=report_captions)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # an estimate; a run ends by itself
        return 130
    print_summary(job, outcome)
    return outcome.code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
