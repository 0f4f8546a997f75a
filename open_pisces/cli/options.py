"""What all commands of the command line share: the parser, types of arguments, and checks of where to write."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from open_pisces.errors import PiscesError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
Result = dict[str, Any] | None
"""What a command gives back: with ``--json`` it is printed as the last line."""


class OutputError(PiscesError):
    """A place that cannot be written to; the message names it and the remedy."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all others."""

    def error(self, message: str) -> NoReturn:
        """Say it in one line and exit with code 2."""
        self.exit(2, f"pisces: {message} (see `{self.prog} --help`)\n")


def at_least(least: int) -> Callable[[str], int]:
    """The type of a whole number with a lower bound."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return read


def share(text: str) -> float:
    """The type of a fraction above 0, at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: use a number above 0, at most 1, such as 0.4")
    return value


def device_name(text: str) -> str:
    """The name of a device."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no device: use auto, cuda, cuda:0, mps or cpu")
    return text


def add_command(commands: Any, name: str, run: Any, text: str, model: bool = False, json: bool = True) -> Any:
    """A new command; with ``model`` it takes ``--model`` and ``--device``, and ``--json`` unless told otherwise."""
    command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    if run:
        command.set_defaults(run=run)
    if model:
        command.add_argument("--model", metavar="DIR", help="a model folder (default: the one in the package)")
        command.add_argument("--device", type=device_name, default="auto", help="cuda, mps, cpu or auto (default)")
    if model and json:
        add_json(command)
    return command


def add_json(command: argparse.ArgumentParser) -> None:
    """The option ``--json``."""
    command.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")


def check_out(out: Path) -> None:
    """Refuse a place that cannot take a picture, before any work is done."""
    if out.is_dir():
        return
    if out.suffix and out.suffix.lower() not in PICTURES:
        raise OutputError(f"cannot write a picture to {out}: name a folder or a file ending in {', '.join(PICTURES)}")
    folder = out.parent if out.suffix else out
    if not folder.is_dir():
        raise OutputError(f"output folder {folder} does not exist: make it first with `mkdir -p {folder}`")


def quiet() -> None:
    """Turn off the bars of reading and writing weights, and warnings of what is meant: they would fill the terminal."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # a checkpoint of one process
