"""Processes for tests: trainings by several ranks, and command lines, without the ten seconds of imports of each.

A fork server imports the package once; every process is forked from it and has only then its variables, its standard
error and its work. Nothing has run in the server, so a fork is as good as a new interpreter; that a new interpreter
trains as well is shown by `tests/test_readme.py` and by the launcher's test, which start real ones.

``python together.py FOLDER`` runs the cases of a folder in this process, for torchrun. Losses of every step go to the
run's ``metrics.jsonl``.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Case = tuple[str, str, list[str], str]
"""Name, recipe, overrides, fault: something that one process does to itself, or ``probe`` for a run with probes."""

PROBED = 2
"""Pictures of a probe; nobody looks at these."""

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["open_pisces.cli", "open_pisces.train.loop"])


def free_port() -> str:
    """A port of this machine that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


def start(work: Callable[..., Any], *given: Any, environment: dict[str, str], log: Path) -> Any:
    """Call ``work(*given)`` in a new process with these environment variables; its standard error goes to a file.

    Returns:
        The process, as `multiprocessing` has it; its exit code is what ``work`` returns if that is a number.
    """
    process = SERVER.Process(target=_begin, args=(environment, Path.cwd(), log, work, given))
    process.start()
    return process


def _begin(environment: dict[str, str], folder: Path, log: Path, work: Callable[..., Any], given: Any) -> None:
    os.setsid()  # a group of its own: who kills it kills its workers as well, and nobody else
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    sys.exit(work(*given))


def launch(folder: Path, cases: list[Case], ranks: int = 2, wait: float = 600, of: int = 99) -> list[tuple[int, str]]:
    """Run cases one after another in ``ranks`` processes.

    Returns exit code and standard error of the first ``of`` processes; when those have ended the others are killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    world = {**os.environ, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    logs = [folder / f"{rank}.log" for rank in range(ranks)]
    started = [
        start(main, folder, environment={**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}, log=log)
        for rank, log in enumerate(logs)
    ]
    try:
        until = time.monotonic() + wait
        for process in started[:of]:
            process.join(max(0.0, until - time.monotonic()))
        codes = [process.exitcode for process in started[:of]]
        assert None not in codes, f"after {wait:g} s: {[log.read_text()[-2000:] for log in logs]}"
        return [(code, log.read_text()) for code, log in zip(codes, logs, strict=False)]
    finally:
        for process in started:
            process.kill()
            process.join()


def main(folder: Path) -> None:
    """Run the cases of a folder as one of several processes."""
    import torch

    torch.set_num_threads(1)
    from open_pisces.recipe import load_config
    from open_pisces.train import log, loop, probes
    from open_pisces.train.flops import Costs

    log.LOG_EVERY = 1
    probes.COUNT = PROBED
    honest = loop.train_step
    loop.costs_of = lambda module, config: Costs(())  # FLOPs are counted before anything is shared, and take long
    for name, recipe, overrides, fault in json.loads((folder / "cases.json").read_text()):
        loop.train_step = faulty(honest, fault) if " " in fault else honest
        looks = (loop.probe,) if fault == "probe" else ()
        loop.train(load_config(recipe, [f"out={folder / name}", *overrides]), probes=looks)


def faulty(honest: Any, fault: str) -> Any:
    """`train_step` with something done by one process at one step: ``KIND RANK STEP``."""
    kind, rank, at = fault.split()
    mine = int(os.environ.get("RANK", "0")) == int(rank)

    def step(run: Any, batches: Any, number: int) -> dict[str, float]:
        if mine and number == int(at):
            if kind == "stop":
                signal.raise_signal(signal.SIGUSR1)
            if kind == "hang":
                time.sleep(3600)
            died = run.config.folder / "died"
            if kind == "die" or (kind == "once" and not died.exists()):
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "nan":
                losses = run.training.losses
                run.training.losses = lambda batch: (found := losses(batch))._replace(loss=found.loss * float("nan"))
                try:
                    return honest(run, batches, number)
                finally:
                    run.training.losses = losses
        return honest(run, batches, number)

    return step


if __name__ == "__main__":
    main(Path(sys.argv[1]))
