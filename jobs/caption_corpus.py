"""Caption images with a vision-language model and pruned visual tokens. Every row is captioned exactly once.

Usage: python jobs/caption_corpus.py [--config FILE] [section.key=value ...]

Examples:
    python jobs/caption_corpus.py                                   # the demo
    python jobs/caption_corpus.py --config conf/llava15_7b.yaml input.path=s3://bucket/images output.path=s3://bucket/out
    python jobs/caption_corpus.py ... run.estimate=true             # caption a sample, print dollars and hours
    ray job submit --working-dir . -- python jobs/caption_corpus.py --config ... input.path=... output.path=...

Run the same command again to resume a job that stopped.

Exit codes:
    0    done
    2    bad configuration or input
    3    the gate found too little quality
    4    stopped by the spend cap
    130  interrupted
    1    anything else
"""

import sys

from pipelines.config.keys import Config
from pipelines.entry import enter


def run(config: Config) -> int:
    from demo import ensure_corpus
    from pipelines.preflight.estimate import run_estimate
    from pipelines.preflight.gate import pass_gate
    from pipelines.preflight.summary import print_estimate
    from pipelines.report.terminal import print_summary
    from pipelines.report.write import report_captions
    from pipelines.run.job import prepare
    from pipelines.run.run import run_job

    ensure_corpus(config.input.path)
    job = prepare(config)
    if config.run.estimate:
        print_estimate(job, *run_estimate(job))
        return 0
    outcome = run_job(job, before=pass_gate, conclude=report_captions)
    print_summary(job, outcome)
    return outcome.code


def main(argv: list[str]) -> int:
    return enter(argv, run, __doc__, Config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
