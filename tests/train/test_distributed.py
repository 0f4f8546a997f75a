"""Several processes against one: the same losses, the same weights; and what happens when one of them fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import start_of
from PIL import Image
from safetensors.torch import load_file
from together import PROBED, Case, launch
from torch import Tensor

from open_pisces.data.order import Mixture
from open_pisces.recipe import load_config
from open_pisces.settings import ConfigError
from open_pisces.train import log, probes
from open_pisces.train.checkpoint import faults, find
from open_pisces.train.log import Metrics
from open_pisces.train.loop import train
from open_pisces.train.objectives import build_training
from open_pisces.train.sharding import split_frozen
from open_pisces.train.world import World

pytestmark = pytest.mark.timeout(900)  # two processes beside another worker's tests, on two cores

STEPS = 8
"""In float64 a fault shows at the first step that has it; these hold several of each kind."""

DOUBLE = ["train.precision=fp64", f"train.steps={STEPS}", "train.save_every=1000", "train.ema=0.9"]
PACKED = ["data.row_length=512", "data.rows=1", "train.batch_size=6"]
CASES = {
    "understanding_clip": ("understanding_clip", ["train.batch_size=6"], []),
    "gen_clip": ("gen_clip", ["train.batch_size=8"], ["train.accumulate=2"]),
    "decoder": ("decoder", [], ["train.accumulate=2"]),
    "stage1": ("stage1", ["train.weight_decay=0.1"], ["train.accumulate=2"]),
    "stage2": ("stage2", [], ["train.shard_frozen_above=0", "train.reduce_each=true"]),
    "stage3": ("stage3", PACKED, ["train.checkpointing=selective"]),
    "full": ("stage3", PACKED, ["train.checkpointing=full", "train.shard_frozen_above=0"]),
    "muon": ("stage3", [*PACKED, "train.optimizer=muon", "loss.history_noise=0.9"], []),
    "flow": ("stage3", ["model.bridge.head=flow", "model.bridge.flow_width=16"], ["train.accumulate=2"]),
    "noisy": ("decoder", ["diffusion.noisy=0.8", "train.optimizer=muon"], []),
    "probed": ("decoder", [], ["train.shard_frozen_above=0", "train.checkpointing=full"]),
}
"""Every objective, and every way of spreading it: recipe, what one process does as well, what only two do."""


def case(runs: Path, name: str, recipe: str, *overrides: str, fault: str = "") -> Case:
    return name, f"nano/{recipe}", [*start_of(runs, recipe), *DOUBLE, *overrides], fault


@pytest.fixture(scope="module")
def together(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All cases by two processes."""
    folder = tmp_path_factory.mktemp("two")
    told = [case(runs, name, recipe, *both, *spread) for name, (recipe, both, spread) in CASES.items()]
    for code, text in launch(folder, told):
        assert code == 0, text[-3000:]
    return folder


