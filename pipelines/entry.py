"""The common frame of the entry points in jobs/: logging, --help, the configuration, and exit codes of errors.

This module lies in `pipelines` because every way to start a script can import `pipelines`, but `jobs` can be imported
from the repository alone.
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

    Args:
        argv: arguments of the command line, without the program.
        run: the job, from configuration to exit code. `run` imports torch and Ray itself, so that --help and a wrong
            key answer before those are loaded.
        usage: docstring of the job, which --help prints.
        schema: type of the configuration.
        demo: configuration file that is read when the command line names no model of its own.
        without: keys that mean nothing to this job.

    Returns:
        The exit code of `run`, 0 for --help, 2 for a UserError, 1 for a JobFailedError, 130 for Ctrl-C. Any other
        exception passes: Python prints its traceback and exits with code 1.
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
