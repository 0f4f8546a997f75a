"""How likely the model finds an answer, and drawings chosen by that: several are drawn, its own eye takes one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image

from open_pisces.batch import Turn
from open_pisces.data.prompts import IGNORED, collate, wordings
from open_pisces.device import upcast
from open_pisces.generate.generator import Generator, PromptError
from open_pisces.generate.messages import Conversation
from open_pisces.generate.offload import WRITES

AT_ONCE = 32
"""Pictures that are looked at together."""


@torch.inference_mode()
def log_likelihoods(
    generator: Generator, conversations: Sequence[Conversation], continuations: Sequence[str]
) -> list[tuple[float, bool]]:
    """How likely answers are.

    The template ends right before the assistant's first word, so a continuation's leading blanks are left out.

    Returns:
        For each conversation the sum of the log-probabilities (natural, over the whole vocabulary) of the
        continuation's tokens, end of turn not among them, and whether `Generator` would write these tokens at
        temperature 0.

    Raises:
        PromptError: for a conversation that is too long with its continuation.
    """
    generator.parts.use(WRITES)
    pisces = generator.pisces
    renderer = generator.renderer
    rendered = [renderer.render(conversation.turns, answer_next=True) for conversation in conversations]
    counts = []
    for row, words in zip(rendered, continuations, strict=True):
        row.labels = [IGNORED] * len(row.ids)  # earlier answers are given, not asked for
        ids = renderer.text_ids(words.lstrip())
        counts.append(len(ids))
        row.add(ids, supervised=True)
        if len(row.ids) > generator.max_prompt_tokens:
            raise PromptError(
                f"{describe_length(len(row.ids), generator)} with its continuation {words[:30]!r}: shorten it"
            )
    images = [conversation.images for conversation in conversations]
    batch = collate(rendered, images, renderer, *generator.sizes, multiple=1)
    batch = batch.to(generator.device, next(pisces.llm.parameters()).dtype)
    hidden_KD = pisces.hidden(pisces.embed(batch)[0]).flatten(0, 1)[batch.text_at_K]
    logits_KV = upcast(pisces.llm.get_output_embeddings()(hidden_KD))
    chosen_K = logits_KV.log_softmax(-1).gather(-1, batch.labels_K[:, None])[:, 0]
    logits_KV[:, [token for token in renderer.special_ids if token != renderer.end_of_turn]] = float("-inf")
    greedy_K = logits_KV.argmax(-1) == batch.labels_K
    parts = zip(chosen_K.split(counts), greedy_K.split(counts), strict=True)
    return [(float(chosen.sum()), bool(greedy.all())) for chosen, greedy in parts]


def describe_length(length: int, generator: Generator) -> str:
    """A length in the words of an error: how much of the room for prompts it takes."""
    return f"{length} tokens with its pictures, of {generator.max_prompt_tokens} that this model takes,"


def caption_scores(generator: Generator, pictures: Sequence[Image], captions: Sequence[str]) -> list[float]:
    """How well pictures fit captions.

    The mean log-probability of the caption's tokens as an answer to the request for a brief description.
    """
    question = wordings()["caption_short"][0]
    found = []
    for start in range(0, len(pictures), AT_ONCE):
        shown = [(picture,) for picture in pictures[start : start + AT_ONCE]]
        said = captions[start : start + AT_ONCE]
        asked = [Conversation((Turn("user", (0, question)),), images) for images in shown]
        tokens = [max(1, len(generator.renderer.text_ids(caption))) for caption in said]
        sums = log_likelihoods(generator, asked, said)
        found += [total / count for (total, _), count in zip(sums, tokens, strict=True)]
    return found


def best_of(
    generator: Generator,
    prompts: list[str],
    of: int,
    n: int = 1,
    *how: Any,
    **more: Any,
) -> list[list[Image]]:
    """Draw ``of`` pictures for each one that is wanted, keep that which the model itself describes by the prompt best.

    Picture j of a prompt is the best of those numbered ``j * of`` to ``(j + 1) * of - 1``, so with ``of`` = 1 this is
    `Generator.image`, whose further arguments, from ``steps`` on, are ``how`` and ``more``.

    Raises:
        PromptError: for an empty or over-long prompt, or fewer than one picture to choose from.
    """
    if of < 1:
        raise PromptError(f"best of {of}: draw at least one picture")
    rows = generator.image(prompts, n * of, *how, **more)
    if of == 1:
        return rows
    chosen = []
    for prompt, row in zip(prompts, rows, strict=True):
        scores = caption_scores(generator, row, [prompt.strip()] * len(row))
        groups = range(0, len(row), of)
        chosen.append([row[max(range(start, start + of), key=scores.__getitem__)] for start in groups])
    return chosen
