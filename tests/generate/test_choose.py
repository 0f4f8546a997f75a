"""Drawings chosen by the model's own answers, and words that it never saw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL.Image import Image, fromarray

from open_pisces.batch import Turn
from open_pisces.cli import main
from open_pisces.data.tokenizer import MOST_WORDS, byte_tokenizer, load_tokenizer, train_tokenizer
from open_pisces.generate import choose
from open_pisces.generate.choose import best_of, caption_scores, log_likelihoods
from open_pisces.generate.generator import Generator, PromptError
from open_pisces.generate.messages import Conversation
from open_pisces.generate.words import UnknownWord, known_words, unknown_words
from open_pisces.model.pisces import Pisces


@pytest.fixture(scope="module")
def generator(nano_pisces: Pisces, nano_tokenizer: Any) -> Generator:
    return Generator(nano_pisces, nano_tokenizer, "cpu")


def plain(level: int) -> Image:
    return fromarray(np.full((32, 32, 3), level, np.uint8))


def test_a_captions_score_is_its_mean_log_probability_a_token(generator: Generator) -> None:
    pictures = [plain(level) for level in (0, 90, 255)]
    captions = ["a cat", "two big dogs", "x"]
    scores = caption_scores(generator, pictures, captions)
    for picture, caption, score in zip(pictures, captions, scores, strict=True):
        asked = Conversation((Turn("user", (0, "Describe the image briefly.")),), (picture,))
        ((total, _),) = log_likelihoods(generator, [asked], [caption])
        assert score == pytest.approx(total / len(generator.renderer.text_ids(caption)), abs=1e-4)


def test_the_best_described_of_each_group_is_kept(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def image(prompts: list[str], n: int, *how: Any) -> list[list[Image]]:
        asked.append((n, *how))
        return [[plain(10 * i + j) for j in range(n)] for i in range(len(prompts))]

    def scores(_: Any, pictures: list[Image], captions: list[str]) -> list[float]:
        assert captions == ["a cat"] * 6 or captions == ["a dog"] * 6
        return [-abs(int(np.asarray(picture)[0, 0, 0]) % 10 - 4) for picture in pictures]  # number 4 is best

    monkeypatch.setattr(generator, "image", image)
    monkeypatch.setattr(choose, "caption_scores", scores)
    rows = best_of(generator, ["a cat", " a dog "], 3, 2, 5, 1.5, 7, 0.5)
    assert [[np.asarray(p)[0, 0, 0] for p in row] for row in rows] == [[2, 4], [12, 14]]
    assert asked == [(6, 5, 1.5, 7, 0.5)]


def test_best_of_one_is_the_generators_own(generator: Generator) -> None:
    one = best_of(generator, ["a cat"], 1, 2, 1, 1.0, 3)
    two = generator.image(["a cat"], 2, 1, 1.0, 3)
    assert [np.asarray(p).tolist() for p in one[0]] == [np.asarray(p).tolist() for p in two[0]]
    with pytest.raises(PromptError, match="best of 0"):
        best_of(generator, ["a cat"], 0)


# ------------------------------------------------------------------------------------------------ unknown words


def test_a_tokenizer_of_our_own_keeps_its_words(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["A red cat!", "two Cats, 3d style"], 400, "tiny")
    assert known_words(tokenizer) == ("3d", "a", "cat", "cats", "red", "style", "two")
    tokenizer.save_pretrained(str(tmp_path))
    assert known_words(load_tokenizer(tmp_path, "tiny")) == known_words(tokenizer)


def test_unknown_words_are_named_with_known_ones_like_them() -> None:
    tokenizer = train_tokenizer(["a red cat and an umbrella"], 400, "tiny")
    assert unknown_words(tokenizer, "A RED cat, an umbrella") == []
    found = unknown_words(tokenizer, "a giraffe and a giraffe with an umbrela")
    assert found == [UnknownWord("giraffe", ()), UnknownWord("with", ()), UnknownWord("umbrela", ("umbrella",))]
    assert "never saw the word 'umbrela' (known words like it: umbrella)" in str(found[2])


def test_nothing_is_said_where_it_is_not_known_what_was_seen() -> None:
    assert unknown_words(byte_tokenizer("tiny"), "anything at all") == []
    many = train_tokenizer((f"w{number}" for number in range(MOST_WORDS + 2)), 400, "tiny")
    assert known_words(many) == () and unknown_words(many, "w1 x") == []


def test_the_command_line_warns_and_still_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], generator: Generator
) -> None:
    monkeypatch.setattr("open_pisces.cli.generate.load_generator", lambda _: generator)
    monkeypatch.setitem(generator.tokenizer.init_kwargs, "known_words", ["a", "cat"])
    main(["generate", "a catt", "--out", str(tmp_path / "x.png"), "--steps", "1", "--best-of", "2", "--json"])
    out, told = capsys.readouterr()
    assert "never saw the word 'catt' (known words like it: cat)" in told and "pisces info --words" in told
    assert '"unknown_words": ["catt"]' in out and (tmp_path / "x.png").is_file()
