"""Filters a dataset by named rules, and counts what each rule drops.

A rule is a function of a sample and the rule's value: true keeps the sample. Rules are written ``name=value`` and apply
in the order given; the first that drops a sample is the one counted. A sample without captions passes the rules on
captions (it may hold questions), one without pictures the rules on pictures.

A rule that needs a picture which cannot be read makes the sample count as damaged; to count such samples under a name
of their own, give ``missing_image`` first.
"""

from __future__ import annotations

import difflib
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL.Image import Image

from open_pisces.batch import Sample
from open_pisces.data.images import ImageError, image_size, open_image
from open_pisces.data.shards import DamagedSample, ShardError, ShardReader, open_dataset
from open_pisces.datasets.duplicates import Appearance, NearIndex, appearance_of
from open_pisces.datasets.language import SCRIPTS, LanguageError, in_language, load_identifier, repeated_share, words_of
from open_pisces.datasets.shard_writer import ShardWriter
from open_pisces.datasets.stats import checked
from open_pisces.errors import PiscesError


class RuleError(PiscesError):
    """A rule that cannot be applied; the message names the rule and shows how one is written."""


class Candidate:
    """A sample to be judged: its words are read at once, its pictures only when a rule needs them.

    Raises:
        DamagedSample: from every member, when what it needs cannot be read.
    """

    def __init__(self, reader: ShardReader, index: int) -> None:
        self._reader = reader
        self._index = index
        self.words: Sample = checked(reader.words(index))

    @property
    def captions(self) -> list[str]:
        """The short captions and the detailed one, those that are there."""
        return [caption for caption in (*self.words.short_captions, self.words.detailed) if caption.strip()]

    @property
    def licences(self) -> list[str]:
        """The sample's own licence (``facts["licence"]``), else those of the dataset it is in."""
        own = self.words.facts.get("licence") if isinstance(self.words.facts, dict) else None
        return [str(own)] if own else [str(row.get("licence", "")) for row in self._reader.licences]

    @cached_property
    def files(self) -> tuple[bytes, ...]:
        """The files of the pictures, as they are in the dataset."""
        return tuple(self._reader.pictures(self._index))

    @cached_property
    def sizes(self) -> list[tuple[int, int]]:
        """(width, height) of each picture as stored, from its header alone."""
        return [self._read(number, image_size, raw) for number, raw in enumerate(self.files)]

    @cached_property
    def images(self) -> list[Image]:
        """The pictures, decoded."""
        return [self._read(number, open_image, raw) for number, raw in enumerate(self.files)]

    @cached_property
    def appearances(self) -> list[Appearance]:
        """What each picture looks like, for finding copies."""
        return [appearance_of(image) for image in self.images]

    def _read(self, number: int, read: Callable[[bytes], Any], raw: bytes) -> Any:
        try:
            return read(raw)
        except ImageError as error:
            where = f"{self._reader.folder}: sample {self.words.key!r}, picture {number}"
            raise DamagedSample(f"{where}: {error}", "image") from None


# --------------------------------------------------------------------------------------------------------- the rules


def size(candidate: Candidate, least: int) -> bool:
    """The shorter side of every picture has at least so many pixels."""
    return all(min(sides) >= least for sides in candidate.sizes)


def aspect(candidate: Candidate, most: float) -> bool:
    """The longer side of every picture is at most so many times its shorter side."""
    return all(max(sides) / min(sides) <= most for sides in candidate.sizes)


def caption_length(candidate: Candidate, bounds: tuple[int, int]) -> bool:
    """Each caption that is there has MIN to MAX words (`words_of`)."""
    return all(bounds[0] <= len(words_of(caption)) <= bounds[1] for caption in candidate.captions)


def repetition(candidate: Candidate, most: float) -> bool:
    """Each caption repeats at most this share of itself (`repeated_share`)."""
    return all(repeated_share(caption) <= most for caption in candidate.captions)


def language(candidate: Candidate, codes: tuple[str, ...]) -> bool:
    """Each caption may be in one of the languages (`in_language`)."""
    for caption in candidate.captions:
        if not any(in_language(caption, code) for code in codes):
            return False
    return True


