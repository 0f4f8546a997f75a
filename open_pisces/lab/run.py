"""Doing an experiment: every training that is missing, what it reaches, and the conclusion; it stops and goes on."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from open_pisces.config import RunConfig
from open_pisces.datasets.scenes.composer import load_cutouts
from open_pisces.eval.run import digest, model_hash, versions
from open_pisces.eval.scenes.judge import NETWORKS, SceneJudge
from open_pisces.factory.encode import encode
from open_pisces.files import WEIGHTS, locked, write_whole
from open_pisces.generate.generator import Generator
from open_pisces.lab.analysis import compare_paired, verdict_of
from open_pisces.lab.experiment import (
    Budget,
    Experiment,
    LabError,
    PlannedRun,
    config_of,
    described,
    part_config,
    planned_runs,
)
from open_pisces.lab.measures import HeldOut, held_out, measure
from open_pisces.model.folder import keep_parts
from open_pisces.train.loop import is_done, train
from open_pisces.train.objectives import build_training

MEASURED = "measured.json"
RESULTS = "results.json"
SETTINGS = "experiment.json"
BATCHES = 4
"""That a variant's tokens are counted in."""
WORDS = {"exhibit", "claim", "note", "plot", "comparisons"}
"""Settings that change no training: what is said of its results."""
Say = Callable[[str], object]


class Lab:
    """One experiment in its folder.

    Args:
        name: of the experiment.
        experiment: what is compared.
        budget_name: of the budget.
        budget: how much is done.
        folder: of all experiments; this one's is below it, and parts that several share.

    Raises:
        LabError: if the folder holds results of other settings; the message names what differs.
    """

    def __init__(self, name: str, experiment: Experiment, budget_name: str, budget: Budget, folder: Path) -> None:
        self.name, self.budget_name = name, budget_name
        self.experiment, self.budget = experiment, budget
        self.folder = folder / f"{name}-{budget_name}"
        self.parts = folder / "parts"
        self.samples: dict[str, float] = {}
        self.tokens: dict[str, float] = {}
        self._shown: HeldOut | None = None
        self._judge: SceneJudge | None = None
        self._check()

    def _check(self) -> None:
        path = self.folder / SETTINGS
        asked = described(self.experiment, self.budget)
        if path.is_file():
            before = json.loads(path.read_text())
            before["budget"]["seeds"] = asked["budget"]["seeds"]  # more seeds go on with those that are there
            for key in sorted((set(before) | set(asked)) - WORDS):
                if before.get(key) != asked.get(key):
                    raise LabError(
                        f"{self.folder} holds runs of another {key} ({_short(before.get(key))}, not "
                        f"{_short(asked.get(key))}): choose another --out, or empty it"
                    )
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asked, indent=1))

    def run(self, say: Say = print) -> dict[str, Any]:
        """Do what is missing; the results, which are also in ``results.json``.

        Raises:
            LockHeldError: if another process is at it.
            LabError: after SIGINT or SIGTERM; nothing of an unfinished training is measured.
        """
        with locked(self.folder / ".lock", wait=False):
            planned = planned_runs(self.experiment, self.budget)
            for number, run in enumerate(planned, 1):
                if not (self.folder / run.name / MEASURED).is_file():
                    say(f"{self.name}: {run.name} ({number} of {len(planned)})")
                    self._one(run)
            return self.conclude()

    # ------------------------------------------------------------------------------------------------- one run

    def _one(self, run: PlannedRun) -> None:
        folder = self.folder / run.name
        began = time.monotonic()
        start = self._start_of(run.variant)
        samples = self._samples_of(run.variant)
        config = config_of(self.experiment, self.budget, run.variant, run.seed, samples, start, folder / "training")
        self._train(config)
        model = config.folder / "model"
        generator = Generator.from_pretrained(model, "cpu")
        found = measure(generator, self.judge, self.shown, model, folder / "drawing")
        row = {
            "variant": run.variant,
            "seed": run.seed,
            "samples": config.train.steps * config.train.batch_size,
            "tokens": round(self._tokens_of(run.variant) * config.train.steps * config.train.batch_size),
            "steps": config.train.steps,
            "seconds": round(time.monotonic() - began, 1),
            "final_loss": _last_losses(config.folder / "metrics.jsonl"),
            **{name: round(value, 6) for name, value in found.items()},
        }
        write_whole(folder / MEASURED, json.dumps(row, indent=1))
        shutil.rmtree(config.folder / "state", ignore_errors=True)  # nothing goes on from here

    def _train(self, config: RunConfig) -> None:
        if is_done(config):
            return
        if config.data.features:
            encode(config)
        train(config, probes=())
        if not is_done(config):  # a signal ends a training after its step, with everything saved
            raise LabError(f"stopped in {config.folder}: the same command goes on")

    def _start_of(self, variant: str) -> str:
        """The model folder that a variant starts from, after its parts, which are trained once."""
        start = self.budget.start or str(WEIGHTS)
        for part in self.experiment.variants[variant].parts:
            how = self.budget.model_dump(include={"data", "part_samples", "batch_size"})
            made = self.parts / digest({**part.model_dump(), **how, "start": model_hash(start)})[:16]
            self.parts.mkdir(exist_ok=True)
            with locked(self.parts / f".{made.name}.lock"):  # another experiment may want it too
                if not (made / "start").is_dir():
                    keep_parts(start, made / "start", part.keep)
                config = part_config(part, self.budget, str(made / "start"), made / "training")
                self._train(config)
            start = str(config.folder / "model")
        return start

    def _samples_of(self, variant: str) -> float:
        """How many samples a variant sees."""
        if variant not in self.samples:
            one = self.experiment.variants[variant]
            self.samples[variant] = self.budget.samples * one.samples
            if one.tokens_of:
                tokens = self._samples_of(one.tokens_of) * self._tokens_of(one.tokens_of)
                self.samples[variant] = tokens / self._tokens_of(variant)
        return self.samples[variant]

    def _tokens_of(self, variant: str) -> float:
        """Tokens of an average sample of a variant, counted in its first batches."""
        if variant not in self.tokens:
            start = self._start_of(variant)
            where = self.folder / "counted"
            config = config_of(self.experiment, self.budget, variant, 0, self.budget.samples, start, where)
            if config.data.features:
                encode(config)
            training: Any = build_training(config)
            ids = [batch.ids_BS for step in range(BATCHES) for batch in training.load(step).with_totals()]
            real = sum(int((one != training.load.renderer.pad).sum()) for one in ids)
            self.tokens[variant] = real / (BATCHES * config.train.batch_size)
        return self.tokens[variant]

    @property
    def shown(self) -> HeldOut:
        """What all runs are measured on."""
        if self._shown is None:
            plain = self.experiment.world == "plain"
            self._shown = held_out(load_cutouts(), plain, self.budget.questions, self.budget.captions)
        return self._shown

    @property
    def judge(self) -> SceneJudge:
        """Who looks at drawings."""
        if self._judge is None:
            self._judge = SceneJudge.from_pretrained(next(iter(NETWORKS)))
        return self._judge

    # --------------------------------------------------------------------------------------------- the conclusion

    def conclude(self) -> dict[str, Any]:
        """The results of the runs that are there.

        Raises:
            LabError: if one is missing.
        """
        rows = []
        for run in planned_runs(self.experiment, self.budget):
            path = self.folder / run.name / MEASURED
            if not path.is_file():
                raise LabError(f"{self.folder}: {run.name} was not done: `pisces lab {self.name}` goes on")
            rows.append(json.loads(path.read_text()))
        found = results(self.name, self.budget_name, self.experiment, self.budget, rows)
        write_whole(self.folder / RESULTS, json.dumps(found, indent=1) + "\n")
        return found


