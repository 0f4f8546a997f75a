"""``pisces data replay``."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from open_pisces.cli.options import Result, add_command, at_least, model_folder, progress_bar, quiet, say_counts


def replay(args: argparse.Namespace) -> Result:
    """Let a model's LLM write conversations to be replayed."""
    import torch

    from open_pisces.eval.run import model_hash
    from open_pisces.factory.replay import Writing, write_replay
    from open_pisces.generate.language import load_language

    how = Writing(args.request, args.answer, args.temperature, batch_size=args.batch_size, seed=args.seed)
    folder = model_folder(args)
    quiet()
    generator = load_language(folder, args.device, getattr(torch, args.dtype) if args.dtype else None)
    with progress_bar() as bar:
        writer = f"{model_hash(folder)} {args.dtype or 'auto'}"
        found = write_replay(generator, writer, args.out, args.count, how, partial(bar, "conversations"))
    return say_counts(args, found)


def add_replay(commands: Any) -> None:
    """Its arguments."""
    text = (
        "let a chat LLM write its own text before it learns pictures: mixed in as `conversation` it keeps its language"
    )
    command = add_command(commands, "replay", replay, text, model=True)
    command.add_argument("out", metavar="OUT", type=Path, help="the folder to write; an unfinished one is gone on with")
    command.add_argument("--count", type=at_least(1), default=2000, help="conversations (default: 2000)")
    command.add_argument("--request", type=at_least(1), default=64, help="most tokens of a request (default: 64)")
    command.add_argument(
        "--answer",
        type=at_least(1),
        default=192,
        help="most tokens of an answer, of which whole sentences stay (default: 192)",
    )
    command.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="default: float32 on a CPU (bfloat16 is faster with AMX), bfloat16 else",
    )
    command.add_argument("--temperature", type=float, default=1.0, help="1 (default) is the LLM's own distribution")
    command.add_argument("--batch-size", type=at_least(1), default=32, help="written together (default: 32)")
    command.add_argument("--seed", type=at_least(0), default=0, help="of all draws (default: 0)")
