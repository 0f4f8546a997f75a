"""Trainings run by several processes at once, for tests: ``python together.py FOLDER`` under torchrun's variables.

`launch` starts the processes. ``FOLDER/cases.json`` lists ``[name, recipe, overrides, fault]``; a fault is something
that one process does to itself, or ``probe`` for a run that looks at samples. Losses of every step go to the run's
``metrics.jsonl``.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

Case = tuple[str, str, list[str], str]


def launch(folder: Path, cases: list[Case], ranks: int = 2, wait: float = 600, of: int = 99) -> list[tuple[int, str]]:
    """Run cases one after another in ``ranks`` processes.

    Returns exit code and standard error of the first ``of`` processes; when those have ended the others are killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=(folder / f"{rank}.log").open("w"),
        )
        for rank in range(ranks)
    ]
    try:
        codes = [process.wait(wait) for process in started[:of]]
        return [(code, (folder / f"{rank}.log").read_text()) for rank, code in enumerate(codes)]
    finally:
        for process in started:
            process.kill()


def main(folder: Path) -> None:
    """Run the cases of a folder as one of several processes."""
    import torch

    torch.set_num_threads(1)
    from open_pisces.config import load_config
    from open_pisces.train import log, loop

    log.LOG_EVERY = 1
    honest = loop.train_step
    for name, recipe, overrides, fault in json.loads((folder / "cases.json").read_text()):
        loop.train_step = faulty(honest, fault) if " " in fault else honest
        probes = (loop.probe,) if fault == "probe" else ()
        loop.train(load_config(recipe, [f"out={folder / name}", *overrides]), probes=probes)


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
