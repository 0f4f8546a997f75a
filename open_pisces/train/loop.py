"""The one loop behind every training: gen-CLIP, decoder, stages 1 to 3. They differ by their recipe only."""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from open_pisces.config import RunConfig
from open_pisces.data.loader import SkipTally
from open_pisces.data.prefetch import prefetch
from open_pisces.data.shards import open_dataset
from open_pisces.device import autocast
from open_pisces.errors import PiscesError
from open_pisces.model.folder import write_folder
from open_pisces.settings import ConfigError
from open_pisces.train.checkpoint import Checkpoints, load_latest, own_folder, read_progress, state_of
from open_pisces.train.flops import meta_copy
from open_pisces.train.log import Log, describe_run
from open_pisces.train.objectives import build_training, costs_of, skeleton
from open_pisces.train.objectives.base import Objective
from open_pisces.train.optim import AveragedWeights, build_optimizer, drop_gradients, lr_at, set_rate
from open_pisces.train.probes import Probe, probe
from open_pisces.train.resume import changed_settings, check_order, order_of
from open_pisces.train.sharding import checkpoint_activations, compile_parts, shard
from open_pisces.train.signals import Stop, stop_signals
from open_pisces.train.world import World, gather_full, join_world, reduce_gradients

LOSSES = ("text", "vectors", "diffusion", "contrastive", "mae")
"""What is watched for spikes."""
SPIKE_STEPS = 100


class BadStep(PiscesError, FloatingPointError):
    """A loss or gradient that is not finite, or a spike; the step was not applied."""


@dataclass
class Progress:
    """How far a run is, beside its tensors."""

    step: int = 0
    seconds: float = 0.0
    left_out: list[int] = field(default_factory=list)
    """Steps whose batches are not trained on."""
    recent: dict[str, list[float]] = field(default_factory=dict)
    """The last losses, to tell a spike by."""
    read: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    order: dict[str, Any] = field(default_factory=dict)
    """What the order of the samples is a function of (`resume.order_of`)."""


@dataclass
class Run:
    """The state of a running training."""

    config: RunConfig
    world: World
    training: Objective
    optimizer: torch.optim.Optimizer
    average: AveragedWeights
    checkpoints: Checkpoints
    log: Log
    copies: dict[str, nn.Module]
    progress: Progress
    probes: Sequence[Probe]
    licences: list[dict[str, Any]]
    """Of the data, for the model folder."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds."""
        return state_of(self.training.module, self.optimizer, self.average)


def is_done(config: RunConfig) -> bool:
    """Whether this training has run all its steps and left its model folder."""
    progress = read_progress(config.folder / "state")
    return progress is not None and progress["step"] >= config.train.steps and (config.folder / "model").is_dir()


def train(config: RunConfig, probes: Sequence[Probe] = (probe,)) -> Path:
    """Run one training, or continue it from its last checkpoint; returns the run folder.

    Under torchrun all ranks train together. SIGINT, SIGTERM and SIGUSR1 end it after the current step with
    everything saved; the same command then continues to the bit, with any number of ranks. The run folder holds
    ``model/`` (the model folder), ``state/`` (to resume), ``config.yaml``, ``versions.json``, ``metrics.jsonl``,
    ``events.jsonl``, ``tensorboard/`` and ``samples/``.

    Args:
        config: the recipe.
        probes: called every ``train.probe_every`` steps, to judge the run by looking.
    """
    with join_world(config) as world, own_folder(config.folder, world):
        run = start(config, world, probes)
        try:
            with stop_signals(config.train.grace) as stop, run.log:
                while not run_until_done(run, stop):
                    pass
                run.checkpoints.wait()
        finally:
            run.checkpoints.close()
    return config.folder


