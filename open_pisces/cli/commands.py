"""The command line: ``pisces train | plan | generate | ask | reconstruct | chat | serve | info | data | ...``.

Only argparse is imported here; PyTorch and the rest load inside the command that needs them, so that ``--help``
answers at once. With ``--json`` a command's result is one JSON object on the last line of standard output. An
expected error is one line on standard error and exit code 2, with nothing half-written.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence

from open_pisces.cli.bench import add_bench
from open_pisces.cli.chat import add_chat
from open_pisces.cli.data import add_data
from open_pisces.cli.evaluate import add_eval
from open_pisces.cli.generate import add_demo, add_generate
from open_pisces.cli.lab import add_lab
from open_pisces.cli.large_pages import restart_with_large_pages
from open_pisces.cli.model import add_model
from open_pisces.cli.options import Parser, add_command
from open_pisces.cli.serve import add_serve
from open_pisces.cli.train import add_train
from open_pisces.cli.weights import add_weights
from open_pisces.errors import PiscesError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, 2 after an expected error, 130 after Ctrl-C. Programming errors keep their traceback.
    """
    args = build_parser().parse_args(argv)
    if argv is None and getattr(args, "large_pages", False):
        restart_with_large_pages()
    # diffusers imports it where it is installed, and on a CPU it says then that a faster kernel is missing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        result = args.run(args)
    except (PiscesError, OSError) as error:
        if isinstance(error, OSError) and not error.filename:
            raise  # no file behind it: a fault of the program, not of the user
        print(f"pisces: {'; '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pisces: interrupted", file=sys.stderr)
        return 130
    if result is not None and getattr(args, "json", False):
        print(json.dumps(result))
    return 0


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options, one ``add_*`` for each file of this folder; ``--help`` lists them in this order.

    Each command's function is stored as ``args.run``.
    """
    parser = Parser(prog="pisces", description="One model that answers questions about images and makes images.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add_train(commands)
    add_generate(commands)
    add_chat(commands)
    add_serve(commands)
    add_model(commands)
    add_weights(commands)
    add_data(add_command(commands, "data", None, "build datasets and look at them"))
    add_eval(add_command(commands, "eval", None, "measure a model"))
    add_lab(commands)
    add_bench(commands)
    add_demo(commands)
    return parser
