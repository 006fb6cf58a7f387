"""Measure captions without questions: health, agreement with other captions, scores against references, a canary.

    python jobs/quality.py                                           # the demo's captions against its references
    python jobs/quality.py input.path=CORPUS output.path=A baseline.path=B      # A's agreement with B, say unpruned
    python jobs/quality.py --config conf/mine.yaml canary.images=64  # before a large job: does the model look at all?

Keys as for caption_corpus.py; without a canary input.* (for references), output.*, baseline.*, sample and resamples
matter. The canary runs the model on Ray. Prints a table, tracks it, and writes quality.json beside the captions.
Exit codes: 0 done; 2 bad configuration or no captions; 3 captions do not depend on their images; 1 anything else.
"""

import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path

from pipelines.config.keys import QualityConfig
from pipelines.config.load import help_text, load_config
from pipelines.errors import JobFailedError, UserError
from pipelines.quality.captions import measure_quality, track_quality
from pipelines.quality.summary import print_quality
from pipelines.store import make_store


def main(argv: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if {"-h", "--help"} & set(argv):
        print(help_text(__doc__ or "", QualityConfig))
        return 0
    try:
        config = load_config(argv, QualityConfig)
        if config.input.path == ".cache/demo_corpus" and not Path(config.input.path).exists():
            raise UserError("the demo has no captions yet: make caption writes them")
        quality = measure_quality(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except JobFailedError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    output = make_store(config.output.path, endpoint_url=config.output.endpoint_url)
    output.write("quality.json", json.dumps(asdict(quality), indent=1).encode())
    print_quality(quality, config.canary.max_same)
    print(f"mlflow  {track_quality(config, quality)}")
    return 3 if quality.canary and not quality.canary.saw_the_images else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
