"""The Inception v3 of the Frechet Inception Distance, from a local file of its published weights.

The network is the one of TensorFlow's ``inception-2015-12-05`` graph, as pytorch-fid carried it over: average pools do
not count the padding, the last block pools by maximum, and features are the 2,048 means before the classifier. Its
layers stand in ``inception.yaml`` under the names of the weight file, so that the file loads as it is.

The published file could not be had where this was written. Checked are names and shapes, and that random weights give
what pytorch-fid 0.3.0 (with torchvision 0.28) gives with them; figures made with the published weights were not
compared with the figures of other programs.
"""

from __future__ import annotations

from functools import cache, partial
from importlib import resources
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional

WIDTH = 2048
SIDE = 299
PUBLISHED = "6726825d"
"""How sha256 of ``pt_inception-2015-12-05-6726825d.pth`` begins: by the custom of PyTorch's hub the name says it."""

_POOLS = {
    "max": partial(functional.max_pool2d, kernel_size=3, stride=1, padding=1),
    "max_by_2": partial(functional.max_pool2d, kernel_size=3, stride=2),
    "average": partial(functional.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False),
}


@cache
def _table() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(
        resources.files("open_pisces.eval.distances").joinpath("inception.yaml").read_text()
    )
    return found


def resized(x_BCHW: Tensor) -> Tensor:
    """Pictures at 299 x 299 pixels, bilinearly and without smoothing, whatever their size: as pytorch-fid does."""
    return functional.interpolate(x_BCHW, size=(SIDE, SIDE), mode="bilinear", align_corners=False)


class Convolution(nn.Module):
    """A convolution without bias, batch normalisation with epsilon 0.001, ReLU."""

    def __init__(self, inputs: int, outputs: int, kernel: Any, stride: int, padding: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outputs, eps=0.001)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """``(B, inputs, H, W)`` to ``(B, outputs, H', W')``."""
        return functional.relu(self.bn(self.conv(x_BCHW)))


class Block(nn.Module):
    """Branches of layers as rows of the table say, their outputs joined along the channels.

    Args:
        inputs: channels in.
        branches: the table's rows.
        argument: what stands for ``argument`` in them.
    """

    def __init__(self, inputs: int, branches: list[list[Any]], argument: Any = None) -> None:
        super().__init__()
        self.paths: list[list[list[str]]] = []  # per branch its steps; a step of two names joins both outputs
        self.channels = 0
        for branch in branches:
            steps: list[list[str]] = []
            wide = inputs
            for row in branch:
                names, wide = self._add(row, wide, argument)
                steps.append(names)
            self.paths.append(steps)
            self.channels += wide

    def _add(self, row: Any, wide: int, argument: Any) -> tuple[list[str], int]:
        """Build one row of the table; its names and its channels."""
        if isinstance(row, str):
            return [argument if row == "argument" else row], wide
        ((name, value),) = row.items()
        if name == "both":
            built = [self._add(part, wide, argument) for part in value]
            return [names[0] for names, _ in built], sum(channels for _, channels in built)
        outputs, *shape = (argument if part == "argument" else part for part in value)
        self.add_module(name, Convolution(wide, outputs, *shape))
        return [name], outputs

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """``(B, inputs, H, W)`` to ``(B, channels, H', W')``."""
        found = []
        for steps in self.paths:
            y_BCHW = x_BCHW
            for names in steps:
                y_BCHW = torch.cat([self._layer(name)(y_BCHW) for name in names], 1)
            found.append(y_BCHW)
        return torch.cat(found, 1)

    def _layer(self, name: str) -> Any:
        return _POOLS[name] if name in _POOLS else self.get_submodule(name)


class FidInception(Block):
    """Pictures to pool3 features; a `Block` of one branch, the stem, and the mixed blocks after it."""

    def __init__(self) -> None:
        table = _table()
        super().__init__(3, [table["stem"]])
        wide = self.channels
        for name, (kind, argument) in table["mixed"].items():
            block = Block(wide, table["kinds"][kind], argument)
            self.add_module(name, block)
            self.paths[0].append([name])
            wide = block.channels
        self.channels = wide

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Pictures ``(B, 3, 299, 299)`` in [0, 1] to features ``(B, 2048)``."""
        return super().forward(2 * x_BCHW - 1).mean((2, 3))

    def load(self, weights: dict[str, Tensor]) -> None:
        """Take the weights of a file; its classifier (``fc``) has no use here, and counts of batches may be missing.

        Raises:
            ValueError: for other names or shapes, with an example.
        """
        own = self.state_dict()
        taken = {name: value for name, value in weights.items() if not name.startswith("fc.")}
        needed = {name for name in own if not name.endswith("num_batches_tracked")}
        wrong = sorted((needed - set(taken)) | (set(taken) - set(own)))
        wrong += [name for name in needed & set(taken) if taken[name].shape != own[name].shape]
        if wrong:
            raise ValueError(
                f"{len(wrong)} of its {len(needed)} tensors have other names or shapes, such as {wrong[0]}"
            )
        self.load_state_dict({**own, **taken})
