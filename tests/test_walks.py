"""The walks that README describes, under a profiler: which files of the package a reader has to open to follow them."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import open_pisces
from open_pisces.cli import main
from open_pisces.model.folder import WEIGHTS
from open_pisces.recipe import load_config
from open_pisces.train.loop import start, train_step
from open_pisces.train.world import World

PACKAGE = Path(open_pisces.__file__).parent
README = (Path(__file__).parent.parent / "README.md").read_text()


def files_entered(walk: Callable[[], Any]) -> list[str]:
    """Files of the package that hold a function which ``walk`` executes, in the order of their first call."""
    found: dict[str, None] = {}

    def note(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(f"{PACKAGE}/"):
            found[frame.f_code.co_filename.removeprefix(f"{PACKAGE}/")] = None

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        walk()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return list(found)


def counts_in_readme() -> dict[str, int]:
    """The figures that README gives: one row of its table for each walk."""
    return {name: int(count) for name, count in re.findall(r"^\| (\w[^|]*?) \| (\d+) \|", README, re.MULTILINE)}


def test_from_shard_to_loss(tmp_path: Path) -> None:
    """A step of stage 3: its samples are read, laid out, collated; losses and gradients; the optimizer's step."""
    run = start(load_config("nano/stage3", [f"out={tmp_path}", "model.start=null"]), World(torch.device("cpu")))
    run.training.load(0)  # what is imported or opened on first use is not part of the walk

    def walk() -> None:
        batches, _, _ = run.world.equalize_micro_batches(run.training.load(1), run.training.load)
        train_step(run, batches, 1)

    files = files_entered(walk)
    assert "data/loader.py" in files and "model/heads.py" in files
    assert len(files) == counts_in_readme()["from shard to loss and step"], files


@pytest.mark.skipif(not (WEIGHTS / "config.json").is_file(), reason="needs the shipped weights")
def test_from_prompt_to_png(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["generate", "a red heart", "--out", "heart.png"]
    assert main(command) == 0
    files = [file for file in files_entered(lambda: main(command)) if not file.startswith("cli/")]
    assert "generate/generator.py" in files and "model/decoder.py" in files
    assert len(files) == counts_in_readme()["from prompt to PNG"], files


@pytest.mark.skipif(not (WEIGHTS / "config.json").is_file(), reason="needs the shipped weights")
def test_from_frozen_caption_to_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["eval", "drawing", "--per-category", "1", "--steps", "2", "--json", "--out"]
    assert main([*command, "first"]) == 0
    files = [file for file in files_entered(lambda: main([*command, "second"])) if not file.startswith("cli/")]
    assert "eval/scenes/judge.py" in files and "eval/drawing/rules.py" in files
    assert len(files) == counts_in_readme()["from frozen caption to score"], files


def test_from_recipe_to_saved_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (["train", "nano/stage1", f"out=run{i}", "train.steps=1", "model.start=null"] for i in range(2))
    assert main(first) == 0
    files = [file for file in files_entered(lambda: main(second)) if not file.startswith("cli/")]
    assert "train/checkpoint.py" in files and "model/folder.py" in files
    assert len(files) == counts_in_readme()["from recipe to a saved step"], files
