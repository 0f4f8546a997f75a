"""Bytes that a computation holds, counted from the tensors that PyTorch hands out rather than asked of an allocator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """While it is entered, follows every storage that an operation returns until nobody holds it any more.

    What was there before is not counted, nor are views of it; nor is memory that a kernel takes and gives back inside
    one operation, which no tensor shows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        """Elements of the largest tensor made, views left out."""
        self._step = 0
        self._known: dict[int, StorageWeakRef] = {}
        self._lives: list[list[int]] = []  # first and last step, bytes, key
        self._living: dict[int, list[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        self._step += 1
        for tensor in _tensors((args, kwargs)):
            self._meet(tensor)
        found = func(*args, **(kwargs or {}))
        for tensor in _tensors(found):
            if self._meet(tensor):
                self.largest = max(self.largest, tensor.numel())
                storage = tensor.untyped_storage()
                life = [self._step, 2**62, storage.nbytes(), storage._cdata]  # it has no end yet
                self._lives.append(life)
                self._living[storage._cdata] = life
        for key in [key for key in self._living if self._known[key].expired()]:
            self._living.pop(key)[1] = self._step  # it lived up to here, and through this operation
        return found

    def peak(self, *but: Tensor | None) -> int:
        """The most bytes alive at one time, those of some tensors left out."""
        left_out = {tensor.untyped_storage()._cdata for tensor in but if tensor is not None}
        changes = []
        for first, last, size, key in self._lives:
            if key not in left_out:
                changes += [(first, size), (last, -size)]
        alive = most = 0
        for _, size in sorted(changes):  # at one step the dead go first, for their sizes are negative
            alive += size
            most = max(most, alive)
        return most

    def _meet(self, tensor: Tensor) -> bool:
        """Whether its storage is new. The weak reference keeps the address from being given to another."""
        storage = tensor.untyped_storage()
        new = storage._cdata not in self._known
        if new:
            self._known[storage._cdata] = StorageWeakRef(storage)
        return new


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
