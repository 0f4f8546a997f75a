"""LLaVA's projector as the understanding MLP: both are two layers with GELU between them (``mlp2x_gelu``)."""

from __future__ import annotations

import re

import torch

from open_pisces.model.bridge import Bridge
from open_pisces.model.importers.files import ImportSourceError, read_weights

_NAMES = {
    r"(?:model\.)?multi_modal_projector\.linear_1\.(weight|bias)": r"first.\1",
    r"(?:model\.)?multi_modal_projector\.linear_2\.(weight|bias)": r"second.\1",
    r"(?:model\.)?mm_projector\.0\.(weight|bias)": r"first.\1",
    r"(?:model\.)?mm_projector\.2\.(weight|bias)": r"second.\1",
}
"""transformers' names, and LLaVA's own."""


@torch.no_grad()
def fill_projector(bridge: Bridge, source: str) -> None:
    """Give a bridge's understanding MLP the weights of a LLaVA's projector; the LLaVA's other parts are left out.

    Args:
        bridge: of the LLM and the tower that the projector was trained between.
        source: a LLaVA, or its projector alone.

    Raises:
        ImportSourceError: if a tensor is missing, comes twice, or has another shape; the bridge is untouched then.
    """
    found: dict[str, torch.Tensor] = {}
    for name, value in read_weights(source).items():
        for pattern, ours in _NAMES.items():
            if re.fullmatch(pattern, name):
                found[re.sub(pattern, ours, name)] = value
    for name, value in bridge.understanding_projector.state_dict().items():
        if name not in found:
            raise ImportSourceError(
                f"{source}: holds no projector of two layers: {name} {tuple(value.shape)} is missing"
            )
        if found[name].shape != value.shape:
            shape = tuple(found[name].shape)
            raise ImportSourceError(
                f"{source}: its projector's {name} is {shape}, that between the folder's tower and LLM is "
                f"{tuple(value.shape)}: import the tower and the LLM that it was trained with"
            )
    bridge.understanding_projector.load_state_dict(found)
