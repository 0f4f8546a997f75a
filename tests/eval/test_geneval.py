"""GenEval: the rules on hand-worked pictures, prompts, scores, runs, layouts of others.

Two tests read the official data, from the folder that the environment variable ``PISCES_GENEVAL`` names (the folder
``prompts`` of djghosh13/geneval, with ``evaluation_metadata.jsonl`` and ``object_names.txt``); without it they skip.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow
from PIL.Image import Image

from open_pisces.eval.drawing import exports
from open_pisces.eval.drawing.detection import Detection
from open_pisces.eval.drawing.judged_run import (
    GenEval,
    detect,
    detectors_of,
    items_of,
    prompts_of,
    read_findings,
    score_run,
)
from open_pisces.eval.drawing.official_layout import GenEvalOfFolder
from open_pisces.eval.drawing.prompts import (
    CATEGORIES,
    RELATIONS,
    Prompt,
    PromptSetError,
    Unwanted,
    Wanted,
    check_known,
    from_row,
    generate,
    plural,
    read_prompts,
    tables,
    to_row,
    write_prompts,
)
from open_pisces.eval.drawing.rules import Box, Rules, Spread, keep, pixel_overlap, relations, summarize, verdict_of
from open_pisces.eval.evaluation import rescore
from open_pisces.eval.intervals import EvaluationError
from open_pisces.eval.run import Manifest, RunError, RunFolder

RULES = Rules()
OFFICIAL = Path(os.environ.get("PISCES_GENEVAL", "")).absolute()
needs_official = pytest.mark.skipif("PISCES_GENEVAL" not in os.environ, reason="PISCES_GENEVAL names no folder")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs without a folder of their own lie below the working directory."""
    monkeypatch.chdir(tmp_path)


def square(x: float, y: float, width: float = 10, height: float = 10) -> Box:
    """A box by its middle."""
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def seen(name: str, score: float = 0.95, color: str = "", box: Box = (10, 10, 30, 30)) -> Detection:
    return Detection(name, box, score, {color: 1.0} if color else {})


def asks(tag: str, *include: Wanted, exclude: tuple[Unwanted, ...] = ()) -> Prompt:
    return Prompt("k", tag, "a photo of something", include, exclude)


def right(prompt: Prompt, *detections: Detection, rules: Rules = RULES) -> bool:
    return verdict_of(prompt, detections, rules).correct


CAT, DOG = Wanted("cat"), Wanted("dog")
RED_CAT, BLUE_DOG = Wanted("cat", 1, "red"), Wanted("dog", 1, "blue")
CAT_LEFT_OF_DOG = asks("position", DOG, Wanted("cat", 1, "", ("left of", 0)))

# ------------------------------------------------------------------------------------------------------- confidence

ASKED = {  # of each category a prompt, and what shows it
    "single_object": (asks("single_object", CAT), [("cat", "", 10)]),
    "two_object": (asks("two_object", CAT, DOG), [("cat", "", 10), ("dog", "", 60)]),
    "counting": (
        asks("counting", Wanted("cat", 2), exclude=(Unwanted("cat", 3),)),
        [("cat", "", 10), ("cat", "", 60)],
    ),
    "colors": (asks("colors", RED_CAT), [("cat", "red", 10)]),
    "position": (CAT_LEFT_OF_DOG, [("cat", "", 10), ("dog", "", 60)]),
    "color_attr": (asks("color_attr", RED_CAT, BLUE_DOG), [("cat", "red", 10), ("dog", "blue", 60)]),
}
# Rule: above 0.3 counts, of counting prompts above 0.9; both strictly, as 32-bit floats.
CONFIDENCES = [
    (0.0, False, False),
    (0.05, False, False),
    (0.29, False, False),
    (0.2999, False, False),
    (0.3, False, False),
    (float(np.float32(0.3)), False, False),  # 0.30000001...: the same 32-bit float
    (float(np.nextafter(np.float32(0.3), np.float32(1))), True, False),
    (0.3001, True, False),
    (0.31, True, False),
    (0.6, True, False),
    (0.8999, True, False),
    (0.9, True, False),
    (float(np.float32(0.9)), True, False),  # 0.89999997...
    (float(np.nextafter(np.float32(0.9), np.float32(1))), True, True),
    (0.9001, True, True),
    (0.95, True, True),
    (1.0, True, True),
]


def shown(tag: str, score: float) -> bool:
    """Whether a category's prompt is right with all that it asks for found at one confidence."""
    prompt, things = ASKED[tag]
    return right(prompt, *(seen(name, score, color, square(x, 10)) for name, color, x in things))


@pytest.mark.parametrize(("score", "above", "above_counting"), CONFIDENCES)
def test_confidence(score: float, above: bool, above_counting: bool) -> None:
    assert (shown("single_object", score), shown("counting", score)) == (above, above_counting)


@pytest.mark.parametrize("tag", CATEGORIES)
def test_the_confidence_that_a_category_needs(tag: str) -> None:
    most = np.float32(0.9 if tag == "counting" else 0.3)  # the largest that does not count
    assert not shown(tag, float(most)) and shown(tag, float(np.nextafter(most, np.float32(1))))


@pytest.mark.parametrize("tag", CATEGORIES)
def test_an_empty_picture_shows_nothing(tag: str) -> None:
    prompt, _ = ASKED[tag]
    verdict = verdict_of(prompt, [], RULES)
    assert not verdict.correct and verdict.reasons[0] == f"expected {prompt.include[0].name} >= " + (
        "2, found 0" if tag == "counting" else "1, found 0"
    )


@pytest.mark.parametrize("tag", CATEGORIES)
def test_every_object_has_to_be_there(tag: str) -> None:
    prompt, things = ASKED[tag]
    found = [seen(name, 0.95, color, square(x, 10)) for name, color, x in things]
    for missing in range(len(found)):
        assert not right(prompt, *found[:missing], *found[missing + 1 :])
    wrong = [replace(detection, name="cow") for detection in found]
    assert not right(prompt, *wrong)
    assert right(prompt, *found, *wrong)  # what was not asked does no harm


# --------------------------------------------------------------------------------------------------------- counting

# Place k says whether k cats are right. Rule: at least N (include), fewer than N + 1 (exclude).
EXACTLY = {2: "..x....", 3: "...x...", 4: "....x.."}
AT_LEAST = {1: ".xxxxxx", 2: "..xxxxx", 3: "...xxxx", 4: "....xxx"}


@pytest.mark.parametrize(("number", "found"), [(n, k) for n in EXACTLY for k in range(7)])
def test_exact_counts(number: int, found: int) -> None:
    prompt = asks("counting", Wanted("cat", number), exclude=(Unwanted("cat", number + 1),))
    cats = [seen("cat", 0.91 + k / 100) for k in range(found)]
    assert right(prompt, *cats) is (EXACTLY[number][found] == "x")


@pytest.mark.parametrize(("number", "found"), [(n, k) for n in AT_LEAST for k in range(7)])
def test_counts_without_exclude(number: int, found: int) -> None:
    assert right(asks("counting", Wanted("cat", number)), *[seen("cat")] * found) is (AT_LEAST[number][found] == "x")


# tag, confident (0.95), unsure (0.6), N with exclude N + 1, right? Only "counting" asks more than 0.3.
@pytest.mark.parametrize(
    ("tag", "sure", "unsure", "number", "expected"),
    [
        ("counting", 2, 0, 2, True),
        ("counting", 2, 1, 2, True),  # the third is not confident enough to be too many
        ("counting", 2, 5, 2, True),
        ("counting", 1, 1, 2, False),  # the second is not confident enough to count
        ("counting", 0, 2, 2, False),
        ("counting", 3, 0, 2, False),
        ("counting", 3, 1, 4, False),
        ("counting", 4, 1, 4, True),
        ("single_object", 1, 1, 2, True),
        ("single_object", 0, 2, 2, True),
        ("single_object", 2, 1, 2, False),
        ("single_object", 0, 3, 2, False),
        ("two_object", 1, 2, 3, True),
        ("two_object", 1, 3, 3, False),
    ],
)
def test_unsure_ones_count_in_other_categories_only(
    tag: str, sure: int, unsure: int, number: int, expected: bool
) -> None:
    prompt = asks(tag, Wanted("cat", number), exclude=(Unwanted("cat", number + 1),))
    assert right(prompt, *[seen("cat", 0.95)] * sure, *[seen("cat", 0.6)] * unsure) is expected


