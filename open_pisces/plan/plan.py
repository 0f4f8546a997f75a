"""What a training will take, before anything is fetched: memory of each GPU, time, disk; and what to change if it is
too much (``pisces plan``)."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from open_pisces.config import RunConfig
from open_pisces.plan.layout import GIB, PACKED, PADDED, RESERVE, TEXTS, Layout, PlanError
from open_pisces.train.objectives import costs_of, skeleton

MOST_GPUS = 4096
"""Where the search for a number of GPUs that is enough ends."""


def gpu_facts(name: str) -> dict[str, float]:
    """``tflops`` and ``gib`` of a GPU in ``gpus.yaml``; a `PlanError` lists what there is."""
    known = yaml.safe_load((Path(__file__).parent / "gpus.yaml").read_text())
    if name not in known:
        near = difflib.get_close_matches(name.lower(), known, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise PlanError(f"no GPU {name!r}: {hint}known are {', '.join(known)}")
    return known[name]


def plan(
    config: RunConfig, gpus: int, gpu: str = "h100", utilisation: float = 0.4, picture_kb: float = 100.0
) -> dict[str, Any]:
    """What a training needs on so many GPUs.

    Args:
        config: the recipe.
        gpus: how many, one process each.
        gpu: a name in ``gpus.yaml``.
        utilisation: share of its dense bfloat16 peak that a step reaches (MFU).
        picture_kb: assumed size of a picture's file.

    Returns:
        Plain data: ``parts``, ``memory_gib`` of one GPU, ``host_gib`` of a machine, ``step``, ``run``, ``disk_gb``,
        ``assumed``, ``fits``, and if it does not fit ``too_much_gib`` and ``remedy``.

    Raises:
        PlanError: for an unknown GPU, or a number that the recipe cannot be spread over.
    """
    facts, layout = gpu_facts(gpu), Layout(config, gpus, skeleton(config))
    memory = layout.memory
    result: dict[str, Any] = {
        "recipe": config.name,
        "gpus": gpus,
        "gpu": gpu,
        "replicas": config.train.replicas,
        "parts": dict(_parts(layout.module)),
        "memory_gib": {**{name: size / GIB for name, size in asdict(memory).items()}, "total": memory.total / GIB},
        "gpu_gib": facts["gib"],
        "host_gib": _host(layout),
        **_work(layout, facts["tflops"] * 1e12 * utilisation),
        "disk_gb": _disk(layout, picture_kb),
        "assumed": _assumed(layout, utilisation, picture_kb),
    }
    result["fits"] = result["memory_gib"]["total"] <= facts["gib"]
    if not result["fits"]:
        too_much = result["memory_gib"]["total"] - facts["gib"]
        result |= {"too_much_gib": too_much, "remedy": remedy(layout, facts["gib"])}
    return result


def refusal(result: dict[str, Any]) -> str:
    """One line about a plan that does not fit."""
    where = f"{result['recipe']} does not fit on {result['gpus']} x {result['gpu']}"
    found = f"{result['memory_gib']['total']:.1f} GiB of {result['gpu_gib']:.1f}, {result['too_much_gib']:.1f} too many"
    return f"{where}: {found}: {result['remedy']}"


# ---------------------------------------------------------------------------------------------------------- its rows


def _parts(module: nn.Module) -> Iterator[tuple[str, dict[str, int]]]:
    """Parameters of every part, and how many of them learn."""
    for name, part in module.named_children():
        parameters = list(part.parameters())
        if parameters:
            learning = sum(p.numel() for p in parameters if p.requires_grad)
            yield name, {"parameters": sum(p.numel() for p in parameters), "learning": learning}


def _host(layout: Layout) -> float:
    """GiB of the first machine's memory before a model is sharded: rank 0 holds it in float32, no other rank does."""
    return 4 * sum(p.numel() for p in layout.module.parameters()) / GIB


def _work(layout: Layout, rate: float) -> dict[str, Any]:
    """What a step and the run do, and how long they take at ``rate`` FLOP/s of one GPU."""
    counts, settings = layout.counts, layout.config.train
    by_part = costs_of(layout.module, layout.config).by_part(counts)
    flops = sum(by_part.values())
    seconds, steps = flops / (rate * layout.gpus), settings.steps
    step: dict[str, Any] = {"samples": settings.batch_size, "micro_batches": layout.micro_batches}
    if layout.has_sequences:
        step |= {"tokens": settings.batch_size * layout.mean.tokens, "tokens_per_sample": layout.mean.tokens}
        step |= {"row_length": layout.row_length}
    step |= {"flops": flops, "flops_by_part": by_part, "seconds": seconds}
    run = {"steps": steps, "samples": steps * settings.batch_size, "flops": flops * steps}
    run |= {"days": seconds * steps / 86_400, "gpu_hours": seconds * steps * layout.gpus / 3600}
    return {"step": step, "run": run}


