"""Answering in batches, as `eval.understanding` does, against one question at a time: same questions, same answers.

The shipped model on made-up questions in the benchmarks' schemas, shortest prompts first, pictures opened before the
clock starts. Writing is what a batch shares: the ratio is that of choice questions, which this model answers with a
phrase of some nine tokens. Where it says one word (``words``), nearly all time goes into reading picture and prompt,
which on a few cores is as much work in a batch as alone.
"""

from __future__ import annotations

from typing import Any

from PIL.Image import Image

from open_pisces.bench.pairs import compare
from open_pisces.eval.understanding.benchmarks import choose
from open_pisces.eval.understanding.questions import FIXTURES, read_questions
from open_pisces.generate.generator import Generator
from open_pisces.model.folder import WEIGHTS

CHOICES = ("mmbench_en", "seed_bench", "ai2d", "scienceqa")
WORDS = ("vqav2", "gqa", "pope", "mme_perception", "docvqa")
BATCH = 16
TOKENS = 64
"""New tokens at most."""


def run(pairs: int = 15) -> dict[str, Any]:
    """Seconds one by one over seconds in batches of 16; at least 2 is wanted of the choice questions.

    Raises:
        AssertionError: if the two ways differ in an answer.
    """
    generator = Generator.from_pretrained(WEIGHTS, "cpu")
    choices, words = (_compare(generator, names, pairs) for names in (CHOICES, WORDS))
    return {**choices, "words": {key: words[key] for key in ("ratio", "low", "high", "n", "figures")}}


def _compare(generator: Generator, names: tuple[str, ...], pairs: int) -> dict[str, Any]:
    pictures, prompts = _questions(names)
    batched, single = (_answers(generator, pictures, prompts, size) for size in (BATCH, 1))
    if batched != single:
        differing = sum(a != b for a, b in zip(batched, single, strict=True))
        raise AssertionError(f"{differing} of {len(prompts)} answers differ between batches of {BATCH} and single ones")
    found = compare(
        "eval_batching",
        lambda: _answers(generator, pictures, prompts, BATCH),
        lambda: _answers(generator, pictures, prompts, 1),
        pairs,
        warm=0,
    )
    tokens = sum(len(generator.renderer.text_ids(answer)) for answer in batched) / len(batched)
    found["figures"] |= {"questions": len(prompts), "batch": BATCH, "answers_equal": True, "tokens_per_answer": tokens}
    found["figures"] |= {"answers_per_second_ours": len(prompts) / found["figures"]["seconds_ours"]}
    return found


def _questions(names: tuple[str, ...]) -> tuple[list[list[Image]], list[str]]:
    """Pictures and prompts, sorted as a run sorts them."""
    read = []
    for row in choose(names):
        asked = read_questions(row, FIXTURES)
        read += [(asked, item) for item in asked.items]
    # Prompts of like length share a batch, so that little of it is padding.
    read.sort(key=lambda one: len(one[1]["prompt"]))
    return [asked.pictures(item) for asked, item in read], [item["prompt"] for _, item in read]


def _answers(generator: Generator, pictures: list[list[Image]], prompts: list[str], size: int) -> list[str]:
    said: list[str] = []
    for start in range(0, len(prompts), size):
        part = slice(start, start + size)
        said += generator.text(pictures[part], prompts[part], max_new_tokens=TOKENS)
    return said
