"""``pisces bench``: the speed claims."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from open_pisces.cli.options import Result, add_command, add_json, at_least, quiet, say_counts


def bench(args: argparse.Namespace) -> Result:
    """Measure one of the speed claims."""
    from importlib import import_module

    quiet()
    return say_counts(args, import_module(f"open_pisces.bench.{args.name}").run(args.pairs))


def bench_names() -> list[str]:
    """The modules of ``open_pisces/bench`` that define ``run``."""
    # Their text is read: importing them would load PyTorch for `pisces --help`.
    folder = Path(__file__).parent.parent / "bench"
    return sorted(file.stem for file in folder.glob("*.py") if "\ndef run(" in file.read_text())


def add_bench(commands: Any) -> None:
    """``pisces bench``."""
    names = bench_names()
    command = add_command(commands, "bench", bench, "measure a speed claim: two ways side by side")
    command.add_argument("name", choices=names, metavar="NAME", help=", ".join(names))
    command.add_argument("--pairs", type=at_least(2), default=15, help="pairs of runs (default: 15)")
    add_json(command)
