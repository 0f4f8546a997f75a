"""Bytes that a computation holds, counted from the tensors that PyTorch hands out rather than asked of an allocator."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is entered, follows every storage that an operation returns until it is freed.

    Storages that were there before are not counted, nor are views of them; nor is memory that a kernel takes and gives
    back inside one operation, which no tensor shows. Works on real and on fake tensors.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        """Bytes alive."""
        self.largest = 0
        """Elements of the largest tensor made, views left out."""
        self._known: dict[int, tuple[weakref.ref[Any], int]] = {}  # address -> storage, its number in the log
        self._log: list[tuple[int, int]] = []  # number of a storage, bytes it adds; negative: it was freed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        self._follow((args, kwargs), new=False)
        found = func(*args, **kwargs)
        self._follow(found, new=True)
        return found

    def peak(self, *without: Tensor | None) -> int:
        """The most bytes alive at one time, those of some tensors left out."""
        addresses = [tensor.untyped_storage()._cdata for tensor in without if tensor is not None]
        left_out = {self._known[address][1] for address in addresses if address in self._known}
        alive = most = 0
        for number, size in self._log:
            if number not in left_out:
                alive += size
                most = max(most, alive)
        return most

    def _follow(self, tree: Any, new: bool) -> None:
        """Log the storages that are not known yet, and when they are freed; those that are not ``new`` count 0."""
        for tensor in tree_leaves(tree):
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in self._known:
                continue
            size = 0
            if new:
                size = storage.nbytes()
                self.largest = max(self.largest, tensor.numel())
            number = len(self._log)
            freed = partial(self._forget, storage._cdata, number, size)
            self._known[storage._cdata] = (weakref.ref(storage, freed), number)
            self._log.append((number, size))
            self.now += size

    def _forget(self, address: int, number: int, size: int, freed: Any) -> None:
        del self._known[address]  # another storage may get this address
        self._log.append((number, -size))
        self.now -= size
