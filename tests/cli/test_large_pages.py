"""The restart of a training's command with large pages (`cli/large_pages.py`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from open_pisces.cli import commands, large_pages
from open_pisces.cli.commands import main


@pytest.fixture
def started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str], dict[str, str]]]:
    """What the process would have been replaced by, on a machine where large pages can be had."""
    found: list[Any] = []
    switch = tmp_path / "enabled"
    switch.write_text("always [madvise] never\n")
    monkeypatch.setattr(large_pages, "SWITCH", switch)
    monkeypatch.setattr(large_pages, "DRIVERS", (tmp_path / "no such driver",))
    monkeypatch.setattr(large_pages.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "open_pisces", "train", "nano"])
    monkeypatch.setattr(os, "execve", lambda *given: found.append(given))
    monkeypatch.delenv(large_pages.NAME, raising=False)
    return found


def test_a_training_starts_again_as_it_was_called(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWN", "1")
    large_pages.restart_with_large_pages()
    ((program, arguments, environment),) = started
    assert program == sys.executable and arguments == [sys.executable, "-m", "open_pisces", "train", "nano"]
    assert environment["OWN"] == "1"
    assert environment[large_pages.NAME].split(":")[0] == "glibc.malloc.hugetlb=1"


def test_make_test_sets_the_same(started: Any) -> None:
    large_pages.restart_with_large_pages()
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert f"test: export {large_pages.NAME} ?= {started[0][2][large_pages.NAME]}\n" in makefile


def test_who_has_set_tunables_is_left_alone(started: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(large_pages.NAME, "")
    large_pages.restart_with_large_pages()
    assert started == []


def test_where_it_cannot_help_nothing_is_restarted(
    started: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as other:
        other.setattr(large_pages, "DRIVERS", (tmp_path,))
        large_pages.restart_with_large_pages()
    with monkeypatch.context() as other:
        other.setattr(large_pages.platform, "libc_ver", lambda: ("", ""))
        large_pages.restart_with_large_pages()
    large_pages.SWITCH.write_text("always madvise [never]\n")
    large_pages.restart_with_large_pages()
    large_pages.SWITCH.unlink()
    large_pages.restart_with_large_pages()
    assert started == []


def test_only_a_command_of_its_own_process_is_restarted(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    asked: list[str] = []
    monkeypatch.setattr(commands, "restart_with_large_pages", lambda: asked.append("again"))
    assert main(["train", "no such recipe"]) == 2
    monkeypatch.setattr(sys, "argv", ["pisces", "plan", "no such recipe", "--gpus", "1"])
    assert main() == 2 and asked == []
    monkeypatch.setattr(sys, "argv", ["pisces", "train", "no such recipe"])
    assert main() == 2 and asked == ["again"]


def test_a_restarted_command_does_what_was_asked() -> None:
    environment = {key: value for key, value in os.environ.items() if key != large_pages.NAME}
    command = [sys.executable, "-m", "open_pisces", "train", "tiny/stagee1"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "did you mean tiny/stage1?" in done.stderr
