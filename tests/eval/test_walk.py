"""How many files of the package one command walks through: what somebody has to open who follows it."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import open_pisces
from open_pisces.cli.commands import main

PACKAGE = Path(open_pisces.__file__).parent


def files_entered(words: list[str]) -> set[str]:
    """Files of the package of which a command executes a function; what is run at import does not count."""
    for module in pkgutil.walk_packages([str(PACKAGE)], "open_pisces."):
        if not module.name.startswith(("open_pisces.integrations", "open_pisces.__main__")):
            importlib.import_module(module.name)
    entered: set[str] = set()

    def look(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            entered.add(frame.f_code.co_filename)

    sys.setprofile(look)
    try:
        assert main(words) == 0
    finally:
        sys.setprofile(None)
    return {str(Path(file).relative_to(PACKAGE)) for file in entered if Path(file).is_relative_to(PACKAGE)}


def test_drawing_walks_through_few_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    how = ["--per-category", "1", "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "run"), "--json"]
    entered = files_entered(["eval", "drawing", *how])
    # The command line builds the parsers of all its groups before it runs one: how many those are is not this walk's.
    walked = sorted(file for file in entered if not file.startswith("cli/"))
    assert {"eval/scenes/drawing.py", "generate/generator.py", "model/pisces.py"} <= set(walked)
    assert len(walked) <= 28, walked
    assert len([file for file in walked if file.startswith("eval/")]) <= 9, walked
