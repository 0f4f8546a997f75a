"""Text that an LLM writes by itself (`factory/replay.py`): what is kept, what is counted, what a stopped run leaves."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from open_pisces.batch import Turn
from open_pisces.data.shards import open_dataset
from open_pisces.factory.replay import ReplayError, Writing, _whole_sentences, write_replay
from open_pisces.files import LockHeldError, locked
from open_pisces.generate.generator import Generator

HOW = Writing(request=6, answer=12, batch_size=4)
ENDLESS = "x" * 40


class Script:
    """Stands in for a generator: texts follow from the seed, a character is a token."""

    def __init__(self, stops_at: int = -1) -> None:
        self.tokenizer = self
        self.rounds = 0
        self.stops_at = stops_at

    def open_user_turn(self, rows: int) -> list[str]:
        if self.rounds == self.stops_at:
            raise KeyboardInterrupt
        self.rounds += 1
        return [""] * rows

    def prompt(self, turns: list[tuple[Turn, ...]], images: list[Any]) -> list[str]:
        return [str(turn.content[0]) for (turn,) in turns]

    def tokens(self, batch: list[str], most: int, temperature: float, seeds: Sequence[int]) -> list[str]:
        return [self.text(request, seed)[:most] for request, seed in zip(batch, seeds, strict=True)]

    def text(self, request: str, seed: int) -> str:
        kind = seed % 8
        if not request:  # a request: two of eight are unfit, one comes again and again
            return {0: "", 1: ENDLESS, 2: "again"}.get(kind, f"ask {seed % 100}")
        return {3: ENDLESS, 4: request, 5: "no. It goes on"}.get(kind, f"said {seed % 100}")

    def rows(self, columns: list[str], count: int) -> list[str]:
        return columns

    def decode(self, row: str) -> str:
        return row


def write(out: Path, count: int = 8, how: Writing = HOW, stops_at: int = -1) -> tuple[dict[str, Any], Script]:
    script: Any = Script(stops_at)
    return write_replay(script, "model", out, count, how), script


def conversations(out: Path) -> list[tuple[str, str]]:
    reader = open_dataset(out)
    turns = [reader[i].conversation for i in range(len(reader))]
    assert all([turn["role"] for turn in one] == ["user", "assistant"] for one in turns)
    return [(one[0]["content"][0], one[1]["content"][0]) for one in turns]


def test_what_is_fit_is_written_and_the_rest_counted(tmp_path: Path) -> None:
    found, script = write(tmp_path / "out")
    kept = conversations(tmp_path / "out")
    expected = [("again", "said 2")] + [
        (f"ask {seed}", "no." if seed % 8 == 5 else f"said {seed}") for seed in (5, 6, 7, 13, 14, 15, 21)
    ]
    assert kept == expected
    assert found["conversations"] == 8 and found["rounds"] == script.rounds == 6
    assert found["dropped"] == {
        "request empty": 3,
        "request too long": 3,
        "answer too long": 3,
        "answer copies the request": 3,
        "asked before": 2,
    }
    assert [path.name for path in tmp_path.iterdir() if "rounds" in path.name] == []


def test_a_long_answer_is_cut_after_a_whole_sentence_and_never_inside_code() -> None:
    assert _whole_sentences("One. Two! It is 3.5 m lo") == "One. Two!"
    assert _whole_sentences("it goes on and on") is None
    assert _whole_sentences("So:\n```\nx = 1. \ny = 2") is None
    assert _whole_sentences("So:\n```\nx = 1\n```\nThat is all. And") == "So:\n```\nx = 1\n```\nThat is all."


def test_a_stopped_run_goes_on_and_writes_the_same(tmp_path: Path) -> None:
    once, _ = write(tmp_path / "once")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", stops_at=2)
    assert not (tmp_path / "out").exists()
    rounds = tmp_path / ".out.rounds.jsonl"
    rounds.write_text(rounds.read_text() + '[[["half')  # killed while it wrote
    again, script = write(tmp_path / "out")
    assert again == once and script.rounds == once["rounds"] - 2
    assert conversations(tmp_path / "out") == conversations(tmp_path / "once")
    files = sorted(path.relative_to(tmp_path / "once") for path in (tmp_path / "once").rglob("*") if path.is_file())
    assert files
    for file in files:
        assert (tmp_path / "once" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()


def test_rounds_of_other_settings_are_not_gone_on_with(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", stops_at=2)
    other = Writing(request=6, answer=12, batch_size=4, seed=1)
    found, script = write(tmp_path / "out", how=other)
    assert script.rounds == found["rounds"]
    assert conversations(tmp_path / "out")[0] == ("again", f"said {((1 << 32) + 2) % 100}")


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    with locked(tmp_path / ".out.lock"), pytest.raises(LockHeldError):
        write(tmp_path / "out")


def test_an_llm_that_cannot_chat_is_given_up(nano_folder: Path, tmp_path: Path) -> None:
    generator = Generator.from_pretrained(nano_folder, "cpu")
    how = Writing(request=1, answer=1, batch_size=2)
    with pytest.raises(ReplayError, match=r"of 16 conversations \d were fit \(.*request too long"):
        write_replay(generator, "nano", tmp_path / "out", 100, how)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"request": 0}, {"answer": 0}, {"batch_size": 0}])
def test_bad_settings_are_refused(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(ReplayError, match=name.replace("_", " ")):
        Writing(**wrong)


def test_a_row_is_drawn_from_its_own_seed(nano_folder: Path) -> None:
    generator = Generator.from_pretrained(nano_folder, "cpu")
    batch = generator.open_user_turn(3)
    columns: Iterator[list[int]] = generator.tokens(batch, 8, 1.0, [1, 2, 1])
    first, second, third = zip(*columns, strict=True)
    assert first == third != second
