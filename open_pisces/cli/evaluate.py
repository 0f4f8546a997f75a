"""``pisces eval``: the commands that measure a model, look at what it draws, and report.

Every one writes a run folder (under ``runs/eval`` unless ``--out`` names one), goes on with it if it was interrupted,
and can be scored again from it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_pisces.cli.options import OutputError, Result, add_command, add_json, at_least, check_out, quiet

if TYPE_CHECKING:
    from open_pisces.eval.distances.features import FeatureNetwork
    from open_pisces.eval.drawing.detection import Detector
    from open_pisces.eval.scenes.judge import SceneJudge
    from open_pisces.generate.generator import Generator
    from open_pisces.generate.painter import Painter

OUT = "the run's folder (default: one under runs/eval, named after task, model and settings)"


# ------------------------------------------------------------------------------------------------- the commands


def scenes(args: argparse.Namespace) -> Result:
    """Score answers to questions about scenes."""
    from open_pisces.eval.scenes.vqa import evaluate_vqa

    model, generator = _generator(args)
    return _scored(args, evaluate_vqa(generator, args.limit, args.seed, args.split, model=model, folder=args.out))


def placement(args: argparse.Namespace) -> Result:
    """Score whether the decoder puts things where they belong, from true vectors."""
    from open_pisces.eval.scenes.placement import evaluate_placement

    if args.sheet:
        check_out(args.sheet)
    model, painter = _painter(args)
    limit, seed, split = args.limit, args.seed, args.split
    return _scored(
        args, evaluate_placement(painter, limit, seed, split, sheet=args.sheet, model=model, folder=args.out)
    )


def drawing(args: argparse.Namespace) -> Result:
    """Score drawings of the frozen captions by the two judges."""
    from open_pisces.eval.scenes.drawing import evaluate_drawing

    model, generator = _generator(args)
    how = {name: getattr(args, name) for name in ("split", "per_category", "n", "steps", "guidance_scale", "detailed")}
    return _scored(args, evaluate_drawing(generator, model, _judges(), args.out, seed=args.seed, **how))


def diagnose(args: argparse.Namespace) -> Result:
    """Say where drawing loses its quality."""
    from open_pisces.eval.scenes.diagnose import diagnose as find

    model, generator = _generator(args)
    return _scored(args, find(generator, model, _judges(), args.out, args.per_category, args.split))


def geneval(args: argparse.Namespace) -> Result:
    """GenEval, on a model or on pictures that are there."""
    from open_pisces.eval.drawing import judged_run as geneval_runs
    from open_pisces.eval.drawing.prompts import read_prompts
    from open_pisces.eval.run import model_hash

    if not args.prompts and not args.images:
        raise OutputError("give --prompts (GenEval's evaluation_metadata.jsonl, or a file in its form) or --images")
    prompts = read_prompts(args.prompts) if args.prompts else None
    quiet()
    detector = _detector(args)
    if args.images or prompts is None:
        return _scored(args, geneval_runs.score_folder(args.images, detector, args.out, args.n, prompts=prompts))
    model, generator = _generator(args)
    how: dict[str, Any] = {name: getattr(args, name) for name in ("n", "steps", "guidance_scale", "seed")}
    return _scored(
        args, geneval_runs.evaluate(generator, prompts, args.out, detector, str(model), model_hash(model), **how)
    )


def fid(args: argparse.Namespace) -> Result:
    """Frechet distance of drawings of captions from real pictures."""
    from open_pisces.eval.distances.fid import FidEvaluation

    model, generator = _generator(args)
    names = ("limit", "side", "steps", "guidance_scale", "seed", "biased")
    how: dict[str, Any] = {name: getattr(args, name) for name in names}
    asked = FidEvaluation(generator, _network(args), args.captions, args.real, **how)
    return _scored(args, asked.run(model, args.out))


def statistics(args: argparse.Namespace) -> Result:
    """Keep what a Frechet distance needs of real pictures, so that the pictures are read once."""
    from open_pisces.eval.distances.distances import FeatureStatistics
    from open_pisces.eval.distances.features import Features
    from open_pisces.eval.distances.fid import measure_real

    quiet()
    found = measure_real(_network(args), args.real, args.side, args.biased)
    kept = FeatureStatistics.of(found) if isinstance(found, Features) else found
    kept.save(args.out)
    _say(args, str(args.out))
    return {"out": str(args.out), "n": kept.n, "distance": kept.ruler.distance}


def reconstruction(args: argparse.Namespace) -> Result:
    """How far the decoder's reconstructions are from the true pictures."""
    from open_pisces.eval.distances.features import pictures_of
    from open_pisces.eval.distances.reconstruction import ReconstructionEvaluation

    model, painter = _painter(args)
    images = []
    for source in pictures_of(args.images)[: args.limit]:
        images += source.open()
    how: dict[str, Any] = {name: getattr(args, name) for name in ("steps", "guidance_scale", "seed", "biased")}
    return _scored(args, ReconstructionEvaluation(painter, images, _network(args), **how).run(model, args.out))


