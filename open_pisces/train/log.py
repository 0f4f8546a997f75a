"""A run folder that explains itself: settings, versions, metrics, samples, and a bar that tells the time left."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from open_pisces.config import RunConfig


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


@contextmanager
def progress_bar(name: str, done: int, total: int) -> Iterator[Any]:
    """A function to call once a step with the words to show."""
    columns = (
        TextColumn(f"[bold]{name}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}"),
    )
    with Progress(*columns, refresh_per_second=2) as bar:
        task = bar.add_task(name, total=total, completed=done, words="")
        yield lambda words: bar.update(task, advance=1, words=words)
