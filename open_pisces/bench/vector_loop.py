"""Writing the M vectors of a picture with a key-value cache, against Emu2's loop, which reads the whole sequence again.

Emu2's published code calls its LLM on prompt and vectors so far for each of its 64 vectors
(``models/modeling_emu.py``: ``generate_image``). Here prompts of 50 tokens and 64 vectors, an LLM of random weights in
the shape of SmolLM2-135M cut to a third of its layers, float32; the vectors of both ways are equal. The ratio is that
of four prompts together; ``alone`` is one, where a CPU spends its time on reading the weights for each vector, and
reading 114 tokens with them costs little more.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from open_pisces.batch import SequenceBatch
from open_pisces.bench.pairs import compare
from open_pisces.data.prompts import generation_turns
from open_pisces.data.tokenizer import BEGIN_IMAGE, byte_tokenizer
from open_pisces.generate.generator import Generator
from open_pisces.model.parts import PARTS, build_part
from open_pisces.model.pisces import Pisces
from open_pisces.recipe import load_config

PROMPT = 50
SHAPE = {
    "model_type": "llama",
    "vocab_size": 265,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 10,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
SAME = 1e-4
"""Vectors of both ways may differ by so much: rounding, fed back 64 times."""


PROMPTS = 4


def run(pairs: int = 15) -> dict[str, Any]:
    """Seconds of the loop that reads everything again over seconds of ours, four prompts; at least 5 is wanted.

    Raises:
        AssertionError: if the two ways write other vectors.
    """
    found = _compare(PROMPTS, pairs)
    alone = _compare(1, pairs)
    return {**found, "alone": {key: alone[key] for key in ("ratio", "low", "high", "n", "figures")}}


def _compare(prompts: int, pairs: int) -> dict[str, Any]:
    generator, batch = random_model(prompts)
    apart = float((generator.vectors_after(batch) - recomputed(generator, batch)).abs().max())
    if apart > SAME:
        raise AssertionError(f"vectors with a cache and without one are {apart} apart, more than {SAME}")
    found = compare("vector_loop", lambda: generator.vectors_after(batch), lambda: recomputed(generator, batch), pairs)
    vectors = generator.renderer.M * prompts
    rate = vectors / found["figures"]["seconds_ours"]
    found["figures"] |= {"prompts": prompts, "prompt_tokens": PROMPT, "vectors": vectors, "vectors_per_second": rate}
    return found


def random_model(prompts: int) -> tuple[Generator, SequenceBatch]:
    """A generator of 64 vectors, and prompts for it."""
    size = {"llm.config": SHAPE, "generation.image_size": 64, "generation.patch_size": 4, "generation.pool": 2}
    generator = random_generator(size)
    turns = [generation_turns(f"{number} cats " * PROMPT) for number in range(prompts)]
    batch = generator.prompt(turns, [()] * prompts, BEGIN_IMAGE)
    return generator, replace(batch, ids_BS=batch.ids_BS[:, -PROMPT:])  # their last tokens, [IMG] among them


def random_generator(settings: dict[str, Any]) -> Generator:
    """A generator of random weights without a decoder: nano's, but for these settings of the model."""
    config = load_config("nano/stage1", [f"model.{key}={value}" for key, value in settings.items()]).model
    config = config.model_copy(update={"start": None})
    torch.manual_seed(0)
    parts = {name: build_part(name, config) for name in PARTS if name != "decoder"}
    return Generator(Pisces(config, **parts), byte_tokenizer(config.template), "cpu")


@torch.inference_mode()
def recomputed(generator: Generator, batch: SequenceBatch) -> Tensor:
    """The M vectors after a prompt, ``(B, M, E)``, the whole sequence read again for each."""
    pisces = generator.pisces
    inputs_BSD, _ = pisces.embed(batch)
    written = []
    for _ in range(generator.renderer.M):
        vector_BE, embedded_BD = pisces.next_vector(pisces.hidden(inputs_BSD)[:, -1], None)
        written.append(vector_BE)
        inputs_BSD = torch.cat([inputs_BSD, embedded_BD[:, None]], 1)
    return torch.stack(written, 1)
