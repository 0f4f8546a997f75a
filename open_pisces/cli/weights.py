"""``pisces weights``: published weights as parts of a model folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from open_pisces.cli.options import Result, add_command, add_json, quiet
from open_pisces.errors import PiscesError


class LicenceError(PiscesError):
    """Weights whose licence was not accepted."""


def families(args: argparse.Namespace) -> Result:
    """List what can be imported."""
    from open_pisces.model.importers.families import families as known

    rows = {name: {"part": f.part, "example": f.example, "licence": f.licence} for name, f in known().items()}
    if not args.json:
        for name, row in rows.items():
            print(f"{name:18} {row['part']:14} {row['example']}\n{'':18} {row['licence']}")
    return rows


def import_(args: argparse.Namespace) -> Result:
    """Import a published model as a part."""
    import yaml

    from open_pisces.factory.importing import SETTINGS, find_family, import_weights
    from open_pisces.recipe import override_values

    quiet()
    family = find_family(args.family)
    overrides = override_values(args.overrides)
    if not args.accept_licence:
        _ask(family.licence, args.source)
    config = import_weights(family, args.source, args.out, overrides)
    block = {family.part: getattr(config, family.part).model_dump(mode="json", exclude_defaults=True)}
    if not args.json:
        print(yaml.safe_dump(block, sort_keys=False).rstrip())
        print(f"written to {args.out}; a recipe that trains on it begins with `extends: {args.out / SETTINGS}`")
    return {"folder": str(args.out), **block}


def _ask(licence: str, source: str) -> None:
    """Show the licence; on a terminal ask, elsewhere refuse.

    Raises:
        LicenceError: if it is not accepted.
    """
    print(f"The licence of {source}, as far as known here (its own page holds): {licence}", file=sys.stderr)
    if sys.stdin.isatty() and input("Accept it? [y/N] ").strip().lower() in ("y", "yes"):
        return
    raise LicenceError(f"{source}: its licence was not accepted: read it, and add --accept-licence")


def add_weights(commands: Any) -> None:
    """``pisces weights list | import``."""
    group = add_command(commands, "weights", None, "bring published weights into a model folder")
    verbs = group.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = add_command(verbs, "list", families, "the families that can be imported, and their licences")
    add_json(command)

    command = add_command(verbs, "import", import_, "check and convert a published model, as one part")
    command.add_argument("family", metavar="FAMILY", help="one of `pisces weights list`")
    command.add_argument("source", metavar="SOURCE", help="a folder or file that you downloaded, or a hub name")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as generation.pool=2")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="the model folder to write or add to")
    command.add_argument("--accept-licence", action="store_true", help="you have read its licence and accept it")
    add_json(command)
