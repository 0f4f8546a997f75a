"""What scores look like in a terminal of 80 columns."""

from __future__ import annotations

from typing import Any

import pytest

from open_pisces.cli.tables import print_benchmarks, print_score


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def printed(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    """The lines that hold something, each as its parts."""
    return [line.split("  ") for line in capsys.readouterr().out.splitlines() if line.strip(" ─")]


def test_a_score_comes_first_and_nested_figures_are_tables(capsys: pytest.CaptureFixture[str]) -> None:
    categories = {name: {"score": 0.5, "low": 0.25, "high": 1.0, "n": 60} for name in ("single_object", "[two]")}
    result: dict[str, Any] = {"name": "scenes/drawing", "score": 0.25, "low": 0.125, "high": 0.5, "n": 1200}
    result |= {"baseline": None, "categories": categories, "wrong": ["a photo of [something] else " * 2] * 2}
    print_score(result)
    lines = [[part.strip() for part in line if part.strip()] for line in printed(capsys)]
    assert lines[:4] == [["score 0.25 [0.125, 0.5]"], ["name: scenes/drawing"], ["n: 1,200"], ["baseline: none"]]
    assert lines[4:7] == [["wrong"], *[["a photo of [something] else a photo of [something] else"]] * 2]
    assert lines[7:] == [
        ["categories", "score", "n"],
        ["single object", "0.5 [0.25, 1]", "60"],
        ["[two]", "0.5 [0.25, 1]", "60"],
    ]


def test_wrong_pictures_are_prompts_with_what_was_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    reasons = ["expected [cat] >= 1, found 0", "expected dog >= 1, found 0"]
    row = {"key": "train-0000025", "prompt": "a [cat] above a dog", "picture": 0, "reasons": reasons}
    print_score({"examples": [row], "missing": []})
    lines = " ".join(capsys.readouterr().out.split())
    assert lines == f"examples a [cat] above a dog: {'; '.join(reasons)}"


def test_a_table_wider_than_long_is_turned(capsys: pytest.CaptureFixture[str]) -> None:
    print_score({"categories": {f"category_number_{place}": place / 10 for place in range(6)}})
    lines = [[part.strip() for part in line if part.strip()] for line in printed(capsys)]
    assert lines[0] == ["categories"] and lines[1:] == [[f"category number {n}", f"{n / 10:.4g}"] for n in range(6)]


def test_a_score_that_is_missing_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    print_score({"score": None, "low": None, "high": None, "why": "needs a judge"})
    assert capsys.readouterr().out.splitlines() == ["score none", "  why: needs a judge"]


def test_benchmarks_stand_in_rows_with_what_there_is_to_say_once(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"score": 60.0, "low": 50.0, "high": 70.5, "strict": 60.0, "lenient": 65.0, "n": 1000, "unparsed": 0}
    empty = {**dict.fromkeys(row), "n": 0, "unparsed": 0, "why": "no folder; made up"}
    print_benchmarks({"model": "m", "data": "hub", "rows": {"pope": {**row, "why": "made up"}, "gqa": empty}})
    lines = [[cell.strip() for cell in "".join(line).split("│")[1:-1]] for line in printed(capsys)]
    assert ["pope", "60", "50 to 70.5", "60", "65", "1,000", "0"] in lines
    assert ["gqa", "not run", "", "", "", "0", "0"] in lines
    print_benchmarks({"model": "m", "data": "hub", "rows": {"pope": {**row, "why": "made up"}, "gqa": empty}})
    assert capsys.readouterr().out.splitlines()[-2:] == ["all: made up", "gqa: no folder"]
