"""Run folders: prompts, outputs and scores of one evaluation; resumable and re-scorable.

::

    manifest.json     task, model and its hash, settings, hash of the items, versions, device
    items.jsonl       what is asked, one line each, with a ``key``
    images/           pictures, in GenEval's official layout: 00000/metadata.jsonl, 00000/samples/0000.png
    NAME.jsonl        raw rows (images, detections, answers ...), one line for each item, with its ``key``
    scores.json       what the rows amount to, with the hashes of the manifest and of the model

Work is done in batches that depend on the items alone, and a batch is done when all its rows are written; one that was
cut short is done again as a whole. So a run that was interrupted gives the same rows as one that was not.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from open_pisces.data.images import ImageError, open_image
from open_pisces.errors import PiscesError
from open_pisces.files import sha256_of, write_whole
from open_pisces.model.folder import read_card

Row = dict[str, Any]
RUNS = Path("runs/eval")
_MATTER = ("torch", "transformers", "diffusers", "numpy", "pillow")


class RunError(PiscesError):
    """A run folder that cannot be used as asked; the message names it and the remedy."""


def digest(value: Any) -> str:
    """sha256 of a JSON value, independent of the order of keys."""
    return sha256_of(json.dumps(value, sort_keys=True, ensure_ascii=False).encode())


def model_hash(folder: str | Path) -> str:
    """What identifies a model folder: sha256 over its settings and over the checksums of its parts."""
    card = read_card(folder)
    return digest({"model": card["model"], "parts": card["parts"]})


def versions() -> dict[str, str]:
    """The versions on which figures may depend."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for name in ("open-pisces", *_MATTER):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # run from a copy of the sources that is not installed
            found[name] = "not installed"
    return found


@dataclass(frozen=True)
class Manifest:
    """What decides a run's results."""

    task: str
    """``geneval``, ``scenes``, ``understanding/pope`` ..."""
    model: str
    """The folder or name, as it was given."""
    model_hash: str
    settings: dict[str, Any]
    """Everything that shapes what is made: seed, steps, guidance, batch size, prompt set and its version ..."""
    items: str = ""
    """`digest` of the items; filled in by `RunFolder.open`."""
    device: str = "cpu"
    threads: int = field(default_factory=torch.get_num_threads)
    versions: dict[str, str] = field(default_factory=versions)

    @property
    def folder(self) -> Path:
        """Where the run lies if no folder is named."""
        means = {key: value for key, value in asdict(self).items() if key != "model"}
        return RUNS / f"{self.task.replace('/', '-')}-{self.model_hash[:8]}-{digest(means)[:8]}"


