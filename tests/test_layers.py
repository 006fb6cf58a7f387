"""Arrows point one way: jobs -> pipelines -> otprune -> torch. Read from the sources, so nothing is imported."""

import ast
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


def test_there_is_something_to_check():
    assert "otprune/select.py" in sources("otprune")