def results(
    name: str, budget_name: str, experiment: Experiment, budget: Budget, rows: list[dict[str, Any]]
) -> dict[str, Any]:
    """Comparisons and verdict of measured runs, with all that a page about them needs."""
    compared = []
    for comparison in experiment.comparisons:
        sides = [
            [row[comparison.metric] for row in rows if row["variant"] == variant]
            for variant in (comparison.better, comparison.worse)
        ]
        compared.append((comparison, compare_paired(sides[0], sides[1], comparison.metric)))
    return {
        "name": name,
        "budget": budget_name,
        "about": budget.about,
        "exhibit": experiment.exhibit,
        "claim": experiment.claim,
        "note": experiment.note,
        "plot": experiment.plot,
        "variants": {key: variant.about for key, variant in experiment.variants.items()},
        "comparisons": [{**comparison.model_dump(), **asdict(paired)} for comparison, paired in compared],
        "verdict": verdict_of(compared),
        "runs": rows,
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "versions": versions(),
        "settings": described(experiment, budget),
    }


def _last_losses(path: Path) -> dict[str, float]:
    """The mean of the last ten lines of a training's losses."""
    rows = [json.loads(line) for line in path.read_text().splitlines()][-10:]
    found = {}
    for name in ("text", "vectors"):
        values = [row[name] for row in rows if isinstance(row.get(name), float)]
        if values:
            found[name] = round(sum(values) / len(values), 5)
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 80 else f"{text[:77]}..."
