"""``pisces chat``: one conversation that draws, sees and answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL.Image import Image
from PIL.Image import open as open_picture

from open_pisces.cli.chat import Chat, CommandError
from open_pisces.errors import PiscesError
from open_pisces.generate.generator import Generator
from open_pisces.model.folder import WEIGHTS
from open_pisces.serve.engine import Engine


@pytest.fixture(scope="module")
def generator() -> Generator:
    return Generator.from_pretrained(WEIGHTS, "cpu")


@pytest.fixture
def talk(generator: Generator, tmp_path: Path) -> Chat:
    return Chat(Engine(generator), tmp_path)


def said(talk: Chat, line: str) -> str:
    return "".join(talk.take(line))


def test_it_draws_sees_what_it_drew_and_answers(talk: Chat, tmp_path: Path, generator: Generator) -> None:
    told = said(talk, "a red heart on a blue background")
    assert told == f"[{tmp_path}/pisces-001.png, seed 0]"
    drawn = open_picture(tmp_path / "pisces-001.png")
    expected = generator.image(["a red heart on a blue background"])[0][0]
    assert np.abs(np.asarray(drawn, int) - np.asarray(expected)).max() <= 1
    assert said(talk, "/say What is in the picture?") == "red heart"
    assert [turn.role for turn in talk.turns] == ["user", "assistant"] * 2


def test_a_picture_of_yours_is_asked_about(talk: Chat, tmp_path: Path, generator: Generator) -> None:
    heart: Image = generator.image(["a red heart on a blue background"])[0][0]
    heart.save(tmp_path / "my heart.png")
    assert said(talk, f"/see '{tmp_path}/my heart.png'").endswith("my heart.png: ask about it]")
    assert said(talk, "What is in the picture?") == "red heart"
    assert len(list(tmp_path.iterdir())) == 1


def test_again_takes_another_seed_and_several_are_numbered(talk: Chat, tmp_path: Path) -> None:
    said(talk, "/draw a tree")
    assert said(talk, "/again") == f"[{tmp_path}/pisces-002.png, seed 1]"
    files = sorted(tmp_path.iterdir())
    assert len(files) == 2 and files[0].read_bytes() != files[1].read_bytes()
    assert len(talk.turns) == 2
    said(talk, "/n 2")
    said(talk, "/seed 7")
    assert said(talk, "/draw a cat").count("seed 7]") == 2 and len(list(tmp_path.iterdir())) == 4
    said(talk, "/new")
    assert not talk.turns and not talk.images


def test_the_whole_conversation_is_sent_where_it_was_asked_for(talk: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = []
    submit = talk.engine.submit
    monkeypatch.setattr(
        talk.engine, "submit", lambda id, request: lengths.append(len(request.turns)) or submit(id, request)
    )
    for whole in (False, True):
        talk.whole = whole
        said(talk, "/new")
        said(talk, "/say a")
        said(talk, "/say b")
    assert lengths == [1, 1, 1, 3]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("/paint a cat", "no command /paint"),
        ("/draw", "say something after it"),
        ("/see nowhere.png", "nowhere.png: no such file"),
        ("/see", "no such file"),
        ("/seed x", "/seed 'x': give a whole number"),
        ("/n 0", "of at least 1"),
        ("/again", "nothing was said yet"),
        ("word " * 2000, "leave out earlier turns"),
    ],
)
def test_what_cannot_be_done_is_said_and_the_conversation_stays(talk: Chat, line: str, why: str) -> None:
    with pytest.raises(PiscesError, match=why):
        said(talk, line)
    assert talk.turns == [] and not talk.engine.busy
    assert said(talk, "/help").startswith("Say what to draw")


def test_a_conversation_that_is_stopped_can_go_on(talk: Chat) -> None:
    pieces = talk.take("/say Describe the image in detail.")
    next(pieces)
    pieces.close()
    assert talk.turns == [] and not talk.engine.busy
    assert said(talk, "/draw a cat")


def test_the_command_reads_lines(tmp_path: Path) -> None:
    lines = "/help\na red heart\n/say What is in the picture?\n/nothing\n\n/quit\n"
    command = [sys.executable, "-m", "open_pisces", "chat", "--out", str(tmp_path)]
    done = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.splitlines()[-2:] == [
        f"[{tmp_path}/pisces-001.png, seed 0]",
        "red heart",
    ]
    assert done.stderr == "pisces: no command /nothing: /help lists them\n"
    done = subprocess.run([*command[:-1], "nowhere"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "no folder nowhere" in done.stderr


def test_an_error_of_the_command_is_a_pisces_error() -> None:
    assert issubclass(CommandError, PiscesError)
