"""The one loop behind every training: gen-CLIP, decoder, stages 1 to 3. They differ by their recipe only."""

from __future__ import annotations

import signal
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from open_pisces.batch import StepBatches
from open_pisces.config import RunConfig, TrainConfig
from open_pisces.data.loader import SkipTally
from open_pisces.data.prefetch import prefetch
from open_pisces.data.shards import open_dataset
from open_pisces.model.weights import write_folder
from open_pisces.paint import pick_device
from open_pisces.train.checkpoint import load_state, read_progress, save_state
from open_pisces.train.log import Metrics, describe_run, progress_bar
from open_pisces.train.objectives import Training, build_training
from open_pisces.train.optim import AveragedWeights, build_optimizer, lr_at
from open_pisces.train.probes import probe

LOG_EVERY = 10


def is_done(config: RunConfig) -> bool:
    """Whether this training has run all its steps and left its model folder."""
    progress = read_progress(config.folder / "state")
    return progress is not None and progress["step"] >= config.train.steps and (config.folder / "model").is_dir()


def train(config: RunConfig) -> Path:
    """Run one training, or continue it from its last checkpoint; returns the run folder.

    SIGINT and SIGTERM end it after the current step with everything saved; the same command then continues to the
    bit. The run folder holds ``model/`` (the model folder), ``state/`` (to resume), ``config.yaml``,
    ``versions.json``, ``metrics.jsonl`` and ``samples/``.
    """
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    device = pick_device(config.device)
    training = build_training(config)
    module = training.module.to(device)
    if config.train.compile and training.compiled is not None:
        # Padded lengths are few, each gets its own fast code; packed rows differ in number from step to step.
        training.compiled.compile(dynamic=None if config.data.row_length else False)
    optimizer, average = build_optimizer(module, config.train), AveragedWeights(module, config.train.ema)
    progress = read_progress(config.folder / "state") or {"step": 0, "seconds": 0.0}
    if progress["step"]:
        load_state(progress, module, optimizer, average)
    describe_run(config.folder, config)
    metrics, clock = Metrics(config.folder, progress["step"]), Clock(progress["seconds"])
    steps, tally = range(progress["step"], config.train.steps), SkipTally(config.data.max_bad)
    with stop_signals() as stop, progress_bar(config.name, len(range(progress["step"])), config.train.steps) as tell:
        for step, given in zip(steps, prefetch(training.load, steps, workers=config.data.workers), strict=True):
            tally.add(given)
            row = train_step(training, given.batches, optimizer, step, config.train, device)
            average.update(step)
            tell("  ".join(f"{k} {v:.4g}" for k, v in row.items() if k != "lr"))
            last = step + 1 == config.train.steps
            if step % LOG_EVERY == 0 or last:
                metrics.write({"step": step, **row, **_data_row(given, tally), "seconds": round(clock.seconds, 2)})
            if last or (step + 1) % config.train.probe_every == 0:
                # Eager: a cache grows by one place a token, and each length would be compiled anew.
                with average.applied(), torch.compiler.set_stance("force_eager"):
                    probe(config, training, config.folder / "samples", step + 1)
            if last or stop or (step + 1) % config.train.save_every == 0:
                save(config, training, optimizer, average, step + 1, clock.seconds)
            if stop:
                break
    if not steps and not is_done(config):  # all steps are in the state, but model/ was taken away
        save(config, training, optimizer, average, progress["step"], progress["seconds"])
    return config.folder


def train_step(
    training: Training,
    batches: list[Any],
    optimizer: torch.optim.Optimizer,
    step: int,
    config: TrainConfig,
    device: torch.device,
) -> dict[str, float]:
    """One optimizer step over the micro-batches of one global batch; returns what to log.

    Every micro-batch's loss is already a share of the global one, so gradients add up to the whole batch's.

    Raises:
        FloatingPointError: for a loss or gradient that is not finite; the step is not applied.
    """
    totals: Counter[str] = Counter()
    for group in optimizer.param_groups:
        group["lr"] = lr_at(step, config)
    training.module.train()
    for batch in batches:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            losses = training.losses(batch.to(device))
        losses.loss.backward()
        totals.update({name: value.item() for name, value in losses.parts.items()})
    norm = nn.utils.clip_grad_norm_(_learning(training.module), config.clip).item()
    if not all(map(torch.isfinite, map(torch.tensor, (*totals.values(), norm)))):
        found = f"loss {dict(totals)} or gradient norm {norm}"
        raise FloatingPointError(f"step {step}: {found} is not finite: lower train.lr")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {**totals, "norm": norm, "lr": lr_at(step, config)}


def _data_row(given: StepBatches, tally: SkipTally) -> dict[str, float]:
    """What the log says of a step's data: share of places that are no padding, samples skipped so far by cause."""
    row: dict[str, float] = {f"skipped_{cause.replace(' ', '_')}": n for cause, n in sorted(tally.causes.items())}
    return {**({"real_tokens": given.real_tokens / given.all_tokens} if given.all_tokens else {}), **row}


def _learning(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def save(
    config: RunConfig,
    training: Training,
    optimizer: torch.optim.Optimizer,
    average: AveragedWeights,
    step: int,
    seconds: float,
) -> None:
    """Write ``model/`` with the averaged weights in place, then ``state/``.

    In this order, because the state says how far the run is: killed in between, it goes back a little and writes both.
    """
    licences = [entry for s in config.data.sources for entry in open_dataset(s.path).licences]
    record = {
        "name": config.name,
        "steps": step,
        "samples": step * config.train.batch_size,
        "seconds": round(seconds, 1),
        "device": config.device if config.device != "auto" else str(pick_device()),
        "data": [source.path for source in config.data.sources],
        "licences": licences,
    }
    with average.applied():
        write_folder(
            config.folder / "model", config.model, training.parts, training.tokenizer, config.model.start, record
        )
    progress = {"step": step, "seconds": seconds}
    save_state(config.folder / "state", training.module, optimizer, average, progress)


class Clock:
    """Seconds of training, those before an interruption included."""

    def __init__(self, before: float) -> None:
        self.start = time.monotonic() - before

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return time.monotonic() - self.start


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM arrives; outside the main thread no signal is caught."""
    caught: list[int] = []
    try:
        numbers = (signal.SIGINT, signal.SIGTERM)
        before = {s: signal.signal(s, lambda number, frame: caught.append(number)) for s in numbers}
    except ValueError:
        yield caught
        return
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
