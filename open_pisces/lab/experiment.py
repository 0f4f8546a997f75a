"""An experiment as a file says it: variants of one training, a budget, and what is compared with what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from open_pisces.config import RunConfig
from open_pisces.errors import PiscesError
from open_pisces.recipe import RECIPES, load_config
from open_pisces.settings import Settings, YamlLoader, validate

EXPERIMENTS = RECIPES / "lab" / "experiments"
Metric = Literal["questions", "answer_loss", "drawing", "things", "vector_error"]
HIGHER = {"questions": True, "answer_loss": False, "drawing": True, "things": True, "vector_error": False}
"""Whether more is better."""


class LabError(PiscesError):
    """An experiment that cannot be done as asked; the message names what is wrong and the remedy."""


class Part(Settings):
    """A training that several runs start from: done once for all its seeds, and for all experiments that share it."""

    recipe: str
    overrides: list[str] = []
    keep: list[str] = ["understanding_encoder", "generation_encoder"]
    """Parts of the folder to start from; the others are built anew."""


class Variant(Settings):
    """One way of doing the training."""

    about: str
    """For the table, in a few words."""
    overrides: list[str] = []
    """On top of the experiment's."""
    samples: float = 1.0
    """Times the budget's samples."""
    tokens_of: str | None = None
    """In place of ``samples``: as many tokens as this variant sees, which is as much compute for the LLM."""
    parts: list[Part] = []
    """Done before it, one starting from the other."""


class Comparison(Settings):
    """What the paper's claim says of two variants."""

    metric: Metric
    better: str
    worse: str
    matched: str
    """What both have the same of, in words."""


class Budget(Settings):
    """How much is done."""

    about: str
    """How long it takes, and on what."""
    data: str
    """The dataset, in place of ``{data}`` in overrides."""
    start: str
    """The model folder to start from, in place of ``{start}``; empty is the one in the package."""
    samples: int
    seeds: int
    batch_size: int = 64
    part_samples: int = 0
    """Of a part's training."""
    questions: int = 300
    captions: int = 20
    """Of each of GenEval's six categories."""
    training: str | None = None
    """Another recipe for the training, in place of the experiment's."""


class Experiment(Settings):
    """A file of ``recipes/lab/experiments``."""

    exhibit: str
    """The paper's table or figure."""
    claim: str
    note: str = ""
    """What has to be known to read its figures."""
    training: str
    """The recipe that all variants change."""
    overrides: list[str] = []
    world: Literal["plain", "many"] = "plain"
    """Of the scenes that models are asked about and draw."""
    variants: dict[str, Variant]
    comparisons: list[Comparison]
    plot: Literal["bars", "curve"] = "bars"
    budgets: dict[str, Budget]


@dataclass(frozen=True)
class PlannedRun:
    """One training of an experiment.

    Args:
        variant: its name.
        seed: of weights, data order and everything else random.
    """

    variant: str
    seed: int

    @property
    def name(self) -> str:
        """Its folder under the experiment's."""
        return f"{self.variant}/seed{self.seed}"


def names() -> list[str]:
    """The experiments of the package."""
    return sorted(path.stem for path in EXPERIMENTS.glob("*.yaml"))


def load_experiment(name: str) -> Experiment:
    """An experiment by its name, or a file of one's own.

    Raises:
        LabError: for one that is not there, or names variants that it does not have.
        ConfigError: for a wrong key or value.
    """
    path = EXPERIMENTS / f"{name}.yaml" if name in names() else Path(name)
    if not path.is_file():
        raise LabError(f"no experiment {name!r}: choose {', '.join(names())}, or give a YAML file")
    experiment = validate(Experiment, yaml.load(path.read_text(), YamlLoader), {"": str(path)})
    known = set(experiment.variants)
    named = {one for comparison in experiment.comparisons for one in (comparison.better, comparison.worse)}
    named |= {variant.tokens_of for variant in experiment.variants.values() if variant.tokens_of}
    if unknown := named - known:
        raise LabError(f"{path}: no variant {min(unknown)!r}; it has {', '.join(sorted(known))}")
    return experiment


def budget_of(experiment: Experiment, name: str) -> Budget:
    """A budget by its name.

    Raises:
        LabError: for one that the experiment does not have.
    """
    if name not in experiment.budgets:
        raise LabError(f"no budget {name!r}: choose {', '.join(experiment.budgets)}")
    return experiment.budgets[name]


def planned_runs(experiment: Experiment, budget: Budget) -> list[PlannedRun]:
    """All trainings, seed by seed, so that an unfinished experiment has whole pairs."""
    runs = []
    for seed in range(budget.seeds):
        runs += [PlannedRun(variant, seed) for variant in experiment.variants]
    return runs


def config_of(
    experiment: Experiment, budget: Budget, variant: str, seed: int, samples: float, start: str, out: Path
) -> RunConfig:
    """The recipe of one training.

    Args:
        experiment: whose.
        budget: how much.
        variant: its name.
        seed: of the run.
        samples: that it sees.
        start: the model folder it starts from.
        out: its run folder.
    """
    own = experiment.variants[variant].overrides
    overrides = [_filled(text, budget, start) for text in (*experiment.overrides, *own)]
    steps = max(1, round(samples / budget.batch_size))
    overrides += [f"train.batch_size={budget.batch_size}", f"train.steps={steps}", f"seed={seed}", f"out={out}"]
    overrides += [f"train.save_every={steps}", f"train.probe_every={10 * steps}"]
    return load_config(budget.training or experiment.training, overrides)


def part_config(part: Part, budget: Budget, start: str, out: Path) -> RunConfig:
    """The recipe of a training that runs start from."""
    steps = max(1, round(budget.part_samples / budget.batch_size))
    overrides = [_filled(text, budget, start) for text in part.overrides]
    overrides += [f"train.batch_size={budget.batch_size}", f"train.steps={steps}", f"out={out}"]
    overrides += [f"train.save_every={steps}", f"train.probe_every={10 * steps}"]
    return load_config(part.recipe, overrides)


def _filled(text: str, budget: Budget, start: str) -> str:
    return text.replace("{data}", budget.data).replace("{start}", start)


def described(experiment: Experiment, budget: Budget) -> dict[str, Any]:
    """What an experiment's results depend on, as plain values."""
    own = experiment.model_dump(mode="json", exclude={"budgets"})
    return {**own, "budget": budget.model_dump(mode="json", exclude={"about"})}
