"""Arrows point one way: jobs -> pipelines -> otprune -> torch. Read from the sources, so nothing is imported."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METHOD_MAY_IMPORT = {"torch", "numpy", "otprune"}
# What one part of the method needs beyond that; imported where it is used when it is optional.
EXCEPTIONS = {
    "otprune/models/": {"transformers", "safetensors", "huggingface_hub", "PIL"},
    "otprune/distance.py": {"ot"},
    "otprune/triton_greedy.py": {"triton"},
}


def imports(path: Path) -> Iterator[str]:
    """Top-level names of everything a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield (node.module or "").split(".")[0]


def sources(package: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("source", sources("otprune"))
def test_the_method_imports_torch_and_numpy_only(source):
    allowed = METHOD_MAY_IMPORT | set(sys.stdlib_module_names)
    allowed = allowed.union(*(extra for prefix, extra in EXCEPTIONS.items() if source.startswith(prefix)))
    assert set(imports(ROOT / source)) <= allowed


@pytest.mark.parametrize("source", sources("pipelines"))
def test_the_dataflow_never_imports_its_entry_points(source):
    assert not set(imports(ROOT / source)) & {"jobs", "tests", "benchmarks"}


@pytest.mark.parametrize("module", ["source", "questions", "canary_stages", "sink", "sample_sink"])
def test_what_tasks_run_loads_no_model_library(module):
    """Each process of a task imports the module of its stage: torch would cost it seconds before its first unit."""
    code = f"import sys, pipelines.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "ray", "mlflow", "scipy"} & set(done.stdout.split())


def test_there_is_something_to_check():
    assert "otprune/select.py" in sources("otprune")
