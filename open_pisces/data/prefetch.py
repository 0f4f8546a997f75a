"""Prefetching: steps are loaded ahead of the training, by a thread or by worker processes, in order."""

from __future__ import annotations

import queue
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils.data import DataLoader, Dataset


def prefetch(load: Callable[[int], Any], steps: Sequence[int], depth: int = 4, workers: int = 0) -> Iterator[Any]:
    """``load(step)`` for every step in order, prepared while the last one trains; errors surface here.

    Args:
        load: what a step trains on; depends on its number alone.
        steps: which steps.
        depth: steps prepared ahead by the thread; each worker prepares two.
        workers: processes; 0 uses one thread.
    """
    if workers and len(steps):
        yield from DataLoader(
            _Steps(load),
            batch_size=None,
            sampler=steps,
            num_workers=workers,
            prefetch_factor=2,
            collate_fn=_identity,
            worker_init_fn=_ignore_signals,
        )
        return
    yield from _by_thread(load, steps, depth)


class _Steps(Dataset[Any]):
    """Steps as a dataset, so that PyTorch's workers can prepare them."""

    def __init__(self, load: Callable[[int], Any]) -> None:
        self.load = load

    def __getitem__(self, step: int) -> Any:
        return self.load(step)


def _ignore_signals(worker: int) -> None:
    """Workers ignore SIGINT, SIGTERM and SIGUSR1; the main process shuts them down."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def _identity(step: Any) -> Any:
    return step


def _by_thread(load: Callable[[int], Any], steps: Sequence[int], depth: int) -> Iterator[Any]:
    ready: queue.Queue[Any] = queue.Queue(depth)
    stop = threading.Event()

    def work() -> None:
        for step in steps:
            try:
                item: tuple[Any, BaseException | None] = (load(step), None)
            except BaseException as error:
                item = (None, error)
            while not stop.is_set():
                try:
                    ready.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if stop.is_set() or item[1] is not None:
                return

    thread = threading.Thread(target=work, daemon=True, name="prefetch")
    thread.start()
    try:
        for _ in steps:
            value, error = ready.get()
            if error is not None:
                raise error
            yield value
    finally:
        stop.set()
        thread.join()
