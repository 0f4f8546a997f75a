"""Composed scenes: the ground truth is true, captions determine pictures, answers are balanced."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from open_pisces.batch import Sample
from open_pisces.data.order import stream
from open_pisces.data.shards import ShardError, ShardReader, data_path
from open_pisces.datasets.scenes import composer as scenes
from open_pisces.datasets.scenes.composer import Composer, Cutouts, build, load_cutouts
from open_pisces.datasets.scenes.layout import SIZE, vocabulary

WORDS = {"noto": "", "noto-v1": "blob", "fluent-3d": "3d", "twemoji": "twemoji"}
PAINT = {
    "red": (210, 20, 30), "orange": (240, 110, 0), "yellow": (250, 210, 0), "green": (0, 120, 40), "blue": (0, 60, 190),
    "purple": (110, 20, 150), "brown": (100, 50, 20), "black": (0, 0, 0), "white": (255, 255, 255),
}  # fmt: skip


def synthetic() -> Cutouts:
    """A dark opaque rectangle, its own colour and proportions, for each thing and style."""
    pictures = {}
    for style in WORDS:
        for thing in (*vocabulary().objects, *vocabulary().shapes):
            rng = stream(0, style, thing.name)
            colour = PAINT[thing.colour] if thing.is_shape else tuple(rng.integers(0, 90, 3).tolist())
            size = (48, 48) if thing.is_shape else tuple(rng.integers(34, 49, 2).tolist())
            key = (style, thing.concept, thing.colour if thing.is_shape else "")
            pictures[key] = Image.new("RGBA", size, (*colour, 255))
    return Cutouts(pictures, WORDS, {style: {"package": style} for style in WORDS})


CUTOUTS = synthetic()
COUNT = 4000


@pytest.fixture(scope="module")
def train() -> list[Sample]:
    composer = Composer(CUTOUTS, "train", 0)
    return [composer.scene(index) for index in range(COUNT)]


@pytest.fixture(scope="module")
def many() -> list[Sample]:
    """Scenes for training: half of them pairs, with questions about every thing."""
    composer = Composer(CUTOUTS, "train", 0, pairs=0.5, many=True)
    return [composer.scene(index) for index in range(COUNT)]


def facts(sample: Sample) -> dict:
    assert sample.facts is not None
    return sample.facts


def middle(one: dict) -> tuple[float, float]:
    x0, y0, x1, y1 = one["box"]
    return (x0 + x1) / 2, (y0 + y1) / 2


# --------------------------------------------------------------------------------- pictures and their facts


def test_a_scene_is_a_function_of_seed_split_and_index(train: list[Sample]) -> None:
    for index in (17, 3, 3999, 0):
        again = Composer(CUTOUTS, "train", 0).scene(index)
        assert again.images[0].tobytes() == train[index].images[0].tobytes()
        assert (again.short, again.detailed, again.questions, again.facts) == (
            train[index].short, train[index].detailed, train[index].questions, train[index].facts
        )  # fmt: skip
    assert Composer(CUTOUTS, "train", 1).scene(0).short != train[0].short


def test_boxes_hold_the_objects_and_the_rest_is_ground(train: list[Sample]) -> None:
    for sample in train[:600]:
        pixels = np.asarray(sample.images[0]).astype(int)
        assert pixels.shape == (SIZE, SIZE, 3)
        ground = np.array(vocabulary().backgrounds[facts(sample)["background"]])
        covered = np.zeros((SIZE, SIZE), dtype=int)
        for one in facts(sample)["objects"]:
            x0, y0, x1, y1 = one["box"]
            assert 0 <= x0 < x1 <= SIZE and 0 <= y0 < y1 <= SIZE
            covered[y0:y1, x0:x1] += 1
            seen = pixels[y0:y1, x0:x1].reshape(-1, 3)
            style, concept, colour = one["style"], one["concept"], one["colour"]
            shape = concept in ("heart", "circle", "square")
            drawn = CUTOUTS.pictures[style, concept, colour if shape else ""].getpixel((0, 0))
            assert (abs(seen - np.array(drawn[:3])) <= 2).all()
        assert covered.max() == 1, f"objects overlap: {sample.short}"
        assert (pixels[covered == 0] == ground).all()


def test_places_are_where_the_objects_are(train: list[Sample]) -> None:
    """A large object still has its middle in the third of the picture that its place names."""
    third = SIZE / 3
    for sample in train:
        for one in facts(sample)["objects"]:
            x, y = middle(one)
            if facts(sample)["layout"] == "single":
                across = "left" if x < third else "right" if x > 2 * third else ""
                down = "top" if y < third else "bottom" if y > 2 * third else ""
                assert f"{down} {across}".strip() == one["place"].replace("centre", ""), sample.short
            else:
                for word, far in (("left", x), ("right", SIZE - x), ("top", y), ("bottom", SIZE - y)):
                    assert word not in one["place"].split() or far < SIZE / 2


def test_relations_hold_in_pixels(train: list[Sample]) -> None:
    holds = {
        "left of": lambda a, b: a[2] <= b[0],
        "right of": lambda a, b: a[0] >= b[2],
        "above": lambda a, b: a[3] <= b[1],
        "below": lambda a, b: a[1] >= b[3],
    }
    seen = Counter()
    for sample in train:
        if facts(sample)["layout"] == "pair":
            relation = facts(sample)["relation"]
            first, second = (one["box"] for one in facts(sample)["objects"])
            assert holds[relation](first, second), sample.short
            assert f" {relation} a" in sample.short
            seen[relation] += 1
    assert set(seen) == set(holds) and min(seen.values()) > 200


def test_sizes_are_told_apart_in_pixels(train: list[Sample]) -> None:
    sides = defaultdict(set)
    for sample in train:
        if facts(sample)["layout"] == "single":
            one = facts(sample)["objects"][0]
            x0, y0, x1, y1 = one["box"]
            sides[one["size"]].add(max(x1 - x0, y1 - y0))
    assert max(sides["small"]) + 6 < min(sides["large"])


def test_grounds_never_hide_what_stands_on_them(train: list[Sample]) -> None:
    for sample in train:
        assert facts(sample)["background"] not in {one["colour"] for one in facts(sample)["objects"]}
    pale = Cutouts({("noto", "cat", ""): Image.new("RGBA", (9, 9), (140, 190, 240, 255))}, {"noto": ""})
    cat = next(thing for thing in vocabulary().objects if thing.name == "cat")
    assert "blue" not in pale.grounds("noto", cat) and {"orange", "white"} <= pale.grounds("noto", cat)


def test_layouts_styles_and_grounds_have_their_shares(train: list[Sample]) -> None:
    layouts = Counter(facts(s)["layout"] for s in train)
    styles = Counter(facts(s)["objects"][0]["style"] for s in train)
    numbers = Counter(len(facts(s)["objects"]) for s in train if facts(s)["layout"] == "count")
    for kind, share in scenes.LAYOUTS.items():
        assert abs(layouts[kind] / COUNT - share) < 0.03
    assert abs(styles["noto"] / COUNT - 0.4) < 0.03 and abs(styles["noto-v1"] / COUNT - 0.3) < 0.03
    assert set(numbers) == {2, 3, 4} and min(numbers.values()) > 0.28 * sum(numbers.values())
    assert all(len({one["style"] for one in facts(s)["objects"]}) == 1 for s in train)
    grounds = Counter(facts(s)["background"] for s in train)
    assert set(grounds) == set(vocabulary().backgrounds) and abs(grounds["white"] / COUNT - 0.4) < 0.04


# ------------------------------------------------------------------------------------------------- held out


def concepts(sample: Sample) -> frozenset[str]:
    return frozenset(one["concept"] for one in facts(sample)["objects"])


def test_held_out_pairs_and_style_never_meet_training(train: list[Sample]) -> None:
    held_out = vocabulary().held_out_pairs
    assert len(held_out) == 40 and all(len(pair) == 2 for pair in held_out)
    pairs = [Composer(CUTOUTS, "pairs", 0).scene(i) for i in range(1000)]
    style = [Composer(CUTOUTS, "style", 0).scene(i) for i in range(300)]
    assert not {concepts(s) for s in (*train, *style)} & held_out
    assert {concepts(s) for s in pairs} == held_out
    assert {one["style"] for s in style for one in facts(s)["objects"]} == {"twemoji"}
    assert "twemoji" not in {one["style"] for s in (*train, *pairs) for one in facts(s)["objects"]}
    assert all(" twemoji " in s.short for s in style) and not any("twemoji" in s.short for s in train)


def test_every_member_of_a_held_out_pair_is_trained_alone_and_with_others(train: list[Sample]) -> None:
    members = frozenset().union(*vocabulary().held_out_pairs)
    alone = frozenset().union(*(concepts(s) for s in train if facts(s)["layout"] == "single"))
    paired = frozenset().union(*(concepts(s) for s in train if facts(s)["layout"] == "pair"))
    assert members <= alone and members <= paired and len(alone) == 48


def test_the_fixture_keeps_the_split() -> None:
    held_out = vocabulary().held_out_pairs
    for split, inside in (("train", False), ("pairs", True)):
        reader = ShardReader(data_path(f"fixture/{split}"))
        samples = [reader[i] for i in range(len(reader))]
        met = {concepts(s) for s in samples if len(concepts(s)) == 2}
        assert met and ((met <= held_out) if inside else not met & held_out)
        assert all(s.images[0].size == (SIZE, SIZE) and s.short and s.detailed and s.questions for s in samples)


# ------------------------------------------------------------------------------------------------- captions


def meaning(sample: Sample) -> tuple:
    """All that may differ between two scenes but the jitter (boxes)."""
    known = facts(sample)
    return (
        known["background"], known["layout"], known.get("relation"), known.get("arrangement"),
        tuple((o["concept"], o["style"], o["colour"], o["size"], o["place"]) for o in known["objects"]),
    )  # fmt: skip


def test_a_short_caption_determines_the_scene(train: list[Sample]) -> None:
    meanings = defaultdict(set)
    for sample in train:
        meanings[sample.short].add(meaning(sample))
    assert len(meanings) > 1000
    assert not {short: found for short, found in meanings.items() if len(found) > 1}


def test_a_bare_caption_is_the_default_scene(train: list[Sample]) -> None:
    bare = [facts(s) for s in train if s.short in ("a cat", "an apple", "a bee")]
    assert bare
    for known in bare:
        (one,) = known["objects"]
        assert (known["background"], one["style"], one["size"], one["place"]) == ("white", "noto", "large", "centre")


def test_a_detailed_caption_names_everything(train: list[Sample]) -> None:
    plurals = {thing.name: thing.plural for thing in (*vocabulary().objects, *vocabulary().shapes)}
    openings = Counter()
    for sample in train:
        known, text = facts(sample), sample.detailed
        first = known["objects"][0]
        assert f"{known['background']} background" in text or text.endswith(f" {known['background']}."), text
        word = WORDS[first["style"]]
        assert (f"in {word} style" in text) if word else "style" not in text
        assert text[0].isupper() and text.endswith(".") and "  " not in text and "{" not in text
        names = [_name(one) for one in known["objects"]]
        if known["layout"] == "count":
            assert plurals[names[0]] in text and scenes_number(known) in text.lower() and "small" in text
        else:
            assert all(re.search(rf"\b{name}\b", text) for name in names)
        if known["layout"] == "single":
            assert first["size"] in text and first["place"].split()[0] in text
        openings[known["layout"], " ".join(text.split()[:2])] += 1
    assert all(sum(1 for kind, _ in openings if kind == layout) >= 3 for layout in scenes.LAYOUTS)


def _name(one: dict) -> str:
    shape = one["concept"] in ("heart", "circle", "square")
    return f"{one['colour']} {one['concept']}" if shape else one["concept"]


def scenes_number(known: dict) -> str:
    return ("one", "two", "three", "four")[len(known["objects"]) - 1]


def test_articles_agree(train: list[Sample]) -> None:
    for sample in train:
        for text in (sample.short, sample.detailed, *(q.question for q in sample.questions)):
            assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text.lower()), text


# ---------------------------------------------------------------------------------------- questions, answers


@pytest.mark.parametrize("asking", ["train", "many"])
def test_answers_are_true(asking: str, request: pytest.FixtureRequest) -> None:
    train: list[Sample] = request.getfixturevalue(asking)
    plurals = {t.plural: t.name for t in (*vocabulary().objects, *vocabulary().shapes)}
    asked = Counter()
    for sample in train:
        known = facts(sample)
        names = [_name(one) for one in known["objects"]]
        for q in sample.questions:
            asked[q.kind] += 1
            text = q.question.removesuffix("?")
            if q.kind == "how_many":
                assert ("one", "two", "three", "four").index(q.answer) + 1 == sum(
                    plurals[p] == name for name in names for p in plurals if f"many {p} " in f"{text} "
                )
            elif q.kind == "is_there":
                named = text.removesuffix(" in the picture")
                assert q.answer == ("yes" if any(re.search(rf" an? {name}$", named) for name in names) else "no")
            elif q.kind == "left_or_right":
                x = {name: middle(one)[0] for name, one in zip(names, known["objects"], strict=True)}
                first, second = _compared(text)
                assert q.answer == ("left" if x[first] < x[second] else "right")
            elif q.kind == "where":
                (one,) = (o for o in known["objects"] if re.search(rf"the {_name(o)}$", text))
                assert q.answer == one["place"]
            elif q.kind == "which_colour":
                shapes = [o for o in known["objects"] if f"the {o['concept']}" in text]
                assert q.answer == (shapes[0]["colour"] if shapes else known["background"])
            else:
                at = [o for o in known["objects"] if known["layout"] != "pair" or f" {o['place']}" in text]
                assert plurals.get(q.answer, q.answer) == _name(at[0])
    assert set(asked) == {"what", "how_many", "which_colour", "where", "is_there", "left_or_right"}
    assert min(asked.values()) > 0.1 * COUNT


def test_many_questions_ask_about_each_thing_and_come_out_even_in_every_scene(many: list[Sample]) -> None:
    for sample in many:
        asked: dict[str, list[str]] = defaultdict(list)
        for q in sample.questions:
            asked[q.kind].append(q.answer)
        things = 2 if facts(sample)["layout"] == "pair" else 1
        assert len(asked["what"]) == things
        assert sorted(asked["is_there"]) == ["no"] * things + ["yes"] * things
        assert sorted(asked["left_or_right"]) in ([], ["left", "right"])
        assert len({q.question for q in sample.questions}) == len(sample.questions)
    kinds = Counter(q.kind for sample in many for q in sample.questions)
    assert kinds["left_or_right"] > 0.4 * COUNT and kinds["where"] > COUNT


def _at(name: str, said: str) -> tuple[int, int]:
    found = re.search(rf"\b{name}\b", said)
    assert found, (name, said)
    return found.span()


BEFORE = {"left of": 0, "above": 1, "over": 1, "on top of": 1, "to the left of": 0, "and": 0, "next to": 0}
AFTER = {"right of": 0, "below": 1, "under": 1, "underneath": 1, "to the right of": 0}


def test_other_words_say_the_same_scene(many: list[Sample]) -> None:
    """Every caption in other words names style, ground and things, and its relation or places hold in pixels."""
    forms = Counter()
    for sample in many:
        known = facts(sample)
        (said,) = sample.more_captions
        words = WORDS[known["objects"][0]["style"]]
        assert (f" {words} " in f" {said} ") if words else not re.search(r"\b(blob|3d|twemoji)\b", said)
        assert known["background"] in said or known["background"] == "white"
        said = re.sub(r" on (an? )?(\w+)( background)?$", "", said) if said.endswith(known["background"]) else said
        said = re.sub(rf" on an? {known['background']} background$", "", said)
        if known["layout"] != "pair":
            continue
        one, other = sorted(known["objects"], key=lambda o: _at(_name(o), said)[0])
        if all(f"the {o['place']}" in said for o in (one, other)):  # each named with its thing
            forms["places"] += 1
            places = [_at(f"the {o['place']}", said)[0] for o in (one, other)]
            assert places == sorted(places), said
            continue
        between = said[_at(_name(one), said)[1] : _at(_name(other), said)[0]]
        word = re.sub(rf" an? ({words} )?$" if words else r" an? $", "", between).strip()
        assert word in BEFORE or word in AFTER, (word, said)
        forms[word] += 1
        axis = BEFORE.get(word, AFTER.get(word))
        ahead = middle(one)[axis] < middle(other)[axis]
        assert ahead == (word in BEFORE), said
    assert len(forms) >= 10 and min(forms.values()) > 20, forms


def test_plain_scenes_are_of_the_default_style_on_white() -> None:
    composer = Composer(CUTOUTS, "train", 0, pairs=1.0, plain=True)
    scenes = [composer.scene(i) for i in range(40)]
    for scene in scenes:
        assert scene.facts["layout"] == "pair" and scene.facts["background"] == "white"
        assert {thing["style"] for thing in scene.facts["objects"]} == {"noto"}
        assert " on " not in scene.short and all(word not in scene.short for word in ("flat", "glossy", "3d", "blob"))
    assert len({scene.short for scene in scenes}) > 30
    with pytest.raises(ShardError, match="plain scenes are of the default style"):
        Composer(CUTOUTS, "style", 0, plain=True)


def test_the_share_of_pairs_is_a_setting_and_the_others_keep_theirs(many: list[Sample]) -> None:
    layouts = Counter(facts(sample)["layout"] for sample in many)
    assert layouts["pair"] / COUNT == pytest.approx(0.5, abs=0.03)
    assert layouts["single"] / layouts["count"] == pytest.approx(0.45 / 0.25, rel=0.12)
    with pytest.raises(ShardError, match="share of pairs of 1.5"):
        Composer(CUTOUTS, "train", 0, pairs=1.5)


def test_the_share_of_colored_shapes_is_a_setting() -> None:
    composer = Composer(CUTOUTS, "train", 0, pairs=1.0, shapes=0.8)
    scenes = [composer.scene(i) for i in range(300)]
    shapes = {thing.concept for thing in vocabulary().shapes}
    colored = [thing["concept"] in shapes for scene in scenes for thing in facts(scene)["objects"]]
    # Two of one concept are drawn again, and there are three concepts of shapes: fewer than the share stay.
    assert 0.6 < np.mean(colored) < 0.8
    with pytest.raises(ShardError, match="share of colored shapes of -1"):
        Composer(CUTOUTS, "train", 0, shapes=-1)


def _compared(text: str) -> tuple[str, str]:
    patterns = (
        r"Is the (?P<a>.*) left or right of the (?P<b>.*)",
        r"On which side of the (?P<b>.*) is the (?P<a>.*)",
        r"Is the (?P<a>.*) to the left or to the right of the (?P<b>.*)",
    )
    found = next(m for m in (re.fullmatch(p, text) for p in reversed(patterns)) if m)
    return found["a"], found["b"]


MOST = {"how_many": 0.32, "is_there": 0.54, "left_or_right": 0.55, "where": 0.17, "which_colour": 0.2}


def test_no_answer_of_a_closed_type_is_a_good_guess(train: list[Sample]) -> None:
    answers = defaultdict(Counter)
    for sample in train:
        for q in sample.questions:
            answers[q.kind][q.answer] += 1
            assert len(q.answer.split()) <= 3 and q.answer == q.answer.lower()
    for kind, most in MOST.items():
        share = max(answers[kind].values()) / sum(answers[kind].values())
        assert share < most, (kind, answers[kind])
    assert set(answers["how_many"]) == {"one", "two", "three", "four"} and len(answers["where"]) == 9
    assert len(answers["which_colour"]) == 11


def test_the_wording_does_not_give_yes_away(train: list[Sample]) -> None:
    """A reader without the picture: shapes and objects are asked about as often where they are as elsewhere."""
    asked = defaultdict(Counter)
    for sample in train:
        for q in sample.questions:
            if q.kind == "is_there":
                asked[any(f" {shape}" in q.question for shape in ("heart", "circle", "square"))][q.answer] += 1
    for answers in asked.values():
        assert 0.42 < answers["yes"] / sum(answers.values()) < 0.58, asked


def test_at_most_two_questions_of_a_type_and_no_scene_without(train: list[Sample]) -> None:
    for sample in train:
        kinds = Counter(q.kind for q in sample.questions)
        assert kinds and max(kinds.values()) <= 2


# --------------------------------------------------------------------------------------------- building


def test_building_gives_the_composers_scenes_whatever_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenes, "load_cutouts", lambda path: CUTOUTS)
    monkeypatch.setattr(scenes, "CHUNK", 7)
    for processes in (1, 2):
        build(tmp_path / str(processes), 30, 5, "train", processes=processes)
    for file in (f for f in (tmp_path / "1").rglob("*") if f.is_file()):
        assert file.read_bytes() == (tmp_path / "2" / file.relative_to(tmp_path / "1")).read_bytes()
    reader, composer = ShardReader(tmp_path / "1"), Composer(CUTOUTS, "train", 5)
    assert len(reader) == 30 and {row["package"] for row in reader.licences} == set(WORDS) - {"twemoji"}
    assert reader[29].images[0].tobytes() == composer.scene(29).images[0].tobytes()


def test_what_cannot_be_composed_is_named(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no cut-outs at .*: build them with `pisces data build artwork`"):
        build(tmp_path / "out", 3, 0, "train", cutouts=tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ShardError, match="no cut-outs"):
        load_cutouts(tmp_path)
    with pytest.raises(ShardError, match="unknown split 'test': choose train, pairs or style"):
        Composer(CUTOUTS, "test")  # type: ignore[arg-type]
    few = Cutouts({("noto", "cat", ""): Image.new("RGBA", (4, 4))}, {"noto": ""})
    with pytest.raises(ShardError, match="the cut-outs lack airplane, apple"):
        Composer(few, "train")
    with pytest.raises(ShardError, match="no style for the split 'style'"):
        Composer(few, "style")
