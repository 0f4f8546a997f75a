"""What a run needs to go on as if nothing had happened, in checkpoints that are whole or not there.

::

    state/latest              the name of the newest
    state/step-00000500/      PyTorch's distributed checkpoint: shards of any number of ranks
        progress.json         how far the run is
        manifest.json         sizes and sha256 of all files; names and shapes of all tensors

A checkpoint is written under a hidden name, verified to be complete, and renamed; `latest` moves last. It is local to
its run (PyTorch's index is a pickle): what is shared is the model folder.
"""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections import ChainMap
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from open_pisces.errors import PiscesError
from open_pisces.files import LockHeldError, locked, sha256_of, sync, whole_file
from open_pisces.train.optim import AveragedWeights
from open_pisces.train.world import World

FORMAT = 1


class CheckpointError(PiscesError):
    """A checkpoint that cannot be written or read, or does not fit the run; the message names it."""


@dataclass(frozen=True)
class Found:
    """A checkpoint that is complete by its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def progress(self) -> dict[str, Any]:
        """How far the run was."""
        return json.loads((self.folder / "progress.json").read_text())


def state_of(module: nn.Module, optimizer: torch.optim.Optimizer, average: AveragedWeights) -> dict[str, Tensor]:
    """All tensors that change, by name: weights that learn, buffers, averages, the optimizer's moments."""
    state: dict[str, Tensor] = {}
    kept = set(module.state_dict())
    state |= {f"weights/{name}": buffer for name, buffer in module.named_buffers() if name in kept}
    for name, p in module.named_parameters():
        if p.requires_grad:
            state[f"weights/{name}"] = p.detach()
            state |= {f"optimizer/{name}/{key}": value for key, value in optimizer.state[p].items()}
    return state | {f"average/{name}": value for name, value in average.values.items()}


# -------------------------------------------------------------------------------------------------- reading


def find(state: Path) -> list[Found]:
    """The checkpoints of a run that have a manifest, the newest first; their files are not yet verified."""
    # `latest` moves last, so the folder it names is complete; the others are what a damaged one falls back to.
    latest = state / "latest"
    named = latest.read_text().strip() if latest.is_file() else ""
    folders = sorted(state.glob("step-*"), key=lambda folder: (folder.name == named, folder.name), reverse=True)
    found = []
    for folder in folders:
        try:
            found.append(Found(folder, json.loads((folder / "manifest.json").read_text())))
        except (OSError, json.JSONDecodeError):
            warnings.warn(
                f"{folder / 'manifest.json'}: missing or damaged; this checkpoint is passed over", stacklevel=2
            )
    return found


def read_progress(state: Path) -> dict[str, Any] | None:
    """How far a run is by its newest checkpoint, or None where there is none."""
    for found in find(state):
        try:
            return found.progress
        except (OSError, json.JSONDecodeError):
            continue
    return None


def faults(found: Found, part: int = 0, parts: int = 1) -> list[str]:
    """What is wrong with a share of a checkpoint's files, each with its path."""
    wrong = []
    for name, expected in sorted(found.manifest["files"].items())[part::parts]:
        path = found.folder / name
        if not path.is_file():
            wrong.append(f"{path}: missing")
        elif path.stat().st_size != expected["size"]:
            wrong.append(f"{path}: {path.stat().st_size} bytes instead of {expected['size']}")
        elif sha256_of(path) != expected["sha256"]:
            wrong.append(f"{path}: differs from its checksum")
    return wrong


def load_latest(state: Path, tensors: dict[str, Tensor], world: World) -> dict[str, Any] | None:
    """Put the newest good checkpoint back in place, for any number of ranks; returns its progress.

    Damaged ones are put aside, and the file is named on standard error. None means that there is no checkpoint.

    Raises:
        CheckpointError: if there are only damaged ones, or the newest good one is of another model or a newer version.
    """
    told = []
    for name in world.gather_objects([found.folder.name for found in find(state)])[0]:
        found = Found(state / name, json.loads((state / name / "manifest.json").read_text()))
        if found.manifest.get("format") != FORMAT:
            raise CheckpointError(
                f"{found.folder}: written by another version (format {found.manifest.get('format')}, this one reads "
                f"{FORMAT}): update open_pisces, or choose another out=FOLDER"
            )
        own_faults = faults(found, world.rank, world.ranks)  # each rank reads its share of the files
        wrong = list(chain.from_iterable(world.gather_objects(own_faults)))
        if not wrong:
            _check_fit(found, tensors)
            dcp.load({"all": tensors}, checkpoint_id=found.folder, process_group=world.saving, no_dist=world.ranks == 1)
            return found.progress
        told += wrong
        if world.is_first:
            aside = found.folder.with_name(f"damaged-{name}")
            print(f"pisces: checkpoint put aside as {aside}: {'; '.join(wrong)}", file=sys.stderr)
            shutil.rmtree(aside, ignore_errors=True)
            found.folder.rename(aside)
    if told or any(state.glob("step-*")):
        what = told[0] if told else f"{state}: its checkpoints have no manifest"
        raise CheckpointError(f"no checkpoint is good ({what}): bring one back, or remove {state} to begin anew")
    return None


def _check_fit(found: Found, tensors: dict[str, Tensor]) -> None:
    written = found.manifest["tensors"]
    wanted = {name: list(value.shape) for name, value in tensors.items()}
    odd = sorted(name for name in {*written, *wanted} if written.get(name) != wanted.get(name))
    if odd:
        was, now = (shapes.get(odd[0], "not there") for shapes in (written, wanted))
        raise CheckpointError(
            f"{found.folder}: belongs to another model ({odd[0]}: {was}, now {now}): choose another out=FOLDER"
        )


