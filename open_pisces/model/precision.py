"""What stays float32 when a model is cast: everything that says where or when."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


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
