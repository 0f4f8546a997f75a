"""A run folder that explains itself: settings, versions, metrics, samples, and a bar that tells the time left."""

from __future__ import annotations

import importlib
import json
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from open_pisces.batch import StepBatches
from open_pisces.config import RunConfig
from open_pisces.settings import ConfigError
from open_pisces.train.flops import Costs, counts_of, matmul_rate
from open_pisces.train.world import World

LOG_EVERY = 10
SHOWN = ("text", "vectors", "diffusion", "contrastive", "retrieval", "mae", "norm")
"""What the bar has room for."""
FASTER = 1.3
"""How much faster float32 has to be before a run says so: less may be noise of the measurement."""


def describe_run(folder: Path, config: RunConfig) -> None:
    """Write the resolved settings and the versions beside the run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    packages = ("open-pisces", "torch", "transformers", "diffusers", "tokenizers", "numpy", "pillow")
    versions = {"python": platform.python_version(), "machine": platform.machine(), "commit": _commit()}
    for package in packages:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    (folder / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


def _commit() -> str:
    asked = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or "unknown"


class Metrics:
    """``metrics.jsonl``: one JSON object a line; lines after a resumed step are dropped, they will be written again."""

    def __init__(self, folder: Path, step: int) -> None:
        self.path = folder / "metrics.jsonl"
        kept = self.read(folder)
        self.path.write_text("".join(json.dumps(row) + "\n" for row in kept if row["step"] < step))

    def write(self, row: dict[str, Any]) -> None:
        """Append one row."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    @staticmethod
    def read(folder: Path) -> list[dict[str, Any]]:
        """All whole rows of a run."""
        path = folder / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("}")]


