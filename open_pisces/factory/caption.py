"""``pisces data caption``: a vision LLM describes the pictures of a dataset; its words become their captions.

Each input shard becomes one output shard with a manifest, written as a whole. A run that was stopped or killed goes on
with the shards that are not there yet, on any number of workers.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from open_pisces.batch import Sample
from open_pisces.data.images import ImageError, open_image
from open_pisces.data.shards import DamagedSample, ShardError, ShardReader, data_path
from open_pisces.datasets.shard_writer import ShardWriter, join_datasets
from open_pisces.datasets.stats import checked
from open_pisces.factory.caption_checks import CaptioningError, Filters, Template
from open_pisces.factory.captioners import Asked, Captioner, CaptionerSettings
from open_pisces.factory.cluster import Workers, run_stage
from open_pisces.factory.endpoint_captioner import EndpointCaptioner, check_captioner
from open_pisces.files import LockHeldError, locked, write_whole

SETTINGS = "caption.json"
"""In the output folder: what its captions depend on."""
MANIFEST = "manifest.json"
"""In each part: what became of the samples of one input shard."""


@dataclass(frozen=True)
class Captioning:
    """What is to be written.

    Args:
        captioner: who writes.
        template: what is asked.
        field: the caption that is replaced: the ``detailed`` one, or the ``short`` one.
        filters: which captions are kept.
    """

    captioner: CaptionerSettings
    template: Template
    field: Literal["detailed", "short"] = "detailed"
    filters: Filters = Filters()

    def as_settings(self, reader: ShardReader) -> dict[str, Any]:
        """What the captions of a dataset depend on."""
        prompts = {"prompt": self.template.prompt, "prompt_with_caption": self.template.prompt_with_caption}
        own = {"field": self.field, **prompts, "filters": self.filters.as_settings()}
        # Lists, as JSON gives them back.
        return dict(json.loads(json.dumps({"source": reader.digest, **self.captioner.as_settings(), **own})))


def caption(
    source: str,
    out: str | Path,
    captioning: Captioning,
    workers: Workers | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Any]:
    """Write a dataset's samples with new captions; those whose caption is dropped are left out, and counted.

    Args:
        source: a dataset's folder or address, or its name under the data folder.
        out: the folder to write, which all workers see; one of an unfinished run with the same settings is continued.
        captioning: what is to be written.
        workers: who does it; by default this process.
        progress: called after each shard with how many samples are done, and how many there are.

    Returns:
        ``read``, which is ``written`` and all of ``dropped`` and ``damaged`` (cause -> samples); ``shards``; and
        ``damaged_shards``, with what is wrong with each.

    Raises:
        CaptioningError: if the captioner cannot be used, ``out`` is something else or of other settings, or another
            run writes it.
        ShardError: no dataset at ``source``.
    """
    address = source if "://" in source or Path(source).is_dir() else str(data_path(source))
    reader = ShardReader(address, keep_damaged=True)
    folder = Path(out).absolute()
    if isinstance(reader.folder, Path) and reader.folder.resolve().is_relative_to(folder.resolve()):
        raise CaptioningError(f"{out} is, or holds, the dataset that is read: choose another folder")
    _check_folder(folder, captioning.as_settings(reader))
    numbers = [number for number in range(len(reader.shards)) if number not in reader.damaged_shards]
    todo = [number for number in numbers if not _manifest_file(folder, number).is_file()]
    if todo:
        check_captioner(captioning.captioner)
    parts = folder / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder / ".lock", wait=False))
        except LockHeldError as error:
            raise CaptioningError(f"another run writes {folder}: {error}") from None
        write_whole(folder / SETTINGS, json.dumps(captioning.as_settings(reader), indent=1))
        done = sum(len(reader.samples_of(number)) for number in numbers if number not in todo)
        build = partial(CaptionStage, address, folder, captioning)
        for manifest in run_stage(build, todo, workers or Workers()):
            done += manifest["samples"]
            if progress:
                progress(done, len(reader))
        manifests = [json.loads(_manifest_file(folder, number).read_text()) for number in numbers]
        counts = _counts(reader, manifests)
        if not counts["written"]:
            causes = {**counts["dropped"], **counts["damaged"]}
            raise CaptioningError(
                f"none of {counts['read']} captions was kept ({causes}): look at the template and the filters"
            )
        join_datasets(folder, [parts / f"{number:05d}" for number in numbers])
        for lock in parts.glob(".*.lock"):
            lock.unlink()
    return counts


def _check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse a folder of something else, or of other settings, naming the first that differs."""
    if not folder.exists() or not any(folder.iterdir()):
        return
    try:
        before = json.loads((folder / SETTINGS).read_text())
    except (OSError, ValueError):
        raise CaptioningError(f"{folder} is there and is no captioning: choose another folder or empty it") from None
    for name, value in settings.items():
        if before.get(name) != value:
            was, now = (str(one)[:80] for one in (before.get(name), value))
            raise CaptioningError(f"{folder} was begun with {name} = {was}, not {now}: choose another folder, or that")


def _manifest_file(folder: Path, number: int) -> Path:
    return folder / "parts" / f"{number:05d}" / MANIFEST