def start(config: RunConfig, world: World, probes: Sequence[Probe] = ()) -> Run:
    """Build everything, shard it, and load the last checkpoint."""
    settings = config.train
    training = build_training(config, world)
    module = training.module.double() if settings.precision == "fp64" else training.module
    # The order matters: copies and costs see the whole model; checkpointing and compilation come before sharding.
    if world.mesh is None:
        module.to(world.device)  # otherwise sharding takes it there block by block: a device never holds all of it
    copies = {name: meta_copy(part) for name, part in training.parts.items()}
    quantized = settings.lora is not None and settings.lora.bits == 4
    # Quantized layers cannot be counted: those of the same shapes are.
    costs = costs_of(skeleton(config) if quantized else module, config)
    checkpoint_activations(module, settings.checkpointing)
    if settings.compile and training.compiled is not None:
        # Padded lengths are few, each gets its own fast code; packed rows differ in number from step to step.
        compile_parts(training.compiled, world, dynamic=None if config.data.row_length else False)
    shard(module.train(), world, settings, training.weights)
    # After sharding: the optimizer's moments are shards like their weights.
    optimizer = build_optimizer(module, settings)
    average = AveragedWeights(module, settings.ema)
    state = config.folder / "state"
    found = load_latest(state, state_of(module, optimizer, average), world)
    progress = Progress(**found) if found else Progress()
    order = order_of(config, training.load.mixture)
    changed = _changes(config, progress.order, order, world) if found else []
    progress.order = order
    if world.is_first:
        describe_run(config.folder, config)
    log = Log(config, costs, world, progress.step, progress.seconds)
    if found:
        log.event(progress.step, "resumed", processes=world.ranks, changed=changed)
    checkpoints = Checkpoints(state, world, settings.keep, settings.save_async)
    named = list(chain.from_iterable(open_dataset(source.path).licences for source in config.data.sources))
    licences = [row for i, row in enumerate(named) if row not in named[:i]]  # datasets may share them
    return Run(config, world, training, optimizer, average, checkpoints, log, copies, progress, probes, licences)


def _changes(config: RunConfig, before: dict[str, Any], now: dict[str, Any], world: World) -> list[str]:
    """What differs from the run that is continued, said once; an order that changed needs consent.

    Raises:
        ConfigError: on all ranks, if there is none.
    """
    problem = ""
    changed = list[str]()
    if world.is_first:  # only its view counts: ranks on other machines may see the folder a little later
        try:
            changed = list(dict.fromkeys([*check_order(config, before, now), *changed_settings(config)]))
        except ConfigError as error:
            problem = str(error)
    problem = world.gather_objects(problem)[0]
    if problem:
        raise ConfigError(problem)
    if changed:
        print(f"pisces: {config.folder} goes on with other settings: {'; '.join(changed)}", file=sys.stderr)
    return changed


def run_until_done(run: Run, stop: Stop) -> bool:
    """Train until the last step. Returns False after a rewind: call it again."""
    settings = run.config.train
    progress = run.progress
    # A resumed run has already skipped some: the allowed share is of the whole run.
    tally = SkipTally(run.config.data.max_bad, progress.read)
    tally.causes.update(progress.skipped)
    left_out = set(progress.left_out)
    steps = [step for step in range(progress.step, settings.steps) if step not in left_out]
    read_ahead = prefetch(run.training.load, steps, workers=run.config.data.workers)
    if settings.lora and not progress.step:
        run_probes(run)  # what it could before it was tuned
    for step, given in zip(steps, run.log.waiting(read_ahead), strict=True):
        row: dict[str, float] = {}
        batches, whole, ended = run.world.equalize_micro_batches(given, run.training.load, stop.asked)
        tally.add(whole)
        progress.read = tally.read
        progress.skipped = dict(tally.causes)
        try:
            with run.world.name_missing_ranks():
                row = train_step(run, batches, step)
            # Only here: a step that was refused must not move the average.
            run.average.update(step)
        except BadStep as bad:
            if not handle_bad_step(run, step, bad):
                return False
        progress.step = step + 1
        run.log.step(step, row, batches, whole, tally.causes, last=progress.step == settings.steps)
        last = progress.step == settings.steps
        ended |= stop.asked and run.world.ranks == 1  # several have to hear of it first
        if last or progress.step % settings.probe_every == 0:
            run_probes(run)
        if last or ended or progress.step % settings.save_every == 0:
            save(run)
        if ended:
            run.log.event(progress.step, "stopped")
            return True
    if progress.step < settings.steps:  # the last ones are left out
        progress.step = settings.steps
        save(run)
    elif not steps and not run.world.gather([(run.config.folder / "model").is_dir()])[0][0]:
        save(run, progress.seconds)  # all steps are in the state, but model/ was taken away
    return True


