"""Check that an output holds every row of its input exactly once, in captions or in quarantine.

Usage: python jobs/verify.py [--config FILE] [section.key=value ...]

Examples:
    python jobs/verify.py                                            # the demo's output
    python jobs/verify.py input.path=s3://bucket/images output.path=s3://bucket/captions
    python jobs/verify.py output.path=runs/evaluate_demo             # an evaluation: every question exactly once
    python jobs/verify.py output.path=... repair=true                # remove what the job then makes anew

Reads every column of every part. Takes the keys of caption_corpus.py, of which only input.path, input.limit,
output.path and the keys of their stores matter.

Exit codes:
    0    every row is there exactly once
    1    rows are missing, doubled, unknown or damaged; the first differences are printed, and what was removed
    2    bad configuration, or no such input or output
    130  interrupted
"""

import sys

from pipelines.entry import enter
from pipelines.verify.config import VerifyConfig


def run(config: VerifyConfig) -> int:
    from pipelines.output.lease import other_holder
    from pipelines.store import make_store
    from pipelines.verify.captions import verify

    if (holder := other_holder(make_store(config.output.path, endpoint_url=config.output.endpoint_url))) is not None:
        print(f"still being written by {holder}")
    found, repaired = verify(config)
    print("\n".join(found.lines()))
    if not found.num_differences:
        print(f"exactly once: the output holds every {found.counted[:-1]} once")
        return 0
    print(f"NOT exactly once: {found.num_differences:,} differences, the first {len(found.differences)} are")
    for difference in found.differences:
        print(f"  {difference}")
    print("\n".join(repaired or [f"{len(found.broken):,} parts are to be made anew: repair=true removes them"]))
    return 1


def main(argv: list[str]) -> int:
    return enter(argv, run, __doc__, VerifyConfig)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
