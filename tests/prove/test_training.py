"""Proofs about training: many processes in groups, kills at any moment, two hundred kills of saves."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import kill_while_saving
from together import launch

from open_pisces.recipe import TRAININGS, load_config
from open_pisces.train import log
from open_pisces.train.checkpoint import find
from open_pisces.train.log import Metrics
from open_pisces.train.loop import start, train
from open_pisces.train.world import World

pytestmark = pytest.mark.prove
LOSSES = ("text", "vectors", "diffusion", "contrastive", "mae", "norm")
MIXTURE = (
    "data.sources=[{path: fixture/train, weight: 0.7, tasks: {generate_short: 1.0, question: 1.0}}, "
    "{path: fixture/pairs, weight: 0.3, take: 30, tasks: {caption_detailed: 1.0, caption_short: 0.5}}]"
)
PACKED = ["data.row_length=512", "data.rows=1", "data.workers=2", "train.batch_size=6", "train.accumulate=1"]


def settings(runs: Path, name: str, *more: str) -> list[str]:
    before = TRAININGS[TRAININGS.index(name) - 1]
    return [f"model.start={runs / before / 'model'}", "train.save_every=10000", "train.probe_every=10000", *more]


def apart(one: Path, other: Path) -> list[float]:
    """The largest relative difference of the losses and the norm of each step."""
    rows = zip(Metrics.read(one), Metrics.read(other), strict=True)
    return [max(abs(a[k] - b[k]) / max(abs(a[k]), 1e-12) for k in set(a) & set(LOSSES)) for a, b in rows]


@pytest.mark.parametrize("name", ["gen_clip", "decoder", "stage3"])
def test_four_processes_in_two_groups_train_as_one_does(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Callable[..., None], name: str
) -> None:
    """HSDP 2 x 2: float64 to 1e-9 over 20 steps, float32 to 1e-5 at the first step and 1e-3 at the 50th."""
    monkeypatch.setattr(log, "LOG_EVERY", 1)
    bounds, figures = {"fp64": 20, "fp32": 50}, {}
    for precision, steps in bounds.items():
        over = settings(runs, name, f"train.precision={precision}", f"train.steps={steps}", "train.batch_size=8")
        spread = ["train.replicas=2", "train.accumulate=2"]
        for code, told in launch(tmp_path, [(precision, f"nano/{name}", [*over, *spread], "")], ranks=4, wait=900):
            assert code == 0, told[-3000:]
        alone = train(load_config(f"nano/{name}", [*over, "train.accumulate=1", f"out={tmp_path}/one"]), probes=())
        figures[precision] = apart(alone, tmp_path / precision)
        alone.rename(tmp_path / f"one-{precision}")
    assert max(figures["fp64"]) < 1e-9
    assert figures["fp32"][0] < 1e-5 and figures["fp32"][-1] < 1e-3
    record(**{f"{name}_fp64_20_steps": max(figures["fp64"]), f"{name}_fp32_step_1": figures["fp32"][0],
              f"{name}_fp32_step_50": figures["fp32"][-1]})  # fmt: skip


def test_a_run_goes_on_at_one_two_four_and_one_processes(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, record: Callable[..., None]
) -> None:
    """The losses are those of a run that was never cut, which other batches would not give."""
    monkeypatch.setattr(log, "LOG_EVERY", 1)
    over = [*settings(runs, "stage3", MIXTURE, "train.precision=fp64"), *PACKED]
    cuts = [(1, 8), (2, 16), (4, 24), (1, 32)]
    for ranks, steps in cuts:
        until = [*over, f"train.steps={steps}"]
        if ranks == 1:
            train(load_config("nano/stage3", [*until, f"out={tmp_path / 'cut'}"]), probes=())
        else:
            for code, told in launch(tmp_path, [("cut", "nano/stage3", until, "")], ranks, wait=900):
                assert code == 0, told[-3000:]
    whole = train(load_config("nano/stage3", [*over, "train.steps=32", f"out={tmp_path / 'whole'}"]), probes=())
    most = max(apart(whole, tmp_path / "cut"))
    assert most < 1e-9
    record(processes=[ranks for ranks, _ in cuts], steps=32, largest_relative_difference=most)


def test_compiled_blocks_of_two_processes_train_as_eager_ones(
    runs: Path, tmp_path: Path, record: Callable[..., None]
) -> None:
    """Float32, packed rows that change in number, activations of matrix products kept."""
    over = [*settings(runs, "stage3", "train.steps=5", "train.checkpointing=selective"), *PACKED]
    cases = [(f"compile-{on}", "nano/stage3", [*over, f"train.compile={on}"], "") for on in ("true", "false")]
    for code, told in launch(tmp_path, cases, wait=900):
        assert code == 0, told[-3000:]
    most = max(apart(tmp_path / "compile-false", tmp_path / "compile-true"))
    assert most < 1e-4
    record(steps=5, largest_relative_difference=most)


def test_a_restart_by_torchrun_resumes_by_itself(runs: Path, tmp_path: Path, record: Callable[..., None]) -> None:
    """One process kills itself at step 7; torchrun starts both again, they go on from step 5."""
    over = settings(runs, "stage1", "train.steps=10", "train.save_every=5", "train.save_async=false")
    (tmp_path / "cases.json").write_text(json.dumps([["run", "nano/stage1", over, "once 1 7"]]))
    script = Path(__file__).parents[1] / "together.py"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    subprocess.run([sys.executable, *torchrun, str(script), str(tmp_path)], check=True, timeout=600)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [(event["event"], event["step"]) for event in events] == [("resumed", 5)]
    assert progress(tmp_path / "run") == 10
    record(died_at=7, resumed_at=5)


def state(config: Any) -> dict[str, torch.Tensor]:
    run = start(config, World(torch.device("cpu")))
    run.checkpoints.close()
    return run.tensors


def test_kills_anywhere_change_no_bit_of_what_comes_fifty_steps_later(
    runs: Path, tmp_path: Path, record: Callable[..., None]
) -> None:
    """kill -9 of the whole training at random moments, with a mixture, packing and two workers."""
    steps, chance, kills = 60, random.Random(3), 0
    over = [
        *settings(runs, "stage3", MIXTURE, "train.ema=0.9"),
        *PACKED,
        f"train.steps={steps}",
        "train.save_every=5",
    ]
    whole, killed = (load_config("nano/stage3", [*over, f"out={tmp_path / name}"]) for name in ("whole", "killed"))
    command = [sys.executable, "-m", "open_pisces", "train", "nano/stage3", *over]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, f"out={whole.folder}"], env=environment, check=True, stdout=subprocess.DEVNULL)
    while True:
        process = subprocess.Popen(
            [*command, f"out={killed.folder}"], env=environment, start_new_session=True, stdout=subprocess.DEVNULL
        )
        reached = progress(killed.folder)
        target = reached + chance.randint(1, 7) if kills < 6 else steps + 1
        while process.poll() is None and progress(killed.folder) < min(target, steps - 1):
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.5))
        if process.poll() is not None or kills >= 6:
            assert process.wait() == 0
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    one, other = state(whole), state(killed)
    differ = [name for name, value in one.items() if not torch.equal(value, other[name])]
    assert not differ and kills >= 4
    record(kills=kills, steps=steps, tensors=len(one), tensors_that_differ=len(differ))


def progress(folder: Path) -> int:
    """The step of the newest checkpoint."""
    steps = [int(place.name.split("-")[1]) for place in (folder / "state").glob("step-*")]
    return max(steps, default=0)


def test_two_hundred_kills_of_saves_leave_a_good_checkpoint(tmp_path: Path, record: Callable[..., None]) -> None:
    """Half of them in the background; every time the next process resumes from one that is verified."""
    figures = kill_while_saving(tmp_path, 200, seed=7, most=0.5)
    assert figures["fewest_good"] >= 1 and find(tmp_path)
    record(**figures)
