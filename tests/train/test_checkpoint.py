"""Checkpoints: whole or not there, whatever happens to the process, the disk or the files."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from kills import WORLD, kill_while_saving, small
from torch import Tensor

from open_pisces.train.checkpoint import (
    CheckpointError,
    Checkpoints,
    faults,
    find,
    load_latest,
    read_progress,
)


def write(state: Path, *steps: int, background: bool = False, keep: int = 2) -> dict[str, Tensor]:
    """Checkpoints of these steps, each of other numbers; those of the last."""
    checkpoints = Checkpoints(state, WORLD, keep, background)
    tensors = small()
    for step in steps:
        with torch.no_grad():
            for value in tensors.values():
                value += step
        checkpoints.save(step, tensors, {"step": step})
    checkpoints.close()
    return tensors


def equal(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return set(tensors) == set(others) and all(torch.equal(value, others[name]) for name, value in tensors.items())


def test_a_state_holds_weights_buffers_averages_and_moments() -> None:
    names = {name.split("/")[0] + ":" + name.rsplit("/", 1)[-1] for name in small()}
    assert {
        "optimizer:exp_avg",
        "optimizer:exp_avg_sq",
        "optimizer:step",
        "weights:0.weight",
        "average:1.bias",
    } <= names


@pytest.mark.parametrize("background", [False, True])
def test_what_is_read_is_what_was_written_last(tmp_path: Path, background: bool) -> None:
    tensors = write(tmp_path, 1, 2, 3, background=background)
    found = small(1)
    assert load_latest(tmp_path, found, WORLD) == {"step": 3} and equal(found, tensors)
    assert [f.folder.name for f in find(tmp_path)] == ["step-00000003", "step-00000002"]  # two are kept
    assert (tmp_path / "latest").read_text() == "step-00000003"
    assert not list(tmp_path.glob(".*"))


def test_a_checkpoint_in_the_background_is_of_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    checkpoints, tensors = Checkpoints(tmp_path, WORLD), small()
    wanted = {name: value.clone() for name, value in tensors.items()}
    checkpoints.save(1, tensors, {"step": 1}, before=lambda: time.sleep(0.2))
    for value in tensors.values():
        value.fill_(7.0)  # the training goes on
    checkpoints.close()
    found = small(1)
    load_latest(tmp_path, found, WORLD)
    assert equal(found, wanted)


def test_nothing_is_there_before_the_model_folder_is(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, WORLD, background=False)
    seen: list[Any] = []
    checkpoints.save(1, small(), {"step": 1}, before=lambda: seen.append(read_progress(tmp_path)))
    assert seen == [None] and read_progress(tmp_path) == {"step": 1}


@pytest.mark.parametrize("harm", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], harm: str
) -> None:
    write(tmp_path, 1, 2)
    file = tmp_path / "step-00000002" / "__0_0.distcp"
    content = file.read_bytes()
    if harm == "missing":
        file.unlink()
    else:
        half = len(content) // 2
        file.write_bytes(
            content[:-8] if harm == "truncated" else content[:half] + bytes([content[half] ^ 1]) + content[half + 1 :]
        )
    assert len(faults(find(tmp_path)[0])) == 1
    assert load_latest(tmp_path, small(), WORLD) == {"step": 1}
    told = capsys.readouterr().err
    words = {"truncated": "bytes instead of", "flipped": "differs from its checksum", "missing": "missing"}
    assert str(file) in told and words[harm] in told
    assert (tmp_path / "damaged-step-00000002").is_dir()  # nothing is thrown away


def test_no_good_checkpoint_is_no_reason_to_begin_anew(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / "step-00000001" / "__0_0.distcp").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"no checkpoint is good \(.*__0_0\.distcp: 0 bytes.*remove .* to begin anew"
    ):
        load_latest(tmp_path, small(), WORLD)


def test_a_checkpoint_without_manifest_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    (tmp_path / "step-00000002" / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="manifest.json: missing or damaged"):
        assert load_latest(tmp_path, small(), WORLD) == {"step": 1}


def test_another_model_or_a_newer_version_is_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    other = {name.replace("0.", "other.", 1): value for name, value in small().items()}
    with pytest.raises(CheckpointError, match="belongs to another model"):
        load_latest(tmp_path, other, WORLD)
    manifest = tmp_path / "step-00000001" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(CheckpointError, match=r"format 99, this one reads 1\): update open_pisces"):
        load_latest(tmp_path, small(), WORLD)


@pytest.mark.parametrize("background", [False, True])
def test_a_full_disk_ends_the_save_and_spares_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool
) -> None:
    write(tmp_path, 1, 2)
    checkpoints = Checkpoints(tmp_path, WORLD, background=background)
    honest = os.fsync

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        CheckpointError, match=r"\.step-00000003: cannot be written: OSError.*No space left.*step-00000002"
    ):
        checkpoints.save(3, small(), {"step": 3})
        checkpoints.wait()
    monkeypatch.setattr(os, "fsync", honest)
    assert load_latest(tmp_path, small(), WORLD) == {"step": 2} and not list(tmp_path.glob(".step*"))
    checkpoints.save(4, small(), {"step": 4})  # there is room again
    checkpoints.close()
    assert load_latest(tmp_path, small(), WORLD) == {"step": 4}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    write(tmp_path, 1)
    tmp_path.chmod(0o500)
    try:
        with pytest.raises((CheckpointError, OSError), match=str(tmp_path)):
            write(tmp_path, 2)
    finally:
        tmp_path.chmod(0o700)
    assert load_latest(tmp_path, small(), WORLD) == {"step": 1}


def test_a_rename_that_is_refused_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, 1)

    def read_only(path: Path, target: Path) -> Path:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "rename", read_only)
    with pytest.raises(CheckpointError, match=r"\.step-00000002: cannot be written: OSError.*Read-only file system"):
        write(tmp_path, 2)
    monkeypatch.undo()
    assert load_latest(tmp_path, small(), WORLD) == {"step": 1}


def test_a_run_that_went_back_replaces_what_it_comes_by_again(tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    write(tmp_path, 2)
    found = small(1)
    assert load_latest(tmp_path, found, WORLD) == {"step": 2}
    assert not equal(found, small(1)) and not list(tmp_path.glob(".*"))


def test_kills_at_random_moments_of_saves_leave_a_good_checkpoint(tmp_path: Path) -> None:
    assert kill_while_saving(tmp_path, 10, seed=1)["fewest_good"] >= 1