# Rule: the 16 most confident of a class count.
@pytest.mark.parametrize(
    ("found", "include", "exclude", "expected"),
    [
        (15, 15, 16, True),
        (16, 16, 17, True),
        (17, 16, 17, True),  # the seventeenth is not seen
        (40, 16, 17, True),
        (15, 16, 17, False),
        (16, 15, 16, False),
        (17, 15, 16, False),
        (17, 17, 18, False),  # seventeen can never be found
        (40, 17, 18, False),
        (40, 1, 40, True),
        (40, 1, 16, False),
    ],
)
def test_sixteen_at_most(found: int, include: int, exclude: int, expected: bool) -> None:
    prompt = asks("counting", Wanted("cat", include), exclude=(Unwanted("cat", exclude),))
    assert right(prompt, *[seen("cat")] * found) is expected


def test_sixteen_of_each_class_the_most_confident() -> None:
    found = [seen("cat", 0.5 + k / 100) for k in range(20)] + [seen("dog")] * 18
    kept = keep(found, RULES, "two_object")
    assert [len(kept[name]) for name in ("cat", "dog")] == [16, 16]
    assert [round(d.score, 2) for d in kept["cat"]] == [round(0.69 - k / 100, 2) for k in range(16)]
    assert len(keep(found, replace(RULES, max_objects=3), "two_object")["cat"]) == 3


# Rule: any clause of exclude that is met makes the picture wrong.
@pytest.mark.parametrize(
    ("exclude", "cats", "dogs", "expected"),
    [
        ((), 1, 9, True),
        ((Unwanted("dog", 1),), 1, 0, True),
        ((Unwanted("dog", 1),), 1, 1, False),
        ((Unwanted("dog", 2),), 1, 1, True),
        ((Unwanted("dog", 2),), 1, 2, False),
        ((Unwanted("dog", 2),), 1, 3, False),
        ((Unwanted("dog", 1), Unwanted("cow", 1)), 1, 1, False),
        ((Unwanted("cow", 1), Unwanted("dog", 1)), 1, 1, False),
        ((Unwanted("cow", 1),), 1, 1, True),
        ((Unwanted("cat", 2),), 2, 0, False),
        ((Unwanted("dog", 1),), 0, 1, False),
    ],
)
def test_exclude(exclude: tuple[Unwanted, ...], cats: int, dogs: int, expected: bool) -> None:
    assert right(asks("single_object", CAT, exclude=exclude), *[seen("cat")] * cats, *[seen("dog")] * dogs) is expected


# Rule: objects are looked for one by one, so the same detection may serve two of them.
@pytest.mark.parametrize(
    ("include", "cats", "dogs", "expected"),
    [
        ((CAT, DOG), 1, 1, True),
        ((CAT, DOG), 2, 0, False),
        ((CAT, DOG), 0, 2, False),
        ((CAT, DOG), 5, 5, True),
        ((CAT, CAT), 1, 0, True),
        ((CAT, Wanted("cat", 2)), 1, 0, False),
        ((Wanted("cat", 2), CAT), 2, 0, True),
        ((Wanted("cat", 2), Wanted("dog", 3)), 2, 3, True),
        ((Wanted("cat", 2), Wanted("dog", 3)), 2, 2, False),
        ((Wanted("cat", 2), Wanted("dog", 3)), 1, 3, False),
    ],
)
def test_several_objects(include: tuple[Wanted, ...], cats: int, dogs: int, expected: bool) -> None:
    assert right(asks("two_object", *include), *[seen("cat")] * cats, *[seen("dog")] * dogs) is expected


# ----------------------------------------------------------------------------------------------------------- colour


# Rule: all of the `count` most confident have to be of the colour; those behind are not looked at.
@pytest.mark.parametrize(
    ("count", "cats", "expected"),
    [
        (1, [(0.9, "red")], True),
        (1, [(0.9, "blue")], False),
        (1, [(0.9, "red"), (0.8, "blue")], True),
        (1, [(0.9, "blue"), (0.8, "red")], False),  # the colour of the second does not help
        (1, [(0.8, "red"), (0.9, "blue")], False),  # nor does standing first
        (1, [(0.8, "blue"), (0.9, "red")], True),
        (1, [(0.31, "red"), (0.3, "blue")], True),
        (1, [(0.3, "red")], False),  # found none
        (1, [(0.3, "red"), (0.31, "blue")], False),
        (1, [(0.9, "red"), (0.8, "red"), (0.7, "red")], True),  # too many is no fault without exclude
        (2, [(0.9, "red"), (0.8, "red")], True),
        (2, [(0.9, "red"), (0.8, "blue")], False),
        (2, [(0.9, "blue"), (0.8, "red")], False),
        (2, [(0.9, "red"), (0.8, "blue"), (0.7, "red")], False),  # two are red, but not the first two
        (2, [(0.9, "red"), (0.8, "red"), (0.7, "blue")], True),
        (2, [(0.9, "red")], False),
        (3, [(0.9, "red"), (0.8, "red"), (0.7, "red")], True),
        (3, [(0.9, "red"), (0.8, "red"), (0.7, "pink")], False),
    ],
)
def test_colour_of_the_most_confident(count: int, cats: list[tuple[float, str]], expected: bool) -> None:
    found = [seen("cat", score, color) for score, color in cats]
    assert right(asks("colors", Wanted("cat", count, "red")), *found) is expected


def test_the_likeliest_colour_counts_and_among_equals_the_first() -> None:
    prompt = asks("colors", RED_CAT)
    for shares, expected in (
        ({"red": 0.4, "blue": 0.35, "green": 0.25}, True),
        ({"red": 0.35, "blue": 0.4, "green": 0.25}, False),
        ({"red": 0.4, "blue": 0.4, "green": 0.2}, True),  # argmax of a tie
        ({"blue": 0.4, "red": 0.4, "green": 0.2}, False),
    ):
        assert right(prompt, Detection("cat", (0, 0, 9, 9), 0.9, shares)) is expected


@pytest.mark.parametrize(
    ("cats", "dogs", "expected"),
    [
        (["red"], ["blue"], True),
        (["blue"], ["red"], False),  # swapped: the colours leaked
        (["red"], ["red"], False),
        (["blue"], ["blue"], False),
        (["red"], ["green"], False),
        (["green"], ["blue"], False),
        (["red"], [], False),
        ([], ["blue"], False),
        (["red", "blue"], ["blue", "red"], True),
        (["blue", "red"], ["blue"], False),
        (["red"], ["red", "blue"], False),
        (["red", "red"], ["blue", "blue"], True),
    ],
)
def test_each_object_its_own_colour(cats: list[str], dogs: list[str], expected: bool) -> None:
    found = [seen("cat", 0.9 - k / 10, color) for k, color in enumerate(cats)]
    found += [seen("dog", 0.9 - k / 10, color) for k, color in enumerate(dogs)]
    assert right(asks("color_attr", RED_CAT, BLUE_DOG), *found) is expected


def test_one_class_in_two_colours_cannot_be_right() -> None:
    """Both clauses look at the same most confident cat: the official code does so too, and its prompts never ask."""
    prompt = asks("color_attr", RED_CAT, Wanted("cat", 1, "blue"))
    assert not right(prompt, seen("cat", 0.9, "red"), seen("cat", 0.8, "blue"))


@pytest.mark.parametrize(("first", "second", "expected"), [("red", "blue", True), ("blue", "red", False)])
@pytest.mark.parametrize("score", [0.4, 0.95, 1.0])
def test_among_equals_the_order_given_counts(first: str, second: str, expected: bool, score: float) -> None:
    assert right(asks("colors", RED_CAT), seen("cat", score, first), seen("cat", score, second)) is expected


def test_a_colour_that_was_not_asked_for_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="colour of cat .* detect again"):
        right(asks("colors", RED_CAT), seen("cat"))
    assert not right(asks("colors", RED_CAT), seen("cat", 0.2))  # it does not come to that


# --------------------------------------------------------------------------------------------------------- position

