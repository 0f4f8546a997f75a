"""A training step of `tiny` against one of a bare transformers `LlamaForCausalLM` of its shape on the same tokens.

Both compiled, in bfloat16 autocast, forward and backward. The samples are detailed captions; ours reads the pictures'
features as from the cache, so the encoders are not part of this, while the projections, the placing and the head are.
Llama reads the placeholders' embeddings in the pictures' places, and predicts the same tokens at the same places.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from open_pisces.bench.pairs import compare
from open_pisces.bench.stage_batches import ROWS, STEPS, read, shipped, step, words_only

IGNORED = -100


def run(pairs: int = 15) -> dict[str, Any]:
    """Seconds of Llama's step over ours: at least 0.95 is wanted."""
    generator = shipped()
    pisces = generator.pisces
    batch = read(generator, {"caption_detailed": 1}, ROWS)
    llama = copy.deepcopy(pisces.llm)
    pisces.llm.base_model.compile(dynamic=False)
    llama.compile(dynamic=False)
    ids_BS = batch.ids_BS
    labels_BS = torch.full_like(ids_BS, IGNORED)  # transformers' labels: the token itself where it is supervised
    labels_BS.view(-1)[batch.text_at_K + 1] = batch.labels_K
    # The check that both do the same work: without pictures the losses are equal.
    alike = {"pisces": step(pisces, words_only(batch)), "llama": _llama(llama, ids_BS, labels_BS)}
    if abs(alike["pisces"] - alike["llama"]) > 0.01 * alike["llama"]:
        raise AssertionError(f"without pictures the two must have the same loss: {alike}")
    found = compare(
        "stage_step",
        lambda: [step(pisces, batch) for _ in range(STEPS)],
        lambda: [_llama(llama, ids_BS, labels_BS) for _ in range(STEPS)],
        pairs,
    )
    found["figures"] |= {
        "tokens_per_second": STEPS * ids_BS.numel() / found["figures"]["seconds_ours"],
        "steps": STEPS,
        "tokens": list(ids_BS.shape),
        "supervised": len(batch.labels_K) / ids_BS.numel(),
        "loss_without_pictures": alike,
    }
    return found


def _llama(llama: Any, ids_BS: Tensor, labels_BS: Tensor) -> float:
    with torch.autocast("cpu", torch.bfloat16):
        loss = llama(input_ids=ids_BS, labels=labels_BS, use_cache=False).loss
    loss.backward()
    llama.zero_grad(set_to_none=True)
    return loss.item()
