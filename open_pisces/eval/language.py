"""Whether the LLM still knows its language after it has learnt pictures: perplexity on a fixed text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from open_pisces.device import upcast
from open_pisces.errors import PiscesError
from open_pisces.eval.evaluation import Evaluation, Score
from open_pisces.eval.intervals import mean_interval
from open_pisces.eval.run import Row, RunFolder
from open_pisces.files import sha256_of
from open_pisces.generate.generator import Generator

TEXT = Path(__file__).with_name("language.txt")
"""Twelve paragraphs on everyday things, written for this measurement, so that no LLM has learnt them by heart."""


class TextError(PiscesError):
    """A text that cannot be measured on."""


@dataclass(frozen=True)
class LanguageScore(Score):
    """Perplexity: lower is better."""

    baseline: float
    """Of an LLM that takes every token for equally likely: the size of its vocabulary."""
    tokens: int


@dataclass
class LanguagePerplexity(Evaluation):
    """Perplexity of a text without pictures and without a chat template.

    Args:
        generator: the model.
        text: a file in UTF-8, paragraphs divided by empty lines; None takes the packaged one.

    Raises:
        TextError: when it is opened, for a text that is no file, has no paragraph of two tokens, or is too long.
    """

    generator: Generator
    text: Path | None = None
    task = "language"
    stages = ("likelihoods",)

    def __post_init__(self) -> None:
        self.device = str(self.generator.device)

    @property
    def settings(self) -> Row:
        """Which text."""
        words = len(self.generator.tokenizer)
        return {"text": sha256_of(self._file), "vocabulary": words, "batch_size": 1}

    @property
    def _file(self) -> Path:
        return self.text or TEXT

    def items(self) -> list[Row]:
        """The paragraphs."""
        try:
            text = self._file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TextError(f"{self._file}: cannot be read as UTF-8 text: {error}") from None
        paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
        rows = [{"key": f"{i:04d}", "text": words} for i, words in enumerate(filter(None, paragraphs))]
        lengths = [len(self.generator.renderer.text_ids(row["text"])) for row in rows]
        if not lengths or min(lengths) < 2:
            raise TextError(f"{self._file}: a paragraph needs two tokens or more: join it to its neighbor")
        if max(lengths) > self.generator.max_prompt_tokens:
            raise TextError(
                f"{self._file}: a paragraph of {max(lengths)} tokens, this model takes "
                f"{self.generator.max_prompt_tokens}: divide it by an empty line"
            )
        return rows

    @torch.inference_mode()
    def answer(self, run: RunFolder, stage: str, batch: Sequence[Row]) -> None:
        """The negative log-likelihood of each paragraph's tokens but the first."""
        llm = self.generator.pisces.llm
        for item in batch:
            ids_S = torch.tensor(self.generator.renderer.text_ids(item["text"]), device=self.generator.device)
            logits_SV = upcast(llm(input_ids=ids_S[None]).logits[0, :-1])
            chosen_S = logits_SV.log_softmax(-1).gather(-1, ids_S[1:, None])[:, 0]
            run.append(stage, [{"key": item["key"], "nll": -float(chosen_S.sum()), "tokens": len(chosen_S)}])

    def score(self, run: RunFolder) -> LanguageScore:
        """From the rows."""
        return score_run(run)


def score_run(run: RunFolder) -> LanguageScore:
    """``exp`` of the mean over paragraphs of the mean negative log-likelihood of a token."""
    rows = run.rows("likelihoods")
    interval = mean_interval([row["nll"] / row["tokens"] for row in rows])
    score, low, high = (round(float(np.exp(value)), 3) for value in (interval.score, interval.low, interval.high))
    return LanguageScore(
        name=LanguagePerplexity.task,
        score=score,
        low=low,
        high=high,
        n=len(rows),
        baseline=run.manifest.settings["vocabulary"],
        tokens=sum(row["tokens"] for row in rows),
    )