def _counts(reader: ShardReader, manifests: list[dict[str, Any]]) -> dict[str, Any]:
    dropped, damaged = Counter[str](), Counter[str]()
    for manifest in manifests:
        dropped.update({cause: len(keys) for cause, keys in manifest["dropped"].items()})
        damaged.update({cause: len(keys) for cause, keys in manifest["damaged"].items()})
    lost = sum(len(reader.samples_of(number)) for number in reader.damaged_shards)
    if lost:
        damaged["shard"] = lost
    return {
        "read": len(reader),
        "written": sum(manifest["written"] for manifest in manifests),
        "dropped": dict(dropped),
        "damaged": dict(damaged),
        "shards": len(manifests),
        "damaged_shards": list(reader.damaged_shards.values()),
    }


def build_captioner(settings: CaptionerSettings) -> Captioner:
    """The captioner, loaded.

    Raises:
        CaptioningError: if it cannot be used; the message says why.
    """
    if settings.kind == "endpoint":
        return EndpointCaptioner(settings)
    # Later: workers that only wait for a server need no PyTorch.
    from open_pisces.factory.local_captioners import OwnModel, VisionLLM

    return VisionLLM(settings) if settings.kind == "transformers" else OwnModel(settings)


class CaptionStage:
    """Captions one shard at a time; what workers run.

    Args:
        source: the dataset's folder or address.
        out: where parts are written.
        captioning: what is to be written.
    """

    def __init__(self, source: str, out: Path, captioning: Captioning) -> None:
        self.reader = ShardReader(source, keep_damaged=True)
        self.parts = out / "parts"
        self.captioning = captioning
        self.captioner: Captioner = build_captioner(captioning.captioner)

    def __call__(self, number: int) -> dict[str, Any]:
        """The manifest of a shard, which is captioned unless it was before."""
        part = self.parts / f"{number:05d}"
        # Two workers may get one shard when Ray gives up on one that still lives: the second waits, and finds it done.
        with locked(self.parts / f".{number:05d}.lock"):
            if not (part / MANIFEST).is_file():
                for left in self.parts.glob(f".{number:05d}.*.part"):  # of workers that were killed
                    shutil.rmtree(left)
                self._write(number, part)
            found: dict[str, Any] = json.loads((part / MANIFEST).read_text())
            return {"shard": found["shard"], "samples": found["samples"]}

    def _write(self, number: int, part: Path) -> None:
        began = time.monotonic()
        samples = self.reader.samples_of(number)
        outcome = _Outcome()
        licences = self.reader.licences
        with ShardWriter(part, max(1, len(samples)), licences) as writer:
            readable: list[tuple[Sample, tuple[bytes, ...], str]] = []
            asked = self._asked(samples, outcome, readable)
            # The captioner reads ahead of what it has written; its answers come in the order of the questions.
            for at, written in enumerate(self.captioner.write(asked)):
                words, files, prompt = readable[at]
                readable[at] = (words, (), "")  # only those that are being worked on stay in memory
                cause = written.failed or self.captioning.filters.cause(written.text, written.finished, prompt)
                if cause:
                    outcome.drop(cause, words.key)
                    continue
                try:
                    writer.write(self._captioned(words, written.text), encoded=files)
                except (ShardError, UnicodeError):
                    outcome.damage("unwritable", words.key)
            manifest = {"shard": self.reader.shards[number], "samples": len(samples), "written": len(writer)}
            manifest |= {"dropped": outcome.dropped, "damaged": outcome.damaged}
            manifest["seconds"] = round(time.monotonic() - began, 2)
            writer.beside[MANIFEST] = json.dumps(manifest, indent=1)

    def _captioned(self, sample: Sample, text: str) -> Sample:
        return replace(sample, short=text) if self.captioning.field == "short" else replace(sample, detailed=text)

    def _asked(
        self, samples: range, outcome: _Outcome, readable: list[tuple[Sample, tuple[bytes, ...], str]]
    ) -> Iterator[Asked]:
        """What is asked about each sample that can be read; ``readable`` grows with them."""
        for index in samples:
            try:
                words = checked(self.reader.words(index))
                files = tuple(self.reader.pictures(index))
                picture = open_image(files[0]) if files else None  # captions speak of the first picture
            except DamagedSample as error:
                outcome.damage(error.cause, self.reader.key(index))
                continue
            except ImageError:
                outcome.damage("image", self.reader.key(index))
                continue
            if picture is None:
                outcome.drop("no picture", words.key)
                continue
            prompt = self.captioning.template.ask(words.short)
            readable.append((words, files, prompt))
            yield Asked(picture, prompt)


class _Outcome:
    """Keys of the samples of a shard that are not written, by cause."""

    def __init__(self) -> None:
        self.dropped: dict[str, list[str]] = {}
        self.damaged: dict[str, list[str]] = {}

    def drop(self, cause: str, key: str) -> None:
        self.dropped.setdefault(cause, []).append(key)

    def damage(self, cause: str, key: str) -> None:
        self.damaged.setdefault(cause, []).append(key)
