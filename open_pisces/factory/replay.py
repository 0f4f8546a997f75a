"""Text that a chat LLM writes by itself, to be replayed while it learns pictures.

An LLM that trains on pictures alone loses its language, and what it was trained on is seldom at hand. What it says is:
after the template's open user turn a chat LLM writes what users ask, and then answers it (Magpie, arXiv 2406.08464).
Written before the first training on pictures and mixed into it as the task `conversation`, this holds its language
where it was.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from open_pisces.batch import Sample, Turn
from open_pisces.datasets.language import repeated_share
from open_pisces.datasets.shard_writer import ShardWriter
from open_pisces.errors import PiscesError
from open_pisces.files import locked
from open_pisces.generate.generator import Generator

TRIED = 8
"""Rounds after which an LLM that writes next to nothing is given up."""
SENTENCES = re.compile(r".*[.!?](?=\s)", re.DOTALL)
Show = Callable[[int, int], None]
Pair = tuple[str, str]


class ReplayError(PiscesError):
    """Text that cannot be written as asked; the message names what is wrong and the remedy."""


@dataclass(frozen=True)
class Writing:
    """How text is written.

    Args:
        request: most tokens of what a user asks.
        answer: most tokens of the answer; a longer one is cut after its last whole sentence.
        temperature: 1 samples the LLM's own distribution, which is what is to be kept.
        repetition: most of itself that a text may repeat (`repeated_share`).
        batch_size: conversations that are written together.
        seed: of all draws.
    """

    request: int = 64
    answer: int = 192
    temperature: float = 1.0
    repetition: float = 0.3
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ReplayError(f"temperature {self.temperature}: give 0 (always the likeliest) or more")
        if self.request < 1 or self.answer < 1 or self.batch_size < 1:
            raise ReplayError(
                f"request {self.request}, answer {self.answer}, batch size {self.batch_size}: give 1 or more"
            )


@dataclass
class Written:
    """The conversations so far."""

    pairs: list[Pair] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    rounds: int = 0

    def take(self, pairs: list[Pair], causes: dict[str, int]) -> None:
        """Add those of a round; what was asked before is dropped."""
        known = {request for request, _ in self.pairs}
        for request, answer in pairs:
            if request in known:
                self.dropped["asked before"] += 1
            else:
                known.add(request)
                self.pairs.append((request, answer))
        self.dropped.update(causes)
        self.rounds += 1


def write_replay(
    generator: Generator, model: str, out: Path, count: int, how: Writing | None = None, show: Show | None = None
) -> dict[str, Any]:
    """Write a dataset of conversations without pictures.

    Every round is kept in a file beside ``out`` as it is done: a run that was stopped goes on, and writes the same.

    Args:
        generator: the model.
        model: what identifies its weights; rounds of another model are not gone on with.
        out: the dataset's folder.
        count: conversations.
        how: lengths, temperature, seed.
        show: is told how many there are, of how many.

    Returns:
        ``conversations``, ``rounds``, and what was dropped by cause.

    Raises:
        ReplayError: if the LLM writes next to nothing that is fit: it was not trained to chat in this template.
        ShardError: if ``out`` holds something else.
        LockHeldError: if another process writes it.
    """
    how = how or Writing()
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    with ShardWriter(out) as writer, locked(out.with_name(f".{out.name}.lock"), wait=False):
        rounds = out.with_name(f".{out.name}.rounds.jsonl")
        header = json.dumps({"model": model, **asdict(how)})
        done = _read_rounds(rounds, header)
        with rounds.open("a") as file:
            while len(done.pairs) < count:
                pairs, causes = write_round(generator, how, done.rounds)
                file.write(json.dumps([pairs, causes]) + "\n")
                file.flush()
                done.take(pairs, causes)
                if show is not None:
                    show(min(len(done.pairs), count), count)
                if done.rounds >= TRIED and len(done.pairs) < done.rounds:
                    causes_said = ", ".join(f"{cause} {n}" for cause, n in done.dropped.most_common())
                    raise ReplayError(
                        f"of {done.rounds * how.batch_size} conversations {len(done.pairs)} were fit ({causes_said}): "
                        "this LLM was not trained to chat in the model's template; give text of your own"
                    )
        for number, (request, answer) in enumerate(done.pairs[:count]):
            turns = {"role": "user", "content": [request]}, {"role": "assistant", "content": [answer]}
            writer.write(Sample(f"{number:07d}", (), conversation=turns))
    rounds.unlink()
    return {"conversations": count, "rounds": done.rounds, "dropped": dict(done.dropped)}


def write_round(generator: Generator, how: Writing, number: int) -> tuple[list[Pair], dict[str, int]]:
    """The requests and answers of one batch that are fit, and how many were not, by cause."""
    B = how.batch_size
    seeds = [(how.seed << 32) + number * B + row for row in range(B)]
    asked = _texts(generator, generator.open_user_turn(B), how.request, how.temperature, seeds)
    causes: Counter[str] = Counter()
    requests: list[tuple[int, str]] = []
    for seed, (text, ended) in zip(seeds, asked, strict=True):
        if cause := _cause(text if ended else None, how):
            causes[f"request {cause}"] += 1
        else:
            requests.append((seed, text))
    if not requests:
        return [], dict(causes)
    batch = generator.prompt([(Turn("user", (text,)),) for _, text in requests], [()] * len(requests))
    answers = _texts(generator, batch, how.answer, how.temperature, [seed for seed, _ in requests])
    pairs: list[Pair] = []
    for (_, request), (text, ended) in zip(requests, answers, strict=True):
        answer = text if ended else _whole_sentences(text)
        if cause := _cause(answer, how):
            causes[f"answer {cause}"] += 1
        elif answer == request:
            causes["answer copies the request"] += 1
        else:
            pairs.append((request, str(answer)))
    return pairs, dict(causes)


def _texts(generator: Generator, batch: Any, most: int, temperature: float, seeds: list[int]) -> list[tuple[str, bool]]:
    """What each row writes, and whether its turn ended."""
    columns = generator.tokens(batch, most + 1, temperature, seeds)  # one more: the end of the turn
    rows = generator.rows(columns, len(seeds))
    return [(generator.tokenizer.decode(row[:most]).strip(), len(row) <= most) for row in rows]


def _whole_sentences(text: str) -> str | None:
    """What comes before the last end of a sentence; None if there is none, or if it lies in a block of code."""
    found = SENTENCES.match(text)
    return None if found is None or found[0].count("```") % 2 else found[0]


def _cause(text: str | None, how: Writing) -> str:
    if text is None:
        return "too long"
    if not text:
        return "empty"
    return "repeats itself" if repeated_share(text) > how.repetition else ""


def _read_rounds(path: Path, header: str) -> Written:
    """What a stopped run has written; nothing if it was another one, whose file is begun anew."""
    done = Written()
    lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
    if not lines or lines[0] != f"{header}\n":
        path.write_text(f"{header}\n")
        return done
    whole = [line for line in lines if line.endswith("\n")]  # a killed run leaves half a line
    if len(whole) < len(lines):
        path.write_text("".join(whole))
    for line in whole[1:]:
        pairs, causes = json.loads(line)
        done.take([(request, answer) for request, answer in pairs], causes)
    return done
