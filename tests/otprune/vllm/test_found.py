"""The plugin's entry point is found by new processes, with the package installed and without. Needs no vLLM."""

import os
import shutil
import subprocess
import venv
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from otprune.vllm import found

ROOT = Path(__file__).resolve().parents[3]

# A driver that makes the plugin findable, and what a process that it starts finds then.
DRIVER = f"""
import os, subprocess, sys
from otprune.vllm.found import is_findable, make_findable
before = is_findable()
make_findable(*sys.argv[1:])
code = '''
import os
from importlib.metadata import entry_points
points = [point for point in entry_points(group={found.GROUP!r}) if point.name == {found.NAME!r}]
import otprune
print(len(points), points[0].load().__module__, os.path.dirname(os.path.dirname(otprune.__file__)))
'''
print(before, is_findable(), os.environ.get("VLLM_PLUGINS"))
print(subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout, end="")
make_findable()
"""


@pytest.fixture
def shipped(tmp_path) -> Path:
    """The package's code alone, as Ray ships it, and a driver beside it."""
    shutil.copytree(ROOT / "otprune", tmp_path / "job" / "otprune", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "job" / "driver.py").write_text(DRIVER)
    return tmp_path / "job"


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory) -> Path:
    """The interpreter of an environment in which nothing is installed, neither for it nor for what it starts."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin" / "python"


def run(bare_python: Path, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VLLM_PLUGINS")}
    command = [str(bare_python), "driver.py", *arguments]
    return subprocess.run(command, cwd=folder, env=environ | environment, capture_output=True, text=True)


def test_the_entry_point_of_the_package_is_the_one_that_is_written(tmp_path, monkeypatch):
    lines = (ROOT / "pyproject.toml").read_text()
    assert f'[project.entry-points."{found.GROUP}"]\n{found.NAME} = "{found.VALUE}"' in lines
    folder = found.write_metadata()
    monkeypatch.syspath_prepend(folder)
    assert found.VALUE in [point.value for point in entry_points(group=found.GROUP)]


def test_shipped_code_is_found_by_new_processes_once_it_is_made_findable(bare_python, shipped):
    done = run(bare_python, shipped)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first == "False True None"
    assert second == f"1 otprune.vllm.plugin {shipped.resolve()}"


def test_a_list_of_allowed_plugins_gets_ours(bare_python, shipped):
    assert run(bare_python, shipped, VLLM_PLUGINS="other").stdout.startswith("False True other,otprune\n")
    assert run(bare_python, shipped, VLLM_PLUGINS="").stdout.startswith("False True otprune\n")
    assert run(bare_python, shipped, VLLM_PLUGINS="otprune,other").stdout.startswith("False True otprune,other\n")


def test_workers_that_ray_starts_need_the_package_installed(bare_python, shipped):
    done = run(bare_python, shipped, "ray")
    assert done.returncode == 1
    assert "RuntimeError: with distributed_executor_backend=ray, the package must be installed" in done.stderr


@pytest.fixture
def older(shipped, tmp_path) -> str:
    """An older version of the package, installed on the node."""
    shutil.copytree(shipped / "otprune", tmp_path / "older" / "otprune")
    metadata = tmp_path / "older" / "otprune-0.0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: otprune\nVersion: 0.0.1\n")
    (metadata / "entry_points.txt").write_text(f"[{found.GROUP}]\n{found.NAME} = {found.VALUE}\n")
    return str(tmp_path / "older")


def test_workers_that_ray_starts_take_the_metadata_of_any_version(bare_python, shipped, older):
    """Ray puts the code that it ships in front of what is installed, so that the metadata lead to it."""
    done = run(bare_python, shipped, "ray", PYTHONPATH=older)
    assert "RuntimeError" not in done.stderr


def test_metadata_that_leads_to_other_code_is_not_enough(bare_python, shipped, older):
    done = run(bare_python, shipped, PYTHONPATH=older)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert first.startswith("False True")
    assert second.endswith(str(shipped.resolve()))
