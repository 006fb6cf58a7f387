"""Kills the processes of an engine when the process that started them ends, even by SIGKILL.

An actor that gets a SIGKILL cannot end its engine. The engine would live on and keep the GPU memory that the next actor
needs. So a small guard process reads from a pipe that only the actor holds open. The kernel closes the pipe when the
actor ends, the read returns, and the guard kills the engine.
"""

import contextlib
import os
import subprocess
import sys
from collections.abc import Sequence

import psutil


def guard(processes: Sequence[psutil.Process]) -> subprocess.Popen:
    """Starts the guard of `processes` and returns its process.

    The guard kills `processes` and exits once this process ends or closes the guard's `stdin`.
    """
    pids = [str(process.pid) for process in processes]
    return subprocess.Popen([sys.executable, os.path.abspath(__file__), *pids], stdin=subprocess.PIPE)


def main(pids: Sequence[str]) -> None:
    """Runs the guard of the processes with these ids."""
    # psutil remembers when each process was created, and refuses to kill a later process with a reused id.
    processes = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            processes.append(psutil.Process(int(pid)))
    sys.stdin.buffer.read()  # blocks until the other end of the pipe is closed
    for process in processes:
        with contextlib.suppress(psutil.Error):  # the process is gone, or its id belongs to another one
            process.kill()


if __name__ == "__main__":
    main(sys.argv[1:])