def _disk(layout: Layout, picture_kb: float) -> dict[str, float]:
    """GB on disk: weights and two moments of what learns, its average; the model folder; what is read of the data."""
    settings, module = layout.config.train, layout.module
    learning = sum(p.numel() for p in module.parameters() if p.requires_grad)
    checkpoint = (12 + 4 * bool(settings.ema)) * learning / 1e9
    pictures = layout.config.train.steps * settings.batch_size
    return {
        "checkpoint": checkpoint,
        "checkpoints_kept": settings.keep * checkpoint,
        "model": 4 * learning / 1e9,
        "data_read": pictures * picture_kb * 1e3 / 1e9,
    }


def _assumed(layout: Layout, utilisation: float, picture_kb: float) -> list[str]:
    found = [f"{utilisation:.0%} of the GPU's dense bfloat16 peak", f"{picture_kb:g} kB a picture"]
    found.append(f"{RESERVE:g} GiB of a GPU for what no tensor shows")
    if layout.has_sequences:
        tasks = sorted({task for source in layout.config.data.sources for task in source.tasks})
        found += [f"{TEXTS[task][0]} tokens of text in {task}" for task in tasks]
        found += [f"rows {PACKED if layout.config.data.row_length else PADDED:.0%} full"]
    return found


# ------------------------------------------------------------------------------------------------------ what to change


def remedy(layout: Layout, gib: float) -> str:
    """Changes that make a training fit into so many GiB: settings that are enough alone or else together, or more GPUs.

    Everything it names has been counted.
    """
    if layout.least / GIB > gib:
        return f"no setting helps, {layout.least / GIB:.1f} GiB do not shrink: take a GPU with more memory"
    alone: dict[str, str] = {}
    for words, other in _changes(layout, gib):
        if _key(words) not in alone and (total := _total(other)) <= gib:
            alone[_key(words)] = f"{words} ({total:.1f} GiB)"
    found = list(alone.values()) or [words for words in [_together(layout, gib)] if words]
    for other in (layout.but(gpus=gpus) for gpus in _more_gpus(layout)):
        total = _total(other)
        words = f"({total:.1f} GiB)" if total <= gib else "" if found else _together(other, gib)
        if words:
            found.append(f"--gpus {other.gpus} {'' if total <= gib else 'and '}{words}")
            break
    return "set " + ", or ".join(found) if found else "no setting helps: take a GPU with more memory"


def _together(layout: Layout, gib: float) -> str:
    """Several settings that are enough, those first that cost least; nothing if all together are not."""
    together: dict[str, str] = {}
    while (total := _total(layout)) > gib:
        helps = ((words, other) for words, other in _changes(layout, gib) if _total(other) < 0.99 * total)
        words, layout = next(helps, ("", layout))
        if not words:
            return ""
        together[_key(words)] = words
    return f"{' and '.join(together.values())} ({total:.1f} GiB)"


def _key(words: str) -> str:
    return words.partition("=")[0]


def _total(layout: Layout) -> float:
    return layout.memory.total / GIB


def _more_gpus(layout: Layout) -> Iterator[int]:
    """Twice as many, again and again, as long as every one has a sample."""
    gpus = 2 * layout.gpus
    while gpus <= min(MOST_GPUS, layout.config.train.batch_size):
        yield gpus
        gpus *= 2


def _changes(layout: Layout, gib: float) -> Iterator[tuple[str, Layout]]:
    """Settings that may take less memory, those first that cost least."""
    settings, data = layout.config.train, layout.config.data
    if layout.gpus > 1 and layout.most_micro_batches > 1 and not settings.reduce_each:
        yield "train.reduce_each=true", layout.but(reduce_each=True)
    if layout.has_sequences and data.row_length:
        if data.rows > 1:
            yield "data.rows=1", layout.but(rows=1)
    else:
        yield from _smaller(layout, gib)
    kinds = ("none", "selective", "full")
    for kind in kinds[kinds.index(settings.checkpointing) + 1 :]:
        yield f"train.checkpointing={kind}", layout.but(checkpointing=kind)
    if settings.shard_frozen_above and layout.gpus > 1:
        yield "train.shard_frozen_above=0", layout.but(shard_frozen_above=0)
    if settings.replicas > 1:
        yield "train.replicas=1", layout.but(replicas=1)


def _smaller(layout: Layout, gib: float) -> Iterator[tuple[str, Layout]]:
    """More and smaller micro-batches: as many as seem enough if memory grows with their size, and twice as many."""
    now, most = layout.config.train.accumulate, int(layout.samples)
    memory = layout.memory
    grows = memory.activations + memory.working
    room = gib * GIB - (memory.total - grows)
    times = 2 ** math.ceil(math.log2(grows / room)) if 0 < room < grows else 2
    for accumulate in sorted({min(now * times, most), min(2 * now * times, most)}):
        if accumulate > now:
            yield f"train.accumulate={accumulate}", layout.but(accumulate=accumulate)