def clip(args: argparse.Namespace) -> Result:
    """CLIP score of a run's pictures and its prompts."""
    from open_pisces.eval.distances.clip import clip_score
    from open_pisces.eval.run import RunFolder

    quiet()
    run = RunFolder.load(args.folder)
    captions: list[str] = []
    for item in run.items:
        captions += [item["prompt"]] * len(run.images(item["key"]))
    return _scored(args, clip_score(run, captions, args.clip, device=args.device).row())


def gallery(args: argparse.Namespace) -> Result:
    """Draw fixed prompts; put several models side by side."""
    from open_pisces.eval.drawing import gallery as galleries

    if args.compare:
        check_out(args.compare)
        if len(args.runs) < 2:
            raise OutputError("--compare needs two or more galleries: name their folders")
        found = galleries.compare(args.runs, args.compare)
        _say(args, str(args.compare))
        return found
    model, generator = _generator(args)
    how: dict[str, Any] = {name: getattr(args, name) for name in ("n", "seed", "steps", "guidance_scale")}
    run = galleries.draw(generator, args.out, model, args.prompts, **how)
    _say(args, f"{run.folder}/sheet.png")
    return {"folder": str(run.folder), "sheet": f"{run.folder}/sheet.png"}


def understanding(args: argparse.Namespace) -> Result:
    """The paper's understanding benchmarks."""
    from open_pisces.eval.understanding.evaluate import evaluate
    from open_pisces.eval.understanding.graders import Judge
    from open_pisces.eval.understanding.questions import FIXTURES

    model, generator = _generator(args)
    judge = Judge(args.judge, **({"url": args.judge_url} if args.judge_url else {})) if args.judge else None
    names = args.suite if len(args.benchmarks) == 0 else args.benchmarks
    how: dict[str, Any] = {"limit": args.limit, "batch_size": args.batch_size, "folder": args.out, "judge": judge}
    found = evaluate(generator, names, model=model, data=args.data or FIXTURES, **how)
    if not args.json:
        from open_pisces.cli.tables import print_benchmarks

        print_benchmarks(found)
    return found


def judge(args: argparse.Namespace) -> Result:
    """What the scenes' judges were measured at; measure or train them anew."""
    from open_pisces.datasets.scenes.composer import load_cutouts
    from open_pisces.eval.scenes import judge_check
    from open_pisces.eval.scenes.judge import JUDGES, card

    if args.train:
        quiet()
        judge_check.make(args.train, load_cutouts())
        return _scored(args, card(args.train))
    if args.check:
        return _scored(args, {one.name: judge_check.measure(one, load_cutouts()) for one in _judges()})
    return _scored(args, card(JUDGES))