class RunFolder:
    """One evaluation's folder; see the head of this file."""

    def __init__(self, folder: Path, manifest: Manifest, items: list[Row]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.items = items
        self._written: dict[str, list[Row]] = {}

    # -------------------------------------------------------------------------------------------- opening

    @classmethod
    def open(cls, folder: str | Path | None, manifest: Manifest, items: Sequence[Row]) -> RunFolder:
        """Begin a run, or go on with one of the same manifest and items.

        Without a folder it lies under `RUNS`, in one named after the task, the model and the manifest: the same command
        finds it again. A run does not go on under other versions, threads or devices: its rows might differ.

        Raises:
            RunError: if keys repeat or are missing, or the folder holds something else.
        """
        rows = _plain(list(items))
        manifest = Manifest(**_plain({**asdict(manifest), "items": digest(rows)}))
        folder = manifest.folder if folder is None else Path(folder)
        _check_keys(folder, rows)
        if (folder / "manifest.json").is_file():
            found = cls.load(folder)
            _refuse_another(folder, asdict(found.manifest), asdict(manifest))
            return found
        # A run that was ended before its manifest was written leaves its items, whole or half written.
        begun = re.compile(r"items\.jsonl|\.\d+-(items\.jsonl|manifest\.json)")
        if folder.is_dir() and not all(begun.fullmatch(file.name) for file in folder.iterdir()):
            raise RunError(f"{folder} holds something else: name a new folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "items.jsonl", "".join(_line(row) for row in rows))
        write_whole(folder / "manifest.json", json.dumps(asdict(manifest), indent=1))  # last: it says that all is there
        return cls(folder, manifest, rows)

    @classmethod
    def load(cls, folder: str | Path) -> RunFolder:
        """A run that was begun, to go on or to score again.

        Raises:
            RunError: if it is none, or its items are not those of the manifest.
        """
        folder = Path(folder)
        if not (folder / "manifest.json").is_file():
            raise RunError(f"{folder}: no run folder, for it has no manifest.json")
        try:
            manifest = Manifest(**json.loads((folder / "manifest.json").read_text()))
        except (json.JSONDecodeError, TypeError) as error:
            raise RunError(f"{folder}/manifest.json: cannot be read ({error}): run the evaluation anew") from None
        items = _read(folder / "items.jsonl")
        if digest(items) != manifest.items:
            raise RunError(f"{folder}/items.jsonl was changed after the run began: run the evaluation anew")
        return cls(folder, manifest, items)

    @property
    def hash(self) -> str:
        """sha256 of the manifest but for the model's place: equal hashes ask the same of the same model in one way."""
        return digest({key: value for key, value in asdict(self.manifest).items() if key != "model"})

    # ----------------------------------------------------------------------------------------------- rows

    def batches(self, name: str, size: int) -> Iterator[list[Row]]:
        """Items in batches of ``size``, in order, without those batches whose rows in NAME.jsonl are all there."""
        done = {row["key"] for row in self.written(name)}
        for start in range(0, len(self.items), size):
            # Again as a whole where a row is missing: padding and noise are a batch's, not an item's.
            batch = self.items[start : start + size]
            if not all(item["key"] in done for item in batch):
                yield batch

    def append(self, name: str, rows: Sequence[Row]) -> None:
        """Add a batch's rows to NAME.jsonl; they are on disk when this returns."""
        path = self.folder / f"{name}.jsonl"
        _mend(path)
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(_line(row) for row in rows))
            file.flush()
            os.fsync(file.fileno())
        self._written.pop(name, None)

    def written(self, name: str) -> list[Row]:
        """All rows of NAME.jsonl in the order of writing, none without the file; read once until rows are added.

        Raises:
            RunError: if a line is damaged.
        """
        if name not in self._written:
            self._written[name] = _read(self.folder / f"{name}.jsonl")
        return self._written[name]

    def rows(self, name: str) -> list[Row]:
        """The rows of NAME.jsonl, one for each item and in their order; the last one written of a key counts.

        Raises:
            RunError: if some are missing.
        """
        found = {row["key"]: row for row in self.written(name)}
        missing = [item["key"] for item in self.items if item["key"] not in found]
        if missing:
            raise RunError(
                f"{self.folder}: {len(missing)} of {len(self.items)} rows of {name}.jsonl are missing (the first: "
                f"{missing[0]}); the command that began the run goes on with it"
            )
        return [found[item["key"]] for item in self.items]

    def has(self, name: str) -> bool:
        """Whether NAME.jsonl holds a row for every item."""
        found = {row["key"] for row in self.written(name)}
        return all(item["key"] in found for item in self.items)

    def drop(self, name: str) -> None:
        """Forget the rows of NAME.jsonl, to make them anew."""
        (self.folder / f"{name}.jsonl").unlink(missing_ok=True)
        self._written.pop(name, None)

    def note(self, name: str, value: Row) -> None:
        """Keep something that belongs to the whole run and to no item, as NAME.json."""
        write_whole(self.folder / f"{name}.json", json.dumps(value, indent=1, ensure_ascii=False))

    def noted(self, name: str) -> Row:
        """What was kept as NAME.json.

        Raises:
            RunError: if it is not there, or damaged.
        """
        path = self.folder / f"{name}.json"
        if not path.is_file():
            raise RunError(f"{path}: no such file; the command that began the run goes on with it")
        try:
            value: Row = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # JSON's errors, and bytes that are no text
            raise RunError(f"{path}: cannot be read ({error}): delete it and run the command again") from None
        return value

    # --------------------------------------------------------------------------------------------- pictures

    def place(self, key: str) -> Path:
        """The folder of an item's pictures: its number in five digits."""
        return self.folder / "images" / f"{self._places[key]:05d}"

    def save_images(self, pictures: Mapping[str, Sequence[Image]]) -> None:
        """Save the pictures of items (by key), then note their checksums in images.jsonl."""
        rows = []
        for key, images in pictures.items():
            folder = self.place(key)
            (folder / "samples").mkdir(parents=True, exist_ok=True)
            write_whole(folder / "metadata.jsonl", _line(self.items[self._places[key]]))
            files = {f"{number:04d}.png": image for number, image in enumerate(images)}
            for name, image in files.items():
                image.save(folder / "samples" / name)
            sums = {name: sha256_of(folder / "samples" / name) for name in files}
            rows.append({"key": key, "sha256": sums})
        self.append("images", rows)  # after the files: a row says that its pictures are whole
        self.__dict__.pop("_sums", None)

    def images(self, key: str) -> list[Image]:
        """The pictures of an item.

        Raises:
            RunError: if one is missing, damaged, or not the one that was made.
        """
        pictures = []
        for name, expected in self._sums[key].items():
            path = self.place(key) / "samples" / name
            try:
                pictures.append(open_image(path))
            except ImageError as error:
                raise RunError(f"{error}; or delete {self.folder}/images.jsonl and run the command again") from None
            if sha256_of(path) != expected:
                raise RunError(f"{path} was changed after it was made: scores of it would be of another picture")
        return pictures

    @cached_property
    def _places(self) -> dict[str, int]:
        return {item["key"]: number for number, item in enumerate(self.items)}

    @cached_property
    def _sums(self) -> dict[str, dict[str, str]]:
        return {row["key"]: row["sha256"] for row in self.rows("images")}

    # ---------------------------------------------------------------------------------------------- scores

    def write_scores(self, scores: Row) -> Row:
        """Write ``scores`` with what they belong to; the whole is returned."""
        whole = {**scores, "task": self.manifest.task, "model": self.manifest.model}
        whole |= {"model_hash": self.manifest.model_hash, "run": self.hash}
        write_whole(self.folder / "scores.json", json.dumps(whole, indent=1, ensure_ascii=False))
        return whole

    def scores(self, model: str | None = None) -> Row:
        """The scores of this run.

        Args:
            model: the hash of the model that they have to be of; None takes any.

        Raises:
            RunError: if there are none yet, or they are of another manifest or model.
        """
        path = self.folder / "scores.json"
        if not path.is_file():
            raise RunError(f"{self.folder} has no scores yet: `pisces eval rescore {self.folder}`")
        try:
            scores = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:  # JSON's errors, and bytes that are no text
            raise RunError(f"{path}: cannot be read ({error}): `pisces eval rescore {self.folder}`") from None
        if not isinstance(scores, dict) or scores.get("run") != self.hash:
            raise RunError(f"{path}: scores of another manifest: `pisces eval rescore {self.folder}`")
        if model is not None and scores["model_hash"] != model:
            raise RunError(
                f"{path}: scores of the model {scores['model_hash'][:12]}, asked is {model[:12]}: run the evaluation "
                f"on this model, in a folder of its own"
            )
        return scores


def _plain(value: Any) -> Any:
    """A value as it comes back from JSON: a run that goes on then holds the same types as one that begins."""
    return json.loads(json.dumps(value))


def _check_keys(folder: Path, rows: Sequence[Row]) -> None:
    """Raise unless there are items and each has a key of its own."""
    counts = Counter(str(row["key"]) for row in rows if row.get("key") is not None)
    twice = [key for key, times in counts.items() if times > 1]
    bare = len(rows) - counts.total()
    if rows and not twice and not bare:
        return
    what = f"the key {twice[0]} comes {counts[twice[0]]} times" if twice else f"{bare} of {len(rows)} items have none"
    raise RunError(f"{folder}: a run needs items, each with its own `key`; {what if rows else 'found no items'}")


def _refuse_another(folder: Path, found: Row, asked: Row) -> None:
    """Raise if two manifests differ in anything but where the model lies."""
    before = _flat(found)
    now = _flat(asked)
    what = []
    for key in {**before, **now}:
        old = before.get(key)
        new = now.get(key)
        if old != new:
            what.append(f"{key[1]} = {_brief(old, new)}, now {_brief(new, old)}")
    if what:
        raise RunError(f"{folder} is a run of something else ({', '.join(what)}): name another folder, or delete it")


def _flat(manifest: Row) -> dict[tuple[str, str], str]:
    """What decides a manifest: each value as JSON, by where it stands and its name."""
    plain = {key: value for key, value in manifest.items() if key not in ("model", "versions", "settings")}
    flat = {}
    for group, values in {"": plain, "versions": manifest["versions"], "settings": manifest["settings"]}.items():
        for key, value in values.items():
            flat[group, key] = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return flat


def _brief(text: str | None, other: str | None) -> str:
    """A value in an error message that sets it against another one; a long one is shown from where they part."""
    if text is None or len(text) <= 40:
        return text or "not set"
    start = max(0, len(os.path.commonprefix([text, other or ""])) - 6)
    return f"{'...' if start else ''}{text[start : start + 16]}..."


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read(path: Path) -> list[Row]:
    """The rows of a file; a last line that was cut short was never written. No file is no rows."""
    if not path.is_file():
        return []
    rows: list[Row] = []
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise RunError(f"{path}, line {number}: not valid JSON ({error}): delete the file and run again") from None
        if not isinstance(row, dict) or "key" not in row:
            raise RunError(f"{path}, line {number}: no row with a `key`: delete the file and run again")
        rows.append(row)
    return rows


def _mend(path: Path) -> None:
    """Cut off a last line without its end, so that what is appended stands on lines of its own."""
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)
