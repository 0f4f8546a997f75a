"""``pisces info`` and ``pisces export``: model folders."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from open_pisces.cli.options import Result, add_command, add_json, quiet


def info(args: argparse.Namespace) -> Result:
    """Print what a model folder or a recipe's model consists of."""
    from open_pisces.generate.generator import Generator
    from open_pisces.model import folder, summary
    from open_pisces.recipe import load_config
    from open_pisces.settings import ConfigError

    quiet()
    what = args.what or str(folder.WEIGHTS)
    if args.what is None or Path(what).is_dir():
        described = summary.describe_folder(what)
        if args.verify:
            described["verified"] = f"{folder.verify(what)} files equal the checksums recorded in config.json"
        if set(folder.PARTS) <= set(described["parts"]):  # a folder of one training may hold an encoder alone
            described["null_distance"] = Generator.from_pretrained(what).null_distance()
    else:
        if args.verify:
            raise ConfigError(f"{what}: --verify compares the files of a model folder, and this is a recipe")
        described = summary.describe(load_config(what).model)
    if args.words:
        known = _known_words(what)
        described["known_words"] = known if args.json else ", ".join(known)
    if not args.json:
        from open_pisces.cli.tables import print_info

        print_info(what, described)
    return described


def _known_words(what: str) -> list[str]:
    """The words of a model's training texts.

    Raises:
        ConfigError: for a recipe, or a model whose tokenizer was not trained on them.
    """
    from open_pisces.data.tokenizer import load_tokenizer
    from open_pisces.generate.words import known_words
    from open_pisces.model.folder import read_config
    from open_pisces.settings import ConfigError

    if not (Path(what) / "tokenizer").is_dir():
        raise ConfigError(f"{what}: --words lists those of a model folder with a tokenizer, and it has none")
    words = known_words(load_tokenizer(Path(what) / "tokenizer", read_config(what).template))
    if not words:
        raise ConfigError(f"{what}: its tokenizer keeps no list of words: it was not trained on the model's own texts")
    return list(words)


def export(args: argparse.Namespace) -> Result:
    """Write a model folder anew in another dtype, for shipping."""
    import torch

    from open_pisces.model.folder import convert

    quiet()
    convert(args.model, args.out, {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype])
    print(args.out)
    return None


def add_model(commands: Any) -> None:
    """``pisces info | export``."""
    command = add_command(commands, "info", info, "parts, parameters, sizes, licences, training record")
    text = "a model folder, or a recipe such as 8b/stage1"
    command.add_argument("what", nargs="?", metavar="MODEL|RECIPE", help=text)
    command.add_argument("--verify", action="store_true", help="compare all files with their recorded checksums")
    command.add_argument("--words", action="store_true", help="list the words that a model trained from scratch knows")
    add_json(command)

    command = add_command(commands, "export", export, "write a model folder anew in another dtype, adapter merged")
    command.add_argument("model", metavar="DIR", help="a model folder, such as runs/tiny/stage3/model")
    command.add_argument("out", metavar="OUT", help="the folder to write; one that is there is replaced")
    command.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")