def rescore(args: argparse.Namespace) -> Result:
    """Score a run again from what it kept."""
    from open_pisces.eval.drawing.rules import Rules
    from open_pisces.eval.rescoring import rescore as again
    from open_pisces.eval.run import model_hash

    given = {
        name: getattr(args, name) for name in ("threshold", "counting_threshold") if getattr(args, name) is not None
    }
    rules = Rules(**given) if given else None
    return _scored(args, again(args.folder, model_hash(args.model) if args.model else None, rules))


def export(args: argparse.Namespace) -> Result:
    """Lay out a run's pictures as other benchmarks want them."""
    from open_pisces.eval.drawing.exports import export as lay_out
    from open_pisces.eval.run import RunFolder

    made = lay_out(RunFolder.load(args.folder), args.layout, args.out, args.part)
    _say(args, str(made))
    return {"out": str(made), "layout": args.layout}


def draw(args: argparse.Namespace) -> Result:
    """Draw another benchmark's prompts, to be exported in its layout."""
    from open_pisces.eval.drawing.exports import draw_prompts

    model, generator = _generator(args)
    how: dict[str, Any] = {name: getattr(args, name) for name in ("steps", "guidance_scale", "seed")}
    run = draw_prompts(generator, model, args.layout, args.prompts, args.out, **how)
    _say(args, str(run.folder))
    return {"folder": str(run.folder), "prompts": len(run.items)}


def report(args: argparse.Namespace) -> Result:
    """The paper's tables, and what was measured here."""
    from open_pisces.eval.report.tables import report as collect

    found = collect(args.runs, args.out)
    _say(args, str(args.out))
    return found


# ------------------------------------------------------------------------------------------------ what they share


def _model(args: argparse.Namespace) -> Path:
    """The model's folder, by default the one in the package."""
    from open_pisces.model.folder import WEIGHTS

    return Path(args.model or WEIGHTS)


def _generator(args: argparse.Namespace) -> tuple[Path, Generator]:
    """The model's folder, and the model."""
    from open_pisces.generate.generator import Generator

    quiet()
    return _model(args), Generator.from_pretrained(_model(args), device=args.device)


def _painter(args: argparse.Namespace) -> tuple[Path, Painter]:
    """The model's folder, and its parts without the LLM: a decoder is judged before there is one."""
    from open_pisces.generate.painter import Painter

    quiet()
    return _model(args), Painter.from_pretrained(_model(args), args.device)


def _judges() -> list[SceneJudge]:
    """The two judges of the package."""
    from open_pisces.eval.scenes.judge import NETWORKS, SceneJudge

    return [SceneJudge.from_pretrained(kind) for kind in NETWORKS]


def _detector(args: argparse.Namespace) -> Detector:
    """The detector that a command names."""
    if args.detector == "judge":
        return _judges()[0]
    from open_pisces.eval.drawing.mask2former import CLIP, DETECTOR, Mask2FormerClip

    name = DETECTOR if args.detector == "mask2former" else args.detector
    return Mask2FormerClip(name, args.clip or CLIP, device=args.device)


def _network(args: argparse.Namespace) -> FeatureNetwork:
    """The feature network that a command names."""
    from open_pisces.eval.distances.features import EfficientNetLite0, Inception

    return Inception(args.inception, args.device) if args.inception else EfficientNetLite0(args.device)


def _say(args: argparse.Namespace, text: str) -> None:
    """Print a result for people; with ``--json`` only the JSON object is printed."""
    if not args.json:
        print(text)


def _scored(args: argparse.Namespace, result: dict[str, Any]) -> Result:
    """Print a score for people, and pass it on."""
    if not args.json:
        from open_pisces.cli.tables import print_score

        print_score(result)
    return result


