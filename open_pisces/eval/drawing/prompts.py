"""GenEval's prompts: the official metadata form, read, checked, written, and made for any vocabulary.

One line of the official ``evaluation_metadata.jsonl`` (GenEval, arXiv 2310.11513; repository djghosh13/geneval)::

    {"tag": "position", "include": [{"class": "kite", "count": 1},
     {"class": "dog", "count": 1, "position": ["above", 0]}], "prompt": "a photo of a dog above a kite"}

``include`` is what has to be there, ``exclude`` what must not be there as often, ``["above", 0]`` means above object 0
of ``include``. The official file holds 553 prompts: 80, 99, 80, 94, 100 and 100 in the order of `CATEGORIES`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from open_pisces.data.order import stream
from open_pisces.datasets.scenes.artwork import article
from open_pisces.errors import PiscesError

CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
"""The six categories, by the tag that the official file gives them, in its order."""
RELATIONS = ("left of", "right of", "above", "below")
COUNTS = (2, 3, 4)
"""Numbers that counting prompts ask for."""


class PromptSetError(PiscesError):
    """A prompt set that cannot be used; the message names the file and line or the key, the value and the remedy."""


@cache
def tables() -> dict[str, Any]:
    """``prompts.yaml``: number words, official colors, classes with their spellings, CLIP's color texts."""
    found: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "prompts.yaml").read_text(encoding="utf-8"))
    return found


@dataclass(frozen=True)
class Wanted:
    """What has to be in the picture."""

    name: str
    """Its class."""
    count: int = 1
    color: str = ""
    position: tuple[str, int] | None = None
    """One of `RELATIONS`, and the number of the earlier object of ``include`` that it refers to."""


@dataclass(frozen=True)
class Unwanted:
    """What must not be in the picture ``count`` times or more."""

    name: str
    count: int


@dataclass(frozen=True)
class Prompt:
    """A prompt and what a picture of it has to show.

    Raises:
        PromptSetError: for a category, relation, index or count that GenEval does not have.
    """

    key: str
    tag: str
    """One of `CATEGORIES`."""
    prompt: str
    include: tuple[Wanted, ...]
    exclude: tuple[Unwanted, ...] = ()

    def __post_init__(self) -> None:
        if self.tag not in CATEGORIES:
            raise PromptSetError(f"unknown category {self.tag!r}: `tag` is one of {', '.join(CATEGORIES)}")
        if not self.prompt.strip():
            raise PromptSetError("the prompt is empty: say in words what to draw")
        if not self.include:
            raise PromptSetError("`include` is empty: name at least one object that has to be there")
        for number, wanted in enumerate(self.include):
            _check_position(wanted, number)
        things: list[Wanted | Unwanted] = [*self.include, *self.exclude]
        for thing in things:
            if type(thing.count) is not int or thing.count < 1:  # True is no number of objects
                raise PromptSetError(f"count of {thing.name!r} is {thing.count!r}: give a whole number from 1")


def _check_position(wanted: Wanted, number: int) -> None:
    """Raise unless object ``number`` refers, if at all, in a known way to an object before it."""
    if wanted.position is None:
        return
    relation, target = wanted.position
    if relation not in RELATIONS:
        raise PromptSetError(f"unknown relation {relation!r} of {wanted.name!r}: one of {', '.join(RELATIONS)}")
    if type(target) is not int or not 0 <= target < number:
        before = f"give a number from 0 to {number - 1}" if number else "it is the first, so none is before it"
        raise PromptSetError(f"{wanted.name!r} is {relation} object {target!r} of `include`: {before}")


# ---------------------------------------------------------------------------------------------- the official form


def to_row(prompt: Prompt) -> dict[str, Any]:
    """A prompt as a line of the official file, its keys in the official order; the key is not part of it."""
    row: dict[str, Any] = {"tag": prompt.tag, "include": [_wanted_row(wanted) for wanted in prompt.include]}
    if prompt.exclude:
        row["exclude"] = [{"class": unwanted.name, "count": unwanted.count} for unwanted in prompt.exclude]
    return {**row, "prompt": prompt.prompt}


def _wanted_row(wanted: Wanted) -> dict[str, Any]:
    row: dict[str, Any] = {"class": wanted.name, "count": wanted.count}
    row |= {"color": wanted.color} if wanted.color else {}
    return row | ({"position": list(wanted.position)} if wanted.position else {})


