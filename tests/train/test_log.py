"""What a run tells: lines, events, TensorBoard, trackers; and how it is asked to stop."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from open_pisces.config import RunConfig
from open_pisces.recipe import load_config
from open_pisces.settings import ConfigError
from open_pisces.train import flops, log
from open_pisces.train.log import Metrics
from open_pisces.train.loop import train
from open_pisces.train.signals import stop_signals


def settings(out: Path, *overrides: str) -> RunConfig:
    return load_config("nano/stage1", ["model.start=null", f"out={out}", *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps, every one logged, with a tracker."""
    folder, told = tmp_path_factory.mktemp("run"), []  # type: ignore[var-annotated]
    tracker = SimpleNamespace(
        init=lambda **given: (
            told.append(given)
            or SimpleNamespace(log=lambda line, step: told.append((step, line)), finish=lambda: told.append("finished"))
        )
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", tracker)
        patch.setattr(log, "LOG_EVERY", 1)
        train(settings(folder, "train.track=[wandb]"), probes=())
    (folder / "told.json").write_text(json.dumps(told))
    return folder


def test_a_line_says_what_was_learnt_how_fast_and_with_what(run: Path) -> None:
    rows = Metrics.read(run)
    names = {"text", "vectors", "norm", "norm_predicted", "norm_target", "lr", "seconds", "memory_gib", "data_wait"}
    names |= {"samples_per_second", "tokens_per_second", "real_tokens", "mfu"}
    assert len(rows) == 4 and all(names <= set(row) for row in rows)
    for row in rows:
        assert 0 < row["real_tokens"] <= 1 and 0 <= row["data_wait"] <= 1 and 0 < row["mfu"] < 1
        assert row["memory_gib"] > 0.1 and row["tokens_per_second"] > row["samples_per_second"] > 0
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds)


def test_the_norms_are_those_of_the_vectors(run: Path) -> None:
    from open_pisces.train.objectives import build_training

    config = settings(run, "train.steps=1")
    training = build_training(config)
    (batch, *_) = training.load(1).with_totals()
    parts = training.module.eval()(batch).parts
    _, targets = training.module.embed(batch)
    assert parts["norm_target"].item() == pytest.approx(
        targets.flatten(0, 1).norm(dim=1).sum().item() / batch.total_vectors, rel=1e-5
    )


def test_tensorboard_and_trackers_get_every_line(run: Path) -> None:
    rows = Metrics.read(run)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    for name in ("text", "norm", "tokens_per_second"):
        assert [(e.step, e.value) for e in events.Scalars(name)] == [
            (row["step"], pytest.approx(row[name], rel=1e-5)) for row in rows
        ]
    began, *lines, ended = json.loads((run / "told.json").read_text())
    assert began["name"] == "nano/stage1" and began["config"]["train"]["steps"] == 4 and ended == "finished"
    assert lines == [[row.pop("step"), row] for row in rows]


def test_the_bar_is_text_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    assert not log._bar().console.is_jupyter  # its widgets warn, and a redirected warning warns again without end


def test_a_tracker_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(ConfigError, match="trackio, which is not installed: pip install trackio"):
        train(settings(tmp_path, "train.track=[trackio]"), probes=())


@pytest.mark.parametrize(("tick", "side"), [(0.5, 256), (0.02, 256), (0.0125 / 2, 1024)])
def test_the_rate_of_matrix_products_is_work_over_time(monkeypatch: pytest.MonkeyPatch, tick: float, side: int) -> None:
    """A slow processor is measured with small products: 8 times the work has to fit into a tenth of a second."""
    now = [0.0]

    def clock() -> float:
        now[0] += tick  # each look at the clock is later
        return now[0]

    monkeypatch.setattr(flops.time, "perf_counter", clock)
    assert log.matmul_rate(torch.device("cpu"), torch.float32) == pytest.approx(2 * side**3 / tick)


@pytest.mark.parametrize(
    ("precision", "bfloat16", "said"),
    [
        ("bf16", 61e9, "5.0 times as fast in float32 (305 GFLOP/s) as in bfloat16 (61): train.precision=fp32"),
        ("bf16", 300e9, ""),
        ("fp32", 61e9, ""),
    ],
)
def test_a_processor_that_emulates_bfloat16_is_told(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    precision: str,
    bfloat16: float,
    said: str,
) -> None:
    monkeypatch.setattr(log, "matmul_rate", lambda _, dtype: bfloat16 if dtype is torch.bfloat16 else 305e9)
    train(settings(tmp_path, "train.steps=1", f"train.precision={precision}"), probes=())
    told = " ".join(capsys.readouterr().out.split())
    assert said in told and bool(said) == ("train.precision" in told)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_become_a_wish(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with stop_signals(60.0) as stop:
        assert not stop.asked
        signal.raise_signal(number)
        assert stop.asked
    assert signal.getsignal(number) == before


def test_a_process_that_cannot_save_in_time_does_not_end_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[Any] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with stop_signals(0.05):
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.3)
    assert codes == [1] and "not saved within 0.05 s of the signal (train.grace)" in capsys.readouterr().err
    with stop_signals(0.2):
        signal.raise_signal(signal.SIGTERM)
    time.sleep(0.3)
    assert codes == [1]  # in time
