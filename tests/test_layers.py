"""Arrows point one way: jobs -> pipelines -> otprune -> torch, and from each folder of pipelines/ to those before it.

Read from the sources, so nothing is imported.
"""

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
    "otprune/vllm/": {"vllm"},
    "otprune/distance.py": {"ot"},
    "otprune/triton_greedy.py": {"triton"},
}
# The folders (and files) of pipelines/, in the order in which they may lean on each other: on those before them alone.
ROOMS = (
    *("errors", "secrets", "text", "config", "store", "tracker", "metrics"),
    *("images", "corpus", "output", "dollars", "stages", "engines"),
    *("run", "report", "preflight"),
    *("benchmarks", "quality", "accuracy", "study", "sweep", "verify", "export"),
    "entry",
)


def imports(path: Path) -> Iterator[str]:
    """Dotted names of everything a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def sources(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def test_the_method_imports_torch_and_numpy_only():
    wrong = []
    for path in sources("otprune"):
        source = str(path.relative_to(ROOT))
        allowed = METHOD_MAY_IMPORT | set(sys.stdlib_module_names)
        allowed = allowed.union(*(extra for prefix, extra in EXCEPTIONS.items() if source.startswith(prefix)))
        wrong += [(source, name) for name in imports(path) if name.partition(".")[0] not in allowed]
    assert not wrong


def test_the_dataflow_never_imports_its_entry_points():
    above = {"jobs", "tests", "benchmarks"}
    assert not [
        (path, name) for path in sources("pipelines") for name in imports(path) if name.partition(".")[0] in above
    ]


def test_the_rooms_of_the_dataflow_lean_one_way():
    wrong = []
    for path in sources("pipelines"):
        here = path.relative_to(ROOT / "pipelines").with_suffix("").parts[0]
        if here == "__init__":
            continue
        for name in imports(path):
            package, _, rest = name.partition(".")
            if package == "pipelines" and ROOMS.index(rest.partition(".")[0]) > ROOMS.index(here):
                wrong.append((str(path.relative_to(ROOT)), name))
    assert not wrong


def test_no_files_of_the_dataflow_import_each_other_in_a_circle():
    """Imports within functions count: a circle that Python never meets is one that a reader walks."""
    files = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sources("pipelines")}
    leans_on = {}
    for name, path in files.items():
        found = {each if each in files else each.rpartition(".")[0] for each in imports(path)}
        leans_on[name] = (found & files.keys()) - {name}
    while free := [name for name, others in leans_on.items() if not others & leans_on.keys()]:
        for name in free:
            del leans_on[name]
    assert not leans_on


def test_the_tree_of_the_readme_is_the_tree_of_the_folders():
    """Every folder of the package stands in README's tree, in the order in which they lean on each other."""
    tree = (ROOT / "README.md").read_text().split("\npipelines/", 1)[1].split("\njobs/", 1)[0]
    shown = [line.split("/", 1)[0].strip() for line in tree.splitlines()[1:]]
    assert shown == [room for room in ROOMS if (ROOT / "pipelines" / room).is_dir()]


def test_no_room_is_crowded():
    counts = {room: len(list((ROOT / "pipelines" / room).glob("[!_]*.py"))) for room in ROOMS}
    assert max(counts.values()) <= 20, counts


@pytest.mark.slow
@pytest.mark.parametrize(
    "module",
    ["stages.read", "accuracy.read_questions", "preflight.canary_stages", "stages.write", "preflight.dry_write"],
)
def test_what_tasks_run_loads_no_model_library(module):
    """Each process of a task imports the module of its stage: torch would cost it seconds before its first unit."""
    code = f"import sys, pipelines.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not {"torch", "transformers", "ray", "mlflow", "scipy"} & set(done.stdout.split())
