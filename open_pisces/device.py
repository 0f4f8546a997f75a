"""Devices and dtypes: which device, float32 for losses, and what stays float32 when a model is cast."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from open_pisces.settings import ConfigError


class FloatBuffers(nn.Module):
    """A module whose buffers, and those of all its children, keep their dtype when it is cast.

    Buffers hold positions (rotary frequencies), statistics (pixel means, target statistics) and noise schedules.
    bfloat16 has 8 bits of mantissa: rotary frequencies rounded to it are wrong by 0.4 %, which at position 4,096 is a
    phase error of radians. ``module.to(torch.bfloat16)`` therefore casts parameters only, as transformers' own
    loading in bfloat16 does.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FloatBuffers:
        before = dict(self.named_buffers(remove_duplicate=False))
        super()._apply(fn, recurse)
        for name, value in before.items():
            owner_name, _, leaf = name.rpartition(".")
            owner = self.get_submodule(owner_name)
            now = getattr(owner, leaf)
            if now.dtype != value.dtype:
                setattr(owner, leaf, value.to(now.device))
        return self


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
