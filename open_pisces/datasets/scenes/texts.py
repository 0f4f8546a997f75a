"""What is said about a scene: captions that determine it, and questions with balanced answers.

A squared error blurs whatever a caption leaves open, so a caption names all that may differ between two scenes except
the jitter; what it leaves out has a default (the style noto, the centre, large, on white).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from open_pisces.batch import Question
from open_pisces.datasets.scenes.artwork import article
from open_pisces.datasets.scenes.layout import Layout, Thing

NUMBERS = ("zero", "one", "two", "three", "four")
CONVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
ON_SIDE = {"left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom"}

# Shares of the scenes that are asked, chosen so that the answers come out even; see the layouts in `scenes`.
_ASK_WHAT = 0.6
_ASK_IS_THERE = 0.6
_ASK_ONE = 0.11  # "how many" of single things: as many ones as twos, threes and fours
_ASK_CENTRE = 0.15  # half of the single things stand in the centre
_ASK_WHERE_IN_PAIR = 0.15  # the four sides come from pairs too
_ASK_WHITE = 0.21  # white grounds are five times as frequent as any other
_ASK_GROUND = 0.45  # as many colors of grounds as of shapes, or nearly


@cache
def words() -> dict[str, Any]:
    """The templates and phrases of ``texts.yaml``."""
    table: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "texts.yaml").read_text())
    return table


def short_caption(layout: Layout, style_word: str) -> str:
    """Terse, and still enough to draw the scene."""
    first = layout.things[0]
    if layout.kind == "pair":
        second = layout.things[1]
        text = (
            f"{article(_styled(first.name, style_word))} {layout.relation} {article(_styled(second.name, style_word))}"
        )
    elif layout.kind == "count":
        text = f"{NUMBERS[len(layout.spots)]} {_styled(first.plural, style_word)}"
        text += " in a triangle" if layout.arrangement == "triangle" else ""
    else:
        size = "small " if layout.size == "small" else ""
        text = article(size + _styled(first.name, style_word))
        text += f" {words()['short_places'][layout.places[0]]}" if layout.places[0] != "centre" else ""
    return text if layout.background == "white" else f"{text} on {layout.background}"


def varied_caption(layout: Layout, style_word: str, rng: np.random.Generator) -> str:
    """The same as `short_caption` in other words, as people may write it: the order turned, the places named.

    It too names all that may differ between two scenes; "a cat and a dog" alone means from left to right.
    """
    first = layout.things[0]
    a_first = article(_styled(first.name, style_word))
    if layout.kind == "pair":
        a_second = article(_styled(layout.things[1].name, style_word))
        said = _pair_in_other_words(layout, a_first, a_second, rng)
    elif layout.kind == "count":
        arrangement = words()["arrangements"][layout.arrangement]
        said = f"{NUMBERS[len(layout.spots)]} {_styled(first.plural, style_word)} {arrangement}"
    else:
        size = "small " if layout.size == "small" else _choose(["", "large ", "big "], rng)
        at = layout.places[0]
        middle = words()["centre_in_other_words"]
        place = _choose(middle if at == "centre" else [words()["short_places"][at], words()["places"][at]], rng)
        said = f"{article(size + _styled(first.name, style_word))} {place}".rstrip()
    opening = _choose(words()["openings"], rng)
    # "a picture of on the left ..." would be no English.
    return (opening if said.startswith(("a ", "an ")) else "") + said + _ground_in_other_words(layout.background, rng)


def _pair_in_other_words(layout: Layout, a_first: str, a_second: str, rng: np.random.Generator) -> str:
    names = {"a": a_first, "b": a_second, "at_a": ON_SIDE[layout.places[0]], "at_b": ON_SIDE[layout.places[1]]}
    turned = {"a": a_second, "b": a_first, "at_a": names["at_b"], "at_b": names["at_a"]}
    table = words()["pairs_in_other_words"]
    forms = [phrase.format(**names) for phrase in (*table["any"], *table[layout.relation])]
    forms += [phrase.format(**turned) for phrase in (*table["any"], *table[CONVERSE[layout.relation]])]
    return _choose(forms, rng)


def _ground_in_other_words(background: str, rng: np.random.Generator) -> str:
    named = [f" on {background}", f" on {article(background)} background"]
    return _choose(["", *named] if background == "white" else named, rng)


def _styled(name: str, style_word: str) -> str:
    return f"{style_word} {name}".strip()


def detailed_caption(layout: Layout, style_word: str, rng: np.random.Generator) -> str:
    """One of the templates for the layout, naming everything."""
    first = layout.things[0]
    second = layout.things[-1]
    fill = {
        "style": f" in {style_word} style" if style_word else "",
        "background": layout.background,
        "a_background": article(layout.background),
        "size": layout.size,
        "thing": first.name,
        "a_thing": article(first.name),
        "things": first.plural,
        "place": words()["places"].get(layout.places[0], ""),
        "number": NUMBERS[len(layout.spots)],
        "Number": NUMBERS[len(layout.spots)].capitalize(),
        "arrangement": words()["arrangements"].get(layout.arrangement, ""),
    }
    if layout.kind == "pair":
        fill |= {
            "relation": words()["relations"][layout.relation],
            "a_first": article(first.name),
            "A_first": article(first.name).capitalize(),
            "at_first": ON_SIDE[layout.places[0]],
            "a_second": article(second.name),
            "A_second": article(second.name).capitalize(),
            "at_second": ON_SIDE[layout.places[1]],
        }
    return _choose(words()["detailed"][layout.kind], rng).format(**fill)


def questions(layout: Layout, other: Thing, rng: np.random.Generator) -> tuple[Question, ...]:
    """Questions of the six types that fit the scene, at most two of a type.

    Args:
        layout: the scene.
        other: a thing that is not in it, drawn as the scene's own things are (for "is there").
        rng: chooses questions, objects and phrasings.
    """
    asked = [
        *_how_many(layout, rng),
        *_which_color(layout, rng),
        *_where(layout, rng),
        *_is_there(layout, other, rng),
        *_left_or_right(layout, rng),
    ]
    if not asked or rng.random() < _ASK_WHAT:
        asked.insert(0, _what(layout, rng))
    return tuple(asked)


def many_questions(layout: Layout, others: tuple[Thing, ...], rng: np.random.Generator) -> tuple[Question, ...]:
    """Questions for training: about every thing of the scene, where `questions` asks about one.

    A picture costs the LLM as many vectors however much is asked about it. "Is there" is asked of each thing and of as
    many that are not there, "left or right" in both orders, so both stay balanced within each scene.

    Args:
        layout: the scene.
        others: things that are not in it, as many as it has.
        rng: chooses the phrasings and the order.
    """
    things = layout.things
    asked = [*_how_many(layout, rng), *_which_color(layout, rng)]
    asked += [_what_at(layout, at, rng) for at in range(len(things))]
    if layout.kind == "pair":
        asked += [_where_at(layout, at, rng) for at in range(len(things))]
    elif layout.kind == "single":
        asked += _where(layout, rng)
    for answer, group in (("yes", things), ("no", others)):
        asked += [_ask("is_there", rng, answer, a_thing=article(thing.name)) for thing in group]
    if layout.relation in ("left of", "right of"):
        asked += [_left_or_right_at(layout, first, rng) for first in (0, 1)]
    return tuple(asked[int(i)] for i in rng.permutation(len(asked)))


def _what(layout: Layout, rng: np.random.Generator) -> Question:
    return _what_at(layout, int(rng.integers(len(layout.things))), rng)


def _what_at(layout: Layout, at: int, rng: np.random.Generator) -> Question:
    phrases = words()["questions"]["what"][layout.kind]
    answer = layout.things[at].plural if layout.kind == "count" else layout.things[at].name
    where = ON_SIDE.get(layout.places[at], "")
    return Question(_choose(phrases, rng).format(at=where), answer, "what")


def _how_many(layout: Layout, rng: np.random.Generator) -> list[Question]:
    number = len(layout.spots) if layout.kind == "count" else 1
    if layout.held_out or (number == 1 and rng.random() >= _ASK_ONE):
        return []
    thing = layout.things[int(rng.integers(len(layout.things)))]
    return [_ask("how_many", rng, NUMBERS[number], things=thing.plural)]


def _which_color(layout: Layout, rng: np.random.Generator) -> list[Question]:
    asked = []
    if rng.random() < (_ASK_WHITE if layout.background == "white" else 1.0) * _ASK_GROUND:
        asked.append(_ask("which_colour", rng, layout.background, "background"))
    shapes = [thing for thing in layout.things if thing.is_shape]
    if shapes:
        shape = shapes[int(rng.integers(len(shapes)))]
        many = layout.kind == "count"
        kind = shape.kind_plural if many else shape.concept
        asked.append(_ask("which_colour", rng, shape.colour, "shapes" if many else "shape", kind=kind))
    return asked


def _where(layout: Layout, rng: np.random.Generator) -> list[Question]:
    if layout.kind == "count":
        return []
    chance = 1.0 if layout.held_out else _ASK_WHERE_IN_PAIR
    if layout.kind == "single":
        chance = _ASK_CENTRE if layout.places[0] == "centre" else 1.0
    if rng.random() >= chance:
        return []
    return [_where_at(layout, int(rng.integers(len(layout.things))), rng)]


def _where_at(layout: Layout, at: int, rng: np.random.Generator) -> Question:
    return _ask("where", rng, layout.places[at], thing=layout.things[at].name)


def _is_there(layout: Layout, other: Thing, rng: np.random.Generator) -> list[Question]:
    if rng.random() >= _ASK_IS_THERE:
        return []
    present = bool(rng.integers(2))
    thing = layout.things[int(rng.integers(len(layout.things)))] if present else other
    return [_ask("is_there", rng, "yes" if present else "no", a_thing=article(thing.name))]


def _left_or_right(layout: Layout, rng: np.random.Generator) -> list[Question]:
    if layout.relation not in ("left of", "right of"):
        return []
    # Which of the two the question begins with: left and right come out even.
    return [_left_or_right_at(layout, int(rng.integers(2)), rng)]


def _left_or_right_at(layout: Layout, first: int, rng: np.random.Generator) -> Question:
    names = {"first": layout.things[first].name, "second": layout.things[1 - first].name}
    return _ask("left_or_right", rng, layout.places[first], **names)


def _ask(type_: str, rng: np.random.Generator, answer: str, variant: str = "", **fill: str) -> Question:
    phrases = words()["questions"][type_]
    return Question(_choose(phrases[variant] if variant else phrases, rng).format(**fill), answer, type_)


def _choose(phrases: list[str], rng: np.random.Generator) -> str:
    return phrases[int(rng.integers(len(phrases)))]
