"""A training step of `tiny`'s decoder in bfloat16 on a CPU, attention in float32 against PyTorch's own in bfloat16."""

from __future__ import annotations

from typing import Any

import torch

from open_pisces.bench.pairs import compare
from open_pisces.device import autocast
from open_pisces.model.folder import WEIGHTS, load_part, read_config

PICTURES = 32
"""Of a step, as in the recipe."""


def run(pairs: int = 15) -> dict[str, Any]:
    """Seconds of PyTorch's own over ours: what `Float32Attention` saves."""
    decoder: Any = load_part(WEIGHTS, "decoder", read_config(WEIGHTS)).train()
    cpu = torch.device("cpu")
    found = compare(
        "cpu_attention",
        lambda: _step(decoder, autocast(cpu, True)),
        lambda: _step(decoder, torch.autocast("cpu", torch.bfloat16)),
        pairs,
    )
    found["figures"] |= {"pictures": PICTURES}
    return found


def _step(decoder: Any, context: Any) -> None:
    """Forward and backward of one step."""
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(PICTURES, *decoder.latent_shape, generator=draw)
    vectors = torch.randn(PICTURES, decoder.grid**2, decoder.condition_width, generator=draw)
    times = torch.rand(PICTURES, generator=draw)
    with context:
        loss = decoder(latents, vectors, torch.randn(latents.shape, generator=draw), times).mean()
    loss.backward()
    decoder.zero_grad(set_to_none=True)