MIDDLE = (100.0, 100.0)
STEPS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}
# Two boxes of 10 x 10: dead zone 0.1 x (10 + 10) = 2. Along an axis the component is (d - 2) / d, and has to be
# beyond 0.5, so d has to be beyond 4.
ALONG = [
    (0.0, False),
    (1.0, False),  # inside the dead zone
    (2.0, False),  # at its end
    (2.5, False),  # outside, 0.5 / 2.5 = 0.2
    (3.0, False),  # 0.33
    (4.0, False),  # 2 / 4 = 0.5 exactly
    (4.25, True),  # 0.53
    (5.0, True),  # 0.6
    (10.0, True),  # 0.8
    (90.0, True),  # 0.98
]


@pytest.mark.parametrize("asked", RELATIONS)
@pytest.mark.parametrize("true", RELATIONS)
@pytest.mark.parametrize(("distance", "far_enough"), ALONG)
def test_position_along_an_axis(asked: str, true: str, distance: float, far_enough: bool) -> None:
    x, y = (middle + distance * step for middle, step in zip(MIDDLE, STEPS[true], strict=True))
    found = seen("cat", box=square(x, y)), seen("dog", box=square(*MIDDLE))
    prompt = asks("position", DOG, Wanted("cat", 1, "", (asked, 0)))
    assert right(prompt, *found) is (far_enough and asked == true)


# The same boxes d to the side and d up or down: (d - 2) / (1.4142 d) beyond 0.5 where d is beyond 6.83.
@pytest.mark.parametrize("asked", RELATIONS)
@pytest.mark.parametrize(("across", "down"), [("left of", "above"), ("left of", "below"), ("right of", "above")])
@pytest.mark.parametrize(("distance", "far_enough"), [(2.0, False), (6.5, False), (7.0, True), (20.0, True)])
def test_a_diagonal_has_two_relations(asked: str, across: str, down: str, distance: float, far_enough: bool) -> None:
    x, y = MIDDLE[0] + distance * STEPS[across][0], MIDDLE[1] + distance * STEPS[down][1]
    found = seen("cat", box=square(x, y)), seen("dog", box=square(*MIDDLE))
    prompt = asks("position", DOG, Wanted("cat", 1, "", (asked, 0)))
    assert right(prompt, *found) is (far_enough and asked in (across, down))


# offset of a from b, width and height of a, of b, where a stands; the components are worked beside each.
@pytest.mark.parametrize(
    ("offset", "a", "b", "expected"),
    [
        ((20, 10), (10, 10), (10, 10), "right of"),  # (18, 8) / 22.36 = 0.81, 0.36
        ((20, 14), (10, 10), (10, 10), "right of"),  # (18, 12) / 24.41 = 0.74, 0.492
        ((20, 15), (10, 10), (10, 10), "right of, below"),  # (18, 13) / 25 = 0.72, 0.52
        ((15, 20), (10, 10), (10, 10), "right of, below"),  # 0.52, 0.72
        ((14, 20), (10, 10), (10, 10), "below"),  # 0.492, 0.74
        ((-20, 15), (10, 10), (10, 10), "left of, below"),
        ((20, -15), (10, 10), (10, 10), "right of, above"),
        ((-20, -14), (10, 10), (10, 10), "left of"),
        ((30, 40), (25, 10), (25, 10), "below"),  # (25, 38) / 50: exactly 0.5 is not beyond
        ((30, 40), (24, 10), (25, 10), "right of, below"),  # 25.1 / 50 = 0.502
        ((30, 40), (26, 10), (25, 10), "below"),  # 24.9 / 50 = 0.498
        ((-30, -40), (25, 10), (25, 10), "above"),
        ((-30, -40), (24, 10), (25, 10), "left of, above"),
        ((40, 30), (10, 25), (10, 25), "right of"),
        ((40, -30), (10, 24), (10, 25), "right of, above"),
        ((40, 0), (100, 100), (100, 100), ""),  # dead zone 20: 20 / 40 = 0.5
        ((41, 0), (100, 100), (100, 100), "right of"),  # 21 / 41 = 0.51
        ((20, 0), (10, 10), (90, 90), ""),  # dead zone 10: 10 / 20 = 0.5
        ((21, 0), (90, 90), (10, 10), "right of"),  # 11 / 21 = 0.52; which of the two is large plays no part
        ((30, 30), (100, 10), (100, 10), "below"),  # (10, 28) / 42.43 = 0.24, 0.66
        ((30, 30), (10, 100), (10, 100), "right of"),
        ((30, 30), (100, 100), (100, 100), ""),  # (10, 10) / 42.43 = 0.24
        ((0, 0), (10, 10), (50, 50), ""),  # one inside the other
        ((0, 0), (10, 10), (10, 10), ""),
        ((3, 3), (20, 20), (20, 20), ""),  # inside the dead zone both ways
    ],
)
def test_relations(offset: tuple[int, int], a: tuple[int, int], b: tuple[int, int], expected: str) -> None:
    x, y = MIDDLE[0] + offset[0], MIDDLE[1] + offset[1]
    assert ", ".join(relations(square(x, y, *a), square(*MIDDLE, *b))) == expected


@pytest.mark.parametrize(
    ("distance", "dead_zone", "expected"),
    [
        (0.0, 0.0, False),
        (0.0005, 0.0, False),  # less than 0.001 is nothing
        (0.01, 0.0, True),
        (1.0, 0.0, True),
        (4.0, 0.05, True),  # dead zone 1: 3 / 4
        (2.0, 0.05, False),
        (10.0, 0.25, False),  # dead zone 5: exactly 0.5
        (11.0, 0.25, True),
    ],
)
def test_the_dead_zone_is_a_setting(distance: float, dead_zone: float, expected: bool) -> None:
    found = seen("cat", box=square(8 - distance, 8)), seen("dog", box=square(8, 8))
    assert right(CAT_LEFT_OF_DOG, *found, rules=replace(RULES, position_threshold=dead_zone)) is expected


# x of each cat and dog, the most confident first. Rule: every one of the `count` most confident cats has to stand
# so to every matched dog.
@pytest.mark.parametrize(
    ("cats", "dogs", "many_cats", "many_dogs", "expected"),
    [
        ([10], [60], 1, 1, True),
        ([60], [10], 1, 1, False),
        ([10, 90], [60], 1, 1, True),  # the second cat is not looked at
        ([90, 10], [60], 1, 1, False),
        ([10], [60, 0], 1, 1, True),
        ([10], [0, 60], 1, 1, False),
        ([10, 20], [60], 2, 1, True),
        ([10, 90], [60], 2, 1, False),
        ([90, 10], [60], 2, 1, False),
        ([10, 20, 90], [60], 2, 1, True),
        ([10], [60, 90], 1, 2, True),
        ([30], [60, 10], 1, 2, False),
        ([10, 20], [60, 90], 2, 2, True),
        ([10, 70], [60, 90], 2, 2, False),
        ([10], [60], 2, 1, False),  # a cat is missing
        ([10], [60], 1, 2, False),  # a dog is missing
    ],
)
def test_positions_of_several(cats: list[int], dogs: list[int], many_cats: int, many_dogs: int, expected: bool) -> None:
    found = [seen("cat", 0.9 - k / 10, box=square(x, 10)) for k, x in enumerate(cats)]
    found += [seen("dog", 0.9 - k / 10, box=square(x, 10)) for k, x in enumerate(dogs)]
    prompt = asks("position", Wanted("dog", many_dogs), Wanted("cat", many_cats, "", ("left of", 0)))
    assert right(prompt, *found) is expected


