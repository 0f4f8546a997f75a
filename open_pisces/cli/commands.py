"""The command line: ``pisces train | plan | generate | ask | reconstruct | info | data | eval | bench | ...``.

Only argparse is imported here; PyTorch and the rest load inside the command that needs them, so that ``--help``
answers at once. With ``--json`` a command's result is one JSON object on the last line of standard output. An
expected error is one line on standard error and exit code 2, with nothing half-written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from open_pisces.cli.data import add_data
from open_pisces.cli.evaluate import add_eval
from open_pisces.cli.options import Parser, Result, add_command, add_json, at_least, check_out, quiet, share
from open_pisces.errors import PiscesError

if TYPE_CHECKING:
    from PIL.Image import Image

    from open_pisces.generate.generator import Generator

BENCHES = (
    *("loader", "packing", "feature_cache", "supervised_logits", "stage_step", "mixed_batch", "compile"),
    *("trainer_overhead", "async_save", "eval_drawing", "eval_batching"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, or 2 after an expected error. Programming errors keep their traceback.
    """
    args = build_parser().parse_args(argv)
    try:
        result = args.run(args)
    except (PiscesError, OSError) as error:
        if isinstance(error, OSError) and not error.filename:
            raise  # not about a file: a fault of the program
        print(f"pisces: {'; '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pisces: interrupted", file=sys.stderr)
        return 130
    if result is not None and getattr(args, "json", False):
        print(json.dumps(result))
    return 0


# ------------------------------------------------------------------------------------------------- the commands


def train(args: argparse.Namespace) -> Result:
    """Run one training, or all trainings of a scale that are not done yet, in one process or in several."""
    from open_pisces.config import ConfigError, load_config, trainings

    whole_scale = [] if Path(args.recipe).is_file() else trainings(args.recipe)
    if whole_scale and any(o.startswith(("out=", "name=")) for o in args.overrides):
        raise ConfigError(f"{args.recipe} is {len(whole_scale)} trainings, which need a folder each: set out= for one")
    configs = {name: load_config(name, args.overrides) for name in whole_scale or [args.recipe]}

    if args.nproc > 1:
        from open_pisces.train.launch import launch

        code = launch(["train", args.recipe, *args.overrides], args.nproc)
        if code:
            raise SystemExit(code)
        return None

    from open_pisces.train.loop import is_done
    from open_pisces.train.loop import train as run

    quiet()
    say = print if os.environ.get("RANK", "0") == "0" else lambda text: None  # torchrun's processes say it once
    for name, config in configs.items():
        if whole_scale and is_done(config):
            say(f"{name}: done, in {config.folder}")
            continue
        say(f"{name}: training, in {config.folder}")
        folder = run(config)
        if not is_done(config):
            say(f"{name}: stopped early; the same command goes on from {folder}")
            break
    return None


def plan(args: argparse.Namespace) -> Result:
    """Say what a training needs, before anything is fetched; an error if it does not fit."""
    from open_pisces.config import load_config
    from open_pisces.plan.layout import PlanError
    from open_pisces.plan.plan import plan as make
    from open_pisces.plan.plan import refusal

    quiet()
    found = make(load_config(args.recipe, args.overrides), args.gpus, args.gpu, args.utilisation, args.picture_kb)
    if args.json:
        print(json.dumps(found))
    else:
        from open_pisces.cli.tables import print_plan

        print_plan(found)
    if not found["fits"]:
        raise PlanError(refusal(found))
    return None


def generate(args: argparse.Namespace) -> Result:
    """Draw pictures from prompts."""
    check_out(args.out)
    generator = _generator(args)
    drawn = generator.image(args.prompts, args.n, args.steps, args.guidance_scale, args.seed)
    pictures = [picture for row in drawn for picture in row]
    prompts = [prompt for prompt in args.prompts for _ in range(args.n)]
    if args.out.is_dir():
        files = [args.out / name for name in _names(args.prompts, args.n)]
        _save(dict(zip(files, pictures, strict=True)))
    else:
        files = [args.out] * len(pictures)
        _save({args.out: pictures[0] if len(pictures) == 1 else _sheet(pictures, prompts, args.n)})
    _say(args, "\n".join(f"{prompt}: {file}" for prompt, file in zip(prompts, files, strict=True)))
    asked = {name: getattr(args, name) for name in ("n", "steps", "guidance_scale", "seed")}
    return {"pictures": [{"prompt": p, "file": str(f)} for p, f in zip(prompts, files, strict=True)], **asked}


