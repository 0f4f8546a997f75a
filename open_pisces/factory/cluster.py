"""One stage of work over many items, on processes of this machine or on a Ray cluster: the same stage, the same items.

A stage is built once in each worker (a model is loaded once) and called once for each item. It has to be idempotent: an
item whose worker died is given to another one, which may find it done.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from open_pisces.errors import PiscesError

Stage = Callable[[int], dict[str, Any]]
"""Takes the number of an item; what it returns has to fit into JSON."""
Build = Callable[[], Stage]
"""Makes the stage in its worker; has to be picklable."""
DEATHS = 5
"""Deaths of local workers in a row, without an item finished between them, after which a run gives up."""
PATIENCE = 5.0
"""Seconds for a cluster to answer."""


class ClusterError(PiscesError):
    """Workers that cannot do the work; the message says why."""


@dataclass(frozen=True)
class Workers:
    """Who does the work.

    Args:
        count: processes; 1 without Ray is this process itself.
        ray: None for processes of this machine; ``local`` starts a Ray of its own here, anything else is the address of
            a running cluster, such as ``auto`` or ``ray://head:10001``.
        gpus: of each worker, on Ray.
    """

    count: int = 1
    ray: str | None = None
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ClusterError(f"{self.count} workers: give 1 or more")


def run_stage(build: Build, items: Sequence[int], workers: Workers) -> Iterator[dict[str, Any]]:
    """What the stage makes of every item, in the order in which they are done.

    Raises:
        ClusterError: if workers die again and again, or Ray is missing or cannot be reached.
        PiscesError: what the stage raises ends the run; items that are done stay so.
    """
    if not items:
        return
    if workers.ray is not None:
        yield from _on_ray(build, items, workers)
    elif workers.count == 1:
        stage = build()
        for item in items:
            yield stage(item)
    else:
        yield from _on_processes(build, items, min(workers.count, len(items)))


# ------------------------------------------------------------------------------------------ processes of this machine

_stage: Stage | None = None


def _begin() -> None:
    """In a new worker: leave Ctrl-C to the parent, and end with it however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _call(build: Build, item: int) -> dict[str, Any]:
    """One item in a worker. The stage is built here and not at the start, so that its errors reach the parent."""
    global _stage
    if _stage is None:
        _stage = build()
    return _stage(item)


def _on_processes(build: Build, items: Sequence[int], count: int) -> Iterator[dict[str, Any]]:
    left = list(items)
    deaths = 0
    while left:
        try:
            for item, found in _one_pool(build, left, count):
                left.remove(item)
                deaths = 0
                yield found
        except BrokenProcessPool:
            deaths += 1
            if deaths == DEATHS:
                raise ClusterError(
                    f"workers died {DEATHS} times without finishing one of {len(left)} items: "
                    "is there memory for them all? Try fewer workers"
                ) from None


def _one_pool(build: Build, items: Sequence[int], count: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Items and what was made of them, until all are done or a worker dies."""
    threads = max(1, (os.cpu_count() or 1) // count)
    with _threads_of_workers(threads):
        pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin)
        try:
            # A few more than there are workers: all of 75,000 shards would be 75,000 futures.
            waiting = iter(items)
            running: dict[Future[dict[str, Any]], int] = {}
            while True:
                while len(running) < 2 * count and (item := next(waiting, None)) is not None:
                    running[pool.submit(_call, build, item)] = item
                if not running:
                    return
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                # Those that a death broke come last: what was finished before it is kept.
                for future in sorted(done, key=lambda one: one.exception() is not None):
                    yield running.pop(future), future.result()
        finally:
            processes = list((pool._processes or {}).values())  # none after a death
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:  # an error or Ctrl-C: nobody waits for what they do
                process.kill()


@contextmanager
def _threads_of_workers(threads: int) -> Iterator[None]:
    """New processes take their number of threads from the environment; what the user has set stays."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]


# -------------------------------------------------------------------------------------------------------------- Ray


class _RayStage:
    """A stage as an actor of Ray Data."""

    def __init__(self, build: Build) -> None:
        self.stage = build()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            found = self.stage(int(row["item"]))
        except PiscesError as error:  # Ray would wrap it, with pages of its own
            return {"found": "", "error": str(error)}
        # As JSON: Arrow would want the same columns of the same types in every row.
        return {"found": json.dumps(found), "error": ""}


def _on_ray(build: Build, items: Sequence[int], workers: Workers) -> Iterator[dict[str, Any]]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
        from ray.exceptions import RayError
    except ModuleNotFoundError:
        raise ClusterError("Ray is missing: pip install 'open-pisces[ray]', or leave --ray out") from None
    started = not ray.is_initialized()
    if started:
        _connect(ray, str(workers.ray))
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    before = context.enable_progress_bars
    context.enable_progress_bars = False
    try:
        count = min(workers.count, len(items))
        rows = ray.data.from_items([{"item": item} for item in items], override_num_blocks=len(items))
        done = rows.map(
            _RayStage,
            fn_constructor_args=(build,),
            # An actor that dies is started anew, and its item given out again: Ray Data's own way.
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=count, max_tasks_in_flight_per_actor=2),
            num_cpus=min(1.0, _cpus_of_each(ray, count)),
            num_gpus=workers.gpus,
        )
        for row in done.iter_rows():
            if row["error"]:
                raise PiscesError(row["error"])
            yield json.loads(row["found"])
    except RayError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        raise ClusterError(f"Ray gave up: {lines[-1] if lines else type(error).__name__}") from None
    finally:
        context.enable_progress_bars = before
        if started:
            ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    """Start a Ray here, or join one.

    Raises:
        ClusterError: if there is none at the address.
    """
    quiet = {"configure_logging": True, "logging_level": "ERROR", "log_to_driver": False}
    if address == "local":
        ray.init(address="local", include_dashboard=False, **quiet)
        return
    try:
        host, colon, port = address.removeprefix("ray://").rpartition(":")
        if colon:  # Ray itself would try for minutes
            socket.create_connection((host, int(port)), PATIENCE).close()
        ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        line = str(error).strip().splitlines()[0]
        remedy = "start one (`ray start --head`), or take `local`"
        raise ClusterError(f"no Ray cluster at {address} ({line}): {remedy}") from None


def _cpus_of_each(ray: Any, count: int) -> float:
    """The most that each of ``count`` workers may take: half a CPU stays for reading, or Ray Data waits for ever."""
    return (float(ray.cluster_resources().get("CPU", 1.0)) - 0.5) / count
