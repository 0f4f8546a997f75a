"""The commands of ``pisces eval``; their arguments are in `open_pisces.cli.evaluate`.

Every one writes a run folder (under ``runs/eval`` unless ``--out`` names one), goes on with it if it was interrupted,
and can be scored again from it. What is heavy is imported inside the command that needs it.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from open_pisces.cli.options import OutputError, Result, check_out, load_generator, model_folder, quiet, say

if TYPE_CHECKING:
    from open_pisces.eval.distances.features import FeatureNetwork
    from open_pisces.eval.drawing.detection import Detector
    from open_pisces.eval.scenes.judge import SceneJudge
    from open_pisces.generate.painter import Painter

SAMPLER = ("steps", "guidance_scale", "seed")
"""Options of every command that draws."""


def scenes(args: argparse.Namespace) -> Result:
    """Score answers to questions about scenes."""
    from open_pisces.eval.scenes.vqa import SceneQuestions

    asked = SceneQuestions(load_generator(args), args.limit, args.seed, args.split)
    return _scored(args, asked.run(model_folder(args), args.out))


def language(args: argparse.Namespace) -> Result:
    """Perplexity of the LLM on a text."""
    from open_pisces.eval.language import LanguagePerplexity
    from open_pisces.generate.language import load_language

    folder = model_folder(args)
    quiet()
    return _scored(args, LanguagePerplexity(load_language(folder, args.device), args.text).run(folder, args.out))


def placement(args: argparse.Namespace) -> Result:
    """Score whether the decoder puts things where they belong, from true vectors."""
    from open_pisces.eval.scenes.placement import Placement

    if args.sheet:
        check_out(args.sheet)
    asked = Placement(_painter(args), args.limit, args.seed, args.split, sheet=args.sheet)
    return _scored(args, asked.run(model_folder(args), args.out))


def drawing(args: argparse.Namespace) -> Result:
    """Score drawings of the frozen captions by the two judges."""
    from open_pisces.eval.scenes.drawing import SceneDrawing

    how = _given(args, "split", "per_category", "n", "detailed", "best_of", "vector_guidance", *SAMPLER)
    asked = SceneDrawing(load_generator(args), _judges(), **how)
    return _scored(args, asked.run(model_folder(args), args.out))


def diagnose(args: argparse.Namespace) -> Result:
    """Say where drawing loses its quality."""
    from open_pisces.eval.scenes.diagnose import Diagnosis

    asked = Diagnosis(load_generator(args), _judges(), args.per_category, args.split)
    return _scored(args, asked.run(model_folder(args), args.out))


def geneval(args: argparse.Namespace) -> Result:
    """GenEval, on a model or on pictures that are there."""
    from open_pisces.eval.drawing.judged_run import GenEval
    from open_pisces.eval.drawing.official_layout import GenEvalOfFolder
    from open_pisces.eval.drawing.prompts import read_prompts

    if not args.prompts and not args.images:
        raise OutputError("give --prompts (GenEval's evaluation_metadata.jsonl, or a file in its form) or --images")
    prompts = read_prompts(args.prompts) if args.prompts else None
    quiet()
    detectors = [_detector(args)]
    if args.images or prompts is None:
        there = GenEvalOfFolder(args.images, detectors, args.n, asked=prompts)
        return _scored(args, there.run(args.images, args.out))
    asked = GenEval(load_generator(args), prompts, detectors, **_given(args, "n", *SAMPLER))
    return _scored(args, asked.run(model_folder(args), args.out))


def fid(args: argparse.Namespace) -> Result:
    """Frechet distance of drawings of captions from real pictures."""
    from open_pisces.eval.distances.fid import FidEvaluation

    how = _given(args, "limit", "side", "biased", *SAMPLER)
    asked = FidEvaluation(load_generator(args), _network(args), args.captions, args.real, **how)
    return _scored(args, asked.run(model_folder(args), args.out))


def statistics(args: argparse.Namespace) -> Result:
    """Keep what a Frechet distance needs of real pictures, so that the pictures are read once."""
    from open_pisces.eval.distances.distances import FeatureStatistics
    from open_pisces.eval.distances.features import Features
    from open_pisces.eval.distances.fid import measure_real

    quiet()
    found = measure_real(_network(args), args.real, args.side, args.biased)
    kept = FeatureStatistics.of(found) if isinstance(found, Features) else found
    kept.save(args.out)
    say(args, str(args.out))
    return {"out": str(args.out), "n": kept.n, "distance": kept.ruler.distance}


def reconstruction(args: argparse.Namespace) -> Result:
    """How far the decoder's reconstructions are from the true pictures."""
    from open_pisces.eval.distances.features import pictures_of
    from open_pisces.eval.distances.reconstruction import ReconstructionEvaluation

    painter = _painter(args)
    images = []
    for source in pictures_of(args.images)[: args.limit]:
        images += source.open()
    asked = ReconstructionEvaluation(painter, images, _network(args), **_given(args, "biased", *SAMPLER))
    return _scored(args, asked.run(model_folder(args), args.out))


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
    from open_pisces.eval.drawing.gallery import compare, draw_gallery

    if args.compare:
        check_out(args.compare)
        if len(args.runs) < 2:
            raise OutputError("--compare needs two or more galleries: name their folders")
        found = compare(args.runs, args.compare)
        say(args, str(args.compare))
        return found
    generator = load_generator(args)
    run = draw_gallery(generator, args.out, model_folder(args), args.prompts, **_given(args, "n", *SAMPLER))
    say(args, f"{run.folder}/sheet.png")
    return {"folder": str(run.folder), "sheet": f"{run.folder}/sheet.png"}


