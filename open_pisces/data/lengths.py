"""Token counts of a dataset's samples: one that is longer than ``data.max_length`` is refused before the first step."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from open_pisces.batch import Question, Sample
from open_pisces.config import DataConfig, SourceConfig, Task
from open_pisces.data.order import Mixture
from open_pisces.data.prompts import LengthError, Renderer, SampleError, sample_turns, wordings
from open_pisces.data.shards import DamagedSample, ShardReader, data_path
from open_pisces.files import sha256_of, whole_file

COLUMNS = ("short", "detailed", "questions", "conversation", "asked", "turns", "pictures")
"""Tokens of the texts, then how many questions, turns and pictures a sample has."""
SHARED = 50_000
"""Samples that one rank tokenizes at a time; their counts are one file of the cache."""
_CHUNK = 1000
_JOINTS = 4  # tokens that joining a text to its wording may cost


def check_lengths(mixture: Mixture, renderer: Renderer, config: DataConfig, rank: int = 0, ranks: int = 1) -> None:
    """Refuse a mixture that holds a sample too long for ``data.max_length`` in any wording of its tasks.

    Three sieves, so that it is soon done for millions: the bytes of a sample's texts, from the index alone (byte-level
    tokenizers never make more tokens than bytes); the tokens of those that are left; and a rendering of the last few.

    With several ranks each checks the chunks of samples that fall to it; an error of one has to end all.

    Raises:
        LengthError: naming the sample, its length and the limit.
    """
    for number, (source, reader) in enumerate(zip(mixture.sources, mixture.readers, strict=True)):
        tasks = [task for task, weight in source.tasks.items() if weight > 0]
        if not tasks:
            continue
        # A conversation may name a picture any number of times: its bytes say nothing.
        left = np.arange(len(reader))
        if "conversation" not in tasks:
            left = np.flatnonzero(_byte_bound(reader, renderer) > config.max_length)
        # The chunks do not depend on the number of ranks, so that one cache of token counts serves any number.
        starts = range(0, len(left), SHARED)[rank::ranks]
        for chunk in (left[start : start + SHARED] for start in starts):
            table = token_table(reader, renderer.tokenizer, chunk)
            for task in tasks:
                bound = _token_bound(table, task, renderer, config.questions_per_image)
                doubtful = chunk[bound > config.max_length].tolist()
                doubtful = [index for index in doubtful if mixture.holds(number, index)]
                # Rendering a hundred thousand takes minutes: what has passed once passes at every start.
                passed = data_path("lengths") / f"{_verdict(reader, doubtful, task, renderer, config)}.passed"
                if passed.is_file():
                    continue
                for index in doubtful:
                    _check(reader, index, task, renderer, source, config)
                _note(passed)


def _verdict(reader: ShardReader, samples: list[int], task: Task, renderer: Renderer, config: DataConfig) -> str:
    """Changes with all that says how long samples are and may be."""
    limits = [task, config.max_length, config.questions_per_image, config.system, renderer.N, renderer.M]
    said = json.dumps([limits, renderer.frame, wordings()], sort_keys=True)
    name = _name(reader, renderer.tokenizer, np.array(samples, np.int64))
    return sha256_of(f"{name} {said}".encode())[:20]


def _note(path: Path) -> None:
    """Leave an empty file; without it the samples are rendered again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError:
        pass


def _byte_bound(reader: ShardReader, renderer: Renderer) -> np.ndarray:
    """At least as many tokens as each sample can take, were every byte a token; JSON's own signs pay for the turns.

    For all tasks but conversations; `reconstruct` holds the picture twice, the others once.
    """
    asked = chain.from_iterable(texts for texts in wordings().values() if isinstance(texts, list))
    longest = max(len(renderer.text_ids(text)) for text in asked)
    frame = len(renderer.render(()).ids) + 2 * _turn(renderer) + longest + _JOINTS
    return frame + renderer.N + renderer.M + 4 + reader.text_bytes()


def token_table(reader: ShardReader, tokenizer: Any, samples: np.ndarray) -> np.ndarray:
    """Tokens of some samples' texts, ``(samples, COLUMNS)``; computed once per dataset, tokenizer and choice.

    It is kept under ``lengths/`` in the data folder, or only in memory where that cannot be written.
    """
    if not len(samples):
        return np.zeros((0, len(COLUMNS)), np.int32)
    path = data_path("lengths") / f"{_name(reader, tokenizer, samples)}.npy"
    if path.is_file():
        return np.load(path, mmap_mode="r", allow_pickle=False)
    counts = []
    for start in range(0, len(samples), _CHUNK):
        chunk = samples[start : start + _CHUNK].tolist()
        counts.append(_count([_words(reader, index) for index in chunk], tokenizer))
    table = np.concatenate(counts)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as part:
            np.save(part, table, allow_pickle=False)
    except OSError:
        pass
    return table