def ask(args: argparse.Namespace) -> Result:
    """Answer a question about one or more images."""
    from open_pisces.data.images import open_image

    images = [open_image(path) for path in args.images]
    answer = _generator(args).text([images], [args.question], max_new_tokens=args.max_new_tokens)[0]
    _say(args, answer)
    return {"images": args.images, "question": args.question, "answer": answer}


def reconstruct(args: argparse.Namespace) -> Result:
    """Send a picture's true generation vectors through the decoder."""
    from open_pisces.data.images import open_image

    check_out(args.out)
    image = open_image(args.picture)
    file = args.out / f"{Path(args.picture).stem}-reconstructed.png" if args.out.is_dir() else args.out
    (rebuilt,) = _generator(args).reconstruct([image], args.steps, args.guidance_scale, args.seed)
    _save({file: rebuilt})
    _say(args, str(file))
    return {"picture": args.picture, "file": str(file)}


def info(args: argparse.Namespace) -> Result:
    """Say what a model folder or a recipe's model consists of."""
    from open_pisces.config import ConfigError, load_config
    from open_pisces.model import folder, summary

    quiet()
    what = args.what or str(folder.WEIGHTS)
    if args.what is None or Path(what).is_dir():
        described = summary.describe_folder(what)
        if args.verify:
            described["verified"] = f"{folder.verify(what)} files equal the checksums recorded in config.json"
        if set(folder.PARTS) <= set(described["parts"]):
            described["null_distance"] = _generator(argparse.Namespace(model=what, device="auto")).null_distance()
    else:
        if args.verify:
            raise ConfigError(f"{what}: --verify compares the files of a model folder, and this is a recipe")
        described = summary.describe(load_config(what).model)
    if not args.json:
        from open_pisces.cli.tables import print_info

        print_info(what, described)
    return described


def export(args: argparse.Namespace) -> Result:
    """Write a model folder anew in another dtype, for shipping."""
    import torch

    from open_pisces.model.folder import convert

    quiet()
    convert(args.model, args.out, {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype])
    print(args.out)
    return None


def bench(args: argparse.Namespace) -> Result:
    """Measure one of the speed claims."""
    from importlib import import_module

    quiet()
    result = import_module(f"open_pisces.bench.{args.name}").run(args.pairs)
    if not args.json:
        from open_pisces.cli.tables import print_counts

        print_counts(result)
    return result


def demo(args: argparse.Namespace) -> Result:
    """Draw a sheet, caption it, talk about two scenes."""
    from open_pisces.cli.demo import run_demo

    check_out(args.out)
    run_demo(_generator(args), args.out / "demo.png" if args.out.is_dir() else args.out)
    return None


# ------------------------------------------------------------------------------------------------ what they share


def _generator(args: argparse.Namespace) -> Generator:
    """The model that the command names, by default the one in the package."""
    from open_pisces.generate.generator import Generator
    from open_pisces.model.folder import WEIGHTS

    quiet()
    return Generator.from_pretrained(args.model or WEIGHTS, device=args.device)


def _say(args: argparse.Namespace, text: str) -> None:
    """Print a result for people; with ``--json`` only the JSON object is printed."""
    if not args.json:
        print(text)


def _names(prompts: list[str], n: int) -> list[str]:
    """One file name for each picture, speaking and different."""
    names = []
    for i, prompt in enumerate(prompts):
        words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "picture"
        stem = words if len(prompts) == 1 else f"{i:02d}-{words}"
        names += [f"{stem}.png"] if n == 1 else [f"{stem}-{k}.png" for k in range(n)]
    return names


def _sheet(pictures: list[Image], prompts: list[str], n: int) -> Image:
    """Several pictures for one file: a row for each prompt, or a square where there is one picture of each."""
    from open_pisces.sheets import contact_sheet

    return contact_sheet(pictures, prompts, columns=n if n > 1 else max(1, round(len(pictures) ** 0.5)))


