"""``pisces plan``: what a training needs, before anything is fetched: memory of each GPU, time, disk.

A training that does not fit gets a remedy: settings, or a number of GPUs, each of which has been counted.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from open_pisces.config import RunConfig
from open_pisces.plan.layout import GIB, PACKED, PADDED, RESERVE, TEXTS, Layout, PlanError, count_parameters
from open_pisces.train.objectives import costs_of, skeleton

MOST_GPUS = 4096
"""The search for a sufficient number of GPUs ends here."""


def gpu_facts(name: str) -> dict[str, float]:
    """``tflops`` and ``gib`` of a GPU in ``gpus.yaml``.

    Raises:
        PlanError: for an unknown name; it lists the known ones.
    """
    known = yaml.safe_load((Path(__file__).parent / "gpus.yaml").read_text())
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise PlanError(f"no GPU {name!r}: {hint}known are {', '.join(known)}")
    return known[name]


def plan(
    config: RunConfig, gpus: int, gpu: str = "h100", utilisation: float = 0.4, picture_kb: float = 100.0
) -> dict[str, Any]:
    """What a training needs on ``gpus`` GPUs.

    Args:
        config: the recipe.
        gpus: how many, one process each.
        gpu: a name in ``gpus.yaml``.
        utilisation: share of the GPU's dense bfloat16 peak that a step reaches (MFU).
        picture_kb: assumed size of a picture's file.

    Returns:
        Plain data: ``parts``, ``memory_gib`` of one GPU, ``host_gib`` of a machine, ``step``, ``run``, ``disk_gb``,
        ``assumed``, ``fits``, and if it does not fit ``too_much_gib`` and ``remedy``.

    Raises:
        PlanError: for an unknown GPU, or a number that the recipe cannot be spread over.
    """
    facts = gpu_facts(gpu)
    layout = Layout(config, gpus, skeleton(config))
    memory = {name: size / GIB for name, size in asdict(layout.memory).items()}
    memory["total"] = layout.total_gib
    result: dict[str, Any] = {
        "recipe": config.name,
        "gpus": gpus,
        "gpu": gpu,
        "replicas": config.train.replicas,
        "parts": _parts(layout.module),
        "memory_gib": memory,
        "gpu_gib": facts["gib"],
        # Before a model is sharded, rank 0 holds it in its machine's memory, at most in float32; no other rank does.
        "host_gib": 4 * count_parameters(layout.module) / GIB,
        **_work(layout, facts["tflops"] * 1e12 * utilisation),
        "disk_gb": _disk(layout, picture_kb),
        "assumed": _assumed(layout, utilisation, picture_kb),
        "fits": layout.total_gib <= facts["gib"],
    }
    if not result["fits"]:
        result["too_much_gib"] = layout.total_gib - facts["gib"]
        result["remedy"] = remedy(layout, facts["gib"])
    return result


def refusal(result: dict[str, Any]) -> str:
    """One line about a plan that does not fit."""
    where = f"{result['recipe']} does not fit on {result['gpus']} x {result['gpu']}"
    found = f"{result['memory_gib']['total']:.1f} GiB of {result['gpu_gib']:.1f}, {result['too_much_gib']:.1f} too many"
    return f"{where}: {found}: {result['remedy']}"


# ------------------------------------------------------------------------------------------------ parts of the result


def _parts(module: nn.Module) -> dict[str, dict[str, int]]:
    """Parameters of every part that has some, and how many of them learn."""
    counts = {
        name: {"parameters": count_parameters(part), "learning": count_parameters(part, learning=True)}
        for name, part in module.named_children()
    }
    return {name: row for name, row in counts.items() if row["parameters"]}


def _work(layout: Layout, rate: float) -> dict[str, Any]:
    """``step`` and ``run``: what they compute, and how long that takes at ``rate`` FLOP/s of one GPU."""
    settings = layout.config.train
    by_part = costs_of(layout.module, layout.config).by_part(layout.counts)
    flops = sum(by_part.values())
    seconds = flops / (rate * layout.gpus)
    step: dict[str, Any] = {"samples": settings.batch_size, "micro_batches": layout.micro_batches}
    if layout.has_sequences:
        step["tokens"] = settings.batch_size * layout.mean.tokens
        step["tokens_per_sample"] = layout.mean.tokens
        step["row_length"] = layout.row_length
    step |= {"flops": flops, "flops_by_part": by_part, "seconds": seconds}
    run = {
        "steps": settings.steps,
        "samples": settings.steps * settings.batch_size,
        "flops": flops * settings.steps,
        "days": seconds * settings.steps / 86_400,
        "gpu_hours": seconds * settings.steps * layout.gpus / 3600,
    }
    return {"step": step, "run": run}


def _disk(layout: Layout, picture_kb: float) -> dict[str, float]:
    """GB on disk of one checkpoint, of all that are kept, of the model folder; and GB of pictures that are read."""
    settings = layout.config.train
    learning = count_parameters(layout.module, learning=True)
    checkpoint = (12 + 4 * bool(settings.ema)) * learning / 1e9  # float32: weights, two moments, their average
    pictures = settings.steps * settings.batch_size
    return {
        "checkpoint": checkpoint,
        "checkpoints_kept": settings.keep * checkpoint,
        "model": 4 * learning / 1e9,
        "data_read": pictures * picture_kb * 1e3 / 1e9,
    }


def _assumed(layout: Layout, utilisation: float, picture_kb: float) -> list[str]:
    """The assumptions behind the figures, in words."""
    found = [
        f"{utilisation:.0%} of the GPU's dense bfloat16 peak",
        f"{picture_kb:g} kB a picture",
        f"{RESERVE:g} GiB of a GPU for what no tensor shows",
    ]
    if layout.has_sequences:
        tasks: set[str] = set()
        for source in layout.config.data.sources:
            tasks.update(source.tasks)
        found += [f"{TEXTS[task][0]} tokens of text in {task}" for task in sorted(tasks)]
        found.append(f"rows {PACKED if layout.is_packed else PADDED:.0%} full")
    return found


# ------------------------------------------------------------------------------------------------------ what to change


def remedy(layout: Layout, gib: float) -> str:
    """Changes that make a training fit into ``gib`` GiB a GPU, in words; each one has been counted.

    Settings that are enough alone; else the cheapest that are enough together. And the least number of GPUs that is
    enough, alone or with settings.
    """
    if layout.irreducible_gib > gib:
        return f"no setting helps, {layout.irreducible_gib:.1f} GiB do not shrink: take a GPU with more memory"
    alone: dict[str, str] = {}
    for setting, other in _candidates(layout, gib):
        key = setting.partition("=")[0]
        if key not in alone and other.total_gib <= gib:
            alone[key] = f"{setting} ({other.total_gib:.1f} GiB)"
    found = list(alone.values())
    if not found and (together := _combine(layout, gib)):
        found = [together]
    for gpus in _more_gpus(layout):
        other = layout.changed(gpus=gpus)
        if other.total_gib <= gib:
            found.append(f"--gpus {gpus} ({other.total_gib:.1f} GiB)")
            break
        # Settings on top of more GPUs are only worth saying if settings alone are not enough.
        if not found and (together := _combine(other, gib)):
            found.append(f"--gpus {gpus} and {together}")
            break
    return "set " + ", or ".join(found) if found else "no setting helps: take a GPU with more memory"


def _combine(layout: Layout, gib: float) -> str:
    """Several settings that are enough together, added in the order of their cost; "" if all of them are not."""
    chosen: dict[str, str] = {}
    while (total := layout.total_gib) > gib:
        step = _first_that_helps(_candidates(layout, gib), total)
        if step is None:
            return ""
        setting, layout = step
        chosen[setting.partition("=")[0]] = setting  # a later value of the same key replaces the earlier one
    return f"{' and '.join(chosen.values())} ({total:.1f} GiB)"


def _first_that_helps(candidates: Iterable[tuple[str, Layout]], total: float) -> tuple[str, Layout] | None:
    """The first change that saves more than 1 % of ``total`` GiB."""
    for setting, layout in candidates:
        if layout.total_gib < 0.99 * total:
            return setting, layout
    return None


def _more_gpus(layout: Layout) -> Iterator[int]:
    """Twice as many, again and again, as long as each has a sample."""
    gpus = 2 * layout.gpus
    while gpus <= min(MOST_GPUS, layout.config.train.batch_size):
        yield gpus
        gpus *= 2


def _candidates(layout: Layout, gib: float) -> Iterator[tuple[str, Layout]]:
    """Settings that may take less memory, with the layout that each gives; those that cost least time come first."""
    settings = layout.config.train
    if layout.gpus > 1 and layout.most_micro_batches > 1 and not settings.reduce_each:
        yield "train.reduce_each=true", layout.changed(reduce_each=True)
    if not layout.is_packed:
        yield from _more_micro_batches(layout, gib)
    elif layout.config.data.rows > 1:
        yield "data.rows=1", layout.changed(rows=1)
    kinds = ("none", "selective", "full")
    for kind in kinds[kinds.index(settings.checkpointing) + 1 :]:
        yield f"train.checkpointing={kind}", layout.changed(checkpointing=kind)
    if settings.shard_frozen_above and layout.gpus > 1:
        yield "train.shard_frozen_above=0", layout.changed(shard_frozen_above=0)
    if settings.replicas > 1:
        yield "train.replicas=1", layout.changed(replicas=1)


def _more_micro_batches(layout: Layout, gib: float) -> Iterator[tuple[str, Layout]]:
    """``train.accumulate`` raised by the power of two that is enough if memory grows linearly, and by twice that."""
    now = layout.config.train.accumulate
    most = int(layout.samples_per_gpu)
    memory = layout.memory
    grows = memory.activations + memory.working
    room = gib * GIB - (memory.total - grows)
    times = 2 ** math.ceil(math.log2(grows / room)) if 0 < room < grows else 2
    for accumulate in sorted({min(now * times, most), min(2 * now * times, most)}):
        if accumulate > now:
            yield f"train.accumulate={accumulate}", layout.changed(accumulate=accumulate)