# ---------------------------------------------------------------------------------------------------- a step


def train_step(run: Run, batches: list[Any], step: int) -> dict[str, float]:
    """One optimizer step over this rank's micro-batches of one global batch; returns what to log.

    Every micro-batch's loss is already a share of the global one, so gradients add up to the whole batch's.

    Raises:
        BadStep: for a loss or gradient that is not finite anywhere, or a spike; nothing has changed then.
    """
    training = run.training
    settings = run.config.train
    world = run.world
    floats = torch.float64 if settings.precision == "fp64" else None
    batches = [batch.to(world.device, floats) for batch in batches]
    parts: dict[str, Tensor] = {}
    # Outside the loop below: a contrastive loss compares all micro-batches before the first one's backward pass.
    with autocast(world.device, settings.precision == "bf16"):
        batches = training.prepare(batches)
    for number, batch in enumerate(batches):
        reduce_gradients(training.module, settings.reduce_each or number == len(batches) - 1)
        with autocast(world.device, settings.precision == "bf16"):
            losses = training.losses(batch)
        (losses.loss * world.ranks).backward()  # sharded gradients are averaged over ranks
        parts = {name: value + parts.get(name, 0) for name, value in losses.parts.items()}
    drop_gradients(training.idle(batches[0]))
    row = clip_and_sum(run, parts)
    # Every rank sees the same sums, so all of them skip the step or none does.
    why = check_step(run, row)
    if why:
        run.optimizer.zero_grad(set_to_none=True)
        raise BadStep(f"step {step}: {why}")
    rate = lr_at(step, settings)
    set_rate(run.optimizer, rate)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    remember_losses(run.progress, row)
    return {**row, "lr": rate}


def clip_and_sum(run: Run, parts: dict[str, Tensor]) -> dict[str, float]:
    """Clip the gradient; returns its norm and the losses summed over ranks, the same numbers on each."""
    learning = list(chain.from_iterable(group["params"] for group in run.optimizer.param_groups))
    norm = gather_full(nn.utils.clip_grad_norm_(learning, run.config.train.clip))
    names = sorted(parts)
    mine = torch.stack([norm.double(), *(parts[name].double() for name in names)]).tolist()
    norms, *columns = zip(*run.world.gather(mine), strict=True)
    sums = {name: sum(column) for name, column in zip(names, columns, strict=True)}
    return {**{name: sums[name] for name in parts}, "norm": norms[0]}


def check_step(run: Run, row: dict[str, float]) -> str:
    """Why a step must not be applied (not finite, or a spike), or ""."""
    odd = [name for name, value in row.items() if not math.isfinite(value)]
    if odd:
        return f"{odd[0]} is {row[odd[0]]}, not finite: lower train.lr"
    for name in LOSSES if run.config.train.spike else ():
        past = run.progress.recent.get(name, [])
        if name in row and len(past) >= SPIKE_STEPS // 5 and row[name] > run.config.train.spike * median(past):
            return f"{name} is {row[name]:.4g}, the median of the last {len(past)} steps is {median(past):.4g}"
    return ""


def remember_losses(progress: Progress, row: dict[str, float]) -> None:
    """Append a step's losses to the history that spikes are judged by."""
    for name in LOSSES:
        if name in row:
            progress.recent[name] = [*deque(progress.recent.get(name, []), SPIKE_STEPS - 1), row[name]]


