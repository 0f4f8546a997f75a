"""Going on: changed settings are told, a changed order of the data needs consent, ranks that do not come are named."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from together import free_port, start

from open_pisces.cli import main
from open_pisces.config import RunConfig
from open_pisces.recipe import load_config
from open_pisces.settings import ConfigError
from open_pisces.train.checkpoint import read_progress
from open_pisces.train.loop import train
from open_pisces.train.world import VARIABLES, WorldError, _environment


@pytest.fixture(scope="module")
def two_steps(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps. Shared: copy it before going on with it."""
    folder = tmp_path_factory.mktemp("resume") / "run"
    train(recipe(runs, folder), probes=())
    return folder


@pytest.fixture
def run(two_steps: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_steps, tmp_path / "run"))


def recipe(runs: Path, folder: Path, *overrides: str) -> RunConfig:
    start = f"model.start={runs / 'decoder' / 'model'}"
    return load_config("nano/stage1", [f"out={folder}", start, "train.steps=2", *overrides])


def events(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_a_changed_setting_is_told_in_one_line_and_in_the_events(
    runs: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(recipe(runs, run, "train.steps=3", "train.lr=0.002"), probes=())
    told = [line for line in capsys.readouterr().err.splitlines() if "other settings" in line]
    before = recipe(runs, run).train.lr
    assert len(told) == 1 and f"train.lr was {before}, is 0.002" in told[0] and "train.steps was 2, is 3" in told[0]
    resumed = next(event for event in events(run) if event["event"] == "resumed")
    assert any(str(line).startswith("train.lr was") for line in resumed["changed"])  # type: ignore[attr-defined]
    assert read_progress(run / "state")["step"] == 3  # type: ignore[index]


def test_what_did_not_change_is_not_told(runs: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "model")
    train(recipe(runs, run), probes=())
    assert "other settings" not in capsys.readouterr().err
    assert next(event for event in events(run) if event["event"] == "resumed")["changed"] == []


ORDERS = {
    "seed=7": "seed was 0, is 7",
    "train.batch_size=2": "train.batch_size was 4, is 2",
    "data.lanes=2": "data.lanes was .*, is 2",
    "data.sources.0.weight=3.0": "data.sources",
}


@pytest.mark.parametrize(("change", "says"), ORDERS.items())
def test_a_changed_order_of_the_data_is_refused(runs: Path, run: Path, change: str, says: str) -> None:
    before = sorted((run / "state").rglob("*"))
    settings = (run / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=rf"another order: .*{says}.* consent with train.reorder=true"):
        train(recipe(runs, run, "train.steps=3", change), probes=())
    assert sorted((run / "state").rglob("*")) == before and (run / "config.yaml").read_bytes() == settings


def test_other_data_under_the_same_name_is_another_order(
    runs: Path, tmp_path: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from open_pisces.data.shards import ShardReader

    monkeypatch.setattr(ShardReader, "digest", "f" * 64, raising=False)
    honest = ShardReader.__init__

    def altered(self: ShardReader, folder: str | Path) -> None:
        honest(self, folder)
        self.digest = "f" * 64

    monkeypatch.setattr(ShardReader, "__init__", altered)
    with pytest.raises(ConfigError, match="another order: contents of the data"):
        train(recipe(runs, run, "train.steps=3"), probes=())


def test_consent_lets_a_run_go_on_in_another_order(runs: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(recipe(runs, run, "train.steps=3", "seed=7", "train.reorder=true"), probes=())
    assert "seed was 0, is 7" in capsys.readouterr().err
    assert read_progress(run / "state")["order"]["seed"] == 7  # type: ignore[index]


# ------------------------------------------------------------------------------------- variables left over


def command(tmp_path: Path, **variables: str) -> tuple[int, str]:
    """Exit code and standard error of a training that is started with these variables."""
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    given = ["train", "nano/understanding_clip", f"out={tmp_path / 'run'}", "train.timeout=3", "train.steps=1"]
    process = start(main, given, environment={**clean, **variables}, log=tmp_path / "log")
    process.join(120)
    process.kill()  # only if it still waits: its code is then not 2
    process.join()
    return process.exitcode, (tmp_path / "log").read_text()


def test_a_rank_whose_others_never_come_says_so_and_what_to_unset(tmp_path: Path) -> None:
    port = free_port()
    code, told = command(tmp_path, RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    assert code == 2
    first, *_, last = [line for line in told.splitlines() if line.startswith("pisces:")]
    assert first == f"pisces: rank 0 waits for 1 other rank at 127.0.0.1:{port} (WORLD_SIZE=2)"
    assert "waited 3 s (train.timeout) for 1 other rank" in last
    assert "unset RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT to train in one process" in last
    assert "Traceback" not in told


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_PORT is not set, but others of its kind are: unset"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29511"}, "WORLD_SIZE=2, but MASTER_ADDR is not set: start"),
    ],
)
def test_incomplete_variables_are_refused_at_once(tmp_path: Path, variables: dict[str, str], says: str) -> None:
    code, told = command(tmp_path, **variables)
    assert code == 2 and says in told and "Traceback" not in told


def test_a_variable_that_is_no_number_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(WorldError, match="WORLD_SIZE='two' is no whole number"):
        _environment("WORLD_SIZE", 1)