def duplicate(candidate: Candidate, seen: NearIndex) -> bool:
    """Some picture of the sample looks like no picture of an earlier sample that was kept.

    A second sample with the same picture is dropped whatever its words say; one with several pictures only when all of
    them were seen.
    """
    return not candidate.files or any(one not in seen for one in candidate.appearances)


def missing_image(candidate: Candidate, _: None) -> bool:
    """Every picture can be decoded, and each that the words speak of is there."""
    if len(candidate.files) < _pictures_spoken_of(candidate.words):
        return False
    try:
        return len(candidate.images) == len(candidate.files)
    except DamagedSample:
        return False


def licence(candidate: Candidate, allowed: frozenset[str]) -> bool:
    """The sample's licence, or else every licence of the dataset, is among those allowed; an unknown one is not."""
    return bool(candidate.licences) and all(name.casefold() in allowed for name in candidate.licences)


def _pictures_spoken_of(words: Sample) -> int:
    """Captions and questions speak of the first picture, turns of those they name."""
    most = 1 if words.short or words.detailed or words.questions else 0
    for turn in words.conversation:
        content = turn.get("content") if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and isinstance(part.get("image"), int):
                most = max(most, part["image"] + 1)
    return most


# ------------------------------------------------------------------------------------------- rules as they are written


@dataclass(frozen=True)
class Rule:
    """A rule with its value."""

    name: str
    value: Any
    keeps: Callable[[Candidate, Any], bool]


def _number(kind: type[int] | type[float], least: float, most: float = math.inf) -> Callable[[str], Any]:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise ValueError(f"{text!r} is no {'whole ' if kind is int else ''}number") from None
        if not least <= value <= most or math.isinf(value):
            raise ValueError(f"{text} is not {least} {'or more' if math.isinf(most) else f'to {most}'}")
        return value

    return read


def _bounds(text: str) -> tuple[int, int]:
    low, _, high = text.partition(":")
    least = _number(int, 0)(low)
    most = _number(int, 0)(high)
    if least > most:
        raise ValueError(f"{least} is more than {most}")
    return least, most


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise ValueError(f"{text!r} has an empty name")
    return names


def _languages(text: str) -> tuple[str, ...]:
    names = _names(text)
    if unknown := set(names) - set(SCRIPTS):
        raise ValueError(f"{min(unknown)!r} is none of {', '.join(sorted(SCRIPTS))}")
    if set(names) != {"latin"}:
        load_identifier()  # a library that is missing is told before anything is read
    return names


RULES: dict[str, tuple[Callable[[Candidate, Any], bool], Callable[[str], Any] | None, str]] = {
    "size": (size, _number(int, 1), "size=64"),
    "aspect": (aspect, _number(float, 1), "aspect=3"),
    "caption_length": (caption_length, _bounds, "caption_length=3:200"),
    "repetition": (repetition, _number(float, 0, 1), "repetition=0.3"),
    "language": (language, _languages, "language=en"),
    "duplicate": (duplicate, lambda text: NearIndex(_number(int, 0, 16)(text)), "duplicate=4"),
    "missing_image": (missing_image, None, "missing_image"),
    "licence": (licence, lambda text: frozenset(name.casefold() for name in _names(text)), "licence=MIT,CC-BY-4.0"),
}
"""Each rule by name: its function, what reads its value, and how it is written."""


def parse_rule(text: str) -> Rule:
    """A rule from ``name=value``.

    Raises:
        RuleError: an unknown name, naming the nearest; a value that is missing, too many, or out of range.
        LanguageError: for ``language``, if py3langid is not installed.
    """
    name, given, value = (part.strip() for part in text.partition("="))
    if name not in RULES:
        near = difflib.get_close_matches(name, RULES, 1)
        hint = f"did you mean {RULES[near[0]][2]!r}?" if near else f"rules are {', '.join(RULES)}"
        raise RuleError(f"no rule {name!r}: {hint}")
    keeps, read, form = RULES[name]
    if bool(given) != (read is not None):
        raise RuleError(f"rule {text!r}: {'takes no value' if read is None else 'needs a value'}: write {form!r}")
    try:
        return Rule(name, read(value) if read else None, keeps)
    except LanguageError:
        raise
    except ValueError as error:
        raise RuleError(f"rule {text!r}: {error}: write something like {form!r}") from None


