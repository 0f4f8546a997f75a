"""Devices and dtypes."""

from __future__ import annotations

import torch
from torch import Tensor

from open_pisces.config import ConfigError


def pick_device(name: str = "auto") -> torch.device:
    """``auto`` is the best there is: cuda, then mps, then cpu."""
    if name != "auto":
        kind = name.partition(":")[0]
        if kind != "cpu" and not getattr(torch, kind).is_available():
            raise ConfigError(f"device {name!r} is not available to this PyTorch: use auto or cpu")
        return torch.device(name)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def upcast(x: Tensor) -> Tensor:
    """``x`` in float32, which losses and statistics are taken in; float64 stays, for proofs."""
    return x if x.dtype == torch.float64 else x.float()
