"""What the entry points in jobs/ share: logging, --help, the configuration, and exit codes for what goes wrong.

`pipelines` holds it because a script finds `pipelines` however it is started, but `jobs` only from the repository.
"""

import logging
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TypeVar

from pipelines.config.help import print_help
from pipelines.config.keys import Config
from pipelines.config.load import DEMO_CONFIG, load_config
from pipelines.errors import JobFailedError, UserError

C = TypeVar("C", bound=Config)


def enter(
    argv: Sequence[str],
    run: Callable[[C], int],
    usage: str | None,
    schema: type[C],
    demo: Path = DEMO_CONFIG,
    without: Collection[str] = (),
) -> int:
    """Runs a job with the configuration of its command line and returns its exit code.

    `run` imports what it needs itself, so that --help and a wrong key answer before torch and Ray are loaded.
    `usage` is the docstring of the job, `demo` its configuration where none is given, `without` the keys that mean
    nothing to it. Other exceptions than these pass: a traceback, and exit code 1.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if {"-h", "--help"} & set(argv):
        print_help(usage or "", schema, without)
        return 0
    try:
        return run(load_config(argv, schema, demo))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except JobFailedError as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
