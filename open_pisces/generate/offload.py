"""Parts of a model that take turns on a small accelerator: the LLM while it writes, the decoder while it paints."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

WRITES = ("llm", "understanding_encoder")
PAINTS = ("decoder",)
ENCODES = ("generation_encoder",)


class Parts:
    """The parts of a model, and which of them are on the device.

    At `8b` in bfloat16 all of them are 23 GB; the LLM and its encoder, which are the most that is there at once, 17 GB.

    Args:
        modules: by name; those that no `use` names stay where they are.
        device: the accelerator.
        offload: whether parts wait in the memory of the host; otherwise all stay on the device.
    """

    def __init__(self, modules: Mapping[str, nn.Module | None], device: torch.device, offload: bool) -> None:
        self.modules = {name: module for name, module in modules.items() if module is not None}
        self.device = device
        self.offload = offload
        self.here: tuple[str, ...] | None = None

    def use(self, names: tuple[str, ...]) -> None:
        """Bring parts to the device, after the others have left it."""
        if not self.offload or names == self.here:
            return
        for name, module in self.modules.items():
            if name not in names:
                module.to("cpu")
        for name in names:
            if name in self.modules:
                self.modules[name].to(self.device)
        self.here = names
