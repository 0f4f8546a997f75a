"""Perplexity of the LLM on a fixed text."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from open_pisces.cli.commands import main
from open_pisces.eval.evaluation import rescore
from open_pisces.eval.language import TEXT, LanguagePerplexity, TextError
from open_pisces.generate.generator import Generator
from open_pisces.model.pisces import Pisces


@pytest.fixture(scope="module")
def generator(nano_pisces: Pisces, nano_tokenizer: Any) -> Generator:
    return Generator(nano_pisces, nano_tokenizer, "cpu")


def text(folder: Path, words: str) -> Path:
    file = folder / "text.txt"
    file.write_text(words, encoding="utf-8")
    return file


def test_it_is_the_mean_of_what_transformers_calls_the_loss(
    generator: Generator, nano_folder: Path, tmp_path: Path
) -> None:
    paragraphs = ["Salt melts ice.", "The train was late\nagain."]
    asked = LanguagePerplexity(generator, text(tmp_path, "\n\n".join(paragraphs) + "\n"))
    found = asked.run(nano_folder, tmp_path / "run")
    losses = []
    for paragraph in paragraphs:
        ids = torch.tensor([generator.renderer.text_ids(paragraph.replace("\n", " "))])
        with torch.no_grad():
            losses.append(float(generator.pisces.llm(input_ids=ids, labels=ids).loss))
    assert found["score"] == pytest.approx(math.exp(sum(losses) / 2), abs=1e-3)
    assert found["n"] == 2 and found["tokens"] == len("Salt melts ice.") + len("The train was late again.") - 2
    assert found["low"] <= found["score"] <= found["high"] and found["baseline"] == len(generator.tokenizer)
    again = rescore(tmp_path / "run")
    assert {**found, "seconds": 0} == {**again, "seconds": 0}


def test_the_packaged_text_has_twelve_paragraphs(nano_folder: Path, tmp_path: Path, capsys: Any) -> None:
    words = TEXT.read_text(encoding="utf-8")
    assert len(words.strip().split("\n\n")) == 12 and words.isascii()
    short = text(tmp_path, "Bread needs flour.\n\nAnd water.")
    arguments = ["eval", "language", "--model", str(nano_folder), "--text", str(short), "--out", str(tmp_path / "run")]
    assert main([*arguments, "--json"]) == 0 and '"name": "language"' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"), [("", "two tokens or more"), ("a\n\nlong enough", "two tokens"), ("x" * 9000, "empty line")]
)
def test_a_text_that_cannot_be_measured_is_refused(generator: Generator, tmp_path: Path, words: str, says: str) -> None:
    with pytest.raises(TextError, match=says):
        LanguagePerplexity(generator, text(tmp_path, words)).items()
    with pytest.raises(TextError, match="cannot be read as UTF-8 text"):
        LanguagePerplexity(generator, tmp_path).items()
