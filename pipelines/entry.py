"""The common frame of the entry points in jobs/: logging, --help, the configuration, and exit codes of errors.

This module lies in `pipelines` because every way to start a script can import `pipelines`, but `jobs` can be imported
from the repository alone.
"""

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from pipelines.config.help import print_help
from pipelines.config.keys import Config
from pipelines.config.load import DEMO_CONFIG, load_config
from pipelines.errors import JobFailedError, UserError
from pipelines.secrets import without_secrets

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
        The exit code of `run`, 0 for --help, 2 for a UserError, 1 for a JobFailedError or an error of `WORLD`, 130 for
        Ctrl-C. Any other exception passes: Python prints its traceback, without secrets, and exits with code 1.
    """
    sys.excepthook = print_traceback
    with lasting_output():
        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
        if {"-h", "--help"} & set(argv):
            print_help(usage or "", schema, without)
            return 0
        try:
            return run(load_config(argv, schema, demo))
        except UserError as error:
            print(f"error: {one_line(error)}", file=sys.stderr)
            return 2
        except JobFailedError as error:
            print(f"failed: {one_line(error)}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
        except Exception as error:
            from pipelines.store import WORLD  # here, because --help is to answer before its libraries are loaded

            if not isinstance(error, WORLD):
                raise
            print(f"failed: {type(error).__name__}: {one_line(error)}", file=sys.stderr)
            return 1
        finally:
            if (lease := sys.modules.get("pipelines.output.lease")) is not None:  # else no job took one
                lease.release_all()


def one_line(error: Exception) -> str:
    """The message of an error as one line without secrets: what a library says within it may have several lines."""
    return without_secrets(" ".join(line.strip() for line in str(error).splitlines()))


def print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Prints the traceback of an error that nobody foresaw. Its texts may hold anything, secrets too."""
    sys.stderr.write(without_secrets("".join(traceback.format_exception(kind, error, trace))))


@contextlib.contextmanager
def lasting_output() -> Iterator[None]:
    """Keeps stdout and stderr writable for the block, so that no reader's absence ends a job of hours, and secretless.

    What is written to a closed stream, or to a pipe whose reader has gone (`| head`), is lost.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:  # closed: else the next file that is opened would become the job's stdout
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = lasting(sys.stdout), lasting(sys.stderr)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()  # here, because Python's own flush at exit would fail
        sys.stdout, sys.stderr = before


def lasting(stream: Any) -> Any:
    """A stream that outlives its reader, for a text stream, or for None, as which Python knows a closed one."""
    return LastingStream(open(os.devnull, "w") if stream is None else stream)


class LastingStream:
    """A text stream that goes on to nowhere when its reader has gone. No secret passes, whoever writes."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(without_secrets(text))
            return len(text)
        except BrokenPipeError:
            self._forget_reader()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._forget_reader()

    def _forget_reader(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())  # what the stream still holds goes there too
        os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
