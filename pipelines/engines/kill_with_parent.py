"""Ends an engine's processes when the process that started them is gone, however it went.

An actor that is killed outright cannot end its engine, which would live on and hold the GPU's memory against the next
one. So a small process waits for the end of a pipe that only the actor holds open.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence

import psutil


def guard(processes: Sequence[psutil.Process]) -> subprocess.Popen:
    """Starts the guard of `processes`; it lives until this process ends, or closes the guard's `stdin`."""
    pids = [str(process.pid) for process in processes]
    return subprocess.Popen([sys.executable, os.path.abspath(__file__), *pids], stdin=subprocess.PIPE)


def main(pids: Sequence[str]) -> None:
    processes = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(int(pid)))
    sys.stdin.buffer.read()  # returns when nobody holds the other end any more
    for process in processes:
        with contextlib.suppress(psutil.Error):  # gone, or another process under its number
            process.kill()


if __name__ == "__main__":
    main(sys.argv[1:])
