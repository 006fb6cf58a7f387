"""Measure the quality of captions: health, agreement, scores against references, CHAIR, a judge, a canary.

Usage: python jobs/quality.py [--config FILE] [section.key=value ...]

Examples:
    python jobs/quality.py                                           # score the demo's captions against its references
    python jobs/quality.py input.path=CORPUS output.path=A baseline.path=B      # agreement of A with B, e.g. unpruned
    python jobs/quality.py input.path=... output.path=A quality.instances=instances_val2017.json        # CHAIR on COCO
    python jobs/quality.py input.path=... output.path=A baseline.path=B quality.judge.url=http://host/v1 \\
        quality.judge.model=NAME                                     # which does a model prefer?
    python jobs/quality.py --config conf/mine.yaml canary.images=64  # before a large job: do captions depend on images?

Prints a table, tracks it in MLflow, and writes quality.json beside the captions. Without a canary, only input.* (for
the references and images), output.*, baseline.*, quality.*, sample, resamples and mlflow.* have an effect. The canary
runs the model on Ray.

Exit codes:
    0    done
    2    bad configuration or no captions
    3    captions do not depend on their images
    130  interrupted
    1    anything else
"""

import sys

from pipelines.entry import enter
from pipelines.quality.config import QualityConfig


def run(config: QualityConfig) -> int:
    from dataclasses import asdict
    from pathlib import Path

    from pipelines.errors import UserError
    from pipelines.quality.captions import measure_quality, track_quality
    from pipelines.quality.summary import print_quality
    from pipelines.store import make_store, write_json

    if config.input.path == ".cache/demo_corpus" and not Path(config.input.path).exists():
        raise UserError("the demo has no captions yet: make caption writes them")
    quality = measure_quality(config)
    output = make_store(config.output.path, endpoint_url=config.output.endpoint_url)
    write_json(output, "quality.json", asdict(quality))
    print_quality(quality, config.canary.max_same)
    print(f"mlflow  {track_quality(config, quality)}")
    return 3 if quality.canary and not quality.canary.saw_the_images else 0


def main(argv: list[str]) -> int:
    return enter(argv, run, __doc__, QualityConfig)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