# ------------------------------------------------------------------------------------------------- the arguments


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
    vqa = add_command(commands, "scenes", scenes, text, model=True)
    vqa.add_argument("--task", choices=("vqa",), default="vqa")
    text = "does the decoder put things where they belong, from true vectors"
    place = add_command(commands, "placement", placement, text, model=True)
    place.add_argument("--sheet", type=Path, help="also write true pictures above rebuilt ones to this file")
    for one, splits, most in ((vqa, ("train", "pairs", "style"), 1000), (place, ("train", "style"), 300)):
        one.add_argument("--split", choices=splits, default="train", help="all but train are held out")
        one.add_argument("--limit", type=at_least(6), default=most, help=f"questions or pictures (default: {most})")
        text = "compose fresh scenes with this seed (default: the frozen ones)"
        one.add_argument("--seed", type=at_least(0), help=text)
        one.add_argument("--out", type=Path, help=OUT)

    text = "draw the frozen captions; two judges score them by GenEval's rules"
    draw = add_command(commands, "drawing", drawing, text, model=True)
    _add_drawing(draw, 1, 0)
    draw.add_argument("--detailed", action="store_true", help="the detailed captions instead of the short ones")
    text = "where drawing loses its quality: encoder, decoder, the LLM's vectors, captions; a PNG and a JSON"
    find = add_command(commands, "diagnose", diagnose, text, model=True)
    for one in (draw, find):
        one.add_argument("--split", choices=("train", "pairs"), default="train", help="pairs are held out")
        text = "captions of each of the six categories (default: 60, all)"
        one.add_argument("--per-category", type=at_least(1), default=60, metavar="N", help=text)
        one.add_argument("--out", type=Path, help=OUT)
    text = "what the scenes' judges were measured at"
    cards = add_command(commands, "judge", judge, text)
    add_json(cards)
    cards.add_argument("--check", action="store_true", help="measure them again; needs the artwork")
    cards.add_argument("--train", type=Path, metavar="DIR", help="train both anew into this folder (about an hour)")


def _add_geneval(commands: Any) -> None:
    """GenEval and the galleries."""
    command = add_command(commands, "geneval", geneval, "GenEval by its official rules", model=True)
    text = "evaluation_metadata.jsonl of GenEval's repository, or a file in its form"
    command.add_argument("--prompts", type=Path, metavar="FILE", help=text)
    text = "score these pictures, in the official layout, instead of drawing"
    command.add_argument("--images", type=Path, metavar="DIR", help=text)
    text = "mask2former (default), its folder or hub name, or judge (the scenes' concepts)"
    command.add_argument("--detector", default="mask2former", help=text)
    command.add_argument("--clip", help="folder or hub name of the CLIP that names colours (default: ViT-L/14)")
    _add_drawing(command, 4, 42)
    command.add_argument("--out", type=Path, help=OUT)

    text = "draw fixed prompts, simple and complex, onto one sheet; compare models"
    command = add_command(commands, "gallery", gallery, text, model=True)
    command.add_argument("runs", nargs="*", metavar="RUN", help="galleries to put side by side")
    command.add_argument("--compare", type=Path, metavar="FILE", help="the sheet that puts them side by side")
    text = "scenes for models of the scenes' world, open for models of full size"
    command.add_argument("--prompts", default="scenes", help=text)
    _add_drawing(command, 1, 0)
    command.add_argument("--out", type=Path, help=OUT)


