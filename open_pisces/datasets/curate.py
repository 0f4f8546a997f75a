"""Which samples of a dataset are worth training on: small named rules, each counting what it drops.

A rule is a function of a sample and the rule's value: true keeps the sample. Rules are written ``name=value`` and apply
in the order given; the first that drops a sample is the one counted. What a rule finds nothing to judge in, it keeps:
a sample without captions passes the rules on captions (it may hold questions), one without pictures those on pictures.

A rule that has to look into a picture which cannot be read makes the sample count as damaged; to count such samples
under a name of their own, give ``missing_image`` first.
"""

from __future__ import annotations

import difflib
import math
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from open_pisces.batch import Sample
from open_pisces.data.images import ImageError, image_size, open_image
from open_pisces.data.shards import DamagedSample, ShardError, ShardReader, open_dataset
from open_pisces.datasets.shard_writer import ShardWriter
from open_pisces.datasets.stats import Appearance, alike, appearance_of, checked, words_of
from open_pisces.errors import PiscesError


class RuleError(PiscesError):
    """A rule that cannot be applied; the message names the rule and shows how one is written."""


class Candidate:
    """A sample under the rules: its words at once, its pictures only when a rule asks for them.

    Raises:
        DamagedSample: from every member, when what it needs cannot be read.
    """

    def __init__(self, reader: ShardReader, index: int) -> None:
        self._reader, self._index = reader, index
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


# ------------------------------------------------------------------------------------------- copies of pictures