def from_row(row: Any, number: int = 0) -> Prompt:
    """The prompt of a line of the official file.

    Args:
        row: the decoded line. Its ``key`` is the prompt's, if it has one; keys beside the official ones are ignored
            at the top, as the official scorer does, and refused inside ``include`` and ``exclude``.
        number: of the line, for the key of a row that has none.

    Raises:
        PromptSetError: if something is missing, of another kind, or unknown.
    """
    if not isinstance(row, Mapping):
        raise PromptSetError(f"a line has to be an object with tag, include and prompt, found {row!r}")
    for name, kind in (("tag", str), ("include", list), ("prompt", str), ("exclude", list), ("key", str)):
        if name not in row and name not in ("exclude", "key"):
            raise PromptSetError(f"`{name}` is missing: a line has tag, include and prompt, and may have exclude")
        if name in row and not isinstance(row[name], kind):
            raise PromptSetError(f"`{name}` is {row[name]!r}: it has to be a {'text' if kind is str else 'list'}")
    include = tuple(_wanted(_fields(thing, ("class", "count"), ("color", "position"))) for thing in row["include"])
    exclude = [_fields(thing, ("class", "count"), ()) for thing in row.get("exclude", ())]
    unwanted = tuple(Unwanted(thing["class"], thing["count"]) for thing in exclude)
    # Runs keep keys of their own; the official file has none.
    key = row.get("key", f"{number:05d}-{row['tag']}")
    return Prompt(key, row["tag"], row["prompt"], include, unwanted)


def _fields(thing: Any, needed: tuple[str, ...], possible: tuple[str, ...]) -> Mapping[str, Any]:
    """An object of ``include`` or ``exclude`` whose fields are all there and all known."""
    if not isinstance(thing, Mapping) or not all(isinstance(thing.get(name, ""), str) for name in ("class", "color")):
        raise PromptSetError(f"an object is written {{'class': 'cat', 'count': 1}}, found {thing!r}")
    missing = [name for name in needed if name not in thing]
    unknown = [name for name in thing if name not in (*needed, *possible)]
    if missing or unknown:
        what = f"misses {missing[0]!r}" if missing else f"has {unknown[0]!r}, which no rule reads"
        raise PromptSetError(f"the object {dict(thing)!r} {what}: it has {', '.join((*needed, *possible))}")
    return thing


def _wanted(thing: Mapping[str, Any]) -> Wanted:
    position = thing.get("position")
    if position is None:
        return Wanted(thing["class"], thing["count"], thing.get("color", ""))
    if not isinstance(position, Sequence) or isinstance(position, str) or len(position) != 2:
        raise PromptSetError(f"position of {thing['class']!r} is {position!r}: write ['left of', 0]")
    return Wanted(thing["class"], thing["count"], thing.get("color", ""), (position[0], position[1]))


def read_prompts(path: str | Path) -> list[Prompt]:
    """The prompts of a metadata file; a key is the number of the line in five digits, a hyphen and the tag.

    Raises:
        PromptSetError: if the file is missing or empty, or a line is not valid; it names the line.
    """
    path = Path(path)
    if not path.is_file():
        raise PromptSetError(f"{path}: no such file; give GenEval's evaluation_metadata.jsonl or one in its form")
    prompts: list[Prompt] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            prompts += [from_row(json.loads(line), len(prompts))] if line.strip() else []
        except json.JSONDecodeError as error:
            raise PromptSetError(f"{path}, line {number}: not valid JSON ({error})") from None
        except PromptSetError as error:
            raise PromptSetError(f"{path}, line {number}: {error}") from None
    if not prompts:
        raise PromptSetError(f"{path}: holds no prompts")
    return prompts


def write_prompts(path: str | Path, prompts: Iterable[Prompt]) -> None:
    """Write a metadata file in the official form; `read_prompts` gives the same prompts back, numbered anew."""
    text = "".join(json.dumps(to_row(prompt), ensure_ascii=False) + "\n" for prompt in prompts)
    Path(path).write_text(text, encoding="utf-8")


def check_known(prompts: Iterable[Prompt], classes: Sequence[str], colors: Sequence[str], who: str) -> None:
    """Raise unless ``who``, a detector of ``classes`` and ``colours``, can judge all prompts.

    Raises:
        PromptSetError: naming the prompt, the class or color, and what may have been meant.
    """
    known = {"class": set(classes), "colour": set(colors)}
    for prompt in prompts:
        things: list[Wanted | Unwanted] = [*prompt.include, *prompt.exclude]
        asked = [("class", thing.name) for thing in things]
        asked += [("colour", wanted.color) for wanted in prompt.include if wanted.color]
        for kind, name in asked:
            if name in known[kind]:
                continue
            near = get_close_matches(name, sorted(known[kind]), 3, 0.5)
            remedy = f"did you mean {' or '.join(near)}?" if near else f"it knows {len(known[kind])} of them"
            raise PromptSetError(
                f"{prompt.key} ({prompt.prompt!r}): {who} does not know the {kind} {name!r}; {remedy} "
                f"Change the prompts or the detector"
            )


# ------------------------------------------------------------------------------------------------- made to measure


