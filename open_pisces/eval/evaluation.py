"""What every evaluation has in common: items that are asked, answers that are kept, a score made of them alone.

An `Evaluation` is opened as a run folder (`open_pisces.eval.run`), answered batch by batch, and scored from the rows
it kept. So a run that was interrupted goes on, and `rescore` repeats the score of any run without the model.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from rich.console import Console
from rich.progress import track

from open_pisces.eval.intervals import Interval
from open_pisces.eval.run import Manifest, Row, RunError, RunFolder, model_hash
from open_pisces.generate.choose import best_of

if TYPE_CHECKING:
    from open_pisces.generate.generator import Generator

HOMES = {
    "scenes/vqa": "open_pisces.eval.scenes.vqa",
    "scenes/drawing": "open_pisces.eval.scenes.drawing",
    "decoder/placement": "open_pisces.eval.scenes.placement",
    "diagnose": "open_pisces.eval.scenes.diagnose",
    "geneval": "open_pisces.eval.drawing.judged_run",
    "fid": "open_pisces.eval.distances.fid",
    "decoder/reconstruction": "open_pisces.eval.distances.reconstruction",
    "understanding": "open_pisces.eval.understanding.evaluate",
    "language": "open_pisces.eval.language",
}
"""For each task, or the part of its name before the slash, the module whose ``score_run(run)`` scores its runs."""


@dataclass(frozen=True)
class Score:
    """A score as every evaluation gives it; each adds fields of its own in a subclass."""

    name: str
    score: float | None
    """None where it cannot be made; the subclass says why."""
    low: float | None
    """Lower end of the 95 % bootstrap interval."""
    high: float | None
    n: int
    """Independent units behind the score: prompts, questions, pictures."""

    def row(self) -> Row:
        """The fields as plain values, as they stand in ``scores.json``."""
        return asdict(self)


@dataclass(frozen=True)
class Counted(Interval):
    """An interval, and how many units are behind it."""

    n: int


def rounded(interval: Interval, digits: int = 4) -> Interval:
    """An interval as scores hold it."""
    return Interval(**interval.rounded(digits))


def missing(run: RunFolder, stage: str, size: int) -> Iterable[list[Row]]:
    """The batches of ``size`` items whose rows of a stage are not there yet, with a bar on standard error."""
    # A list: the bar wants to know how many there are.
    left = list(run.batches(stage, size))
    return track(left, f"{run.manifest.task}: {stage}", console=Console(stderr=True), disable=not left)


def draw(generator: Generator, run: RunFolder, batch: Sequence[Row], seed: int | None = None) -> None:
    """Draw and keep the pictures of a batch: those of every item's ``prompt``, by the settings of the manifest.

    Picture j of every prompt starts from noise of (seed, j), as GenEval's official sampler resets its seed before each
    prompt. The settings are ``n`` (pictures of a prompt, 1 if it is not set), ``steps``, ``guidance_scale``, ``seed``,
    and where they are set ``vector_guidance``, and ``best_of``: of so many the model's own answers choose.

    Args:
        generator: anything with ``image(prompts, n, steps, guidance_scale, seed)``.
        run: where the pictures are kept.
        batch: items with ``key`` and ``prompt``.
        seed: of this batch; None takes the manifest's. A protocol that wants other noise in every batch gives it here.
    """
    settings = run.manifest.settings
    how = {name: settings[name] for name in ("steps", "guidance_scale", "seed")}
    how |= {name: settings[name] for name in ("vector_guidance",) if name in settings}
    how |= {} if seed is None else {"seed": seed}
    prompts = [item["prompt"] for item in batch]
    if "best_of" in settings:
        drawn = best_of(generator, prompts, settings["best_of"], settings.get("n", 1), **how)
    else:
        drawn = generator.image(prompts, n=settings.get("n", 1), **how)
    run.save_images({item["key"]: images for item, images in zip(batch, drawn, strict=True)})


class Evaluation(ABC):
    """One measurement of one model.

    Args of a subclass are what it measures with: the model, its settings, what is shown. `run` does the rest.
    """

    task: ClassVar[str]
    """A key of `HOMES`, or ``KEY/NAME``."""
    device: str = "cpu"

    @property
    @abstractmethod
    def settings(self) -> Row:
        """Everything that shapes the answers, for the manifest."""

    @property
    @abstractmethod
    def stages(self) -> Sequence[str]:
        """Names of the raw rows that are made, in order: ``("images", "detections-...")``, ``("answers",)``."""

    @abstractmethod
    def items(self) -> list[Row]:
        """What is asked, one row each with its ``key``."""

    @abstractmethod
    def answer(self, run: RunFolder, stage: str, batch: Sequence[Row]) -> None:
        """Make and keep one batch's rows of one stage."""

    @abstractmethod
    def score(self, run: RunFolder) -> Score:
        """The score of a complete run, from its rows alone."""

    @property
    def batch_size(self) -> int:
        """Items that are answered together."""
        size: int = self.settings["batch_size"]
        return size

    def run(self, model: str | Path, folder: str | Path | None = None) -> Row:
        """Open or go on with a run, answer what is missing, score it and write ``scores.json``.

        Args:
            model: the model's folder, for the manifest.
            folder: the run's; None chooses one by the manifest (`RunFolder.open`).

        Returns:
            the fields of the score with ``task``, ``model``, ``model_hash``, ``run``, ``seconds`` and ``folder``.

        Raises:
            RunError: if ``folder`` holds another run.
        """
        start = time.time()
        run = self.open(model, folder)
        self.complete(run)
        # From the rows, although they were just made: a run and its rescoring cannot differ then.
        scores = run.write_scores(self.score(run).row())
        return {**scores, "seconds": round(time.time() - start, 1), "folder": str(run.folder)}

    def open(self, model: str | Path, folder: str | Path | None = None) -> RunFolder:
        """The run folder of this evaluation, begun or found."""
        # Items first: what cannot be asked is refused before a folder is made.
        items = self.items()
        manifest = Manifest(self.task, str(model), self.hash_of(model), self.settings, device=self.device)
        return RunFolder.open(folder, manifest, items)

    def hash_of(self, model: str | Path) -> str:
        """What identifies the model in the manifest."""
        return model_hash(model)

    def complete(self, run: RunFolder) -> None:
        """Answer what a run still lacks, stage by stage, with a bar on standard error."""
        for stage in self.stages:
            for batch in missing(run, stage, self.batch_size):
                self.answer(run, stage, batch)


