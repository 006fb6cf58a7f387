"""Find settings of pruning inside the language model on your own images: FitPrune's recipe, VTW's layer.

    python jobs/calibrate.py prune.method=fitprune                            # the demo, at its 9.8 %
    python jobs/caption_corpus.py prune.method=fitprune prune.settings.recipe=runs/calibration.json
    python jobs/calibrate.py --config conf/llava15_7b.yaml input.path=... prune.method=vtw calibrate.samples=20

Runs in this process, on its GPU if there is one. Writes calibrate.path; VTW's layer is also printed, for
prune.settings.layer. Exit codes: 0 done; 2 bad configuration or input.
"""

import json
import logging
import sys
from pathlib import Path

from demo import ensure_corpus
from pipelines.accuracy.calibrate import calibrate
from pipelines.config.keys import CalibrateConfig
from pipelines.config.load import help_text, load_config
from pipelines.errors import UserError


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if {"-h", "--help"} & set(argv):
        print(help_text(__doc__ or "", CalibrateConfig))
        return 0
    try:
        config = load_config(argv, CalibrateConfig)
        ensure_corpus(config.input.path)
        found = calibrate(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    path = Path(config.calibrate.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{path}: {found}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
