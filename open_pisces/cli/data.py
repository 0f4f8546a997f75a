"""``pisces data``: the commands that build, import, index, curate, look at and encode datasets."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from open_pisces.cli.caption import add_caption, add_workers, workers_of
from open_pisces.cli.options import (
    OutputError,
    Result,
    add_command,
    add_json,
    add_recipe,
    at_least,
    check_out,
    device_name,
    quiet,
    say_counts,
    share,
)
from open_pisces.cli.replay import add_replay
from open_pisces.datasets.formats import FORMATS

TEMPLATES = sorted(path.stem for path in (Path(__file__).parent.parent / "data" / "templates").glob("*.yaml"))
"""The chat templates, by their files: `config.Template` would load pydantic for ``--help``."""


def build_artwork(args: argparse.Namespace) -> Result:
    """Fetch and render the emoji artwork."""
    from open_pisces.datasets.scenes.artwork import build

    print(build(_out(args.out, "artwork")))
    return None


def build_scenes(args: argparse.Namespace) -> Result:
    """Compose scenes with exact ground truth from the artwork."""
    from open_pisces.datasets.scenes.composer import build

    out = _out(args.out, f"scenes/{args.split}")
    how = {"pairs": args.pairs, "many": args.many_words, "plain": args.plain, "shapes": args.shapes}
    print(build(out, args.count, args.seed, args.split, **how))
    return None


def look(args: argparse.Namespace) -> Result:
    """Write a labelled sheet of a dataset's samples."""
    from open_pisces.datasets.look import look as write_sheet

    check_out(args.out)
    file = args.out / "look.png" if args.out.is_dir() else args.out
    print(write_sheet(args.path, file, args.n, args.columns))
    return None


def _out(path: str | None, name: str = "") -> Path:
    """The folder to write a dataset to: ``path`` as it stands, or else ``name`` in the data folder.

    Raises:
        OutputError: for an address such as s3://, because shards are renamed into place.
    """
    if path is None:
        from open_pisces.data.shards import data_path

        return data_path(name)
    if "://" in path:
        raise OutputError(f"{path}: datasets are written to a folder; copy it to its address afterwards")
    return Path(path)


def import_(args: argparse.Namespace) -> Result:
    """Write a dataset of others as our shards."""
    from inspect import getfullargspec

    from open_pisces.datasets.importing import import_dataset

    # An option that is not given is left out, so the defaults stand in one place: `import_dataset`.
    given = {name: value for name, value in vars(args).items() if value is not None}
    options = {name: given[name] for name in getfullargspec(import_dataset).kwonlyargs if name in given}
    return say_counts(args, import_dataset(args.format, args.source, _out(args.out), **options))


def index(args: argparse.Namespace) -> Result:
    """Index tar shards, so that they are read in place."""
    from open_pisces.data.shards import data_path
    from open_pisces.datasets.indexing import index_folder

    names = ("short", "detailed", "image")
    fields = {name: getattr(args, name) for name in names if getattr(args, name)}
    folder = args.folder if Path(args.folder).is_dir() else data_path(args.folder)
    return say_counts(args, {"folder": str(folder), **index_folder(folder, fields or None)})


def filter_(args: argparse.Namespace) -> Result:
    """Write the samples of a dataset that pass rules."""
    from open_pisces.datasets.curate import filter_dataset

    return say_counts(args, filter_dataset(args.source, _out(args.out), args.rule))


def stats(args: argparse.Namespace) -> Result:
    """Count what a dataset holds."""
    from open_pisces.datasets import stats as figures

    if args.png:
        check_out(args.png)
    tokenizer = None
    if args.tokenizer:
        from open_pisces.data.tokenizer import load_tokenizer

        quiet()
        tokenizer = load_tokenizer(args.tokenizer, args.template)
    png = args.png / "stats.png" if args.png and args.png.is_dir() else args.png
    found = figures.stats(args.path, tokenizer, png, args.limit)
    if not args.json:
        print(figures.describe(found))
    return found


def encode(args: argparse.Namespace) -> Result:
    """Write the feature stores of a recipe's frozen encoders."""
    from open_pisces.factory.encode import encode as write
    from open_pisces.recipe import load_config

    config = load_config(args.recipe, args.overrides)
    quiet()
    return say_counts(args, {"stores": write(config, args.batch_size, args.device, workers_of(args))})


# ------------------------------------------------------------------------------------------------- the arguments


