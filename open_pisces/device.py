"""Devices and dtypes: which device, float32 for losses, and what stays float32 when a model is cast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

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


class Float32Attention(TorchFunctionMode):
    """Inside it, attention on a CPU is computed in float32 although autocast is on.

    PyTorch's bfloat16 kernel for the CPU takes 2 to 13 times as long, both passes together (torch 2.13, AMX; LOG.md).
    """

    entered = 0
    """How often it is entered now; a block that is recomputed in the backward pass has to enter it again."""

    def __enter__(self) -> Any:
        """Enter it."""
        Float32Attention.entered += 1
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Leave it."""
        Float32Attention.entered -= 1
        super().__exit__(*error)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention:
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            args = tuple(_float32(value) for value in args)
            return func(*args, **{name: _float32(value) for name, value in kwargs.items()})


def autocast(device: torch.device, bf16: bool) -> AbstractContextManager[Any]:
    """Autocast of a training step: ``bf16`` on its device, with `Float32Attention` on a CPU."""
    stack = ExitStack()
    stack.enter_context(torch.autocast(device.type, torch.bfloat16, enabled=bf16))
    if bf16 and device.type == "cpu":
        stack.enter_context(Float32Attention())
    return stack


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


@cache
def multiplies_bfloat16(kind: str) -> bool:
    """Whether a kind of device multiplies bfloat16 matrices itself; other CPUs emulate it, a hundred times slower."""
    if kind != "cpu":
        return kind == "cuda"
    found = torch.cpu.get_capabilities()
    return bool(found.get("amx_bf16") or found.get("avx512_bf16"))


def upcast(x: Tensor) -> Tensor:
    """``x`` in float32, which losses and statistics are taken in; float64 stays, for proofs."""
    return x if x.dtype == torch.float64 else x.float()


def _float32(value: Any) -> Any:
    """A bfloat16 tensor in float32; anything else as it is."""
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value