@dataclass(frozen=True)
class _Words:
    """A vocabulary that prompts are made of."""

    classes: tuple[str, ...]
    colors: tuple[str, ...]
    colored: tuple[str, ...]
    plurals: Mapping[str, str]

    def sizes(self, tag: str) -> tuple[int, ...]:
        """How many choices each of a category's draws has."""
        things = len(self.classes)
        colors = len(self.colors)
        colored = len(self.colored)
        return {
            "single_object": (things,),
            "two_object": (things, things - 1),
            "counting": (things, len(COUNTS)),
            "colors": (colored, colors),
            "position": (things, things - 1, len(RELATIONS)),
            "color_attr": (colored, colored - 1, colors, colors - 1),
        }[tag]

    def prompt(self, tag: str, draws: tuple[int, ...]) -> Prompt:
        """The prompt of a category's draws; its text is what stands behind "a photo of", its key is empty."""
        first, *rest = draws
        a = (self.colored if tag in ("colors", "color_attr") else self.classes)[first]
        if tag == "single_object":
            return Prompt("", tag, article(a), (Wanted(a),))
        if tag == "counting":
            count = COUNTS[rest[0]]
            text = f"{tables()['numbers'][count]} {self.plurals.get(a) or plural(a)}"
            return Prompt("", tag, text, (Wanted(a, count),), (Unwanted(a, count + 1),))
        if tag == "colors":
            color = self.colors[rest[0]]
            return Prompt("", tag, article(f"{color} {a}"), (Wanted(a, 1, color),))
        if tag == "color_attr":
            b = self.colored[_other(first, rest[0])]
            one = rest[1]
            two = _other(rest[1], rest[2])
            things = (Wanted(a, 1, self.colors[one]), Wanted(b, 1, self.colors[two]))
            return Prompt("", tag, " and ".join(article(f"{thing.color} {thing.name}") for thing in things), things)
        b = self.classes[_other(first, rest[0])]
        if tag == "two_object":
            return Prompt("", tag, f"{article(a)} and {article(b)}", (Wanted(a), Wanted(b)))
        relation = RELATIONS[rest[1]]  # "a left of b": b is named first, so that a can refer to it
        return Prompt("", tag, f"{article(a)} {relation} {article(b)}", (Wanted(b), Wanted(a, 1, "", (relation, 0))))


def _other(first: int, draw: int) -> int:
    """A number that is not ``first``, from one of as many draws less one."""
    return draw + (draw >= first)


def generate(
    classes: Sequence[str],
    colors: Sequence[str],
    per_category: int = 100,
    seed: int = 0,
    template: str = "a photo of {}",
    plurals: Mapping[str, str] | None = None,
    colored: Sequence[str] | None = None,
) -> list[Prompt]:
    """A prompt set in GenEval's manner for any vocabulary: the six categories, drawn evenly, none twice.

    The official script draws with repetition and then drops what came twice, hence its 553 prompts; here a category
    has ``per_category`` prompts, or all that there are (single objects: one for each class). A category is empty if
    the vocabulary cannot fill it. The categories are drawn apart, so a change of colors leaves the others alone.

    Args:
        classes: names of things, as prompts say them.
        colors: names of colors.
        per_category: prompts of each category.
        seed: other seeds give other prompts.
        template: what is said around each, with one ``{}``.
        plurals: of the classes for which `plural` is wrong.
        colored: classes that may be given a color; None takes all but "person", as the official prompts do.

    Raises:
        PromptSetError: for a template without its place, a class or color that comes twice, an unknown colored
            class, or ``per_category`` below 1.
    """
    if template.count("{}") != 1:
        raise PromptSetError(f"template {template!r}: it needs one {{}} where the things go")
    if per_category < 1:
        raise PromptSetError(f"per_category = {per_category}: ask at least one prompt of each category")
    for kind, names in (("class", classes), ("colour", colors)):
        if len(set(names)) != len(names) or not all(name.strip() for name in names):
            raise PromptSetError(f"a {kind} is empty or comes twice among {', '.join(names)}")
    if colored is None:
        colored = [name for name in classes if name not in tables()["uncoloured"]]
    if unknown := [name for name in colored if name not in classes]:
        raise PromptSetError(f"{unknown[0]!r} is to be coloured, but is not one of the {len(classes)} classes")
    words = _Words(tuple(classes), tuple(colors), tuple(colored), plurals or {})
    made: list[Prompt] = []
    for tag in CATEGORIES:
        made += _made(words, tag, per_category, seed)
    return [
        replace(prompt, key=f"{number:05d}-{prompt.tag}", prompt=template.replace("{}", prompt.prompt))
        for number, prompt in enumerate(made)
    ]


def _made(words: _Words, tag: str, per_category: int, seed: int) -> Iterator[Prompt]:
    """Prompts of one category, drawn without repetition from all that there are."""
    sizes = words.sizes(tag)
    possible = math.prod(sizes) if min(sizes) > 0 else 0
    # Without repetition, and from a stream of its own: another category or size changes nothing here.
    chosen = stream(seed, "eval", "geneval", tag).choice(possible, min(per_category, possible), replace=False)
    for draws in zip(*np.unravel_index(chosen, sizes), strict=True) if possible else ():
        yield words.prompt(tag, tuple(int(draw) for draw in draws))


def plural(name: str) -> str:
    """The regular plural of a class: buses, benches, butterflies, cats; give the irregular ones to `generate`."""
    if re.search(r"(s|x|z|ch|sh)$", name):
        return f"{name}es"
    return f"{name[:-1]}ies" if re.search(r"[^aeiou]y$", name) else f"{name}s"
