"""Prove that an output holds every row of its input exactly once, in captions or in quarantine.

Usage: python jobs/verify.py [--config FILE] [section.key=value ...]

Examples:
    python jobs/verify.py                                            # the demo's output
    python jobs/verify.py input.path=s3://bucket/images output.path=s3://bucket/captions
    python jobs/verify.py output.path=runs/evaluate_demo             # of an evaluation: every question, once

Takes the keys of caption_corpus.py; input.path, input.limit, output.path and how to reach them matter.

Exit codes:
    0    proven
    1    not so, with the first differences
    2    bad configuration, no such input or output
    130  interrupted
"""

import sys

from pipelines.config.keys import Config
from pipelines.entry import enter


def run(config: Config) -> int:
    from pipelines.verify.captions import verify

    found = verify(config)
    print("\n".join(found.lines()))
    if not found.num_differences:
        print(f"exactly once: every {found.counted[:-1]} is in one of the two, once")
        return 0
    print(f"NOT exactly once: {found.num_differences:,} differences, the first {len(found.differences)} are")
    for difference in found.differences:
        print(f"  {difference}")
    return 1


def main(argv: list[str]) -> int:
    return enter(argv, run, __doc__, Config)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