def _add_distances(commands: Any) -> None:
    """Frechet distances and CLIP score."""
    text = "Frechet distance of drawings of captions from real pictures (COCO-30K protocol)"
    command = add_command(commands, "fid", fid, text, model=True)
    command.add_argument("--captions", type=Path, required=True, help="captions_val2014.json, or JSON lines")
    text = "folder of real pictures, or a file of their statistics"
    command.add_argument("--real", type=Path, required=True, help=text)
    command.add_argument("--limit", type=at_least(2), default=30_000, help="captions (default: 30000)")
    command.add_argument("--side", type=at_least(8), default=256, help="what pictures are cut to (default: 256)")
    _add_drawing(command, None, 0)
    command.add_argument("--out", type=Path, help=OUT)
    kept = add_command(
        commands, "statistics", statistics, "keep what `fid` needs of real pictures in a file", model=True
    )
    kept.add_argument("--real", type=Path, required=True, help="folder of real pictures")
    kept.add_argument("--side", type=at_least(8), default=256, help="what pictures are cut to (default: 256)")
    kept.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .safetensors file")
    text = "how far pictures rebuilt from their true vectors are from the true ones"
    rebuilt = add_command(commands, "reconstruction", reconstruction, text, model=True)
    rebuilt.add_argument("--images", type=Path, required=True, help="folder of pictures")
    rebuilt.add_argument("--limit", type=at_least(2), default=30_000, help="pictures (default: 30000)")
    _add_drawing(rebuilt, None, 0)
    rebuilt.add_argument("--out", type=Path, help=OUT)
    for one in (command, rebuilt, kept):
        text = "FID's Inception as a local file (default: EfficientNet-Lite0, which is no FID and is not called so)"
        one.add_argument("--inception", type=Path, metavar="FILE", help=text)
        one.add_argument("--biased", action="store_true", help="allow too few pictures; the result says so")
    command = add_command(commands, "clip-score", clip, "how well a run's pictures fit their prompts", model=True)
    command.add_argument("folder", type=Path, metavar="RUN")
    command.add_argument("--clip", required=True, help="folder or hub name of a CLIP")


def _add_understanding(commands: Any) -> None:
    """The understanding benchmarks."""
    text = "the paper's understanding benchmarks"
    command = add_command(commands, "understanding", understanding, text, model=True)
    command.add_argument("benchmarks", nargs="*", metavar="NAME", help="such as gqa or pope (default: the suite)")
    command.add_argument("--suite", choices=("paper",), default="paper", help="all of the paper's, and ChartQA")
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
    command = add_command(commands, "rescore", rescore, "score a run again from what it kept")
    command.add_argument("folder", type=Path, metavar="RUN")
    command.add_argument("--model", help="refuse if the run is not of this model folder")
    command.add_argument("--threshold", type=float, help="GenEval's confidence threshold")
    command.add_argument("--counting-threshold", type=float, help="GenEval's threshold for counting")
    add_json(command)
    command = add_command(commands, "draw", draw, "draw another benchmark's prompts, for `export`", model=True)
    command.add_argument("--prompts", type=Path, required=True, help="its own file or folder of prompts")
    command.add_argument("--out", type=Path, help=OUT)
    _add_drawing(command, None, 0)
    _add_layout(command)
    command = add_command(commands, "export", export, "lay out a run's pictures for another benchmark's own scorer")
    command.add_argument("folder", type=Path, metavar="RUN")
    _add_layout(command)
    command.add_argument("--out", type=Path, required=True, help="the folder to write")
    command.add_argument("--part", action="store_true", help="allow fewer prompts than the benchmark has")
    add_json(command)
    command = add_command(commands, "report", report, "the paper's tables with published figures, and yours")
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or folders of them")
    command.add_argument("--out", type=Path, default=Path("results.md"), help="Markdown; JSON beside it")
    add_json(command)


def _add_layout(command: argparse.ArgumentParser) -> None:
    """Which benchmark's prompts and places."""
    command.add_argument("--layout", choices=("geneval", "geneval2", "wise", "dpg"), required=True)


def _add_drawing(command: argparse.ArgumentParser, n: int | None, seed: int) -> None:
    """Options of the commands that draw."""
    if n is not None:
        command.add_argument("--n", type=at_least(1), default=n, help=f"pictures of each prompt (default: {n})")
    command.add_argument("--steps", type=at_least(1), help="denoising steps (default: the model's)")
    command.add_argument("--guidance-scale", type=float, help="1 turns guidance off (default: the model's)")
    command.add_argument("--seed", type=at_least(0), default=seed, help=f"of the noise (default: {seed})")
