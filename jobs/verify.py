"""Prove that an output holds every row of its input exactly once, in captions or in quarantine.

    python jobs/verify.py                                            # the demo's output
    python jobs/verify.py input.path=s3://bucket/images output.path=s3://bucket/captions
    python jobs/verify.py output.path=runs/evaluate_demo             # of an evaluation: every question, once

Keys as for caption_corpus.py; only input.path, input.limit, output.path and how to reach them matter.
Exit codes: 0 proven; 1 not so, with the first differences; 2 bad configuration, no such input or output.
"""

import logging
import sys

from pipelines.config.load import help_text, load_config
from pipelines.errors import UserError
from pipelines.verify.captions import verify


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if {"-h", "--help"} & set(argv):
        print(help_text(__doc__))
        return 0
    try:
        found = verify(load_config(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(found.lines()))
    if not found.num_differences:
        print(f"exactly once: every {found.counted[:-1]} is in one of the two, once")
        return 0
    print(f"NOT exactly once: {found.num_differences:,} differences, the first {len(found.differences)} are")
    for difference in found.differences:
        print(f"  {difference}")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
