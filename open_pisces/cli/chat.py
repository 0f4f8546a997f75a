"""``pisces chat``: one conversation in the terminal that draws and sees."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_pisces.cli.options import Result, add_command, add_int8, at_least, load_generator
from open_pisces.errors import PiscesError
from open_pisces.files import whole_file

if TYPE_CHECKING:
    from PIL.Image import Image

    from open_pisces.batch import Turn
    from open_pisces.serve.engine import Engine

HELP = """\
Say what to draw, or ask about a picture; the model decides what comes back.
  /draw WORDS       draw, whatever it would do
  /say WORDS        answer in words
  /see FILE         show it a picture; what you say next is about it
  /again            the last answer with the next seed
  /seed N           start from this seed
  /n N              pictures of each drawing
  /new              forget the conversation
  /quit             or Ctrl-D"""


class CommandError(PiscesError):
    """A command that cannot be carried out; the message says why."""


@dataclass
class Chat:
    """A conversation, and where its pictures go.

    Args:
        engine: what answers.
        folder: pictures are written here, as ``pisces-001.png`` and so on.
        whole: send all that was said, and not only the last turn and its pictures.
    """

    engine: Engine
    folder: Path
    whole: bool = False
    seed: int = 0
    n: int = 1
    turns: list[Turn] = field(default_factory=list)
    images: list[Image] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)
    """Pictures that the next turn is about."""
    last_mode: str = "auto"

    def take(self, line: str) -> Iterator[str]:
        """Do what a line asks for; yields what is to be printed, in pieces.

        Raises:
            PiscesError: naming what is wrong; the conversation stays as it was.
        """
        command, _, rest = line.strip().partition(" ")
        if command in ("/draw", "/say"):
            yield from self._answer(rest.strip(), "image" if command == "/draw" else "text")
        elif command == "/see":
            yield self._see(rest.strip())
        elif command == "/again":
            yield from self._again()
        elif command in ("/seed", "/n"):
            self._set(command[1:], rest.strip())
        elif command == "/new":
            self._forget()
        elif command == "/help":
            yield HELP
        elif command.startswith("/"):
            raise CommandError(f"no command {command}: /help lists them")
        else:
            yield from self._answer(line.strip(), "auto")

    def _set(self, name: str, text: str) -> None:
        least = 1 if name == "n" else 0
        if not text.isdecimal() or not least <= int(text) < 2**32:
            raise CommandError(f"/{name} {text!r}: give a whole number of at least {least}")
        setattr(self, name, int(text))

    def _forget(self) -> None:
        for kept in (self.turns, self.images, self.shown):
            kept.clear()

    def _see(self, name: str) -> str:
        from open_pisces.data.images import open_image

        file = next(iter(shlex.split(name)), "")
        self.images.append(open_image(Path(file).expanduser()))
        self.shown.append(len(self.images) - 1)
        return f"[{file}: ask about it]"

    def _again(self) -> Iterator[str]:
        if len(self.turns) < 2:
            raise CommandError("/again: nothing was said yet")
        self.turns.pop()
        self.seed += 1
        yield from self._write(self.last_mode)

    def _answer(self, words: str, mode: str) -> Iterator[str]:
        from open_pisces.batch import Turn

        if not words:
            raise CommandError("say something after it")
        before = list(self.turns), list(self.shown)
        if mode == "text" and not self.shown and not self.whole:
            self.shown = self._latest()
        self.turns.append(Turn("user", (*self.shown, words)))
        self.shown = []
        try:
            yield from self._write(mode)
        except BaseException:
            self.turns, self.shown = before
            raise

    def _latest(self) -> list[int]:
        """The picture that was seen or drawn last."""
        pictures = [part for turn in self.turns for part in turn.content if isinstance(part, int)]
        return pictures[-1:]

    def _write(self, mode: str) -> Iterator[str]:
        """The assistant's turn after the conversation so far."""
        from open_pisces.batch import Turn
        from open_pisces.serve.requests import Request, asked_to_draw

        self.last_mode = mode
        turns = tuple(self.turns) if self.whole else (self.turns[-1],)
        used = sorted({part for turn in turns for part in turn.content if isinstance(part, int)})
        turns = tuple(
            Turn(turn.role, tuple(used.index(part) if isinstance(part, int) else part for part in turn.content))
            for turn in turns
        )
        pictures = tuple(self.images[i] for i in used)
        chosen: Any = mode
        request = Request(turns, pictures, chosen, to_draw=asked_to_draw(turns), seed=self.seed, n=self.n)
        self.engine.submit("chat", request)
        text = ""
        drawn: list[int] = []
        try:
            while self.engine.busy:
                for event in self.engine.step():
                    if event.kind == "error":
                        raise CommandError(event.data["message"])
                    if event.kind == "text":
                        text += event.data["text"]
                        yield event.data["text"]
                    elif event.kind == "picture" and event.image is not None:
                        drawn.append(len(self.images))
                        self.images.append(event.image)
                        yield f"{'' if len(drawn) == 1 else ' '}[{self._save(event.image)}, seed {self.seed}]"
        finally:
            self.engine.cancel("chat")
        self.turns.append(Turn("assistant", tuple(drawn) if drawn else (text,)))

    def _save(self, picture: Image) -> Path:
        numbers = (self.folder / f"pisces-{number:03d}.png" for number in range(1, 10_000))
        file = next(one for one in numbers if not one.exists())
        with whole_file(file) as whole:
            picture.save(whole)
        return file


def chat(args: argparse.Namespace) -> Result:
    """Talk with a model in the terminal."""
    if not args.out.is_dir():
        raise CommandError(f"no folder {args.out}: make it with `mkdir -p {args.out}`, or choose another --out")
    from open_pisces.model.folder import read_card
    from open_pisces.serve.engine import Engine

    generator = load_generator(args)
    folder = generator.pisces.folder
    record = read_card(folder)["record"] if folder else []
    trained = any("conversation" in training.get("tasks", ()) for training in record)
    talk = Chat(Engine(generator), args.out, args.whole or trained, args.seed, args.n)
    people = sys.stdin.isatty()
    if people:
        import readline  # noqa: F401  arrow keys and history

        print(HELP)
    while True:
        try:
            line = input("> " if people else "")
        except EOFError:
            return None
        if line.strip() in ("/quit", "/exit"):
            return None
        if line.strip():
            _print(talk, line)


def _print(talk: Chat, line: str) -> None:
    """Print an answer as it comes; Ctrl-C stops it and not the conversation."""
    try:
        for piece in talk.take(line):
            print(piece, end="", flush=True)
        print()
    except PiscesError as error:
        print(f"pisces: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\n[stopped]", file=sys.stderr)


def add_chat(commands: Any) -> None:
    """``pisces chat``."""
    text = "talk with a model in the terminal: it draws, sees and answers"
    command = add_command(commands, "chat", chat, text, model=True, json=False)
    command.add_argument("--out", type=Path, default=Path("."), help="folder of the pictures (default: .)")
    command.add_argument("--n", type=at_least(1), default=1, help="pictures of each drawing (default: 1)")
    command.add_argument("--seed", type=at_least(0), default=0, help="of drawings (default: 0)")
    add_int8(command)
    text = "send all that was said (default: of a model that was trained on conversations)"
    command.add_argument("--whole", action="store_true", help=text)