def _name(reader: ShardReader, tokenizer: Any, samples: np.ndarray) -> str:
    """Changes with the dataset and with anything the tokenizer does."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    spelled = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    chosen = sha256_of(samples.astype("<i8").tobytes())
    return sha256_of(f"{reader.digest} {chosen} {spelled}".encode())[:20]


def _words(reader: ShardReader, index: int) -> Sample:
    try:
        return reader.words(index)
    except DamagedSample:
        return Sample("", ())  # met again, and counted, when it is drawn


def _count(samples: list[Sample], tokenizer: Any) -> np.ndarray:
    """One row for each sample; all texts are encoded in one call."""
    groups = [_texts(sample) for sample in samples]
    texts = [*chain.from_iterable(chain.from_iterable(groups))]
    encoded = tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else []
    lengths = iter(map(len, encoded))
    rows = []
    for sample, group in zip(samples, groups, strict=True):
        counted = [list(islice(lengths, len(kind))) for kind in group]
        # Of several short captions one is drawn; texts of the other columns come together.
        tokens = [max(counted[0], default=0), *(sum(row) for row in counted[1:])]
        shown = sum(isinstance(part, dict) for part in _parts(sample))
        rows.append([*tokens, len(sample.questions), len(sample.conversation), shown])
    return np.array(rows, np.int32)


def _texts(sample: Sample) -> list[list[str]]:
    """The texts of the first four of `COLUMNS`."""
    detailed = [sample.detailed] if sample.detailed else []
    questions: list[str] = []
    for asked in sample.questions:
        questions += (asked.question, asked.answer)
    return [list(sample.short_captions), detailed, questions, [p for p in _parts(sample) if isinstance(p, str)]]


def _parts(sample: Sample) -> list[Any]:
    """The parts of all turns; a conversation of another form is met again, and counted, when it is drawn."""
    parts: list[Any] = []
    for turn in sample.conversation:
        content = turn.get("content") if isinstance(turn, dict) else None
        parts += content if isinstance(content, list) else []
    return parts


def _token_bound(table: np.ndarray, task: Task, renderer: Renderer, questions: int) -> np.ndarray:
    """At least as many tokens as each sample can take for a task."""
    frame = len(renderer.render(()).ids) + 2 * _turn(renderer)
    picture = max(renderer.N, renderer.M) + 2
    column = {name: table[:, at] for at, name in enumerate(COLUMNS)}
    if task == "conversation":
        pieces = column["turns"] + column["pictures"]
        drawn = 2 * picture * column["pictures"]  # a picture that was drawn comes again, to be asked about
        return frame + column["conversation"] + column["turns"] * _turn(renderer) + drawn + _JOINTS * pieces
    if task == "question":
        asked = np.minimum(column["asked"], questions)
        return frame + column["questions"] + picture + asked * (2 * _turn(renderer) + 2 * _JOINTS)
    wording = wordings()["generate" if task.startswith("generate") else task]
    longest = max(len(renderer.text_ids(text)) for text in wording)
    if task == "reconstruct":  # no caption, and the picture twice
        return frame + longest + renderer.N + renderer.M + 4 + _JOINTS + 0 * column["short"]
    words = column["short" if task.endswith("short") else "detailed"]
    return frame + longest + words + picture + _JOINTS


def _turn(renderer: Renderer) -> int:
    """Tokens that a turn costs besides its content."""
    ends = 1 + len(renderer.frame_ids(renderer.after))
    return ends + max(len(renderer.frame_ids(piece)) for piece in renderer.frame["open"].values())


def _check(
    reader: ShardReader, index: int, task: Task, renderer: Renderer, source: SourceConfig, config: DataConfig
) -> None:
    """Render a sample in each way its task may be worded.

    Raises:
        LengthError: if one of them is too long.
    """
    shown: Any = (None,) * len(reader.image_members(index))  # the pictures' number is all that rendering asks for
    sample = _longest(_words(reader, index), shown, config.questions_per_image, renderer)
    ways = len(wordings().get("generate" if task.startswith("generate") else task, [""])) if task != "question" else 1
    for way in range(ways):
        try:
            draw: Any = _Fixed(way)
            turns = sample_turns(sample, task, draw, 0.0, config.questions_per_image, config.system == "keep")
            length = len(renderer.render(turns).ids)
        except SampleError:
            return  # lacks what the task needs: skipped and counted when it is drawn
        if length > config.max_length:
            raise LengthError(
                f"{source.path}: sample {sample.key!r} takes {length} tokens as {task}, data.max_length is "
                f"{config.max_length}: raise it, or drop the sample (`pisces data filter`)"
            )


class _Fixed:
    """A random stream that always chooses the same wording and drops nothing."""

    def __init__(self, way: int) -> None:
        self.way = way

    def random(self) -> float:
        """Never below a chance of dropping."""
        return 1.0

    def integers(self, high: int) -> int:
        """The wording."""
        return min(self.way, high - 1)

    def permutation(self, count: int) -> np.ndarray:
        """The questions as they stand."""
        return np.arange(count)


def _longest(sample: Sample, images: Any, most: int, renderer: Renderer) -> Sample:
    """The same sample with its pictures, its longest short caption, and its longest questions first."""

    def tokens(asked: Question) -> int:
        return len(renderer.text_ids(asked.question)) + len(renderer.text_ids(asked.answer))

    short = max(sample.short_captions, key=lambda text: len(renderer.text_ids(text)), default="")
    questions = tuple(sorted(sample.questions, key=tokens, reverse=True)[:most])
    return replace(sample, images=images, questions=questions, short=short, more_captions=())
