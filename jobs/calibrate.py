"""Calibrate a method on your own images: FitPrune's recipe, VTW's layer, or the threshold of a budget per picture.

Usage: python jobs/calibrate.py [--config FILE] [section.key=value ...]

Examples:
    python jobs/calibrate.py prune.method=fitprune                            # on the demo corpus, 9.8 % of the tokens
    python jobs/caption_corpus.py prune.method=fitprune prune.settings.recipe=runs/calibration.json   # use it
    python jobs/calibrate.py prune.method=logdet_adaptive calibrate.path=runs/budget.json calibrate.samples=256
    python jobs/caption_corpus.py prune.method=logdet_adaptive prune.settings.threshold=runs/budget.json
    python jobs/calibrate.py --config conf/llava15_7b.yaml input.path=... prune.method=vtw calibrate.samples=20

Runs in this process, on the GPU if there is one. Writes the result to calibrate.path and prints it. Set
prune.settings.layer to VTW's layer.

Exit codes:
    0    done
    2    bad configuration or input; no layer meets calibrate.threshold
    130  interrupted
    1    anything else
"""

import sys

from pipelines.accuracy.config import CalibrateConfig
from pipelines.entry import enter


def run(config: CalibrateConfig) -> int:
    import json
    from pathlib import Path

    from demo import ensure_corpus
    from pipelines.accuracy.calibrate import calibrate

    ensure_corpus(config.input.path)
    found = calibrate(config)
    path = Path(config.calibrate.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{path}: {found}")
    return 0


def main(argv: list[str]) -> int:
    return enter(argv, run, __doc__, CalibrateConfig)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
