"""Writing an answer token by token, against transformers' own ``generate`` on the same LLM.

A prompt of 50 tokens and 64 new ones at temperature 0; the tokens are the same. The LLM is the shipped one, and one of
random weights in the shape of SmolLM2-135M cut to a third of its layers. ``generate`` is called as its users call it:
with its dynamic cache, without sampling.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from open_pisces.batch import SequenceBatch, Turn
from open_pisces.bench.pairs import compare
from open_pisces.bench.vector_loop import random_model
from open_pisces.generate.generator import Generator
from open_pisces.model.folder import WEIGHTS

PROMPT = 50
NEW = 64


def run(pairs: int = 15) -> dict[str, Any]:
    """Seconds of transformers' ``generate`` over seconds of ours, on the shipped LLM; at least 1.5 is wanted.

    Raises:
        AssertionError: if the two ways write other tokens.
    """
    shipped = Generator.from_pretrained(WEIGHTS, "cpu")
    words = shipped.renderer.text_ids("a red heart on a blue background " * PROMPT)[:PROMPT]
    found = _compare(shipped, _of(shipped, words), pairs)
    generator, _ = random_model(1)
    larger = _compare(generator, _of(generator, generator.renderer.text_ids("a cat " * PROMPT)[:PROMPT]), pairs)
    return {**found, "larger": {key: larger[key] for key in ("ratio", "low", "high", "n", "figures")}}


def _of(generator: Generator, ids: list[int]) -> SequenceBatch:
    """A batch of one prompt of these tokens, bare."""
    empty = generator.prompt([(Turn("user", ("a",)),)], [()])
    return replace(empty, ids_BS=torch.tensor([ids]))


def _compare(generator: Generator, batch: SequenceBatch, pairs: int) -> dict[str, Any]:
    one, other = ours(generator, batch), theirs(generator, batch)
    if one != other:
        raise AssertionError(f"other tokens: {one} and {other}")
    found = compare("decode_step", lambda: ours(generator, batch), lambda: theirs(generator, batch), pairs)
    found["figures"]["tokens_per_second"] = NEW / found["figures"]["seconds_ours"]
    return found


def ours(generator: Generator, batch: SequenceBatch) -> list[int]:
    """The tokens that this package writes."""
    return [column[0] for column in generator.tokens(batch, NEW, 0.0, 0)]


@torch.inference_mode()
def theirs(generator: Generator, batch: SequenceBatch) -> list[int]:
    """The tokens that transformers writes, of those that a text may hold."""
    end = generator.renderer.end_of_turn
    written: Tensor = generator.pisces.llm.generate(
        batch.ids_BS,
        attention_mask=torch.ones_like(batch.ids_BS),
        max_new_tokens=NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=generator.renderer.pad,
        suppress_tokens=[token for token in generator.renderer.special_ids if token != end],
    )
    return written[0, batch.ids_BS.shape[1] :].tolist()
