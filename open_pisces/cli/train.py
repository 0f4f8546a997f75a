"""``pisces train`` and ``pisces plan``."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_pisces.cli.options import Result, add_command, add_json, add_recipe, at_least, quiet, share

if TYPE_CHECKING:
    from open_pisces.config import RunConfig


def train(args: argparse.Namespace) -> Result:
    """Run one training, or all trainings of a scale that are not done yet, in one process or in several."""
    from open_pisces.recipe import load_config, trainings
    from open_pisces.settings import ConfigError

    whole_scale = [] if Path(args.recipe).is_file() else trainings(args.recipe)
    if whole_scale and any(override.startswith(("out=", "name=")) for override in args.overrides):
        raise ConfigError(f"{args.recipe} is {len(whole_scale)} trainings, which need a folder each: set out= for one")
    # All recipes are read before the first training starts, so a wrong setting costs no hours.
    configs = _read_all(whole_scale or [args.recipe], args.overrides)

    if args.nproc > 1:
        from open_pisces.train.launch import launch

        code = launch(["train", args.recipe, *args.overrides], args.nproc)
        if code:
            raise SystemExit(code)
        return None

    from open_pisces.factory.encode import encode
    from open_pisces.train.loop import is_done
    from open_pisces.train.loop import train as run

    quiet()
    for name, read in configs.items():
        config = read or load_config(name, args.overrides)
        if whole_scale and is_done(config):
            _say_once(f"{name}: done, in {config.folder}")
            continue
        if whole_scale and config.data.features:
            encode(config)  # what is there is kept; several processes take turns
        _say_once(f"{name}: training, in {config.folder}")
        folder = run(config)
        if not is_done(config):
            _say_once(f"{name}: stopped early; the same command goes on from {folder}")
            break
    return None


def _read_all(names: list[str], overrides: list[str]) -> dict[str, RunConfig | None]:
    """The trainings' settings; None for one that takes those of a folder which an earlier one has yet to write."""
    from open_pisces.recipe import StartMissingError, load_config

    configs: dict[str, RunConfig | None] = {}
    for name in names:
        try:
            configs[name] = load_config(name, overrides)
        except StartMissingError as error:
            if error.start not in [Path("runs") / earlier / "model" for earlier in configs]:
                raise
            configs[name] = None
    return configs


def _say_once(text: str) -> None:
    """Print on rank 0 only; torchrun sets ``RANK``."""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def plan(args: argparse.Namespace) -> Result:
    """Print what a training needs, before anything is fetched; an error if it does not fit."""
    from open_pisces.plan.layout import PlanError
    from open_pisces.plan.plan import plan as make
    from open_pisces.plan.plan import refusal
    from open_pisces.recipe import load_config

    quiet()
    found = make(load_config(args.recipe, args.overrides), args.gpus, args.gpu, args.utilisation, args.picture_kb)
    if args.json:  # printed here, not by `main`, because a plan that does not fit is printed and then refused
        print(json.dumps(found))
    else:
        from open_pisces.cli.tables import print_plan

        print_plan(found)
    if not found["fits"]:
        raise PlanError(refusal(found))
    return None


def add_train(commands: Any) -> None:
    """``pisces train | plan``."""
    command = add_command(commands, "train", train, "run a training, or all of a scale's that are not done")
    add_recipe(command, "tiny/stage1, a YAML file, or a scale: nano, tiny", "settings, such as train.lr=3e-4")
    command.add_argument("--nproc", type=at_least(1), default=1, help="processes on this machine that train together")
    command.set_defaults(large_pages=True)

    command = add_command(commands, "plan", plan, "what a training needs: memory, time, disk; nothing is fetched")
    add_recipe(command, "8b/stage1, or a YAML file", "settings, such as data.rows=1")
    command.add_argument("--gpus", type=at_least(1), required=True, help="how many, one process each")
    command.add_argument("--gpu", default="h100", help="what kind: h100 (default), h200, b200, a100-80 ...")
    text = "share of the peak that is reached (default: 0.4)"
    command.add_argument("--utilisation", type=share, default=0.4, metavar="SHARE", help=text)
    text = "assumed size of a picture's file (default: 100)"
    command.add_argument("--picture-kb", type=at_least(1), default=100, metavar="KB", help=text)
    add_json(command)
