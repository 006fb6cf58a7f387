"""Lets vLLM find the plugin where the package is not installed, such as in Ray's `working_dir`.

vLLM looks for plugins in the metadata of installed packages, in each of its processes: the one that starts the engine,
the engine's core, its workers, and the one in which it inspects a model's class. Code that Ray ships has no metadata.
"""

import atexit
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

GROUP = "vllm.general_plugins"
NAME = "otprune"
VALUE = "otprune.vllm.plugin:register"
ROOT = Path(__file__).resolve().parents[2]  # the folder that holds the package

# Prints where a new process finds the plugin's module, if it finds the plugin.
PROBE = f"""
from importlib.metadata import entry_points
if any(point.name == {NAME!r} and point.value == {VALUE!r} for point in entry_points(group={GROUP!r})):
    import otprune.vllm
    print(otprune.vllm.__file__)
"""


def make_findable(executor: str | None = None) -> None:
    """Makes this process and those that it starts find the plugin. Call it before vLLM is imported.

    Where a new process does not find this very package's plugin, the package's folder and one with the plugin's
    metadata go to the front of `sys.path` and PYTHONPATH. VLLM_PLUGINS, if set, is made to name the plugin.

    Args:
        executor: vLLM's `distributed_executor_backend`.

    Raises:
        RuntimeError: if the plugin is not installed and the engine's workers are Ray's (`executor` ray), which get
            neither path.
    """
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        os.environ["VLLM_PLUGINS"] = ",".join(filter(None, (allowed, NAME)))
    # Ray's workers find the code where Ray ships it, so that any installed version's metadata will do for them.
    if is_findable(any_copy=executor == "ray"):
        return
    if executor == "ray":
        raise RuntimeError(
            "with distributed_executor_backend=ray, the package must be installed on every node, so that vLLM's "
            "workers find its plugin: pip install --no-deps . (or use distributed_executor_backend=mp)"
        )
    added = [str(ROOT), str(write_metadata())]
    sys.path[:0] = added
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (*added, os.environ.get("PYTHONPATH"))))
    importlib.invalidate_caches()


def is_findable(*, any_copy: bool = False) -> bool:
    """Whether a new process finds the plugin of this very package, or with `any_copy` of any, by its entry point."""
    # -P: the folder in which a process happens to start does not count.
    done = subprocess.run([sys.executable, "-P", "-c", PROBE], capture_output=True, text=True)
    found = done.stdout.strip()
    return bool(found) and (any_copy or Path(found).resolve().parents[2] == ROOT)


def write_metadata() -> Path:
    """A new folder with the metadata of a package that has the plugin's entry point alone. It goes with the process."""
    folder = Path(tempfile.mkdtemp(prefix="otprune-plugin-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    # Under a name of its own: of two packages of one name, only the first on the path counts.
    metadata = folder / "otprune_vllm_plugin-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: otprune-vllm-plugin\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(f"[{GROUP}]\n{NAME} = {VALUE}\n")
    return folder