class NearIndex:
    """Pictures seen so far, to ask whether a new one looks like any: hashes within ``distance`` bits, colours alike.

    Exact, without comparing all with all: the 64 bits are cut into ``distance + 1`` bands, and two hashes that differ
    in no more than ``distance`` bits agree in at least one whole band, so only pictures that share a band are
    compared. About 56 + 4 * (distance + 1) bytes a picture.
    """

    def __init__(self, distance: int) -> None:
        self.distance = distance
        cuts = [64 * band // (distance + 1) for band in range(distance + 2)]
        # 16 bits of a longer band are enough to look under: the comparison decides.
        self._bands = [(low, (1 << min(16, high - low)) - 1) for low, high in pairwise(cuts)]
        self._places: list[dict[int, array[int]]] = [{} for _ in self._bands]
        self._hashes, self._colours, self._count = np.zeros(1024, np.uint64), np.zeros((1024, 48), np.uint8), 0

    def __len__(self) -> int:
        return self._count

    def add(self, one: Appearance) -> None:
        """Remember a picture."""
        if self._count == len(self._hashes):
            self._hashes = np.concatenate([self._hashes, np.zeros_like(self._hashes)])
            self._colours = np.concatenate([self._colours, np.zeros_like(self._colours)])
        self._hashes[self._count], self._colours[self._count] = one
        for (shift, mask), places in zip(self._bands, self._places, strict=True):
            places.setdefault(one.hash >> shift & mask, array("I")).append(self._count)
        self._count += 1

    def near(self, number: int) -> np.ndarray:
        """Which pictures (numbered as they were added) have a hash within the distance of this one, ascending."""
        bands = zip(self._bands, self._places, strict=True)
        found = [places.get(number >> shift & mask, array("I")) for (shift, mask), places in bands]
        at = np.unique(np.concatenate([np.array(places, np.int64) for places in found]))
        return at[np.bitwise_count(self._hashes[at] ^ np.uint64(number)) <= self.distance]

    def __contains__(self, one: Appearance) -> bool:
        """Whether a picture that looks like this one was added."""
        return alike(one.colours, self._colours[self.near(one.hash)])


# ------------------------------------------------------------------------------------------ repetition and language

_SCRIPT_SHARE = 0.8  # of the letters: names and signs in a picture may be in another script
_STOP_SHARE, _TELLING = 0.1, 8  # of the words of a text of at least so many

_STOP_WORDS = {
    "en": "a an the of in on at to and or is are was with by for from it its this that there his her their he she they "
    "has have two which while as be background",
    "de": "der die das den dem des ein eine einen einem einer und oder ist sind war mit von auf im in am zu zum es auf "
    "für nicht sich vor neben als zwei",
    "fr": "le la les un une des de du et ou est sont dans sur avec au aux en par pour qui que il elle ce cette deux à",
    "es": "el la los las un una unos unas de del y o es son en con por para que se su sobre al dos lo está hay",
    "it": "il lo la i gli le un una uno di del della dei e o è sono in con su per che si da nel sul al due una",
    "pt": "o a os as um uma de do da dos das e ou é são em no na com por para que se ao seu sua dois sobre",
    "nl": "de het een van en of is zijn in op met voor te aan door dat die er naar bij twee zijn haar",
}
_STOPS = {code: frozenset(words.split()) for code, words in _STOP_WORDS.items()}
_SCRIPTS: dict[str, tuple[str, ...]] = {  # how the Unicode names of their letters begin
    **dict.fromkeys((*_STOP_WORDS, "latin"), ("LATIN", "FULLWIDTH LATIN")),
    "zh": ("CJK", "IDEOGRAPHIC"),
    "ja": ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA"),
    "ko": ("HANGUL",),
    "ru": ("CYRILLIC",),
    "ar": ("ARABIC",),
    "el": ("GREEK",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "th": ("THAI",),
}


def repeated_share(text: str) -> float:
    """How much a text repeats itself, 0 to 1.

    The larger of two shares: of its runs of three words, those that occurred before; and of its words after the first,
    those equal to the word before them (which finds "red red" in a text too short for the other).
    """
    words = words_of(text)
    runs = list(zip(words, words[1:], words[2:], strict=False))
    echoes = sum(one == other for one, other in pairwise(words))
    return max((len(runs) - len(set(runs))) / max(1, len(runs)), echoes / max(1, len(words) - 1))


def in_language(text: str, code: str) -> bool:
    """Whether a text may be in a language: a heuristic, which sorts out what is plainly something else.

    At least 80 % of the letters must be of the language's script. Languages in the Latin script are told apart by their
    commonest words: none of the seven that are known may have more of them in the text, and in eight words or more
    at least a tenth must be among them. ``latin`` asks for the script only.

    What it cannot do: tell Latin-script languages apart in a few words ("Golden Gate Bridge" passes for all seven),
    recognise Latin-script languages it has no list of, tell Russian from Ukrainian, Arabic from Persian, or
    Japanese without kana from Chinese. A text without letters passes.
    """
    names = [unicodedata.name(letter, "") for letter in text if letter.isalpha()]
    if sum(name.startswith(_SCRIPTS[code]) for name in names) < _SCRIPT_SHARE * len(names):
        return False
    if code in ("zh", "ja"):
        return not names or any("KATAKANA" in name or "HIRAGANA" in name for name in names) == (code == "ja")
    if code not in _STOPS:
        return True
    words = words_of(text)
    found = {other: sum(word in stops for word in words) for other, stops in _STOPS.items()}
    common = found[code] >= _STOP_SHARE * len(words) or len(words) < _TELLING
    return common and found[code] == max(found.values())


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
    """Each caption may be in one of the languages (`in_language`, a heuristic)."""
    return all(any(in_language(caption, code) for code in codes) for caption in candidate.captions)


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
    turns = [turn["content"] for turn in words.conversation if isinstance(turn, dict) and "content" in turn]
    parts = [part for content in turns if isinstance(content, list) for part in content]
    named = [part["image"] for part in parts if isinstance(part, dict) and isinstance(part.get("image"), int)]
    described = words.short or words.detailed or words.questions
    return max([index + 1 for index in named] + [1 if described else 0])


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
    least, most = _number(int, 0)(low), _number(int, 0)(high)
    if least > most:
        raise ValueError(f"{least} is more than {most}")
    return least, most


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise ValueError(f"{text!r} has an empty name")
    return names


def _languages(text: str) -> tuple[str, ...]:
    if unknown := set(_names(text)) - set(_SCRIPTS):
        raise ValueError(f"{min(unknown)!r} is none of {', '.join(sorted(_SCRIPTS))}")
    return _names(text)


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
    parsed, reader = parse_rules(rules), open_dataset(source)
    _check_apart(reader, Path(out))
    dropped, damaged = Counter({rule.name: 0 for rule in parsed}), Counter[str]()
    with ShardWriter(out, samples_per_shard, reader.licences) as writer:
        for index in range(len(reader)):
            try:
                candidate = Candidate(reader, index)
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


def _check_apart(reader: ShardReader, out: Path) -> None:
    """Replacing ``out`` must not take the source away."""
    if isinstance(reader.folder, Path) and reader.folder.resolve().is_relative_to(out.resolve()):
        raise ShardError(f"{out} is, or holds, the dataset that is read ({reader.folder}): choose another folder")


def _nothing_left(reader: ShardReader, dropped: Counter[str], damaged: Counter[str]) -> str:
    """Why no sample is left, by what took most of them."""
    if not len(reader):
        return f"{reader.folder} holds no samples: nothing to filter"
    rule, most = dropped.most_common(1)[0]
    reasons = {f"rule {rule!r} dropped most ({most}): loosen it": most}
    reasons |= {f"{count} are damaged ({cause}): get a whole copy": count for cause, count in damaged.items()}
    why = max(reasons, key=lambda reason: reasons[reason])
    return f"none of {len(reader)} samples of {reader.folder} would be kept: {why}"
