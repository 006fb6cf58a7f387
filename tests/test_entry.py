"""What all entry points do alike: --help, one line for what a user got wrong, exit codes, and a quick answer."""

import importlib
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.config.keys import Config
from pipelines.entry import enter
from pipelines.errors import JobFailedError, UserError

ROOT = Path(__file__).parents[1]
JOBS = sorted(path.stem for path in (ROOT / "jobs").glob("[!_]*.py"))
HEAVY = {"torch", "transformers", "ray", "mlflow", "scipy", "pyarrow", "numpy", "PIL"}


@pytest.mark.parametrize("job", JOBS)
def test_help_opens_with_usage_examples_and_exit_codes(job, capsys):
    assert importlib.import_module(f"jobs.{job}").main(["--help"]) == 0
    text, errors = capsys.readouterr()
    assert errors == ""
    what, usage, examples = text.split("\n\n")[:3]
    assert len(what) <= 120
    assert usage == f"Usage: python jobs/{job}.py [--config FILE] [section.key=value ...]"
    commands = [line for line in examples.splitlines() if "python jobs/" in line]
    assert 3 <= len(commands) <= 6
    codes = text.partition("\n\nExit codes:\n")[2].partition("\n\n")[0].splitlines()
    assert {"0", "1", "2", "130"} == {line.split()[0] for line in codes} - {"3", "4"}


@pytest.mark.parametrize("job", JOBS)
def test_a_wrong_key_is_one_line_and_code_2(job, capsys):
    assert importlib.import_module(f"jobs.{job}").main(["output.pth=x"]) == 2
    assert capsys.readouterr() == ("", "error: unknown key output.pth; did you mean output.path?\n")


def test_help_and_a_wrong_key_load_no_library_of_the_run():
    """In a process of its own, since this one has loaded them."""
    code = f"""
import importlib, sys
for job in {JOBS}:
    main = importlib.import_module("jobs." + job).main
    assert main(["--help"]) == 0
    assert main(["output.pth=x"]) == 2
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not HEAVY & set(done.stdout.splitlines()[-1].split())


def test_a_script_finds_its_modules_from_another_folder(tmp_path):
    """As `python jobs/x.py` does, with only jobs/ on the path, and what is installed (here by PYTHONPATH)."""
    done = subprocess.run(
        [sys.executable, ROOT / "jobs" / "verify.py", "output.path="],
        cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1


def test_help_into_a_pipe_that_closes_is_no_error():
    done = subprocess.run(
        f"{sys.executable} jobs/caption_corpus.py --help | true; echo ${{PIPESTATUS[0]}}",
        cwd=ROOT, shell=True, executable="/bin/bash", capture_output=True, text=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("0\n", "")


_TALKS = """
import logging, sys
from pathlib import Path
from rich.console import Console
from pipelines.config.keys import Config
from pipelines.entry import enter

def run(config):
    with open(config.output.path, "w") as file:  # no stream's number may become this file's
        for i in range(300):
            print("on stdout" * 100, flush=i % 9 == 0)
            logging.getLogger("job").warning("on stderr" * 100)
            Console().print("by rich" * 100)
            Console(stderr=True).print("by rich" * 100)
        file.write("done")
    return 0

sys.exit(enter(["model.path=m", f"output.path={sys.argv[1]}"], run, "usage", Config))
"""


@pytest.mark.slow
@pytest.mark.parametrize("streams", ["<&- >&- 2>&-", ">&-", "2>&1 | head -1"])
def test_a_job_outlives_the_readers_of_its_output(streams, tmp_path):
    code = shlex.quote(_TALKS)
    done = subprocess.run(
        f"{sys.executable} -c {code} {tmp_path}/out {streams}; exit ${{PIPESTATUS[0]}}",
        cwd=ROOT, shell=True, executable="/bin/bash", capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 0
    assert (tmp_path / "out").read_text() == "done"
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("input.path must be set"), 2, "error: input.path must be set\n"),
        (UserError("output.path is wrong:\n  no such bucket"), 2, "error: output.path is wrong: no such bucket\n"),
        (JobFailedError("Ray gave up"), 1, "failed: Ray gave up\n"),
        (OSError(28, "No space left"), 1, "failed: OSError: [Errno 28] No space left\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_what_a_run_raises_is_an_exit_code(error, code, line, capsys):
    assert enter(["model.path=m"], raising(error), "usage", Config) == code
    assert capsys.readouterr() == ("", line)


def test_other_errors_pass_with_their_traceback():
    with pytest.raises(ZeroDivisionError):
        enter(["model.path=m"], raising(ZeroDivisionError()), "usage", Config)


def test_a_run_gets_its_configuration_and_its_code_is_the_job_s():
    seen = []
    assert enter(["model.path=m", "unit.images=3"], lambda config: seen.append(config) or 4, "usage", Config) == 4
    assert (seen[0].model.path, seen[0].unit.images) == ("m", 3)


def raising(error: BaseException) -> Callable[[Config], int]:
    def run(config: Config) -> int:
        raise error

    return run
