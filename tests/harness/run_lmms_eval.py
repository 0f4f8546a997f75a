"""``lmms-eval`` with its arguments, also where torchvision's compiled part does not fit the installed torch.

lmms-eval imports torchvision, whose wheel on the package index is built for CUDA: beside a CPU build of torch its
operators are missing and the import fails. They are declared here, without a body; no task of this folder calls them.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import torch

OPERATORS = ("nms", "qnms")  # those that torchvision describes to torch while it is imported


def declare_missing_operators() -> list[torch.library.Library]:
    """Declares torchvision's operators if its library cannot be loaded; keep what is returned as long as they live."""
    spec = find_spec("torchvision")
    library = next(Path(str(spec and spec.origin)).parent.glob("_C*.so"), None)
    try:
        torch.ops.load_library(str(library))
        return []
    except OSError:
        declared = torch.library.Library("torchvision", "DEF")
        for name in OPERATORS:
            declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return [declared]


if __name__ == "__main__":
    kept = declare_missing_operators()
    from lmms_eval.cli.dispatch import main

    sys.exit(main())