def parse_rules(texts: list[str]) -> list[Rule]:
    """Rules in the order given.

    Raises:
        RuleError: none at all, one given twice, or one that `parse_rule` refuses.
    """
    rules = [parse_rule(text) for text in texts]
    if not rules:
        raise RuleError(f"no rule given: name at least one, such as {', '.join(form for _, _, form in RULES.values())}")
    name, times = Counter(rule.name for rule in rules).most_common(1)[0]
    if times > 1:
        raise RuleError(f"rule {name!r} is given {times} times: give it once")
    return rules


# -------------------------------------------------------------------------------------------------------- filtering


def filter_dataset(
    source: str | Path,
    out: str | Path,
    rules: list[str],
    samples_per_shard: int = 2000,
    progress: Callable[[int, int], object] | None = None,
) -> dict[str, Any]:
    """Write the samples of a dataset that pass every rule, in their order, with their pictures' own bytes.

    One pass; memory holds one sample, the index that is written and, for ``duplicate``, what was kept. Texts are
    written in our own layout: of datasets of others, fields that are none of `Sample`'s are left behind.

    Args:
        source: a dataset's folder or address, or its name under the data folder.
        out: the folder to write; an older dataset there is replaced at the end.
        rules: ``name=value``, see `RULES`.
        samples_per_shard: samples in one tar file of ``out``.
        progress: called after each sample with how many were read, and how many there are.

    Returns:
        ``read``, ``kept``, ``dropped`` (rule -> samples) and ``damaged`` (cause -> samples, those that could not be
        read or, as ``unwritable``, not be written: a key that repeats, a picture in an unknown format).

    Raises:
        RuleError: rules that `parse_rules` refuses, or that would keep nothing.
        ShardError: no dataset at ``source``, or ``out`` is or holds ``source``.
    """
    parsed = parse_rules(rules)
    reader = open_dataset(source)
    # Replacing ``out`` must not take the source away.
    if isinstance(reader.folder, Path) and reader.folder.resolve().is_relative_to(Path(out).resolve()):
        raise ShardError(f"{out} is, or holds, the dataset that is read ({reader.folder}): choose another folder")
    dropped = Counter({rule.name: 0 for rule in parsed})
    damaged = Counter[str]()
    with ShardWriter(out, samples_per_shard, reader.licences) as writer:
        for index in range(len(reader)):
            try:
                candidate = Candidate(reader, index)
                # Stops at the first rule that drops it: the later ones, which may decode pictures, are not asked.
                verdict = next((rule.name for rule in parsed if not rule.keeps(candidate, rule.value)), None)
                if verdict is None:
                    _keep(candidate, writer, parsed)
                else:
                    dropped[verdict] += 1
            except DamagedSample as error:
                damaged[error.cause] += 1
            if progress:
                progress(index + 1, len(reader))
        kept = len(writer)
        if not kept:
            raise RuleError(_nothing_left(reader, dropped, damaged))
    return {"read": len(reader), "kept": kept, "dropped": dict(dropped), "damaged": dict(damaged)}


def _keep(candidate: Candidate, writer: ShardWriter, rules: list[Rule]) -> None:
    """Write a sample; only then may later ones be its duplicates."""
    try:
        writer.write(candidate.words, encoded=candidate.files)
    except DamagedSample:
        raise
    except (ShardError, UnicodeError) as error:  # a text may hold half a surrogate pair, which no file can
        raise DamagedSample(f"sample {candidate.words.key!r} cannot be written: {error}", "unwritable") from None
    for seen in (rule.value for rule in rules if isinstance(rule.value, NearIndex)):
        for one in candidate.appearances:
            seen.add(one)


def _nothing_left(reader: ShardReader, dropped: Counter[str], damaged: Counter[str]) -> str:
    """Why no sample is left, by what took most of them."""
    if not len(reader):
        return f"{reader.folder} holds no samples: nothing to filter"
    rule, most = dropped.most_common(1)[0]
    reasons = {f"rule {rule!r} dropped most ({most}): loosen it": most}
    reasons |= {f"{count} are damaged ({cause}): get a whole copy": count for cause, count in damaged.items()}
    why = max(reasons, key=lambda reason: reasons[reason])
    return f"none of {len(reader)} samples of {reader.folder} would be kept: {why}"