def rescore(folder: str | Path, model: str | None = None, **options: Any) -> Row:
    """Score a run again from what it kept, without the model, and write its ``scores.json``.

    Args:
        folder: of the run.
        model: the hash of the model that it has to be of; None takes any.
        options: passed to the task's ``score_run``, such as GenEval's ``rules``; those that are None are left out.

    Raises:
        RunError: if the run is of another model, is not complete, has no score (a gallery), or is scored without one
            of the options.
    """
    run = RunFolder.load(folder)
    if model is not None and run.manifest.model_hash != model:
        raise RunError(
            f"{folder} is a run of the model {run.manifest.model_hash[:12]} ({run.manifest.model}), asked is "
            f"{model[:12]}: evaluate that model, in a folder of its own"
        )
    home = HOMES.get(run.manifest.task) or HOMES.get(run.manifest.task.partition("/")[0])
    if home is None:
        raise RunError(f"{folder}: a run of {run.manifest.task} has pictures and no score")
    given = {name: value for name, value in options.items() if value is not None}
    # Imported here: to score a run of one task the networks of the others need not be loaded.
    score_run = import_module(home).score_run
    unknown = [name for name in given if name not in signature(score_run).parameters]
    if unknown:
        raise RunError(f"{folder}: a run of {run.manifest.task} is scored without {unknown[0]}: leave it out")
    score: Score = score_run(run, **given)
    return {**run.write_scores(score.row()), "folder": str(run.folder)}