# -------------------------------------------------------------------------------------------------- writing


class Checkpoints:
    """Writes the checkpoints of a run, one at a time, in the background if asked.

    Args:
        state: the folder.
        world: the ranks that write together.
        keep: how many to keep.
        background: return when the tensors are copied; otherwise when all is on disk.
    """

    def __init__(self, state: Path, world: World, keep: int = 2, background: bool = True) -> None:
        self.state = state
        self.world = world
        self.keep = keep
        self.background = background
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._job: Future[None] | None = None
        self._stager = DefaultStager(StagingOptions(False, False, False, False))  # keeps its memory for the next one
        if world.is_first:
            state.mkdir(parents=True, exist_ok=True)
            for left in state.glob(".*"):  # of a process that died while it wrote
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    with suppress(OSError):  # such as a file that NFS keeps for another process
                        left.unlink()

    def save(
        self, step: int, tensors: dict[str, Tensor], progress: dict[str, Any], before: Callable[[], None] = lambda: None
    ) -> None:
        """Write a checkpoint.

        Args:
            step: the number it is known by.
            tensors: what changes.
            progress: how far the run is, as JSON takes it.
            before: what rank 0 writes before the checkpoint counts: the model folder.

        Raises:
            CheckpointError: if this or the one before could not be written; those already there are untouched.
        """
        self.wait()
        fresh = self.state / f".step-{step:08d}"
        alone = self.world.ranks == 1
        shapes = {name: list(value.shape) for name, value in tensors.items()}
        options: dict[str, Any] = {"checkpoint_id": fresh, "process_group": self.world.saving, "no_dist": alone}
        whole = {"all": tensors}  # PyTorch notes in its log when it begins and ends each entry at the top
        if not self.background:
            return self._finish(fresh, shapes, progress, before, lambda: dcp.save(whole, **options))
        # The tensors are copied before this returns, so training may go on changing them.
        written: Any = dcp.async_save(whole, **options, async_stager=self._stager)
        self._job = self._pool.submit(self._finish, fresh, shapes, progress, before, written.result)

    def wait(self) -> None:
        """Until the checkpoint under way is on disk; raises what went wrong with it."""
        job = self._job
        self._job = None
        if job is not None:
            job.result()

    def close(self) -> None:
        """Wait, and let the thread go."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()
            self._stager.close()

    def _finish(
        self,
        fresh: Path,
        shapes: dict[str, list[int]],
        progress: dict[str, Any],
        before: Callable[[], None],
        write: Callable[[], Any],
    ) -> None:
        problem = ""
        files = {}
        # All ranks have to come to the collective below, so no error leaves here before it.
        for act in (before, write) if self.world.is_first else (write,):
            try:
                act()
            except BaseException as error:
                problem = problem or f"{fresh}: cannot be written: {_cause(error)}"
        if not problem:
            own = list(fresh.glob(f"__{self.world.rank}_*"))
            if self.world.is_first:
                own += fresh.glob(".metadata")
            files = {path.name: {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in own}
        gathered = self.world.gather_objects((problem, files), self.world.saving)
        problem = next((told for told, _ in gathered if told), "")
        if not problem and self.world.is_first:
            every = dict(ChainMap(*(part for _, part in gathered)))
            try:
                self._commit(fresh, every, shapes, progress)
            except OSError as error:
                problem = f"{error.filename or fresh}: cannot be written: {_cause(error)}"
        problem = self.world.gather_objects(problem, self.world.saving)[0]
        if problem:
            if self.world.is_first:
                shutil.rmtree(fresh, ignore_errors=True)
            left = ", ".join(found.folder.name for found in find(self.state)) or "none"
            raise CheckpointError(f"{problem} (checkpoints that are there: {left})")

    def _commit(
        self, fresh: Path, files: dict[str, Any], shapes: dict[str, list[int]], progress: dict[str, Any]
    ) -> None:
        told = fresh / "progress.json"
        told.write_text(json.dumps(progress))
        sync(told)
        files[told.name] = {"size": told.stat().st_size, "sha256": sha256_of(told)}
        manifest = {"format": FORMAT, "processes": self.world.ranks, "files": files, "tensors": shapes}
        (fresh / "manifest.json").write_text(json.dumps(manifest))
        sync(fresh / "manifest.json")
        sync(fresh)
        place = self.state / fresh.name.removeprefix(".")
        if place.exists():  # a run that went back comes by again
            place.rename(self.state / f".old-{place.name}")
        fresh.rename(place)
        with whole_file(self.state / "latest") as hidden:
            hidden.write_text(place.name)
            sync(hidden)
        sync(self.state)
        for old in sorted(self.state.glob("step-*"), reverse=True)[self.keep :]:
            old.rename(self.state / f".old-{old.name}")
        for old in self.state.glob(".old-*"):
            shutil.rmtree(old, ignore_errors=True)


def _cause(error: BaseException) -> str:
    """What lies at the bottom of PyTorch's wrapping: the first rank's own error."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


@contextmanager
def own_folder(folder: Path, world: World) -> Iterator[None]:
    """Hold an exclusive `flock` on the run folder; it is released when the process ends, however that happens.

    Raises:
        CheckpointError: if another run has it; its process is named.
    """
    with ExitStack() as held:
        problem = ""
        if world.is_first:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                held.enter_context(locked(folder / ".lock", wait=False))
            except LockHeldError as error:
                problem = f"{folder}: {error.holder} is training into it: wait for it, or choose another out=FOLDER"
            except OSError as error:
                problem = str(error)
        problem = world.gather_objects(problem)[0]
        if problem:
            raise CheckpointError(problem)
        yield