@pytest.fixture(scope="module")
def alone(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a case by one process, undivided; one run serves cases that differ only in how two share it."""
    folder = tmp_path_factory.mktemp("one")

    def run(name: str) -> Path:
        recipe, both, _ = CASES[name]
        # Cases that differ only in how two processes share them have the run of one in common.
        own = recipe if not set(both) - set(PACKED) or name == recipe else name
        plain = ["train.accumulate=1", "train.checkpointing=none", f"out={folder / own}"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(log, "LOG_EVERY", 1)
            # Does nothing if it is done.
            return train(load_config(f"nano/{recipe}", [*start_of(runs, recipe), *DOUBLE, *both, *plain]), probes=())

    return run


def weights(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in sorted((folder / "model").rglob("*.safetensors")):
        found |= {f"{file.relative_to(folder)}/{name}": value for name, value in load_file(file).items()}
    return found


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_as_one_does(together: Path, alone: Callable[[str], Path], name: str) -> None:
    single = alone(name)
    one, two = Metrics.read(single), Metrics.read(together / name)
    assert [row["step"] for row in one] == [row["step"] for row in two] == list(range(STEPS))
    for row, other in zip(one, two, strict=True):
        for key in set(row) & {"text", "vectors", "diffusion", "contrastive", "retrieval", "mae", "norm", "lr"}:
            assert other[key] == pytest.approx(row[key], rel=1e-9, abs=1e-12), (row["step"], key)
    whole, spread = weights(single), weights(together / name)
    assert set(whole) == set(spread)
    for key, value in whole.items():
        torch.testing.assert_close(spread[key], value, rtol=1e-8, atol=1e-9, msg=key)


def test_some_of_those_steps_had_a_process_with_one_task_only() -> None:
    """Otherwise the test above would not show that such a process neither hangs nor changes anything."""
    config = load_config("nano/stage1")
    mixture = Mixture(config.data, config.seed)
    kinds = [
        {draw.task.split("_")[0] for draw in mixture.batch(step, config.train.batch_size, rank, 2)}
        for step in range(STEPS)
        for rank in range(2)
    ]
    assert {"generate"} in kinds and {"caption"} in kinds


def test_what_no_sample_uses_does_not_change(runs: Path, tmp_path: Path) -> None:
    """AdamW decays weights for a gradient of zero; a training on captions must leave the drawing parts alone."""
    source = "data.sources=[{path: fixture/train, tasks: {caption_short: 1.0}}]"
    told = case(runs, "captions", "stage1", source, "train.weight_decay=0.5", "train.steps=3", "train.ema=0.0")
    for code, text in launch(tmp_path, [told]):
        assert code == 0, text[-3000:]
    before, after = (
        load_file(folder / "bridge" / "model.safetensors")
        for folder in (runs / "decoder" / "model", tmp_path / "captions" / "model")
    )
    same = {name for name in before if torch.equal(before[name].double(), after[name].double())}
    drawing = {name for name in before if name.startswith(("head.", "generation_projector.", "statistics."))}
    assert same == drawing


def test_a_run_goes_on_with_another_number_of_processes(
    runs: Path, together: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One process, then two, then one: the losses are those of two from the beginning."""
    monkeypatch.setattr(log, "LOG_EVERY", 1)
    recipe, both, spread = CASES["stage1"]
    name, path, overrides, _ = case(runs, "stage1", recipe, *both, *spread)
    config = load_config(path, [*overrides, f"out={tmp_path / name}"])
    train(load_config(path, [*overrides, "train.steps=3", f"out={config.folder}"]), probes=())
    for code, text in launch(tmp_path, [(name, path, [*overrides, "train.steps=6"], "")]):
        assert code == 0, text[-3000:]
    train(config, probes=())
    expected, found = Metrics.read(together / name), Metrics.read(config.folder)
    for row, other in zip(expected, found, strict=True):
        assert [other[k] for k in ("text", "vectors")] == pytest.approx([row[k] for k in ("text", "vectors")], rel=1e-9)
    events = [json.loads(line) for line in (config.folder / "events.jsonl").read_text().splitlines()]
    assert [(e["step"], e["event"], e["processes"]) for e in events] == [(3, "resumed", 2), (6, "resumed", 1)]


def test_probes_look_at_a_sharded_model(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every process takes part, the first one writes, and the pictures are those of one process."""
    monkeypatch.setattr(probes, "COUNT", PROBED)
    short = ("train.steps=2", "train.probe_every=2", "train.shard_frozen_above=0", "train.precision=fp32")
    looked = [case(runs, name, name, *short, fault="probe") for name in ("gen_clip", "decoder", "stage1")]
    for code, text in launch(tmp_path, looked):
        assert code == 0, text[-3000:]
    for name, recipe, overrides, _ in looked:
        single = train(load_config(recipe, [*overrides, "train.accumulate=1", f"out={tmp_path / 'one' / name}"]))
        one, two = (folder / "samples" for folder in (single, tmp_path / name))
        assert sorted(file.name for file in one.iterdir()) == sorted(file.name for file in two.iterdir())
        pictures = [np.asarray(Image.open(folder / "step-2.png")).astype(int) for folder in (one, two)]
        assert np.abs(pictures[0] - pictures[1]).max() <= 2, name


def test_probes_look_at_a_model_sharded_in_bfloat16(runs: Path, tmp_path: Path) -> None:
    """What learns is bfloat16 then, and what is frozen float32: each must get what it takes."""
    short = ("train.steps=2", "train.probe_every=2", "train.precision=bf16")
    looked = [case(runs, name, name, *short, fault="probe") for name in ("gen_clip", "decoder", "stage1")]
    for code, text in launch(tmp_path, looked):
        assert code == 0, text[-3000:]
    for name, *_ in looked:
        assert (tmp_path / name / "samples" / "step-2.png").is_file()


def test_a_signal_to_one_process_stops_all_of_them_saved(runs: Path, tmp_path: Path) -> None:
    stopped = case(runs, "run", "stage1", fault="stop 1 3")
    assert [code for code, _ in launch(tmp_path, [stopped])] == [0, 0]
    # Process 1 was told in step 3, the others hear of it as step 4 begins, and finish that.
    assert [found.progress["step"] for found in find(tmp_path / "run" / "state")] == [5]


def test_what_is_not_finite_in_one_process_is_applied_in_none(runs: Path, together: Path, tmp_path: Path) -> None:
    broken = case(runs, "run", "stage1", "train.on_bad=skip", "train.steps=6", fault="nan 1 2")
    for code, text in launch(tmp_path, [broken]):
        assert code == 0, text[-3000:]
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert [(e["step"], e["event"], e["policy"]) for e in events] == [(2, "bad step", "skip")]
    config = load_config(broken[1], broken[2])
    assert events[0]["samples"] == Mixture(config.data, config.seed).names(2, config.train.batch_size)
    rows = Metrics.read(tmp_path / "run")
    assert [row["step"] for row in rows] == [0, 1, 3, 4, 5]
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())


@pytest.mark.parametrize("kind", ["hang", "die"])
def test_a_process_that_does_not_take_part_is_named(runs: Path, tmp_path: Path, kind: str) -> None:
    lost = case(runs, "run", "stage1", "train.timeout=8", fault=f"{kind} 1 2")
    ((code, told),) = launch(tmp_path, [lost], wait=100, of=1)
    assert code != 0 and "rank 1 of 2 did not take part within 8 s" in told, told[-3000:]


def test_the_launcher_passes_signals_on_and_ends_with_all_saved(runs: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    over = [f"model.start={runs / 'decoder' / 'model'}", "train.steps=100000", "train.save_every=100000"]
    command = [sys.executable, "-m", "open_pisces", "train", "nano/stage1", *over, f"out={run}", "--nproc", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not Metrics.read(run):
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        told, _ = process.communicate(timeout=100)
    assert process.returncode == 0, told
    (found,) = find(run / "state")
    assert found.progress["step"] >= 1 and found.manifest["processes"] == 2 and not faults(found)
    assert told.count("stopped early; the same command goes on") == 1


# ------------------------------------------------------------------------------------------------ one process


def test_frozen_parts_are_split_by_size(runs: Path) -> None:
    config = load_config("nano/stage1", [f"model.start={runs / 'decoder' / 'model'}"])
    pisces: Any = build_training(config).module
    whole, spread = split_frozen(pisces, 10**9)
    assert whole == [pisces.understanding_encoder, pisces.generation_encoder, pisces.decoder] and not spread
    whole, spread = split_frozen(pisces, 0)
    assert pisces.generation_encoder in spread and pisces.understanding_encoder.tower in spread
    assert pisces.decoder.network in spread and whole == [pisces.decoder.condition]
    learning = {p for p in pisces.parameters() if p.requires_grad}
    assert not learning & {p for part in spread for p in part.parameters()}


@pytest.mark.parametrize(
    ("override", "message"), [("train.replicas=3", "does not divide 2 processes"), ("train.batch_size=1", "at most 1")]
)
def test_processes_that_a_recipe_cannot_use_are_refused(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, message: str
) -> None:
    from open_pisces.train.world import _check_ranks

    config = load_config("nano/stage1", [override, "train.accumulate=1"])
    with pytest.raises(ConfigError, match=message):
        _check_ranks(config, 2)


def test_one_process_alone_gathers_itself() -> None:
    world = World(torch.device("cpu"))
    rows = torch.ones(3, 2)
    assert world.gather([1.0]) == [[1.0]] and world.gather_objects("a") == ["a"]
    assert world.gather_rows(rows) == (rows, 0) and world.sum(rows) is rows
    assert not torch.distributed.is_initialized()
