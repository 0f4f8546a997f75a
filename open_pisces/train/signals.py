"""Signals that ask a training to stop, and what happens if it cannot in time."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C, what schedulers and torchrun send, and what SLURM can be asked to send before the time is up."""


@dataclass
class Stop:
    """Whether the training was asked to stop."""

    asked: bool = False


@contextmanager
def stop_signals(grace: float) -> Iterator[Stop]:
    """Sets `Stop.asked` on SIGINT, SIGTERM or SIGUSR1. No-op outside the main thread.

    The process that has not left this block ``grace`` seconds after the first signal ends at once with code 1: a
    scheduler must not take it for saved.
    """
    stop = Stop()
    timer = threading.Timer(grace, _give_up, (grace,))
    # A daemon, so that a run which ends in time is not kept alive by its own timer.
    timer.daemon = True

    def caught(number: int, frame: object) -> None:
        if not stop.asked and not timer.is_alive():
            timer.start()
        stop.asked = True

    try:
        before = {number: signal.signal(number, caught) for number in SIGNALS}
    # Python sets signal handlers in the main thread only: a training in another one cannot be asked.
    except ValueError:
        yield stop
        return
    try:
        yield stop
    finally:
        timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def _give_up(grace: float) -> None:
    print(f"pisces: not saved within {grace:g} s of the signal (train.grace): gave up", file=sys.stderr, flush=True)
    os._exit(1)
