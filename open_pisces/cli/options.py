"""What the command groups share: the parser, argument types, common options, loading the model, printing a result."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from open_pisces.errors import PiscesError

if TYPE_CHECKING:
    from open_pisces.generate.generator import Generator

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
Result = dict[str, Any] | None
"""What a command returns: ``main`` prints it as the last line with ``--json``."""


class OutputError(PiscesError):
    """A path that cannot be written to; the message names it and the remedy."""


class Parser(argparse.ArgumentParser):
    """A parser that prints an error in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit with code 2."""
        self.exit(2, f"pisces: {message} (see `{self.prog} --help`)\n")


def at_least(least: int) -> Callable[[str], int]:
    """Argument type: a whole number of at least ``least``."""

    def read(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return read


def share(text: str) -> float:
    """Argument type: a fraction above 0, at most 1."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: use a number above 0, at most 1, such as 0.4")
    return value


def device_name(text: str) -> str:
    """Argument type: the name of a device."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no device: use auto, cuda, cuda:0, mps or cpu")
    return text


# ------------------------------------------------------------------------------------------- commands and options


def add_command(commands: Any, name: str, run: Any, text: str, model: bool = False, json: bool = True) -> Any:
    """Add a command. ``model`` adds ``--model`` and ``--device``, and ``--json`` too unless ``json`` is False."""
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
    """Add ``--json``."""
    command.add_argument("--json", action="store_true", help="print the result as one JSON object on the last line")


def add_recipe(command: argparse.ArgumentParser, recipe: str, overrides: str) -> None:
    """Add ``RECIPE`` and ``key=value ...`` with their help texts."""
    command.add_argument("recipe", metavar="RECIPE", help=recipe)
    command.add_argument("overrides", nargs="*", metavar="key=value", help=overrides)


def add_drawing_options(command: argparse.ArgumentParser, n: int | None = None, seed: int = 0) -> None:
    """Add the decoder's options. ``n`` is the default of ``--n``; None leaves that option out."""
    if n is not None:
        command.add_argument("--n", type=at_least(1), default=n, help=f"pictures of each prompt (default: {n})")
    command.add_argument("--steps", type=at_least(1), help="denoising steps (default: the model's)")
    command.add_argument("--guidance-scale", type=float, help="1 turns guidance off (default: the model's)")
    command.add_argument("--seed", type=at_least(0), default=seed, help=f"of the noise (default: {seed})")


def add_memory_options(command: argparse.ArgumentParser) -> None:
    """Add ``--offload`` and ``--int8``."""
    add_int8(command)
    text = "keep LLM and decoder in the host's memory in turns: for accelerators that hold one of them only"
    command.add_argument("--offload", action="store_true", help=text)


def add_int8(command: argparse.ArgumentParser) -> None:
    """Add ``--int8``."""
    text = "the LLM's matrices in eight bits, on a CPU: faster for LLMs of some 100 M parameters and more"
    command.add_argument("--int8", action="store_true", help=text)


# --------------------------------------------------------------------------------------------- inside the commands


def check_out(out: Path) -> None:
    """Refuse a path that cannot take a picture, before any work is done."""
    if out.is_dir():
        return
    if out.suffix and out.suffix.lower() not in PICTURES:
        raise OutputError(f"cannot write a picture to {out}: name a folder or a file ending in {', '.join(PICTURES)}")
    folder = out.parent if out.suffix else out
    if not folder.is_dir():
        raise OutputError(f"output folder {folder} does not exist: make it first with `mkdir -p {folder}`")


def quiet() -> None:
    """Turn off transformers' progress bars, and PyTorch's warning about checkpoints of one process."""
    import warnings

    from transformers.utils import logging

    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process is what was asked for


def model_folder(args: argparse.Namespace) -> Path:
    """The folder that ``--model`` names; by default the model in the package."""
    from open_pisces.files import WEIGHTS

    return Path(args.model or WEIGHTS)


def load_generator(args: argparse.Namespace) -> Generator:
    """The model that ``--model`` names, on ``--device``."""
    from open_pisces.generate.generator import Generator

    quiet()
    return Generator.from_pretrained(
        model_folder(args), args.device, getattr(args, "offload", False), getattr(args, "int8", False)
    )


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error for each stage of some work; nothing where nobody looks."""
    import rich.progress
    from rich.console import Console

    console = Console(stderr=True)
    with rich.progress.Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, of: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=of)
            bars.update(tasks[stage], completed=done)

        yield show


def say(args: argparse.Namespace, text: str) -> None:
    """Print a line for people; nothing with ``--json``."""
    if not args.json:
        print(text)


def say_counts(args: argparse.Namespace, result: dict[str, Any]) -> Result:
    """Print counts for people, and return them as the command's result."""
    if not args.json:
        from open_pisces.cli.tables import print_counts

        print_counts(result)
    return result