class Log:
    """What a run tells: the bar, ``metrics.jsonl``, ``events.jsonl``, TensorBoard and trackers; by rank 0.

    Args:
        config: the recipe.
        costs: what its parts cost in FLOPs.
        world: the ranks.
        step: the step the run begins at.
        before: seconds of training before it was interrupted.
    """

    def __init__(self, config: RunConfig, costs: Costs, world: World, step: int, before: float) -> None:
        self.config = config
        self.world = world
        self.first_step = step
        self.start = time.monotonic() - before
        self.costs = costs
        # Measured, not looked up: what a device does on this machine, with these clocks.
        half = config.train.precision == "bf16"
        self.rate = matmul_rate(world.device, torch.bfloat16 if half else torch.float32)
        self.advice = _faster_precision(self.rate) if half and world.device.type == "cpu" and world.is_first else ""
        self.window = Window(time.monotonic())
        self.told: list[Any] = []
        self.metrics: Metrics | None = None
        self._bar: Any = None

    def __enter__(self) -> Log:
        """Open what is written to."""
        if self.world.is_first:
            self.metrics = Metrics(self.config.folder, self.first_step)
            self.told = [_tensorboard(self.config.folder, self.first_step)]
            self.told += [_tracker(name, self.config) for name in self.config.train.track]
            self._bar = _bar()
            self._task = self._bar.add_task(
                self.config.name, total=self.config.train.steps, completed=self.first_step, words=""
            )
            self._bar.start()
            if self.advice:
                self._bar.console.print(self.advice)
        return self

    def __exit__(self, *error: Any) -> None:
        """Close it all."""
        if self.world.is_first:
            self._bar.stop()
            for _, close in self.told:
                close()

    @property
    def seconds(self) -> float:
        """Seconds of training, those before an interruption included."""
        return time.monotonic() - self.start

    def waiting(self, batches: Iterable[StepBatches]) -> Iterator[StepBatches]:
        """The same batches, with the time that the training waits for them."""
        feed = iter(batches)
        while True:
            begun = time.monotonic()
            try:
                given = next(feed)
            except StopIteration:
                return
            self.window.waited += time.monotonic() - begun
            yield given

    def step(
        self,
        step: int,
        row: dict[str, float],
        batches: list[Any],
        whole: StepBatches,
        skipped: dict[str, int],
        last: bool,
    ) -> None:
        """Count a step, and now and then write a line about those since the last line.

        Args:
            step: from 0.
            row: losses and what else is true of this step alone; empty if it was left out.
            batches: this rank's micro-batches.
            whole: counts of all ranks.
            skipped: samples left out so far, by cause.
            last: whether no step follows.
        """
        self.window.add(whole, sum(self.costs.training(counts_of(batch)) for batch in batches))
        if not self.world.is_first:
            return
        self._bar.update(
            self._task,
            completed=step + 1,
            words="  ".join(f"{k} {v:.4g}" for k, v in row.items() if k in SHOWN),
        )
        if row and (step % LOG_EVERY == 0 or last):
            line = {"step": step, **row, **self._figures(skipped), "seconds": round(self.seconds, 2)}
            self._write(line)
            self.window = Window(time.monotonic())

    def _write(self, line: dict[str, float]) -> None:
        assert self.metrics is not None
        self.metrics.write(line)
        for tell, _ in self.told:
            tell({name: value for name, value in line.items() if name != "step"}, line["step"])

    def _figures(self, skipped: dict[str, int]) -> dict[str, float]:
        """Speed, use of the device, memory, data."""
        window = self.window
        seconds = max(time.monotonic() - self.window.begun, 1e-9)
        figures = {
            "samples_per_second": window.samples / seconds,
            "mfu": window.flops / seconds / self.rate,
            "data_wait": window.waited / seconds,
            "memory_gib": _memory(self.world.device),
        }
        if window.places:
            figures |= {"tokens_per_second": window.tokens / seconds, "real_tokens": window.tokens / window.places}
        return {**figures, **{f"skipped_{cause.replace(' ', '_')}": n for cause, n in sorted(skipped.items())}}

    def event(self, step: int, what: str, **facts: Any) -> None:
        """Append something that does not happen every step to ``events.jsonl``."""
        if self.world.is_first:
            with (self.config.folder / "events.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "event": what, **facts}) + "\n")

    def rewind(self, step: int, seconds: float) -> None:
        """The run goes on from an earlier step: later lines are dropped, they will be written again."""
        self.event(step, "rewound")
        self.start = time.monotonic() - seconds
        self.window = Window(time.monotonic())
        if self.metrics is not None:
            self.metrics = Metrics(self.config.folder, step)


@dataclass
class Window:
    """Sums over the steps since the last line of the log."""

    begun: float
    waited: float = 0.0
    samples: int = 0
    tokens: int = 0
    places: int = 0
    flops: float = 0.0
    """Of this rank alone."""

    def add(self, whole: StepBatches, flops: float) -> None:
        """Count a step."""
        self.samples += whole.read
        self.tokens += whole.real_tokens
        self.places += whole.all_tokens
        self.flops += flops


def _memory(device: torch.device) -> float:
    """GiB: the most an accelerator has held, or what the process holds."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if status.is_file():
        return (
            int(next(line for line in status.read_text().splitlines() if line.startswith("VmRSS")).split()[1]) / 2**20
        )
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30


Tell = tuple[Callable[[dict[str, float], int], Any], Callable[[], Any]]
"""How to tell a line, and how to end."""


def _tensorboard(folder: Path, step: int) -> Tell:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step or None, flush_secs=10)

    def tell(line: dict[str, float], at: int) -> None:
        for name, value in line.items():
            writer.add_scalar(name, value, at)

    return tell, writer.close


def _tracker(name: str, config: RunConfig) -> Tell:
    """W&B and trackio share the three functions that are needed."""
    try:
        tracker = importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"train.track names {name}, which is not installed: pip install {name}") from None
    run = tracker.init(project="open-pisces", name=config.name, config=config.model_dump(mode="json"))
    return lambda line, at: run.log(line, step=at), run.finish


def _faster_precision(bfloat16: float) -> str:
    """What to set where this processor only emulates bfloat16; nothing if float32 is not faster."""
    float32 = matmul_rate(torch.device("cpu"), torch.float32)
    if float32 < FASTER * bfloat16:
        return ""
    return (
        f"this CPU multiplies {float32 / bfloat16:.1f} times as fast in float32 ({float32 / 1e9:.0f} GFLOP/s) as in "
        f"bfloat16 ({bfloat16 / 1e9:.0f}): train.precision=fp32 is likely faster here"
    )


def _bar() -> Progress:
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}"),
        refresh_per_second=2,
        # As text in notebooks: without ipywidgets rich warns at each refresh, into the stream that the bar redirects.
        console=Console(force_jupyter=False),
    )