# What is referred to has to be matched itself: found often enough, in its colour, in its own place.
@pytest.mark.parametrize(
    ("include", "found", "reasons"),
    [
        ((DOG, Wanted("cat", 1, "", ("left of", 0))), {"cat": 10}, ["expected dog >= 1", "no target for cat"]),
        ((DOG, Wanted("cat", 1, "", ("left of", 0))), {"dog": 60}, ["expected cat >= 1"]),
        (
            (DOG, Wanted("cat", 1, "", ("left of", 0))),
            {"dog": 10, "cat": 60},
            ["expected cat left of dog, found right"],
        ),
        ((DOG, Wanted("cat", 1, "", ("left of", 0))), {"dog": 10, "cat": 11}, ["found neither side"]),
        (
            (BLUE_DOG, Wanted("cat", 1, "", ("left of", 0))),
            {"cat": 10, "dog": 60},
            ["found 1 red", "no target for cat"],
        ),
        (
            (DOG, Wanted("cat", 1, "blue", ("left of", 0))),
            {"cat": 60, "dog": 10},
            ["expected blue cat >= 1, found 1 red"],
        ),
        ((DOG, Wanted("cat", 1, "red", ("left of", 0))), {"cat": 10, "dog": 60}, []),
        (
            (DOG, Wanted("cat", 1, "", ("left of", 0)), Wanted("cow", 1, "", ("left of", 1))),
            {"cow": 5, "cat": 30, "dog": 60},
            [],
        ),
        (
            (DOG, Wanted("cat", 1, "", ("left of", 0)), Wanted("cow", 1, "", ("left of", 1))),
            {"cow": 45, "cat": 30, "dog": 60},
            ["expected cow left of cat, found right of"],
        ),
        (
            (DOG, Wanted("cat", 1, "", ("left of", 0)), Wanted("cow", 1, "", ("left of", 1))),
            {"cow": 5, "cat": 90, "dog": 60},
            ["expected cat left of dog", "no target for cow to be left of"],
        ),
        (
            (DOG, CAT, Wanted("cow", 1, "", ("left of", 0)), Wanted("pig", 1, "", ("right of", 1))),
            {"cow": 5, "cat": 30, "dog": 60, "pig": 90},
            [],
        ),
    ],
)
def test_what_a_position_refers_to(include: tuple[Wanted, ...], found: dict[str, int], reasons: list[str]) -> None:
    things = [seen(name, 0.9, "red", square(x, 10)) for name, x in found.items()]
    verdict = verdict_of(asks("position", *include), things, RULES)
    assert verdict.correct is (not reasons) and len(verdict.reasons) == len(reasons)
    assert all(said in reason for said, reason in zip(reasons, verdict.reasons, strict=True))


# ---------------------------------------------------------------------------------------------------------- overlap


# Rule: off at 1. Below, a detection is dropped that overlaps a more confident one of its class by that much or more.
@pytest.mark.parametrize(
    ("max_overlap", "boxes", "left"),
    [
        (1.0, [(0, 0, 9, 9), (0, 0, 9, 9)], 2),  # even the same box twice
        (0.99, [(0, 0, 9, 9), (0, 0, 9, 9)], 1),
        (0.5, [(0, 0, 9, 9), (0, 0, 9, 19)], 1),  # 100 / 200: at the limit is dropped
        (0.51, [(0, 0, 9, 9), (0, 0, 9, 19)], 2),
        (0.5, [(0, 0, 9, 9), (20, 0, 29, 9)], 2),
        (0.4, [(0, 0, 9, 9), (0, 5, 9, 14), (0, 10, 9, 19)], 3),  # 50 / 150 each
        (0.3, [(0, 0, 9, 9), (0, 5, 9, 14), (0, 10, 9, 19)], 2),  # the third overlaps only the dropped one
        (0.0, [(0, 0, 9, 9), (20, 0, 29, 9)], 1),  # no overlap at all is still "0 or more"
    ],
)
def test_overlap_suppression(max_overlap: float, boxes: list[Box], left: int) -> None:
    cats = [seen("cat", 0.9 - k / 10, box=box) for k, box in enumerate(boxes)]
    assert len(keep(cats, replace(RULES, max_overlap=max_overlap), "single_object")["cat"]) == left
    assert len(keep([*cats, seen("dog", 0.99, box=boxes[0])], replace(RULES, max_overlap=0.01), "x")["dog"]) == 1


def test_overlap_counts_the_last_pixels() -> None:
    assert pixel_overlap((0, 0, 9, 9), (0, 0, 9, 9)) == 1 and pixel_overlap((0, 0, 9, 9), (10, 0, 19, 9)) == 0
    assert pixel_overlap((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)


# ---------------------------------------------------------------------------------------------------------- prompts


def test_rows_and_prompts_are_the_same_both_ways(tmp_path: Path) -> None:
    rows = [
        {"tag": "single_object", "include": [{"class": "cat", "count": 1}], "prompt": "a photo of a cat"},
        {
            "tag": "counting",
            "include": [{"class": "cat", "count": 2}],
            "exclude": [{"class": "cat", "count": 3}],
            "prompt": "a photo of two cats",
        },
        {
            "tag": "position",
            "include": [
                {"class": "dog", "count": 1, "color": "red"},
                {"class": "cat", "count": 1, "color": "blue", "position": ["left of", 0]},
            ],
            "prompt": "a photo of a blue cat left of a red dog",
        },
    ]
    path = tmp_path / "metadata.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    prompts = read_prompts(path)
    assert [to_row(prompt) for prompt in prompts] == rows
    assert [prompt.key for prompt in prompts] == ["00000-single_object", "00001-counting", "00002-position"]
    assert prompts[2].include[1] == Wanted("cat", 1, "blue", ("left of", 0))
    write_prompts(path, prompts)
    assert read_prompts(path) == prompts and path.read_text().splitlines()[0] == json.dumps(rows[0])
    assert from_row({**rows[0], "key": "mine", "index": 7}).key == "mine"  # other keys at the top do no harm


GOOD = {"tag": "position", "include": [{"class": "dog", "count": 1}], "prompt": "a dog"}


def changed(**fields: Any) -> dict[str, Any]:
    """A good row with one object more, or other keys."""
    row = {**GOOD, **fields}
    return {name: value for name, value in row.items() if value is not None}


def second(**fields: Any) -> dict[str, Any]:
    return changed(include=[{"class": "dog", "count": 1}, {"class": "cat", "count": 1, **fields}])


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (changed(tag="colours"), "unknown category 'colours': .*colors"),
        (changed(tag=None), "`tag` is missing"),
        (changed(include=None), "`include` is missing"),
        (changed(prompt=None), "`prompt` is missing"),
        (changed(prompt="  "), "prompt is empty"),
        (changed(prompt=3), "`prompt` is 3"),
        (changed(include=[]), "`include` is empty"),
        (changed(include={"class": "dog"}), "`include` is .* list"),
        (changed(include=["dog"]), "found 'dog'"),
        (changed(include=[{"class": "dog"}]), "misses 'count'"),
        (changed(include=[{"count": 1}]), "misses 'class'"),
        (changed(exclude=[{"class": "dog", "count": 0}]), "count of 'dog' is 0"),
        (changed(exclude=[{"class": "dog", "count": 1, "color": "red"}]), "has 'color', which no rule reads"),
        (second(colour="red"), "has 'colour', which no rule reads"),
        (second(color=1), "found .*'color': 1"),
        (second(count=0), "count of 'cat' is 0"),
        (second(count=-1), "count of 'cat' is -1"),
        (second(count=1.0), "count of 'cat' is 1.0"),
        (second(count=True), "count of 'cat' is True"),
        (second(count="2"), "count of 'cat' is '2'"),
        (second(position=["near", 0]), "unknown relation 'near' of 'cat'"),
        (second(position=["left of", 1]), "object 1 of `include`: give a number from 0 to 0"),
        (second(position=["left of", -1]), "object -1 of `include`"),
        (second(position=["left of", 2]), "object 2 of `include`"),
        (second(position=["left of", True]), "object True of `include`"),
        (second(position=["left of"]), r"write \['left of', 0\]"),
        (second(position="left of"), r"write \['left of', 0\]"),
        (changed(include=[{"class": "dog", "count": 1, "position": ["above", 0]}]), "it is the first"),
        ([], "has to be an object"),
    ],
)
def test_bad_prompts_name_the_line(tmp_path: Path, row: Any, says: str) -> None:
    path = tmp_path / "metadata.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(PromptSetError, match=f"metadata.jsonl, line 2: .*{says}"):
        read_prompts(path)


