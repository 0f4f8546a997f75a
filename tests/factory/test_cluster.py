"""The same stage on this process, on several, and on a real local Ray: deaths, errors, and the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from endpoint import MODEL, serving
from stages import Square

from open_pisces.data.shards import open_dataset
from open_pisces.errors import PiscesError
from open_pisces.factory.caption import Captioning, caption
from open_pisces.factory.caption_checks import find_template
from open_pisces.factory.captioners import CaptionerSettings
from open_pisces.factory.cluster import ClusterError, Workers, run_stage
from open_pisces.factory.encode import encode
from open_pisces.recipe import load_config

ON = [Workers(), Workers(2)]


@pytest.mark.parametrize("workers", ON, ids=["here", "processes"])
def test_every_item_is_done_once(tmp_path: Path, workers: Workers) -> None:
    found = list(run_stage(partial(Square, tmp_path), range(9), workers))
    assert sorted((row["item"], row["square"]) for row in found) == [(n, n * n) for n in range(9)]
    assert (len({row["process"] for row in found} - {os.getpid()}) > 0) == (workers.count > 1)
    assert list(run_stage(partial(Square, tmp_path), [], workers)) == []


@pytest.mark.parametrize("workers", ON, ids=["here", "processes"])
def test_an_error_of_the_stage_ends_the_run_as_it_is(tmp_path: Path, workers: Workers) -> None:
    with pytest.raises(PiscesError, match="^item 3 is bad$"):
        list(run_stage(partial(Square, tmp_path, bad=3), range(9), workers))


def test_an_item_whose_worker_was_killed_is_done_by_another(tmp_path: Path) -> None:
    found = list(run_stage(partial(Square, tmp_path, deadly=4, deaths=2), range(9), Workers(2)))
    assert sorted(row["item"] for row in found) == list(range(9))
    assert (tmp_path / "deaths").read_text() == "xx"


def test_workers_that_die_again_and_again_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="workers died 5 times without finishing one of"):
        list(run_stage(partial(Square, tmp_path, deadly=0, deaths=99), [0, 1], Workers(2)))


def test_no_worker_outlives_a_run_that_is_killed(tmp_path: Path) -> None:
    """Else a restarted run would wait for what they hold."""
    code = """
from stages import Sleep
from open_pisces.factory.cluster import Workers, run_stage
if __name__ == "__main__":
    for found in run_stage(Sleep, range(4), Workers(2)):
        print(found["process"], flush=True)
"""
    file = tmp_path / "run.py"
    file.write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen([sys.executable, str(file)], stdout=subprocess.PIPE, env=environment) as run:
        assert run.stdout is not None
        worker = int(run.stdout.readline())
        os.kill(worker, 0)
        run.kill()
    end = time.monotonic() + 10
    while time.monotonic() < end:
        try:
            os.kill(worker, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the worker lives on")


def test_no_workers_are_refused() -> None:
    with pytest.raises(ClusterError, match="0 workers"):
        Workers(0)


# ------------------------------------------------------------------------------------------------------------ Ray


@pytest.fixture(scope="module")
def local_ray() -> Any:
    """One real Ray for this file: it takes seconds to start."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    # Its workers read pickled names from the tests' own modules.
    paths = f"{Path(__file__).parent}:{Path(__file__).parents[1]}"
    environment = {"env_vars": {"PYTHONPATH": paths, **{k: v for k, v in os.environ.items() if k == "PISCES_DATA"}}}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield ray
    ray.shutdown()


def test_ray_does_every_item_and_replaces_killed_workers(local_ray: Any, tmp_path: Path) -> None:
    found = list(run_stage(partial(Square, tmp_path, deadly=4, deaths=1), range(9), Workers(2, "local")))
    assert sorted((row["item"], row["square"]) for row in found) == [(n, n * n) for n in range(9)]
    assert (tmp_path / "deaths").read_text() == "x" and os.getpid() not in {row["process"] for row in found}


def test_ray_hands_on_the_stages_own_error(local_ray: Any, tmp_path: Path) -> None:
    with pytest.raises(PiscesError, match="^item 3 is bad$"):
        list(run_stage(partial(Square, tmp_path, bad=3), range(4), Workers(2, "local")))


def test_ray_captions_the_same_as_local_workers(local_ray: Any, tmp_path: Path) -> None:
    from test_caption import write

    source = write(tmp_path / "in", 20)
    with serving() as endpoint:
        settings = CaptionerSettings("endpoint", MODEL, url=endpoint.url, tries=2, concurrency=4)
        how = Captioning(settings, find_template("detailed"))
        counts = [
            caption(str(source), tmp_path / name, how, workers)
            for name, workers in (("here", Workers()), ("ray", Workers(2, "local")))
        ]
    assert counts[0] == counts[1] and counts[0]["written"] == 20
    assert open_dataset(tmp_path / "here").digest == open_dataset(tmp_path / "ray").digest


@pytest.mark.parametrize("where", ["processes", "ray"])
def test_stores_are_the_same_to_the_byte_on_any_workers(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nano_folder: Path, where: str
) -> None:
    from open_pisces.factory import encode as encoding

    if where == "ray":
        request.getfixturevalue("local_ray")
    monkeypatch.setattr(encoding, "FLUSH", 1)
    over = [f"model.start={nano_folder}", "data.features=float32", "data.sources=[{path: fixture/train}]"]
    over += ["data.feature_kinds=[generation]"]
    config = load_config("nano/stage1", over)
    kept = []
    for name, workers in (("alone", Workers()), ("several", Workers(2, "local" if where == "ray" else None))):
        monkeypatch.setenv("PISCES_DATA", str(tmp_path / name))
        rows = encode(config, 16, "cpu", workers)
        folders = [Path(row["folder"]) for row in rows]
        assert len(folders) == 1 and all(folder.is_relative_to(tmp_path / name) for folder in folders)
        kept.append({p.name: (f / p.name).read_bytes() for f in folders for p in f.iterdir() if p.is_file()})
        assert all(
            {p.name for p in folder.iterdir()} == {"features.npy", "valid.npy", "key.json"} for folder in folders
        )
    assert kept[0] == kept[1]


def test_a_cluster_that_is_not_there_is_told_in_a_line(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    ray.shutdown()
    with pytest.raises(ClusterError, match=r"no Ray cluster at 127.0.0.1:9 .*ray start --head"):
        list(run_stage(partial(Square, tmp_path), [1], Workers(1, "127.0.0.1:9")))
