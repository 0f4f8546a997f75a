"""GenEval of pictures that are there already, in a folder of the official layout.

The layout is ``00000/metadata.jsonl``, a line of ``evaluation_metadata.jsonl``, and ``00000/samples/0000.png`` ...
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL.Image import Image

from open_pisces.data.images import open_image
from open_pisces.eval.drawing.detection import Detector
from open_pisces.eval.drawing.judged_run import GenEvalScore, JudgedPictures, score_run
from open_pisces.eval.drawing.prompts import Prompt, from_row, to_row
from open_pisces.eval.intervals import EvaluationError
from open_pisces.eval.run import Row, RunFolder, digest
from open_pisces.files import sha256_of


@dataclass
class GenEvalOfFolder(JudgedPictures):
    """GenEval of pictures that any model made.

    As in the official scorer folders and pictures count whose names are digits. Nothing is written there: the run with
    the detections is a folder of its own. `run` is given the same path in place of a model.

    Args:
        path: of the folder with the numbered folders.
        detectors: as in `GenEval`.
        n: pictures that each prompt has to have.
        batch_size: prompts whose pictures are shown at once.
        asked: whose pictures have to be there, and no others; None takes what there is.

    Raises:
        EvaluationError: naming the folder whose metadata or pictures are missing or of another number.
        ImageError: naming the picture that cannot be read.
    """

    path: Path
    detectors: Sequence[Detector]
    n: int = 4
    batch_size: int = 16
    asked: Sequence[Prompt] | None = None
    task = "geneval"

    def __post_init__(self) -> None:
        self.files, self.found = _official_layout(self.path, self.n)
        if self.asked is not None:
            _check_complete(self.path, self.found, self.asked)

    @property
    def settings(self) -> Row:
        """Those of the layout."""
        return {"n": self.n, "batch_size": self.batch_size}

    def hash_of(self, model: str | Path) -> str:
        """In place of the model's: the hash of all pictures."""
        # Names and contents: a picture that is changed or moved makes another run.
        sums = {}
        for files in self.files.values():
            for file in files:
                sums[str(file.relative_to(self.path))] = sha256_of(file)
        return digest(sums)

    def prompts(self) -> Sequence[Prompt]:
        """Those that are in the folder."""
        return self.found

    def pictures(self, run: RunFolder, key: str) -> list[Image]:
        """Those that are in the folder."""
        return [open_image(file) for file in self.files[key]]

    def score(self, run: RunFolder) -> GenEvalScore:
        """By the first detector's rows."""
        return score_run(run, self.detectors[0].name)


def _official_layout(path: Path, n: int) -> tuple[dict[str, list[Path]], list[Prompt]]:
    """The pictures of each prompt, by key, and the prompts; in the order of the folders' numbers."""
    folders = [folder for folder in path.glob("*") if folder.is_dir() and folder.name.isdigit()]
    if not folders:
        raise EvaluationError(f"{path}: holds no numbered folders; GenEval's layout is 00000/samples/0000.png")
    files = {}
    prompts = []
    for folder in sorted(folders, key=lambda folder: (int(folder.name), folder.name)):
        prompt = _metadata(folder)
        # By the folder's number: the same prompt may come twice.
        prompt = replace(prompt, key=f"{folder.name}-{prompt.tag}")
        prompts.append(prompt)
        files[prompt.key] = _samples(folder / "samples", n)
    return files, prompts


def _metadata(folder: Path) -> Prompt:
    """The prompt of a numbered folder."""
    path = folder / "metadata.jsonl"
    if not path.is_file():
        raise EvaluationError(f"{path}: no such file; it holds the prompt's line of evaluation_metadata.jsonl")
    try:
        return from_row(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:  # JSON's errors, bytes that are no text, and prompts that are none
        raise EvaluationError(f"{path}: {error}") from None


def _samples(folder: Path, n: int) -> list[Path]:
    """The pictures of a prompt in the order of their numbers."""
    # Any number of digits: samplers write 0.png as well as 0000.png.
    files = [file for file in folder.glob("*") if re.fullmatch(r"\d+\.png", file.name)]
    if len(files) != n:
        others = sorted(file.name for file in folder.glob("*") if file not in files)
        beside = f" beside {', '.join(others[:3])}, whose names are not digits and .png" if others else ""
        raise EvaluationError(f"{folder}: {len(files)} pictures{beside}, expected are {n}; add them or say how many")
    return sorted(files, key=lambda file: int(file.stem))


def _check_complete(path: Path, present: Sequence[Prompt], prompts: Sequence[Prompt]) -> None:
    """Raise unless the folders are of ``prompts``, each once."""
    there = Counter(json.dumps(to_row(prompt)) for prompt in present)
    wanted = Counter(json.dumps(to_row(prompt)) for prompt in prompts)
    for rows, what in (
        (wanted - there, "has no pictures"),
        (there - wanted, "is not one of those asked, or comes twice"),
    ):
        if rows:
            prompt = json.loads(next(iter(rows)))["prompt"]
            raise EvaluationError(f"{path}: {prompt!r} {what} ({rows.total()} such of {len(prompts)} prompts)")