def add_data(command: argparse.ArgumentParser) -> None:
    """``pisces data build | import | index | filter | stats | look | caption | encode``."""
    commands = command.add_subparsers(required=True, metavar="COMMAND")
    builds = add_command(commands, "build", None, "build a dataset").add_subparsers(required=True, metavar="DATASET")
    where = "the folder to write, as it stands; by default {} under $PISCES_DATA, which is ./data"

    build = add_command(builds, "artwork", build_artwork, "emoji artwork of six free styles, from npm packages")
    build.add_argument("--out", metavar="DIR", help=where.format("artwork"))

    build = add_command(builds, "scenes", build_scenes, "scenes composed from the artwork, with exact ground truth")
    build.add_argument("--out", metavar="DIR", help=where.format("scenes/SPLIT"))
    build.add_argument("--split", choices=("train", "pairs", "style"), default="train", help="pairs, style: held out")
    build.add_argument("--count", type=at_least(1), default=40_000, help="scenes (default: 40000)")
    build.add_argument("--seed", type=at_least(0), default=0)
    build.add_argument("--pairs", type=share, help="share of scenes with two different things (default: 0.3)")
    text = "for training: ask about every thing of a scene, and caption it in other words too"
    build.add_argument("--many-words", action="store_true", help=text)
    text = "the first lesson: scenes of the default style on white only"
    build.add_argument("--plain", action="store_true", help=text)
    text = "share of colored hearts, circles and squares among the things (default: 0.2)"
    build.add_argument("--shapes", type=share, default=0.2, help=text)

    view = add_command(commands, "look", look, "write a labelled sheet of a dataset's samples")
    view.add_argument("path", metavar="PATH", help="a dataset folder such as scenes/train, or fixture")
    view.add_argument("--out", type=Path, default=Path("look.png"))
    view.add_argument("--n", type=at_least(1), default=40, help="samples, spread evenly over the dataset (default: 40)")
    view.add_argument("--columns", type=at_least(1), default=8)

    _add_import(commands)
    _add_curation(commands)

    add_caption(commands)
    add_replay(commands)
    text = "compute once what a recipe's frozen encoders make of its pictures (for data.features)"
    cache = add_command(commands, "encode", encode, text)
    add_recipe(cache, "tiny/stage1, or a YAML file", "settings, such as data.features=float32")
    cache.add_argument("--batch-size", type=at_least(1), default=64, help="pictures encoded together (default: 64)")
    cache.add_argument("--device", type=device_name, default="auto", help="cuda, mps, cpu or auto (default)")
    add_workers(cache)
    add_json(cache)


def _add_import(commands: Any) -> None:
    """``pisces data import`` and ``pisces data index``."""
    take = add_command(commands, "import", import_, "write a dataset of others as shards of ours")
    text = "; ".join(f"{name}: {format.about}" for name, format in FORMATS.items())
    take.add_argument("format", metavar="FORMAT", help=text)
    take.add_argument("source", metavar="SOURCE", help="a path, an address such as s3://bucket/set, or a hub name")
    take.add_argument("out", metavar="OUT", help="the folder to write, as it stands")
    take.add_argument("--caption-field", help="where the short text is (default: the first usual name)")
    take.add_argument("--detailed-field", help="where the long text is")
    take.add_argument("--image-field", help="where the picture, or its name, is")
    take.add_argument("--images", metavar="DIR", help="folder or address of pictures that records only name")
    take.add_argument("--split", help="of a Hugging Face dataset (default: train)")
    take.add_argument("--limit", type=at_least(1), help="read no more records than this")
    take.add_argument("--max-bad", type=float, help="share of records that may be unusable (default: 0.01)")
    take.add_argument("--min-side", type=at_least(1), help="least side of a picture in pixels (default: 8)")
    take.add_argument("--max-aspect", type=float, help="largest ratio of its sides (default: 20)")
    take.add_argument("--licence", help="kept in the dataset's licence table")
    add_json(take)

    text = "write an index beside tar files (WebDataset, img2dataset), which are then read in place"
    table = add_command(commands, "index", index, text)
    table.add_argument("folder", metavar="FOLDER")
    table.add_argument("--short", metavar="FIELD", help="field of the JSON with the short caption; txt: the text file")
    table.add_argument("--detailed", metavar="FIELD", help="field of the JSON with the detailed caption")
    table.add_argument("--image", metavar="MEMBER", help="ending of the picture, such as depth.png")
    add_json(table)


def _add_curation(commands: Any) -> None:
    """``pisces data filter`` and ``pisces data stats``."""
    sieve = add_command(commands, "filter", filter_, "write the samples that pass rules, and count what each drops")
    sieve.add_argument("source", metavar="SOURCE", help="a dataset folder, or its name under $PISCES_DATA")
    sieve.add_argument("out", metavar="OUT", help="the folder to write, as it stands")
    rules = (
        "size=64, aspect=3, caption_length=3:200, repetition=0.3, language=en, duplicate=4, missing_image, licence=MIT"
    )
    sieve.add_argument("--rule", action="append", required=True, help=f"one rule, in the order of use: {rules}")
    add_json(sieve)

    figures = add_command(commands, "stats", stats, "samples, tokens, lengths, sizes, tasks, copies and licences")
    figures.add_argument("path", metavar="PATH", help="a dataset folder such as scenes/train, or fixture/train")
    figures.add_argument("--png", type=Path, help="also draw histograms to this file")
    figures.add_argument("--tokenizer", metavar="DIR", help="count its tokens; a tokenizer folder or hub name")
    figures.add_argument("--template", choices=TEMPLATES, default="tiny", help="whose special tokens it has")
    figures.add_argument("--limit", type=at_least(1), help="read only so many samples, spread evenly")
    add_json(figures)
