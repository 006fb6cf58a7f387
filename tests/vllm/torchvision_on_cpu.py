"""Lets the registry's torchvision, a CUDA build, be imported beside a CPU torch. For the environment of tests alone.

vLLM's LLaVA class imports torchvision, whose import fails for want of two operators that nothing here calls. This
declares them, in every process (a .pth file imports it), just before torchvision is first imported, and no earlier:
most processes of a job never import torch.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any


class DeclareOperators:
    """A meta-path finder that finds torchvision where it is, but declares its missing operators first."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        import torch

        self.library = torch.library.Library("torchvision", "DEF")
        self.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        self.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        sys.modules.setdefault("_torchvision_operators", self)  # declared as long as the library lives
        return PathFinder.find_spec(name, path, target)


sys.meta_path.insert(0, DeclareOperators())