def test_bad_prompt_files(tmp_path: Path) -> None:
    with pytest.raises(PromptSetError, match="none.jsonl: no such file"):
        read_prompts(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(PromptSetError, match="holds no prompts"):
        read_prompts(tmp_path / "empty.jsonl")
    (tmp_path / "cut.jsonl").write_text(json.dumps(GOOD) + '\n{"tag": "posi')
    with pytest.raises(PromptSetError, match="line 2: not valid JSON"):
        read_prompts(tmp_path / "cut.jsonl")


def test_a_detector_has_to_know_classes_and_colours() -> None:
    prompts = [asks("color_attr", RED_CAT, BLUE_DOG), asks("counting", CAT, exclude=(Unwanted("cow", 2),))]
    check_known(prompts, ("cat", "dog", "cow"), ("red", "blue"), "judge")
    with pytest.raises(PromptSetError, match=r"judge does not know the class 'dog'; did you mean dogs\?"):
        check_known(prompts, ("cat", "dogs", "cow"), ("red", "blue"), "judge")
    with pytest.raises(PromptSetError, match="does not know the colour 'blue'"):
        check_known(prompts, ("cat", "dog", "cow"), ("red",), "judge")
    with pytest.raises(PromptSetError, match="does not know the class 'cow'"):
        check_known(prompts, ("cat", "dog"), ("red", "blue"), "judge")


CLASSES = ("cat", "owl", "fish", "bus", "person", "butterfly", "apple")
COLORS = ("red", "orange", "blue")


def test_generated_prompts_have_the_official_form() -> None:
    prompts = generate(CLASSES, COLORS, 12, seed=3, plurals={"fish": "fish"})
    counts = Counter(prompt.tag for prompt in prompts)
    assert counts == {**dict.fromkeys(CATEGORIES, 12), "single_object": 7} and list(counts) == list(CATEGORIES)
    assert len({prompt.prompt for prompt in prompts}) == len(prompts) == 67  # none twice
    assert [prompt.key for prompt in prompts][:2] == ["00000-single_object", "00001-single_object"]
    assert all(from_row(to_row(p), n) == p for n, p in enumerate(prompts))  # as valid as a file's
    check_known(prompts, CLASSES, COLORS, "judge")
    texts = [prompt.prompt.removeprefix("a photo of ") for prompt in prompts]
    for prompt, text in zip(prompts, texts, strict=True):
        a, b = prompt.include[0], prompt.include[-1]
        assert (
            text
            == {
                "single_object": f"{an(a.name)}",
                "two_object": f"{an(a.name)} and {an(b.name)}",
                "counting": f"{['two', 'three', 'four'][a.count - 2]} {PLURALS[a.name]}",
                "colors": f"{an(f'{a.color} {a.name}')}",
                "position": f"{an(b.name)} {(b.position or ('', 0))[0]} {an(a.name)}",
                "color_attr": f"{an(f'{a.color} {a.name}')} and {an(f'{b.color} {b.name}')}",
            }[prompt.tag]
        )
        assert prompt.tag != "counting" or prompt.exclude == (Unwanted(a.name, a.count + 1),)
        assert not a.color or "person" not in (a.name, b.name)
        assert prompt.tag in ("single_object", "counting", "colors") or a.name != b.name
        assert prompt.tag != "color_attr" or a.color != b.color
    assert {prompt.include[0].count for prompt in prompts if prompt.tag == "counting"} == {2, 3, 4}


PLURALS = {"cat": "cats", "owl": "owls", "fish": "fish", "bus": "buses", "person": "persons"}
PLURALS |= {"butterfly": "butterflies", "apple": "apples"}


def an(words: str) -> str:
    return f"an {words}" if words[0] in "aeo" else f"a {words}"


def test_generation_is_repeatable_and_fills_what_it_can() -> None:
    assert generate(CLASSES, COLORS, 5, 1) == generate(CLASSES, COLORS, 5, 1) != generate(CLASSES, COLORS, 5, 2)
    few = Counter(prompt.tag for prompt in generate(("cat", "dog"), ("red", "blue"), 50))
    # 2; ordered pairs 2; 2 x 3 numbers; 2 x 2 colours; 2 x 4 relations; 2 pairs x 2 pairs of colours
    assert few == dict(zip(CATEGORIES, (2, 2, 6, 4, 8, 4), strict=True))
    assert {p.tag for p in generate(("cat", "dog"), (), 9)} == set(CATEGORIES) - {"colors", "color_attr"}
    assert {p.tag for p in generate(("cat",), ("red",), 9)} == {"single_object", "counting", "colors"}
    other = generate(CLASSES, COLORS, 5, 1, "{} on white", colored=["bus"])
    assert {p.include[0].name for p in other if p.tag == "colors"} == {"bus"}
    assert all(p.prompt.endswith(" on white") for p in other) and "color_attr" not in {p.tag for p in other}
    same = [p for p in generate(CLASSES, COLORS, 5, 1) if p.tag == "position"]
    assert [p.include for p in other if p.tag == "position"] == [p.include for p in same]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"template": "a photo"}, "needs one {}"),
        ({"template": "{} and {}"}, "needs one {}"),
        ({"per_category": 0}, "per_category = 0"),
        ({"classes": ("cat", "cat")}, "class is empty or comes twice"),
        ({"classes": ("cat", " ")}, "class is empty or comes twice"),
        ({"colors": ("red", "red")}, "colour is empty or comes twice"),
        ({"colored": ["dog"]}, "'dog' is to be coloured"),
    ],
)
def test_a_vocabulary_that_cannot_be_used(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(PromptSetError, match=says):
        generate(**{"classes": CLASSES, "colors": COLORS, **fields})


@pytest.mark.parametrize(
    ("name", "expected"),
    [("bus", "buses"), ("bench", "benches"), ("box", "boxes"), ("dish", "dishes"), ("key", "keys"), ("fly", "flies")],
)
def test_regular_plurals(name: str, expected: str) -> None:
    assert plural(name) == expected


@needs_official
def test_the_official_prompts(tmp_path: Path) -> None:
    path = OFFICIAL / "evaluation_metadata.jsonl"
    prompts = read_prompts(path)
    assert [sum(p.tag == tag for p in prompts) for tag in CATEGORIES] == [80, 99, 80, 94, 100, 100]
    write_prompts(tmp_path / "again.jsonl", prompts)
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()
    relation = Counter((wanted.position or ("",))[0] for p in prompts for wanted in p.include)
    assert [relation[name] for name in RELATIONS] == [19, 27, 26, 28]
    numbers = Counter(p.include[0].count for p in prompts if p.tag == "counting")
    assert numbers == {2: 26, 3: 28, 4: 26}
    assert all(p.exclude == (Unwanted(p.include[0].name, p.include[0].count + 1),) for p in prompts if p.exclude)
    check_known(prompts, tuple(tables()["classes"]), tuple(tables()["colours"]), "the official detector")
    assert [p.prompt for p in prompts] == (OFFICIAL / "generation_prompts.txt").read_text().splitlines()
    assert all(right(p, *perfect(p)) for p in prompts)


@needs_official
def test_the_official_classes_in_their_order() -> None:
    assert list(tables()["classes"]) == (OFFICIAL / "object_names.txt").read_text().split("\n")[:80]


# ----------------------------------------------------------------------------------------------------------- scores


def hits(*rows: str) -> list[list[bool]]:
    return [[mark == "x" for mark in row] for row in rows]


def test_scores_by_hand() -> None:
    found = summarize(["single_object", "single_object", "two_object"], hits("xxxx", "x...", "...."))
    # single: mean of 1 and 1/4; two: 0; overall the mean of the two, not 5 of 12 pictures.
    assert [found.categories[tag].score for tag in ("single_object", "two_object")] == [0.625, 0.0]
    assert found.score == 0.3125 and found.n == 12 and found.prompts == 3
    assert (found.all_correct, found.any_correct) == (1, 2)
    assert found.categories["single_object"].n == 8 and found.categories["two_object"].prompts == 1
    assert found.missing == ["counting", "colors", "position", "color_attr"]
    # picture 0: (1 + 0) / 2, the others: (1/2 + 0) / 2; their deviation is half of the difference of one in four
    assert found.spread == Spread([0.5, 0.25, 0.25, 0.25], 0.125)
    assert found.low <= 0.3125 <= found.high and found.baseline == 0


def test_intervals_draw_prompts_again_not_pictures() -> None:
    found = summarize(["counting", "counting"], hits("xxxx", "...."))
    assert (found.score, found.low, found.high) == (0.5, 0, 1)  # a quarter of the draws are both of one kind
    single = summarize(list(CATEGORIES), hits(*["x."] * 6))
    assert (single.score, single.low, single.high) == (0.5, 0.5, 0.5) and not single.missing
    assert summarize(["counting"], hits("x")).spread == Spread([1.0], None)


@pytest.mark.parametrize(
    ("tags", "correct"), [([], []), (["counting"], [[]]), (["counting"] * 2, [[True], [True] * 2])]
)
def test_scores_need_as_many_pictures_of_each_prompt(tags: list[str], correct: list[list[bool]]) -> None:
    with pytest.raises(EvaluationError, match="all need the same number"):
        summarize(tags, correct)


# ------------------------------------------------------------------------------------------------------------- runs


def perfect(prompt: Prompt) -> list[Detection]:
    """What a picture shows that is right."""
    found: list[Detection] = []
    places: list[tuple[float, float]] = []
    for number, wanted in enumerate(prompt.include):
        x, y = 100.0 + 300 * number, 100.0
        if wanted.position:
            relation, target = wanted.position
            x, y = (at + 60 * step for at, step in zip(places[target], STEPS[relation], strict=True))
        places.append((x, y))
        found += [seen(wanted.name, 0.95, wanted.color, square(x, y))] * wanted.count
    return found


class Artist:
    """A generator whose pictures say which prompt they are of, which picture, and whether they are to be right."""

    device = "cpu"

    def __init__(self, prompts: Sequence[Prompt], marks: Mapping[str, str] | str, fails_after: int = 99) -> None:
        self.prompts = {prompt.prompt: number for number, prompt in enumerate(prompts)}
        self.marks, self.fails_after, self.asked = marks, fails_after, []  # type: ignore[var-annotated]

    def image(
        self, prompts: list[str], n: int, steps: int | None, guidance_scale: float | None, seed: int
    ) -> list[list[Image]]:
        if len(self.asked) == self.fails_after:
            raise KeyboardInterrupt
        self.asked.append((prompts, n, steps, guidance_scale, seed))
        return [[self.one(self.prompts[prompt], prompt, number) for number in range(n)] for prompt in prompts]

    def one(self, index: int, prompt: str, number: int) -> Image:
        marks = self.marks if isinstance(self.marks, str) else self.marks[prompt]
        return Pillow.new("RGB", (8, 8), (index, number, 255 * (marks[number] == "x")))


class Reader:
    """A detector that reads what `Artist` wrote, and gives colours only where they are asked for."""

    classes, colors = ("cat", "dog", "cow", "bus"), ("red", "blue")
    threshold, counting_threshold = 0.3, 0.9

    def __init__(self, prompts: Sequence[Prompt], name: str = "Reader 1.0", fails_after: int = 99) -> None:
        self.prompts, self.name, self.fails_after = prompts, name, fails_after
        self.shown: list[int] = []

    def detect(self, images: Sequence[Image], colored: Sequence[Mapping[str, int]]) -> list[list[Detection]]:
        if len(self.shown) == self.fails_after:
            raise KeyboardInterrupt
        self.shown.append(len(images))
        return [self.one(image, wanted) for image, wanted in zip(images, colored, strict=True)]

    def one(self, image: Image, colored: Mapping[str, int]) -> list[Detection]:
        index, _, is_right = image.getpixel((0, 0))  # type: ignore[misc]
        found, left = [], dict(colored)
        for detection in perfect(self.prompts[index]) if is_right else []:
            left[detection.name] = left.get(detection.name, 0) - 1
            colors = (detection.colors or {"red": 1.0}) if left[detection.name] >= 0 else {}
            found.append(replace(detection, colors=colors))
        return found


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return generate(Reader.classes, Reader.colors, 3, seed=7)


@dataclass
class OfOneHash(GenEval):
    """GenEval of a model that is no folder."""

    model_hash: str = "m"

    def hash_of(self, model: str | Path) -> str:
        return self.model_hash


def evaluated(
    prompts: Sequence[Prompt], folder: Path, artist: Artist, reader: Reader, model_hash: str = "m", **how: Any
) -> dict[str, Any]:
    """The scores of a run, without what differs from time to time and place to place."""
    how = {"n": 2, "batch_size": 4, "model_hash": model_hash, **how}
    found = OfOneHash(artist, prompts, [reader], **how).run("model", folder)  # type: ignore[arg-type]
    return {name: value for name, value in found.items() if name not in ("seconds", "folder")}


def test_a_run_draws_detects_and_scores(prompts: list[Prompt], tmp_path: Path) -> None:
    artist, reader = Artist(prompts, "x."), Reader(prompts)
    found = evaluated(prompts, tmp_path / "run", artist, reader, steps=7, guidance_scale=2.5, seed=5)
    assert (found["name"], found["score"], found["n"], found["prompts"]) == ("geneval", 0.5, 36, 18)
    assert found["spread"] == {"scores": [1.0, 0.0], "deviation": 0.7071} and found["detector"] == "Reader 1.0"
    assert [entry[1:] for entry in artist.asked] == [(2, 7, 2.5, 5)] * 5 and len(artist.asked[0][0]) == 4
    assert reader.shown == [8, 8, 8, 8, 4] and found["rules"]["counting_threshold"] == 0.9
    assert found["examples"][0] == {
        "key": prompts[0].key,
        "prompt": prompts[0].prompt,
        "picture": 1,
        "reasons": [f"expected {prompts[0].include[0].name} >= 1, found 0"],
    }
    assert len(found["examples"]) == 18  # three of each category
    run = RunFolder.load(tmp_path / "run")
    assert run.scores("m") == found
    line = json.loads((tmp_path / "run/images/00003/metadata.jsonl").read_text())
    assert line == {"key": prompts[3].key, **to_row(prompts[3])}
    again = Artist(prompts, "x."), Reader(prompts)
    assert evaluated(prompts, tmp_path / "run", *again, steps=7, guidance_scale=2.5, seed=5) == found
    assert again[0].asked == [] and again[1].shown == []  # all was there
    with pytest.raises(RunError, match="model_hash"):
        evaluated(prompts, tmp_path / "run", *again, "another", steps=7, guidance_scale=2.5, seed=5)


@pytest.mark.parametrize(("drawn", "detected"), [(2, 99), (99, 0), (99, 3)])
def test_an_interrupted_run_goes_on(prompts: list[Prompt], tmp_path: Path, drawn: int, detected: int) -> None:
    whole = evaluated(prompts, tmp_path / "whole", Artist(prompts, "x."), Reader(prompts))
    with pytest.raises(KeyboardInterrupt):
        evaluated(prompts, tmp_path / "cut", Artist(prompts, "x.", drawn), Reader(prompts, fails_after=detected))
    artist, reader = Artist(prompts, "x."), Reader(prompts)
    assert evaluated(prompts, tmp_path / "cut", artist, reader) == whole
    assert len(artist.asked) == 5 - min(drawn, 5) and len(reader.shown) == (5 if drawn < 5 else 5 - detected)
    names = ["images.jsonl", "detections-reader-1-0.jsonl", "images/00017/samples/0001.png"]
    assert all((tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes() for name in names)


def test_scores_can_be_made_again_from_the_rows_alone(prompts: list[Prompt], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    found = evaluated(prompts, folder, Artist(prompts, "xx"), Reader(prompts))
    assert found["score"] == 1 and found["examples"] == []
    for file in sorted((folder / "images").rglob("*.*")):
        file.unlink()
    run = RunFolder.load(folder)
    row = score_run(run).row()
    assert row == {name: found[name] for name in row}
    strict = score_run(run, "Reader 1.0", Rules(threshold=0.96, counting_threshold=0.96))
    assert strict.score == 0 and strict.rules.threshold == 0.96
    few = score_run(run, rules=Rules(max_objects=1))
    assert few.categories["counting"].score == 0 and few.categories["colors"].score == 1
    with pytest.raises(EvaluationError, match="threshold of 0.2 is below those of Reader 1.0"):
        score_run(run, rules=Rules(threshold=0.2))
    again = rescore(folder, "m", rules=Rules(max_objects=1))
    assert again["score"] == few.score == run.scores("m")["score"]
    assert rescore(folder)["score"] == found["score"]
    with pytest.raises(RunError, match="a run of geneval is scored without side: leave it out"):
        rescore(folder, side=64)


def test_several_detectors_may_look_at_one_run(prompts: list[Prompt], tmp_path: Path) -> None:
    evaluated(prompts, tmp_path / "run", Artist(prompts, "x."), Reader(prompts))
    run = RunFolder.load(tmp_path / "run")
    other = Reader([*prompts[1:], prompts[0]], "Another, of 2026!")  # sees other things than were drawn
    artist = Artist(prompts, "x.")
    found = evaluated(prompts, tmp_path / "run", artist, other)
    assert artist.asked == [] and (tmp_path / "run" / "detections-another-of-2026.jsonl").is_file()
    with pytest.raises(RunError, match="detections-another-of-2026 and detections-reader-1-0: say which"):
        score_run(run)
    first, second = (score_run(run, name) for name in ("Reader 1.0", "Another, of 2026!"))
    assert first.score == 0.5 > found["score"] == second.score and second.detector == "Another, of 2026!"
    assert detectors_of(run) == ["Another, of 2026!", "Reader 1.0"]
    findings = read_findings(run, "Reader 1.0")
    assert findings.rules == RULES and findings.prompts == prompts
    assert [len(picture) for picture in findings.detections[0]] == [1, 0] and findings.correct[0] == [True, False]
    with pytest.raises(RunError, match="rows of detections-nobody.jsonl are missing"):
        score_run(run, "nobody")


def test_detectors_are_asked_for_no_more_colours_than_rules_look_at(tmp_path: Path) -> None:
    own = [asks("color_attr", Wanted("cat", 2, "red"), Wanted("cat", 1, "red"), BLUE_DOG, Wanted("cow", 4))]
    asked: list[Mapping[str, int]] = []

    class Spy(Reader):
        def detect(self, images: Sequence[Image], colored: Sequence[Mapping[str, int]]) -> list[list[Detection]]:
            asked.extend(colored)
            return super().detect(images, colored)

    evaluated(own, tmp_path / "run", Artist(own, "x"), Spy(own), n=1)
    run = RunFolder.load(tmp_path / "run")
    pictures = [run.images(item["key"]) for item in run.items]
    detect(Spy(own, "other"), run, run.items, pictures, rules=Rules(max_overlap=0.5))
    assert asked == [{"cat": 2, "dog": 1}, {"cat": 16, "dog": 16}]


def test_what_a_detector_does_not_know_is_said_before_anything_is_drawn(prompts: list[Prompt], tmp_path: Path) -> None:
    reader, artist = Reader(prompts), Artist(prompts, "xx")
    reader.classes = ("cat", "dog")  # type: ignore[assignment]
    with pytest.raises(PromptSetError, match=r"Reader 1.0 does not know the class '(cow|bus)'"):
        evaluated(prompts, tmp_path / "run", artist, reader)
    assert artist.asked == [] and not (tmp_path / "run").exists()


def test_rows_of_two_thresholds_are_refused(prompts: list[Prompt], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluated(prompts, tmp_path / "run", Artist(prompts, "xx"), Reader(prompts, fails_after=2))
    run = RunFolder.load(tmp_path / "run")
    with pytest.raises(RunError, match="rows of detections-reader-1-0.jsonl are missing"):
        score_run(run)
    other = Reader(prompts)
    other.threshold = 0.5
    with pytest.raises(RunError, match="holds rows of .*thresholds 0.3.*thresholds 0.5.* detect again"):
        evaluated(prompts, tmp_path / "run", Artist(prompts, "xx"), other)
    with pytest.raises(RunError, match="holds rows of .*thresholds 0.3.*thresholds 0.5.* detect again"):
        score_run(RunFolder.load(tmp_path / "run"))
    empty = RunFolder.open(tmp_path / "empty", Manifest("geneval", "m", "m", {}), items_of(prompts))
    with pytest.raises(RunError, match="none yet: detect first"):
        score_run(empty)
    with pytest.raises(RunError, match="has no detections yet"):
        detectors_of(empty)
    foreign = RunFolder.open(tmp_path / "foreign", Manifest("scenes", "m", "m", {}), [{"key": "a", "prompt": "a cat"}])
    with pytest.raises(RunError, match="no run of GenEval: `tag` is missing"):
        prompts_of(foreign)


def test_a_real_generator(nano_folder: Path, tmp_path: Path) -> None:
    from open_pisces.generate.generator import Generator

    class Blind(Reader):
        def detect(self, images: Sequence[Image], colored: Sequence[Mapping[str, int]]) -> list[list[Detection]]:
            assert len({image.tobytes() for image in images}) > 1
            return [[] for _ in images]

    own = [asks("single_object", CAT), replace(asks("counting", Wanted("dog", 2)), key="l", prompt="two dogs")]
    generator = Generator.from_pretrained(nano_folder, "cpu")
    asked = GenEval(generator, own, [Blind(own)], n=2, steps=2, guidance_scale=1.5)
    found = asked.run(nano_folder, tmp_path / "run")
    assert (found["score"], found["high"], found["n"]) == (0, 0, 4) and len(found["missing"]) == 4
    assert RunFolder.load(tmp_path / "run").images("l")[1].size == (32, 32)


# ------------------------------------------------------------------------------------------------- layouts of others


@pytest.fixture
def run(prompts: list[Prompt], tmp_path: Path) -> RunFolder:
    evaluated(prompts, tmp_path / "run", Artist(prompts, "x.x."), Reader(prompts), n=4)
    return RunFolder.load(tmp_path / "run")


def scored(
    path: Path, reader: Reader, folder: Path | None = None, n: int = 4, prompts: Sequence[Prompt] | None = None
) -> dict[str, Any]:
    """The scores of pictures in the official layout."""
    return GenEvalOfFolder(path, [reader], n, batch_size=5, asked=prompts).run(path, folder)


def test_pictures_of_others_are_scored_like_ours(prompts: list[Prompt], run: RunFolder, tmp_path: Path) -> None:
    out = exports.export(run, "geneval", tmp_path / "out")
    assert json.loads((out / "00004/metadata.jsonl").read_text()) == to_row(prompts[4])
    assert sorted(file.name for file in (out / "00004").rglob("*.*")) == [
        *(f"000{k}.png" for k in range(4)),
        "metadata.jsonl",
    ]
    (out / "00004/grid.png").write_bytes(b"not looked at")
    before = sorted(out.rglob("*"))
    ours, reader = score_run(run).row(), Reader(prompts)
    found = scored(out, reader, tmp_path / "scored", prompts=prompts)
    assert [found[name] for name in ("score", "low", "high", "n", "categories", "spread")] == [
        ours[name] for name in ("score", "low", "high", "n", "categories", "spread")
    ]
    assert found["model"] == str(out) and sorted(out.rglob("*")) == before  # nothing is written there
    assert score_run(RunFolder.load(tmp_path / "scored")).score == found["score"]
    shown = len(reader.shown)
    again = scored(out, reader, tmp_path / "scored")  # goes on
    assert {**again, "seconds": 0} == {**found, "seconds": 0}
    assert len(reader.shown) == shown
    assert scored(out, Reader(prompts))["score"] == 0.5 and (tmp_path / "runs").is_dir()  # a folder is chosen
    Pillow.new("RGB", (8, 8), (0, 0, 0)).save(out / "00000/samples/0000.png")
    with pytest.raises(RunError, match="model_hash"):
        scored(out, reader, tmp_path / "scored")


def test_folders_are_numbers_of_any_length_in_order(prompts: list[Prompt], run: RunFolder, tmp_path: Path) -> None:
    out = exports.export(run, "geneval", tmp_path / "out")
    for number in range(len(prompts)):
        (out / f"{number:05d}").rename(out / f"{number}")
        for name in range(4):
            (out / f"{number}/samples/{name:04d}.png").rename(out / f"{number}/samples/{9 + name}.png")
    (out / "notes").mkdir()
    found = scored(out, Reader(prompts), tmp_path / "scored")
    assert found["spread"]["scores"] == [1, 0, 1, 0]  # 9, 10, 11, 12: by number, not by name
    assert [item["key"].partition("-")[0] for item in RunFolder.load(tmp_path / "scored").items] == [
        str(number) for number in range(len(prompts))
    ]


def test_pictures_that_are_missing_or_broken_are_named(prompts: list[Prompt], run: RunFolder, tmp_path: Path) -> None:
    out, reader = exports.export(run, "geneval", tmp_path / "out"), Reader(prompts)
    with pytest.raises(EvaluationError, match="none: holds no numbered folders"):
        scored(tmp_path / "none", reader)
    with pytest.raises(EvaluationError, match="00000/samples: 4 pictures, expected are 2"):
        scored(out, reader, n=2)
    with pytest.raises(EvaluationError, match=f"'{prompts[2].prompt}' is not one of those asked"):
        scored(out, reader, prompts=[*prompts[:2], *prompts[3:]])
    with pytest.raises(EvaluationError, match="'one more' has no pictures"):
        scored(out, reader, prompts=[*prompts, replace(prompts[0], prompt="one more")])
    picture = out / "00003/samples/0002.png"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:40])
    with pytest.raises(ValueError, match="00003/samples/0002.png: .*(damaged|not an image)"):
        scored(out, reader)
    picture.rename(picture.with_suffix(".jpg"))
    with pytest.raises(
        EvaluationError, match="00003/samples: 3 pictures beside 0002.jpg, whose names .* expected are 4"
    ):
        scored(out, reader)
    picture.write_bytes(whole)
    metadata = out / "00001/metadata.jsonl"
    metadata.write_text(metadata.read_text().replace("single_object", "singles"))
    with pytest.raises(EvaluationError, match="00001/metadata.jsonl: unknown category 'singles'"):
        scored(out, reader)
    metadata.write_text("{")
    with pytest.raises(EvaluationError, match="00001/metadata.jsonl: "):
        scored(out, reader)
    metadata.unlink()
    with pytest.raises(EvaluationError, match="00001/metadata.jsonl: no such file"):
        scored(out, reader)


def drawn(folder: Path, items: list[dict[str, Any]], n: int = 4, side: int = 4) -> RunFolder:
    """A run of any items whose pictures are one grey each: item, then number."""
    run = RunFolder.open(folder, Manifest("pictures", "m", "m", {"n": n}), items)
    run.save_images(
        {
            item["key"]: [Pillow.new("RGB", (side, side), (place, number, 0)) for number in range(n)]
            for place, item in enumerate(items)
        }
    )
    return run


def corner(path: Path, x: int = 0, y: int = 0) -> tuple[int, ...]:
    with Pillow.open(path) as image:
        return tuple(image.getpixel((x, y)))  # type: ignore[arg-type]


def test_geneval2_is_a_map_from_prompt_to_file(tmp_path: Path) -> None:
    source = tmp_path / "geneval2_data.jsonl"
    source.write_text("\n".join(json.dumps({"prompt": f"{k} cats", "atom_count": 2}) for k in range(3)))
    run = drawn(tmp_path / "run", exports.items("geneval2", source), n=2)
    out = exports.export(run, "geneval2", tmp_path / "out", part=True)
    places = json.loads((out / "images.json").read_text())
    assert list(places) == ["0 cats", "1 cats", "2 cats"] and len(list(out.iterdir())) == 4
    assert [corner(Path(place)) for place in places.values()] == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]
    twice = drawn(tmp_path / "twice", [{"key": "a", "prompt": "cats"}, {"key": "b", "prompt": "cats"}])
    with pytest.raises(EvaluationError, match="'cats' comes twice"):
        exports.export(twice, "geneval2", tmp_path / "no", part=True)
    assert sorted(path.name for path in tmp_path.iterdir() if "no" in path.name) == []  # nothing half-written


def test_wise_is_numbered_by_prompt_id(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, numbers in (("culture", (3, 1)), ("science", (12,))):
        rows = [{"prompt_id": k, "Prompt": f"prompt {k}", "Explanation": ""} for k in numbers]
        (tmp_path / f"data/{name}.json").write_text(json.dumps(rows))
    items = exports.items("wise", tmp_path / "data")
    assert [(item["id"], item["prompt"]) for item in items] == [(k, f"prompt {k}") for k in (1, 3, 12)]
    out = exports.export(drawn(tmp_path / "run", items, n=1), "wise", tmp_path / "out", part=True)
    assert {path.name: corner(path)[0] for path in out.iterdir()} == {"1.png": 0, "3.png": 1, "12.png": 2}
    for bad in (0, 1001, None, "7"):
        wrong = drawn(tmp_path / f"wrong{bad}", [{"key": "a", "prompt": "x", "id": bad}])
        with pytest.raises(EvaluationError, match=f"`id` of an item is {bad}: wise numbers"):
            exports.export(wrong, "wise", tmp_path / "no", part=True)


def test_dpg_is_a_grid_of_four_for_each_prompt_file(tmp_path: Path) -> None:
    (tmp_path / "prompts").mkdir()
    for stem in ("midjourney12", "256"):
        (tmp_path / f"prompts/{stem}.txt").write_text(f"about {stem}\n")
    items = exports.items("dpg", tmp_path / "prompts")
    assert items == [{"key": "256", "prompt": "about 256"}, {"key": "midjourney12", "prompt": "about midjourney12"}]
    out = exports.export(drawn(tmp_path / "run", items, n=5), "dpg", tmp_path / "out", part=True)
    assert sorted(path.name for path in out.iterdir()) == ["256.png", "midjourney12.png"]  # and nothing else
    with Pillow.open(out / "midjourney12.png") as whole:
        assert whole.size == (8, 8)
    # as the scorer cuts: (0, 0), (side, 0), (0, side), (side, side)
    cuts = [corner(out / "midjourney12.png", x, y) for x, y in ((0, 0), (4, 0), (0, 4), (4, 4))]
    assert cuts == [(1, number, 0) for number in range(4)]
    with pytest.raises(EvaluationError, match="3 pictures of each prompt, dpg takes 4"):
        exports.export(drawn(tmp_path / "few", items, n=3), "dpg", tmp_path / "no", part=True)
    with pytest.raises(EvaluationError, match="four squares of one size"):
        exports.grid([Pillow.new("RGB", (4, 4))] * 3 + [Pillow.new("RGB", (8, 8))])
    with pytest.raises(EvaluationError, match="four squares of one size"):
        exports.grid([Pillow.new("RGB", (4, 8))] * 4)
    dotted = drawn(tmp_path / "dotted", [{"key": "a.b", "prompt": "x"}])
    with pytest.raises(EvaluationError, match="key 'a.b': dpg's keys are the stems"):
        exports.export(dotted, "dpg", tmp_path / "no", part=True)


@pytest.mark.parametrize(("layout", "number"), [("geneval2", 800), ("wise", 1000), ("dpg", 1065)])
def test_layouts_take_all_prompts_or_say_so(tmp_path: Path, layout: str, number: int) -> None:
    run = drawn(tmp_path / "run", [{"key": "a", "prompt": "x", "id": 1}])
    with pytest.raises(EvaluationError, match=f"1 prompts, {layout} has {number}: draw all of them"):
        exports.export(run, layout, tmp_path / "out")
    assert exports.export(run, layout, tmp_path / "out", part=True).is_dir()


def test_exports_overwrite_nothing(run: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").write_text("mine")
    with pytest.raises(EvaluationError, match="full holds something"):
        exports.export(run, "geneval", tmp_path / "full")
    (tmp_path / "empty").mkdir()
    assert len(list(exports.export(run, "geneval", tmp_path / "empty").iterdir())) == 18
    (run.folder / "images/00005/samples/0001.png").unlink()
    with pytest.raises(RunError, match="00005/samples/0001.png"):
        exports.export(RunFolder.load(run.folder), "geneval", tmp_path / "half")
    assert [path.name for path in tmp_path.iterdir() if "half" in path.name] == []
    for call in (lambda: exports.export(run, "coco", tmp_path / "x"), lambda: exports.items("coco", tmp_path)):
        with pytest.raises(EvaluationError, match="unknown layout 'coco': one of geneval"):
            call()


def test_prompts_of_others_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "bad").write_text('{"text": "a cat"}')
    for layout in ("geneval2", "wise"):
        with pytest.raises(EvaluationError, match=f"bad: not in the form of {layout}'s prompts"):
            exports.items(layout, tmp_path / "bad")
        with pytest.raises(EvaluationError, match="none: not there"):
            exports.items(layout, tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(EvaluationError, match="holds no prompts of dpg"):
        exports.items("dpg", tmp_path / "empty")
    write_prompts(tmp_path / "own.jsonl", [asks("counting", CAT)])
    assert exports.items("geneval", tmp_path / "own.jsonl")[0]["key"] == "00000-counting"