def handle_bad_step(run: Run, step: int, bad: BadStep) -> bool:
    """Follow ``train.on_bad``: skip the batch (True), or rewind to the last checkpoint (False).

    Raises:
        BadStep: if the settings say so, or it happens too often.
    """
    settings = run.config.train
    names = run.training.load.mixture.names(step, run.config.train.batch_size)
    run.log.event(step, "bad step", why=str(bad), policy=settings.on_bad, samples=names)
    left_out = sorted({*run.progress.left_out, step})
    if settings.on_bad == "fatal" or len(left_out) > settings.max_bad_steps:
        raise BadStep(f"{bad} (its samples: {run.config.folder / 'events.jsonl'}; train.on_bad = {settings.on_bad})")
    run.progress.left_out = left_out
    if settings.on_bad == "skip":
        return True
    run.checkpoints.wait()
    found = load_latest(run.config.folder / "state", run.tensors, run.world)
    if found is None:
        raise BadStep(f"{bad}: there is no checkpoint yet to go back to (train.on_bad = rewind)")
    run.progress = Progress(**{**found, "left_out": sorted({*found["left_out"], *left_out})})
    run.log.rewind(run.progress.step, run.progress.seconds)
    return False


# ---------------------------------------------------------------------------------------------- look and save


def run_probes(run: Run) -> None:
    """Call the probes on the averaged weights."""
    # Eager: a cache grows by one place a token, and each length would be compiled anew.
    with run.average.applied(), torch.compiler.set_stance("force_eager"):
        for each in run.probes:
            each(run.config, run.training, run.config.folder / "samples", run.progress.step, run.world)
    run.training.module.train()


def save(run: Run, seconds: float | None = None) -> None:
    """Write ``model/`` with the averaged weights in it, then the checkpoint.

    In this order, because the checkpoint says how far the run is: killed in between, it goes back a little and writes
    both.
    """
    config = run.config
    progress = run.progress
    progress.seconds = round(run.log.seconds if seconds is None else seconds, 2)
    run.checkpoints.wait()
    averages = run.average.by_parameter()
    for name, part in run.training.parts.items():
        fill_weights(run.copies[name], part, averages, run.world, learning_only=name == "adapter")
    record = training_record(run)

    def write_model() -> None:
        write_folder(
            config.folder / "model", config.model, run.copies, run.training.tokenizer, config.model.start, record
        )

    run.checkpoints.save(progress.step, run.tensors, asdict(progress), write_model)


@torch.no_grad()
def fill_weights(
    copy: nn.Module, part: nn.Module, averages: dict[int, Tensor], world: World, learning_only: bool = False
) -> None:
    """Copy a part's full weights, averaged where there are averages, into its CPU copy on rank 0.

    The first call allocates the copy's memory; later calls reuse it, to keep the pause for a checkpoint short.
    ``learning_only`` leaves out what is frozen: the base of an adapter is not written, and may be large.
    """
    places: dict[str, Tensor] = copy.state_dict(keep_vars=True)
    done: dict[int, Tensor] = {}
    for name, value in part.state_dict(keep_vars=True).items():
        if learning_only and (name not in places or (isinstance(value, nn.Parameter) and not value.requires_grad)):
            continue  # quantized weights have scales beside them that the copy has not
        if id(value) not in done:
            whole = gather_full(averages.get(id(value), value.detach()))
            if world.is_first and not places[name].is_meta:
                places[name].copy_(whole)
            elif world.is_first:
                done[id(value)] = whole.to("cpu", copy=True)
        places[name] = done.setdefault(id(value), places[name])
    if world.is_first:
        copy.load_state_dict(places, assign=True)


def training_record(run: Run) -> dict[str, Any]:
    """What the model folder says of this training."""
    config = run.config
    progress = run.progress
    done = progress.step - len([step for step in progress.left_out if step < progress.step])
    return {
        "name": config.name,
        "steps": done,
        "samples": done * config.train.batch_size,
        "seconds": round(progress.seconds, 1),
        "device": f"{run.world.ranks} x {run.world.device.type}" if run.world.ranks > 1 else str(run.world.device),
        "data": [source.path for source in config.data.sources],
        "tasks": sorted(set().union(*(source.tasks for source in config.data.sources))),
        "licences": run.licences,
    }
