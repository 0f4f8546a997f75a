"""``pisces lab``: the paper's ablations in miniature."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from open_pisces.cli.options import Result, add_command, add_json, quiet, say

# Not the lab's own: that would load pydantic for ``--help``.
EXPERIMENTS = Path(__file__).parent.parent / "recipes" / "lab" / "experiments"


def experiment(args: argparse.Namespace) -> Result:
    """Do one experiment, or go on with it."""
    from open_pisces.lab.experiment import budget_of, load_experiment
    from open_pisces.lab.run import Lab

    quiet()
    loaded = load_experiment(args.experiment)
    name = Path(args.experiment).stem
    lab = Lab(name, loaded, args.budget, budget_of(loaded, args.budget), args.out)
    found = lab.run(lambda line: say(args, line))
    if not args.json:
        from open_pisces.lab.report import page

        print(page(found, "."))
        print(f"{lab.folder}/results.json")
    return {key: found[key] for key in ("name", "budget", "verdict", "comparisons", "seconds")}


def report(args: argparse.Namespace) -> Result:
    """Write the page of all experiments that were done."""
    from open_pisces.lab.report import write_report

    found = write_report(args.folders, args.out)
    say(args, str(args.out))
    return {"out": str(args.out), "experiments": found}


def add_lab(commands: Any) -> None:
    """``pisces lab NAME | report``."""
    names = sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))
    group = add_command(commands, "lab", None, "the paper's ablations in miniature").add_subparsers(
        required=True, metavar="EXPERIMENT"
    )
    for name in names:
        command = add_command(group, name, experiment, f"do the experiment {name}, or go on with it")
        command.set_defaults(experiment=name, large_pages=True)
        _add_how(command)
    command = add_command(group, "own", experiment, "do an experiment of your own, a YAML file")
    command.add_argument("experiment", metavar="FILE")
    command.set_defaults(large_pages=True)
    _add_how(command)
    command = add_command(group, "report", report, "write the page of all experiments that were done")
    command.add_argument("folders", nargs="*", type=Path, default=[Path("runs/lab")], metavar="DIR")
    command.add_argument("--out", type=Path, default=Path("lab.md"), help="the page (default: lab.md)")
    add_json(command)


def _add_how(command: argparse.ArgumentParser) -> None:
    text = "how much is done: smoke (minutes, shows nothing), cpu (two cores), or what its file has (default: cpu)"
    command.add_argument("--budget", default="cpu", help=text)
    text = "where the runs are kept (default: runs/lab)"
    command.add_argument("--out", type=Path, default=Path("runs/lab"), help=text)
    add_json(command)
