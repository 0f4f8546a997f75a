"""What the loop costs beside the model: against a bare loop, and against transformers' `Trainer`.

The same model, the same optimizer and clipping, the same micro-batches from memory; steps are small (some 0.1 s on
two cores, an eighth of the recipe's), so that what surrounds them shows. Ours logs, counts FLOPs, adds up over
processes and watches for what is not finite, as in every run. No way writes checkpoints (`pisces bench async_save`).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

from open_pisces.batch import StepBatches
from open_pisces.bench.pairs import compare
from open_pisces.model.folder import WEIGHTS
from open_pisces.recipe import load_config
from open_pisces.train.loop import Run, run_until_done, start
from open_pisces.train.optim import build_optimizer, lr_at, set_rate
from open_pisces.train.signals import Stop
from open_pisces.train.world import World

STEPS = 24


def run(pairs: int = 15) -> dict[str, Any]:
    """Seconds of a bare loop over ours: at least 0.97 is wanted; ``over_trainer`` is `Trainer`'s over ours: 1.05."""
    with tempfile.TemporaryDirectory() as folder:
        endless = [f"train.{name}=1000000" for name in ("steps", "save_every", "probe_every")]
        steps = ["train.batch_size=8", "train.accumulate=1", "data.rows=64", *endless]
        place = [f"model.start={WEIGHTS}", f"out={folder}", "data.sources.0.path=fixture/train"]
        config = load_config("tiny/stage3", [*steps, *place, "train.ema=0.0", "train.precision=bf16"])
        ours, bare, other = (start(config, World(torch.device("cpu"))) for _ in range(3))
        ours.checkpoints = _Nothing()  # type: ignore[assignment]
        given = [ours.training.load(step) for step in range(STEPS)]
        with ours.log:
            found = compare("trainer_overhead", lambda: _ours(ours, given), lambda: _bare(bare, given), pairs)
            over = compare("trainer", lambda: _ours(ours, given), lambda: _trainer(other, given, Path(folder)), pairs)
    found["figures"] |= {"steps": STEPS, "over_trainer": {key: over[key] for key in ("ratio", "low", "high", "n")}}
    return found


class _Nothing:
    """In place of checkpoints."""

    def save(self, *given: Any) -> None:
        """Write nothing."""

    def wait(self) -> None:
        """There is nothing to wait for."""


def _ours(run: Run, given: list[StepBatches]) -> None:
    first = run.progress.step
    config = run.config.model_copy(update={"train": run.config.train.model_copy(update={"steps": first + STEPS})})
    training = copy.copy(run.training)
    training.load = _Loads(run.training.load, given)
    training.parts = {}  # there is nothing to copy for a model folder that nobody writes
    run_until_done(replace(run, config=config, training=training, probes=()), Stop())


class _Loads:
    """A loader whose batches lie in memory."""

    def __init__(self, loader: Any, given: list[StepBatches]) -> None:
        self.mixture = loader.mixture
        self.blank = loader.blank
        self.given = given

    def __call__(self, step: int) -> StepBatches:
        return self.given[step % STEPS]


def _bare(run: Run, given: list[StepBatches]) -> None:
    module = run.training.module.train()
    settings = run.config.train
    learning = [p for p in module.parameters() if p.requires_grad]
    for step, each in enumerate(given):
        for batch in each.with_totals():
            with torch.autocast("cpu", torch.bfloat16):
                loss = module(batch).loss
            loss.backward()
        nn.utils.clip_grad_norm_(learning, settings.clip)
        set_rate(run.optimizer, lr_at(step, settings))
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)


class _Endless(IterableDataset[Any]):
    def __init__(self, given: list[StepBatches]) -> None:
        self.batches: list[Any] = []
        for each in given:
            self.batches += each.with_totals()

    def __iter__(self) -> Iterator[Any]:
        while True:
            yield from self.batches


def _trainer(run: Run, given: list[StepBatches], folder: Path) -> None:
    batches = sum(len(each.batches) for each in given)
    assert batches == STEPS, "one micro-batch a step, as Trainer accumulates in another way"
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        max_steps=STEPS,
        per_device_train_batch_size=1,
        bf16=True,
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        logging_steps=10,
        max_grad_norm=run.config.train.clip,
        remove_unused_columns=False,
        accelerator_config={"dispatch_batches": False, "even_batches": False},
    )
    trainer = Trainer(
        model=run.training.module,
        args=arguments,
        train_dataset=_Endless(given),
        data_collator=lambda found: {"batch": found[0]},
        optimizers=(build_optimizer(run.training.module, run.config.train), None),
    )
    trainer.train()