def _save(pictures: dict[Path, Image]) -> None:
    """Write all pictures or none: into hidden files beside their places, renamed when all are complete."""
    waiting = {file: file.with_name(f".{os.getpid()}-{file.name}") for file in pictures}
    try:
        for file, picture in pictures.items():
            picture.save(waiting[file])
        for file, hidden in waiting.items():
            os.replace(hidden, file)
    finally:
        for hidden in waiting.values():
            hidden.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------- the arguments


def build_parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    parser = Parser(prog="pisces", description="One model that answers questions about images and makes images.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = add_command(commands, "train", train, "run a training, or all of a scale's that are not done")
    command.add_argument("recipe", metavar="RECIPE", help="tiny/stage1, a YAML file, or a scale: nano, tiny")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as train.lr=3e-4")
    command.add_argument("--nproc", type=at_least(1), default=1, help="processes on this machine that train together")

    command = add_command(commands, "plan", plan, "what a training needs: memory, time, disk; nothing is fetched")
    command.add_argument("recipe", metavar="RECIPE", help="8b/stage1, or a YAML file")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="settings, such as data.rows=1")
    command.add_argument("--gpus", type=at_least(1), required=True, help="how many, one process each")
    command.add_argument("--gpu", default="h100", help="what kind: h100 (default), h200, b200, a100-80 ...")
    text = "share of the peak that is reached (default: 0.4)"
    command.add_argument("--utilisation", type=share, default=0.4, metavar="SHARE", help=text)
    text = "assumed size of a picture's file (default: 100)"
    command.add_argument("--picture-kb", type=at_least(1), default=100, metavar="KB", help=text)
    add_json(command)

    command = add_command(commands, "generate", generate, "draw pictures from prompts", model=True)
    command.add_argument("prompts", nargs="+", metavar="PROMPT")
    _add_drawing(command)
    command.add_argument("--n", type=at_least(1), default=1, help="pictures of each prompt (default: 1)")

    command = add_command(commands, "ask", ask, "answer a question about images", model=True)
    command.add_argument("images", nargs="+", metavar="IMAGE")
    command.add_argument("question", metavar="QUESTION")
    command.add_argument("--max-new-tokens", type=at_least(1), default=64, help="length of the answer (default: 64)")

    text = "rebuild a picture from its true generation vectors: what the decoder can do at best"
    command = add_command(commands, "reconstruct", reconstruct, text, model=True)
    command.add_argument("picture", metavar="PICTURE")
    _add_drawing(command)

    command = add_command(commands, "info", info, "parts, parameters, sizes, licences, training record")
    command.add_argument(
        "what", nargs="?", metavar="MODEL|RECIPE", help="a model folder, or a recipe such as 8b/stage1"
    )
    command.add_argument("--verify", action="store_true", help="compare all files with their recorded checksums")
    add_json(command)

    command = add_command(commands, "export", export, "write a model folder anew in another dtype, adapter merged")
    command.add_argument("model", metavar="DIR", help="a model folder, such as runs/tiny/stage3/model")
    command.add_argument("out", metavar="OUT", help="the folder to write; one that is there is replaced")
    command.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16")

    add_data(add_command(commands, "data", None, "build datasets and look at them"))
    add_eval(add_command(commands, "eval", None, "measure a model"))

    command = add_command(commands, "bench", bench, "measure a speed claim: two ways side by side")
    command.add_argument("name", choices=BENCHES, metavar="NAME", help=", ".join(BENCHES))
    command.add_argument("--pairs", type=at_least(2), default=15, help="pairs of runs (default: 15)")
    add_json(command)

    command = add_command(
        commands, "demo", demo, "draw a sheet, caption it, talk about two scenes", model=True, json=False
    )
    command.add_argument("--out", type=Path, default=Path("demo.png"), help="the sheet (default: demo.png)")
    return parser


def _add_drawing(command: argparse.ArgumentParser) -> None:
    """Options of the commands that write pictures with the decoder."""
    command.add_argument(
        "--out", type=Path, default=Path("."), help="a picture file or an existing folder (default: .)"
    )
    command.add_argument("--steps", type=at_least(1), help="denoising steps (default: the model's)")
    command.add_argument("--guidance-scale", type=float, help="1 turns guidance off (default: the model's)")
    command.add_argument("--seed", type=at_least(0), default=0)