def understanding(args: argparse.Namespace) -> Result:
    """The paper's understanding benchmarks."""
    from open_pisces.eval.understanding.evaluate import evaluate
    from open_pisces.eval.understanding.questions import FIXTURES
    from open_pisces.generate.chat_model import ChatModel

    generator = load_generator(args)
    judge = None
    if args.judge:
        judge = ChatModel(args.judge, args.judge_url) if args.judge_url else ChatModel(args.judge)
    found = evaluate(
        generator,
        args.benchmarks or "paper",
        model=model_folder(args),
        data=args.data or FIXTURES,
        limit=args.limit,
        batch_size=args.batch_size,
        folder=args.out,
        judge=judge,
    )
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
    from open_pisces.eval.evaluation import rescore as again
    from open_pisces.eval.run import model_hash

    names = ("threshold", "counting_threshold")
    given = {name: value for name, value in _given(args, *names).items() if value is not None}
    model = model_hash(args.model) if args.model else None
    return _scored(args, again(args.folder, model, rules=Rules(**given) if given else None))


def export(args: argparse.Namespace) -> Result:
    """Lay out a run's pictures as other benchmarks want them."""
    from open_pisces.eval.drawing.exports import export as lay_out
    from open_pisces.eval.run import RunFolder

    made = lay_out(RunFolder.load(args.folder), args.layout, args.out, args.part)
    say(args, str(made))
    return {"out": str(made), "layout": args.layout}


def draw(args: argparse.Namespace) -> Result:
    """Draw another benchmark's prompts, to be exported in its layout."""
    from open_pisces.eval.drawing.exports import draw_prompts

    generator = load_generator(args)
    run = draw_prompts(generator, model_folder(args), args.layout, args.prompts, args.out, **_given(args, *SAMPLER))
    say(args, str(run.folder))
    return {"folder": str(run.folder), "prompts": len(run.items)}


def report(args: argparse.Namespace) -> Result:
    """The paper's tables, and what was measured here."""
    from open_pisces.eval.report.tables import report as collect

    found = collect(args.runs, args.out)
    say(args, str(args.out))
    return found


# ------------------------------------------------------------------------------------------------ what they share


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """The named options as keyword arguments."""
    return {name: getattr(args, name) for name in names}


def _painter(args: argparse.Namespace) -> Painter:
    """The model's parts without the LLM: a decoder is judged before there is one."""
    from open_pisces.generate.painter import Painter

    quiet()
    return Painter.from_pretrained(model_folder(args), args.device)


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


def _scored(args: argparse.Namespace, result: dict[str, Any]) -> Result:
    """Print a score for people, and pass it on."""
    if not args.json:
        from open_pisces.cli.tables import print_score

        print_score(result)
    return result
