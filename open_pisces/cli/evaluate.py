"""The arguments of ``pisces eval``: commands that measure a model, look at what it draws, and report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from open_pisces.cli import eval_commands as run
from open_pisces.cli.options import add_command, add_drawing_options, add_json, at_least

OUT = "the run's folder (default: one under runs/eval, named after task, model and settings)"


def add_eval(command: argparse.ArgumentParser) -> None:
    """All of ``pisces eval``."""
    commands = command.add_subparsers(required=True, metavar="COMMAND")
    _add_scenes(commands)
    _add_geneval(commands)
    _add_distances(commands)
    _add_understanding(commands)
    _add_runs(commands)


def _add_scenes(commands: Any) -> None:
    """What needs nothing but the package and the artwork."""
    text = "questions about scenes, against two baselines"
    vqa = add_command(commands, "scenes", run.scenes, text, model=True)
    text = "does the decoder put things where they belong, from true vectors"
    place = add_command(commands, "placement", run.placement, text, model=True)
    place.add_argument("--sheet", type=Path, help="also write true pictures above rebuilt ones to this file")
    for one, splits, most in ((vqa, ("train", "pairs", "style"), 1000), (place, ("train", "style"), 300)):
        one.add_argument("--split", choices=splits, default="train", help="all but train are held out")
        one.add_argument("--limit", type=at_least(6), default=most, help=f"questions or pictures (default: {most})")
        text = "compose fresh scenes with this seed (default: the frozen ones)"
        one.add_argument("--seed", type=at_least(0), help=text)
        one.add_argument("--out", type=Path, help=OUT)

    text = "draw the frozen captions; two judges score them by GenEval's rules"
    draw = add_command(commands, "drawing", run.drawing, text, model=True)
    add_drawing_options(draw, 1, 0)
    draw.add_argument("--detailed", action="store_true", help="the detailed captions instead of the short ones")
    text = "draw N for each picture, the model's own answers choose (default: 1)"
    draw.add_argument("--best-of", type=at_least(1), default=1, metavar="N", help=text)
    text = "guidance on the LLM's hidden states; 1 turns it off (default: the model's)"
    draw.add_argument("--vector-guidance", type=float, help=text)
    text = "where drawing loses its quality: encoder, decoder, the LLM's vectors, captions; a PNG and a JSON"
    find = add_command(commands, "diagnose", run.diagnose, text, model=True)
    for one in (draw, find):
        one.add_argument("--split", choices=("train", "pairs"), default="train", help="pairs are held out")
        text = "captions of each of the six categories (default: 60, all)"
        one.add_argument("--per-category", type=at_least(1), default=60, metavar="N", help=text)
        one.add_argument("--out", type=Path, help=OUT)
    text = "what the scenes' judges were measured at"
    cards = add_command(commands, "judge", run.judge, text)
    add_json(cards)
    cards.add_argument("--check", action="store_true", help="measure them again; needs the artwork")
    cards.add_argument("--train", type=Path, metavar="DIR", help="train both anew into this folder (about an hour)")


def _add_geneval(commands: Any) -> None:
    """GenEval and the galleries."""
    command = add_command(commands, "geneval", run.geneval, "GenEval by its official rules", model=True)
    text = "evaluation_metadata.jsonl of GenEval's repository, or a file in its form"
    command.add_argument("--prompts", type=Path, metavar="FILE", help=text)
    text = "score these pictures, in the official layout, instead of drawing"
    command.add_argument("--images", type=Path, metavar="DIR", help=text)
    text = "mask2former (default), its folder or hub name, or judge (the scenes' concepts)"
    command.add_argument("--detector", default="mask2former", help=text)
    command.add_argument("--clip", help="folder or hub name of the CLIP that names colours (default: ViT-L/14)")
    add_drawing_options(command, 4, 42)
    command.add_argument("--out", type=Path, help=OUT)

    text = "draw fixed prompts, simple and complex, onto one sheet; compare models"
    command = add_command(commands, "gallery", run.gallery, text, model=True)
    command.add_argument("runs", nargs="*", metavar="RUN", help="galleries to put side by side")
    command.add_argument("--compare", type=Path, metavar="FILE", help="the sheet that puts them side by side")
    text = "scenes for models of the scenes' world, open for models of full size"
    command.add_argument("--prompts", default="scenes", help=text)
    add_drawing_options(command, 1, 0)
    command.add_argument("--out", type=Path, help=OUT)


def _add_distances(commands: Any) -> None:
    """Frechet distances and CLIP score."""
    text = "Frechet distance of drawings of captions from real pictures (COCO-30K protocol)"
    command = add_command(commands, "fid", run.fid, text, model=True)
    command.add_argument("--captions", type=Path, required=True, help="captions_val2014.json, or JSON lines")
    text = "folder of real pictures, or a file of their statistics"
    command.add_argument("--real", type=Path, required=True, help=text)
    command.add_argument("--limit", type=at_least(2), default=30_000, help="captions (default: 30000)")
    command.add_argument("--side", type=at_least(8), default=256, help="what pictures are cut to (default: 256)")
    add_drawing_options(command, None, 0)
    command.add_argument("--out", type=Path, help=OUT)
    kept = add_command(
        commands, "statistics", run.statistics, "keep what `fid` needs of real pictures in a file", model=True
    )
    kept.add_argument("--real", type=Path, required=True, help="folder of real pictures")
    kept.add_argument("--side", type=at_least(8), default=256, help="what pictures are cut to (default: 256)")
    kept.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .safetensors file")
    text = "how far pictures rebuilt from their true vectors are from the true ones"
    rebuilt = add_command(commands, "reconstruction", run.reconstruction, text, model=True)
    rebuilt.add_argument("--images", type=Path, required=True, help="folder of pictures")
    rebuilt.add_argument("--limit", type=at_least(2), default=30_000, help="pictures (default: 30000)")
    add_drawing_options(rebuilt, None, 0)
    rebuilt.add_argument("--out", type=Path, help=OUT)
    for one in (command, rebuilt, kept):
        text = "FID's Inception as a local file (default: EfficientNet-Lite0, which is no FID and is not called so)"
        one.add_argument("--inception", type=Path, metavar="FILE", help=text)
        one.add_argument("--biased", action="store_true", help="allow too few pictures; the result says so")
    command = add_command(commands, "clip-score", run.clip, "how well a run's pictures fit their prompts", model=True)
    command.add_argument("folder", type=Path, metavar="RUN")
    command.add_argument("--clip", required=True, help="folder or hub name of a CLIP")


def _add_understanding(commands: Any) -> None:
    """The understanding benchmarks, and the language behind them."""
    text = "perplexity of the LLM on a fixed text: does it keep its language while it learns pictures"
    command = add_command(commands, "language", run.language, text, model=True)
    command.add_argument("--text", type=Path, metavar="FILE", help="another text, UTF-8 (default: a packaged one)")
    command.add_argument("--out", type=Path, help=OUT)
    text = "the paper's understanding benchmarks"
    command = add_command(commands, "understanding", run.understanding, text, model=True)
    command.add_argument("benchmarks", nargs="*", metavar="NAME", help="such as gqa or pope (default: all)")
    text = "hub, or a folder with local copies (default: a few questions of our own in each benchmark's form)"
    command.add_argument("--data", metavar="hub|DIR", help=text)
    text = "units of each benchmark: images of MME, pairs of MMVP, questions with all their rotations (default: all)"
    command.add_argument("--limit", type=at_least(1), help=text)
    command.add_argument("--batch-size", type=at_least(1), default=16, help="prompts at once (default: 16)")
    command.add_argument("--judge", metavar="MODEL", help="judge of free-form answers, behind an OpenAI-style address")
    text = "its address up to /chat/completions (default: api.openai.com; the key is read from OPENAI_API_KEY)"
    command.add_argument("--judge-url", metavar="URL", help=text)
    command.add_argument("--out", type=Path, help="a folder for the runs, one for each benchmark")


def _add_runs(commands: Any) -> None:
    """What is done with runs."""
    command = add_command(commands, "rescore", run.rescore, "score a run again from what it kept")
    command.add_argument("folder", type=Path, metavar="RUN")
    command.add_argument("--model", help="refuse if the run is not of this model folder")
    command.add_argument("--threshold", type=float, help="GenEval's confidence threshold")
    command.add_argument("--counting-threshold", type=float, help="GenEval's threshold for counting")
    add_json(command)
    command = add_command(commands, "draw", run.draw, "draw another benchmark's prompts, for `export`", model=True)
    command.add_argument("--prompts", type=Path, required=True, help="its own file or folder of prompts")
    command.add_argument("--out", type=Path, help=OUT)
    add_drawing_options(command, None, 0)
    _add_layout(command)
    command = add_command(commands, "export", run.export, "lay out a run's pictures for another benchmark's own scorer")
    command.add_argument("folder", type=Path, metavar="RUN")
    _add_layout(command)
    command.add_argument("--out", type=Path, required=True, help="the folder to write")
    command.add_argument("--part", action="store_true", help="allow fewer prompts than the benchmark has")
    add_json(command)
    command = add_command(commands, "report", run.report, "the paper's tables with published figures, and yours")
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or folders of them")
    command.add_argument("--out", type=Path, default=Path("results.md"), help="Markdown; JSON beside it")
    add_json(command)


def _add_layout(command: argparse.ArgumentParser) -> None:
    """Which benchmark's prompts and places."""
    command.add_argument("--layout", choices=("geneval", "geneval2", "wise", "dpg"), required=True)
