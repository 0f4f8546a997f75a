"""Logits at supervised places only, in chunks, against logits everywhere and a loss that ignores most of them.

One head of 128,256 words on 1,024 places, a quarter of them supervised, float32, forward and backward. The memory is
that of the loss: every storage that operations return during the step, but for the gradients of the input and of the
head, which both ways have to leave behind. What a kernel takes and gives back inside one operation is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from open_pisces.bench.pairs import compare
from open_pisces.model.cross_entropy import linear_cross_entropy
from open_pisces.plan.live_bytes import LiveBytes

WORDS = 128_256
"""Llama 3's vocabulary."""
WIDTH = 512
PLACES = 1024
SUPERVISED = 256
IGNORED = -100


def run(pairs: int = 15) -> dict[str, Any]:
    """Seconds of full logits over ours (at least 1 / 0.75 is wanted), and the bytes of both (at most 0.3)."""
    draw = torch.Generator().manual_seed(0)
    hidden_KD = torch.randn(PLACES, WIDTH, generator=draw).requires_grad_()
    weight_VD = (torch.randn(WORDS, WIDTH, generator=draw) * 0.02).requires_grad_()
    labels_K = torch.randint(WORDS, (PLACES,), generator=draw)
    at_K = torch.randperm(PLACES, generator=draw)[:SUPERVISED].sort().values
    ignoring_K = torch.full_like(labels_K, IGNORED).index_copy(0, at_K, labels_K[at_K])

    def ours() -> Tensor:
        return linear_cross_entropy(hidden_KD[at_K], weight_VD, labels_K[at_K])

    def full() -> Tensor:
        return F.cross_entropy(hidden_KD @ weight_VD.T, ignoring_K, ignore_index=IGNORED, reduction="sum")

    used: dict[str, dict[str, int]] = {}
    losses: dict[str, float] = {}
    for name, way in (("ours", ours), ("other", full)):
        with LiveBytes() as live:
            losses[name] = _step(way, hidden_KD, weight_VD)
        # Gradients left out: both ways have to leave them behind.
        used[name] = {"loss": live.peak(hidden_KD.grad, weight_VD.grad), "with_gradients": live.peak()}
    if abs(losses["ours"] - losses["other"]) > 1e-4 * losses["other"]:
        raise AssertionError(f"the two ways did not compute the same loss: {losses}")
    found = compare(
        "supervised_logits",
        lambda: _step(ours, hidden_KD, weight_VD),
        lambda: _step(full, hidden_KD, weight_VD),
        pairs,
    )
    found["figures"] |= {
        "step_over_full": found["figures"]["seconds_ours"] / found["figures"]["seconds_other"],
        "peak_bytes": used,
        "bytes_over_full": used["ours"]["loss"] / used["other"]["loss"],
        "supervised": SUPERVISED / PLACES,
    }
    return found


def _step(way: Callable[[], Tensor], hidden_KD: Tensor, weight_VD: Tensor) -> float:
    hidden_KD.grad = weight_VD.grad = None
    loss = way()
    loss.backward()
    return loss.item()
