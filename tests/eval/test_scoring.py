"""Rules of the understanding benchmarks, each on cases worked by hand from the code that its docstring names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from open_pisces.eval.intervals import EvaluationError
from open_pisces.eval.understanding import parsing, scoring, totals
from open_pisces.eval.understanding.scoring import Grade

ANIMALS = {"A": "a cat", "B": "a dog", "C": "a bird", "D": "a fish"}

# ------------------------------------------------------------------------------------------------------ open answers


@pytest.mark.parametrize(("matches", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_accuracy_leaves_out_each_person_in_turn(matches: int, expected: float) -> None:
    # Three matches: the 3 who said it see 2 others (2/3 each), the 7 others see 3 (1 each): (2 + 7) / 10.
    assert scoring.vqa_accuracy("red", ["red"] * matches + ["blue"] * (10 - matches)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "golds", "official", "m4c"),
    [
        ("red", ["red"] * 10, 1.0, 1.0),
        ("Red.", ["red"] * 9 + ["rose"], 1.0, 1.0),
        ("red", ["Red"] * 10, 0.0, 1.0),  # who all agree are not touched
        ("two", ["2"] * 9 + ["1"], 1.0, 1.0),
        ("two", ["two"] * 9 + ["1"], 0.0, 1.0),  # people's number words stay words
        ("a box", ["box"] * 3 + ["case"] * 7, 0.9, 0.9),
        ("box!", ["box"] * 2 + ["case"] * 8, 0.6, 0.6),
        ("tea", ["tea!"] * 9 + ["x"], 0.0, 1.0),  # a mark at the end leaves a blank there
        ("", ["red"] * 10, 0.0, 0.0),
    ],
)
def test_vqa_of_the_challenge_and_of_mmf(answer: str, golds: list[str], official: float, m4c: float) -> None:
    assert scoring.vqa_official(answer, golds) == pytest.approx(official)
    assert scoring.vqa_m4c(answer, golds) == pytest.approx(m4c)


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        *[("Red.", "red", 1), ("yes", "Yes", 1), ("T-shirt", "tshirt", 1), ("the red", "red", 0), (" red", "red", 0)],
        *[("red car", "red", 0), ("2", "two", 0), ("", "red", 0)],
    ],
)
def test_gqa_ignores_case_and_punctuation_only(answer: str, gold: str, right: float) -> None:
    assert scoring.OPEN["words"](answer, gold) == right


@pytest.mark.parametrize(
    ("answer", "golds", "expected"),
    [
        ("Tea", ["tea"], 1.0),
        ("Teas", ["Tea"], 0.75),
        ("ab", ["abcd"], 0.5),  # exactly at the cut-off
        ("abc", ["abcdefg"], 0.0),  # 3/7
        ("T", ["Tea"], 0.0),
        ("tea", ["coffee", "teas"], 0.75),
        ("tea  time", ["tea time"], 1.0),
        ("tea   tim", ["tea time"], 1 - 1 / 9),  # blanks count in the length, not in the distance
        ("", ["x"], 0.0),
    ],
)
def test_anls(answer: str, golds: list[str], expected: float) -> None:
    assert scoring.anls(answer, golds) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "gold", "strict", "lenient"),
    [
        ("105", "100", 1, 1),
        ("105.1", "100", 0, 0),
        ("-95", "-100", 1, 1),
        ("33%", "33.3%", 1, 1),
        ("5%", "0.05", 1, 1),
        ("5", "5%", 0, 0),
        ("1,000", "1000", 0, 1),
        ("$5", "5", 0, 1),
        ("12 dollars.", "12", 0, 1),
        ("0.0", "0", 0, 0),  # five per cent of nothing: compared as text
        ("2001", "2010", 1, 1),  # years are numbers to this rule
        ("june", "June", 1, 1),
        ("Answer: June", "June", 0, 1),
        ("May", "June", 0, 0),
    ],
)
def test_relaxed_accuracy(answer: str, gold: str, strict: float, lenient: float) -> None:
    question = {"gold": gold, "options": {}, "facts": {}}
    assert [scoring.grade("relaxed", question, answer, how).value for how in (False, True)] == [strict, lenient]


@pytest.mark.parametrize(
    ("answer", "golds", "dataset", "right"),
    [
        ("It says STOP here", ["stop"], "svt", 1),
        ("st op", ["stop"], "svt", 0),
        ("go or\nstop", ["or stop"], "svt", 1),
        ("halt", ["stop", "Halt"], "svt", 1),
        ("", ["stop"], "svt", 0),
        ("x^{2}+1", ["x ^ { 2 } + 1"], "HME100k", 1),
        ("y = x ^ {2} + 1", ["x^{2}+1"], "HME100k", 1),
        ("X^{2}", ["x^{2}"], "HME100k", 0),
        ("x ^ 2", ["x^2"], "svt", 0),
    ],
)
def test_ocrbench_looks_for_the_gold_text_in_the_answer(
    answer: str, golds: list[str], dataset: str, right: float
) -> None:
    question = {"gold": golds, "options": {}, "facts": {"dataset": dataset}}
    assert scoring.grade("contained", question, answer).value == right


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("2", "2", 1),
        ("The answer is 2.", "2", 1),
        ("so x = 2", "2", 1),
        ("about 2.004", "2", 1),  # numbers are rounded to two places
        ("12", "2", 0),
        ("1000", "1,000", 1),
        ("I see an apple tree", "apple tree", 1),
        ("it is an apple", "apple tree", 0),
        ("The result is 3\nso it is 4", "3", 1),  # every line may hold a key
        ("4.00", "['four', '4']", 1),
        ("", "2", 0),
    ],
)
def test_mmmu_open_questions(answer: str, gold: str, right: float) -> None:
    assert scoring.grade("mmmu", {"gold": gold, "options": {}, "facts": {}}, answer).value == right


def math_question(kind: str, gold: str, options: dict[str, str] | None = None, precision: float | None = None) -> Any:
    """A question of MathVista."""
    return {"gold": gold, "options": options or {}, "facts": {"answer_type": kind, "precision": precision}}


@pytest.mark.parametrize(
    ("question", "answer", "strict", "lenient"),
    [
        (math_question("integer", "14"), "14", 1, 1),
        (math_question("integer", "14"), "14.0", None, 1),  # int("14.0") fails; then a model would be asked
        (math_question("integer", "14"), 'The answer is "14".', 1, 1),
        (math_question("integer", "14"), "There are 14 of 20 left", None, 0),
        (math_question("integer", "14"), "Of 20 there are 14", None, 1),
        (math_question("float", "1.45", precision=2.0), "1.454", 1, 1),
        (math_question("float", "6.0", precision=1.0), "6", 1, 1),
        (math_question("float", "6.0", precision=1.0), "about 6", None, 1),
        (math_question("list", "[4, 6]"), "[4, 6]", 1, 1),
        (math_question("list", "[4, 6]"), "They are [4, 6].", None, 1),
        (math_question("text", "8/11", {"A": "3/11", "B": "8/11"}), "8/11", 1, 1),
        (math_question("text", "8/11", {"A": "3/11", "B": "8/11"}), "B", 1, 1),
        (math_question("text", "8/11", {"A": "3/11", "B": "8/11"}), "(B) 8/11", None, 1),
        (math_question("text", "8/11", {"A": "3/11", "B": "8/11"}), "8/1", None, None),  # not the nearest option
    ],
)
def test_mathvista_without_a_judge(question: Any, answer: str, strict: float | None, lenient: float | None) -> None:
    for how, expected in ((False, strict), (True, lenient)):
        found = scoring.grade("mathvista", question, answer, how)
        assert (found.value, found.read is None) == (expected or 0, expected is None)


@pytest.mark.parametrize(
    ("extraction", "question", "right"),
    [
        ("14", math_question("integer", "14"), 1),
        ("14.7", math_question("integer", "14"), 1),  # int(float())
        ("fourteen", math_question("integer", "14"), 0),
        ("1.456", math_question("float", "1.46", precision=2.0), 1),
        ("inf", math_question("integer", "14"), 0),
        ("(b)", math_question("text", "8/11", {"A": "3/11", "B": "8/11"}), 1),
        ("8/1", math_question("text", "8/11", {"A": "3/12", "B": "8/11"}), 1),  # nearest by edit distance
        ("[4, 6]", math_question("list", "[4, 6]"), 1),
        ("[4,6]", math_question("list", "[4, 6]"), 0),  # compared as text
    ],
)
def test_mathvista_with_an_extraction(extraction: str, question: Any, right: float) -> None:
    assert scoring.mathvista_right(question, extraction, nearest=True).value == right


@pytest.mark.parametrize(
    ("answer", "gold", "strict", "lenient"),
    [
        ("B", "B", 1, 1),
        ("b.", "B", 1, 1),
        ("a dog", "B", 1, 1),  # an option's text becomes its letter
        ("The answer is B", "B", 0, 1),
        ("It is a dog", "B", 1, 1),  # found anywhere in the answer
        ("A Dog", "B", 0, 1),  # with its case
        ("a cat or a dog", "B", 0, 0),  # the first one counts
        ("", "B", 0, 0),
    ],
)
def test_realworldqa_with_options(answer: str, gold: str, strict: float, lenient: float) -> None:
    question = {"gold": gold, "options": ANIMALS, "facts": {}}
    assert [scoring.grade("realworld", question, answer, how).value for how in (False, True)] == [strict, lenient]


@pytest.mark.parametrize(
    ("answer", "gold", "strict", "lenient"),
    [
        *[("two", "2", 1, 1), ("Two.", "2", 0, 1), ("2", "2", 1, 1), ("STOP!", "stop", 1, 1)],
        *[("The answer is 2.", "2", 0, 1), ("a sign", "sign", 0, 1), ("3", "2", 0, 0), ("eleven", "11", 0, 0)],
    ],
)
def test_realworldqa_with_a_word(answer: str, gold: str, strict: float, lenient: float) -> None:
    question = {"gold": gold, "options": {}, "facts": {}}
    assert [scoring.grade("realworld", question, answer, how).value for how in (False, True)] == [strict, lenient]


# --------------------------------------------------------------------------------------------------------- totals


def asked(units: Sequence[Any], facts: Sequence[dict[str, Any]] | None = None, gold: str = "B") -> list[dict[str, Any]]:
    """Questions of these units."""
    return [
        {"key": str(n), "unit": str(unit), "gold": gold, "options": ANIMALS, "facts": facts[n] if facts else {}}
        for n, unit in enumerate(units)
    ]


def graded(values: Sequence[float]) -> list[Grade]:
    """Grades of read answers."""
    return [Grade(float(value), "x") for value in values]


@pytest.mark.parametrize(
    ("units", "values", "score"),
    [
        ("1111", [1, 1, 1, 1], 100),
        ("1111", [1, 1, 1, 0], 0),  # one wrong rotation loses the question
        ("112233", [1, 1, 1, 0, 0, 0], 100 / 3),
        ("1122", [1, 1, 1, 1], 100),
        ("12", [1, 0], 50),  # without rotations: accuracy
        ("1112", [1, 1, 1, 0], 50),  # questions weigh alike, however many options
        ("2121", [1, 1, 1, 0], 50),  # in any order
        ("1122", [0, 0, 0, 0], 0),
    ],
)
def test_circular_accuracy_of_mmbench(units: str, values: list[int], score: float) -> None:
    found = totals.total("all_right", asked(units), graded(values))
    assert found.score == pytest.approx(score) and found.n == len(set(units))
    assert found.details["each"] == pytest.approx(100 * sum(values) / len(values))


@pytest.mark.parametrize(
    ("units", "values", "score", "pairs"),
    [
        ("0011", [1, 1, 1, 1], 100, 2),
        ("0011", [1, 0, 1, 1], 50, 2),
        ("0011", [1, 0, 0, 1], 0, 2),
        ("0101", [1, 1, 1, 0], 50, 2),
        ("00", [1, 1], 100, 1),
        ("00", [0, 0], 0, 1),
        ("001", [1, 1, 0], 100, 1),  # half a pair is left out
        ("001122", [1, 1, 1, 1, 1, 0], 200 / 3, 3),
    ],
)
def test_pair_accuracy_of_mmvp(units: str, values: list[int], score: float, pairs: int) -> None:
    found = totals.total("pairs", asked(units), graded(values))
    assert found.score == pytest.approx(score) and found.n == pairs and bool(found.why) == (units == "001")
    assert totals.total("pairs", asked("01"), graded([1, 1])).score is None


POPE = [
    # gold, read, then what comes of them: f1, precision, recall, yes ratio of the model
    ("yyyynnnn", "yyynynnn", 75.0, 75.0, 75.0, 50.0),
    ("yyyynnnn", "yyyyyyyy", 200 / 3, 50.0, 100.0, 100.0),  # gold says yes in half of them
    ("yyyynnnn", "nnnnnnnn", 0.0, 0.0, 0.0, 0.0),
    ("yyyynnnn", "yyyynnnn", 100.0, 100.0, 100.0, 50.0),
    ("yyyynnnn", "yy__nnnn", 200 / 3, 100.0, 50.0, 25.0),  # unread answers miss
    ("yyyynnnn", "yyyy____", 100.0, 100.0, 100.0, 50.0),
    ("nnnn", "nnnn", 0.0, 0.0, 0.0, 0.0),
    ("yn", "ny", 0.0, 0.0, 0.0, 50.0),
]


@pytest.mark.parametrize(("gold", "read", "f1", "precision", "recall", "yes"), POPE)
def test_f1_of_pope_with_the_models_own_yes_ratio(
    gold: str, read: str, f1: float, precision: float, recall: float, yes: float
) -> None:
    words = {"y": "yes", "n": "no", "_": None}
    questions = [{**question, "gold": words[g]} for question, g in zip(asked(gold), gold, strict=True)]
    grades = [Grade(float(g == r), words[r]) for g, r in zip(gold, read, strict=True)]
    found = totals.total("f1", questions, grades)
    details = [found.details[name] for name in ("precision", "recall", "yes_ratio", "gold_yes_ratio")]
    assert found.score == pytest.approx(f1)
    assert details == pytest.approx([precision, recall, yes, 100 * gold.count("y") / len(gold)])
    right = sum(g == r for g, r in zip(gold, read, strict=True))
    assert found.details["accuracy"] == pytest.approx(100 * right / len(gold))


def test_pope_says_what_leaving_out_unread_answers_would_give() -> None:
    questions = [{**question, "gold": "yes"} for question in asked("1234")]
    found = totals.total("f1", questions, [Grade(1, "yes"), Grade(0, None), Grade(0, None), Grade(0, "no")])
    # 1 hit, 3 misses: 2 / (2 + 3). lmms-eval's recall forgets two of the misses: 2 / (2 + 1).
    assert found.score == pytest.approx(40) and found.details["f1_unread_left_out"] == pytest.approx(200 / 3)


MME = [
    # subtask of each image, both answers of each, score
    (["color"], [(1, 1)], 200),
    (["color"], [(1, 0)], 50),
    (["color"], [(0, 0)], 0),
    (["color", "color"], [(1, 1), (0, 0)], 100),
    (["color", "color"], [(1, 0), (0, 1)], 50),  # half right, no image right
    (["existence", "existence", "color", "color"], [(1, 1), (1, 0), (0, 0), (1, 1)], 225),  # 125 + 100
    (["code_reasoning", "text_translation"], [(1, 1), (1, 1)], 400),
    (["color", "count", "count", "count"], [(1, 1), (1, 1), (0, 0), (0, 0)], 200 + 200 / 3),  # subtasks weigh alike
]


@pytest.mark.parametrize(("tasks", "answers", "score"), MME)
def test_mme_sums_accuracy_and_accuracy_plus(tasks: list[str], answers: list[tuple[int, int]], score: float) -> None:
    facts = [{"category": task} for task in tasks for _ in (0, 1)]
    questions = asked([n for n in range(len(tasks)) for _ in (0, 1)], facts)
    found = totals.total("mme", questions, graded([value for both in answers for value in both]))
    assert found.score == pytest.approx(score) and found.n == len(tasks) and "subtasks have no question" in found.why


def test_mme_leaves_out_an_image_with_one_question_and_knows_all_subtasks() -> None:
    names = totals.MME_TASKS["perception"] + totals.MME_TASKS["cognition"]
    facts = [{"category": name} for name in names for _ in (0, 1)]
    whole = totals.total("mme", asked([n for n in range(14) for _ in (0, 1)], facts), graded([1] * 28))
    assert (whole.score, whole.low, whole.high, whole.why) == (2800, 2800, 2800, "")
    part = totals.total("mme", asked([0, 0, 1], [{"category": "color"}] * 3), graded([1, 1, 1]))
    assert part.n == 1 and part.score == 200 and "1 images left out" in part.why
    assert totals.total("mme", asked([1], [{"category": "color"}]), graded([1])).score is None


@pytest.mark.parametrize(
    ("ade", "coco", "omni", "score"),
    [
        ([1, 0], [1, 0, 0, 0], [1, 1, 1, 0], 56.25),  # ((50 + 25) / 2 + 75) / 2
        ([1], [1], [1], 100),
        ([1], [1], [0], 50),
        ([0], [0], [1], 50),  # the third dimension weighs as much as both flat sets
        ([1], [0], [0], 25),
        ([0, 0], [1], [0], 25),
        ([0], [0], [0], 0),
        ([1, 1, 0], [1, 0], [1, 0, 0, 0], 100 * ((2 / 3 + 1 / 2) / 2 + 1 / 4) / 2),
    ],
)
def test_cv_bench_by_its_published_formula(ade: list[int], coco: list[int], omni: list[int], score: float) -> None:
    sources = ["ADE20K"] * len(ade) + ["COCO"] * len(coco) + ["Omni3D"] * len(omni)
    questions = asked(range(len(sources)), [{"source": source} for source in sources])
    found = totals.total("cv_bench", questions, graded(ade + coco + omni))
    assert found.score == pytest.approx(score)
    assert found.details["each"] == pytest.approx(100 * np.mean(ade + coco + omni))  # what lmms-eval prints


def test_cv_bench_needs_its_three_sources() -> None:
    found = totals.total("cv_bench", asked("12", [{"source": "COCO"}] * 2), graded([1, 0]))
    assert found.score is None and "ADE20K, Omni3D" in found.why and found.details["COCO"] == 50


@pytest.mark.parametrize(
    ("categories", "values", "score"),
    [
        ("ab", [1, 0], 50),
        ("aaab", [1, 1, 1, 0], 50),  # not 75: categories weigh alike
        ("aabb", [1, 0, 1, 1], 75),
        ("a", [1], 100),
        ("abc", [1, 0, 0], 100 / 3),
        ("aab", [0, 0, 1], 50),
        ("abcdefghijklmnopqr", [1] * 9 + [0] * 9, 50),
        ("aaabbc", [1, 1, 0, 1, 0, 0], 100 * (2 / 3 + 1 / 2) / 3),
    ],
)
def test_mmstar_is_the_mean_of_its_categories(categories: str, values: list[int], score: float) -> None:
    questions = asked(range(len(values)), [{"l2_category": name} for name in categories])
    found = totals.total("categories", questions, graded(values))
    assert found.score == pytest.approx(score) and bool(found.why) == (len(set(categories)) < 18)


FIGURES = [
    # (category, set, figure, question) of each; values; aAcc, fAcc, qAcc
    (["VD 0 0 1", "VD 0 1 1"], [1, 1], 100, 100, 100),
    (["VD 0 0 1", "VD 0 1 1"], [1, 0], 50, 50, 0),  # same question, two figures
    (["VD 0 0 1", "VD 0 0 2"], [1, 0], 50, 0, 50),  # same figure, two questions
    (["VD 0 0 1", "VD 0 0 2", "VD 0 1 1", "VD 0 1 2"], [1, 1, 1, 0], 75, 50, 50),
    (["VD 0 0 1", "VD 1 0 1"], [1, 0], 50, 50, 50),  # another set is another figure
    (["VD 0 0 1", "VS 0 0 1"], [1, 0], 50, 100, 50),  # VS without a figure: no figure to be right about
    (["VS 0 0 1"], [1], 100, 0, 100),
    (["VS 0 1 1", "VS 0 2 1", "VS 0 0 1"], [1, 1, 0], 200 / 3, 100, 0),
]


@pytest.mark.parametrize(("places", "values", "each", "figures", "pairs"), FIGURES)
def test_hallusionbench_per_question_figure_and_pair(
    places: list[str], values: list[int], each: float, figures: float, pairs: float
) -> None:
    names = ("category", "set_id", "figure_id", "question_id")
    facts = [dict(zip(names, place.split(), strict=True)) | {"subcategory": "chart"} for place in places]
    found = totals.total("hallusion", asked(range(len(values)), facts), graded(values))
    assert found.score == pytest.approx(each)
    assert [found.details[name] for name in ("aAcc", "fAcc", "qAcc")] == pytest.approx([each, figures, pairs])


@pytest.mark.parametrize(
    ("marks", "score"),
    [
        ([(8, 4)], 50),
        ([(10, 10)], 100),
        ([(5, 10)], 200),  # better than the reference
        ([(8, 4), (4, 2)], 50),
        ([(8, 8), (2, 1)], 90),  # of the sums, not the mean of ratios (75)
        ([(9, 3), (9, 6)], 50),
        ([(1, 1), (9, 1)], 20),
        ([(7.5, 6)], 80),
    ],
)
def test_llava_w_is_the_ratio_of_mean_marks(marks: list[tuple[float, float]], score: float) -> None:
    assert totals.ratio(marks).score == pytest.approx(score)


def test_guesses_stand_apart() -> None:
    questions = [*asked("123"), {**asked("4")[0], "options": {}}]
    found = totals.guesses(questions, [Grade(1, "B"), Grade(0, None), Grade(0, "C"), Grade(0, None)])
    assert found == {"guesses": 1, "score_with_guesses": pytest.approx(100 * 1.25 / 4)}  # of four options


def test_intervals_are_of_the_unit_that_the_rule_counts() -> None:
    questions = asked([n // 2 for n in range(400)])
    grades = graded([n % 4 < 2 for n in range(400)])  # 200 pairs, every other one right
    found = totals.total("pairs", questions, grades)
    half = 1.96 * np.sqrt(0.25 / 200) * 100
    assert found.score == 50 and found.low is not None and found.high is not None
    assert found.low == pytest.approx(50 - half, abs=1.5) and found.high == pytest.approx(50 + half, abs=1.5)
    single = totals.total("mean", questions, grades)
    assert single.high is not None and single.high - 50 == pytest.approx(half / np.sqrt(2), abs=1.5)
    assert totals.score_only("pairs", questions, grades) == found.score


def test_without_answers_there_is_no_score() -> None:
    with pytest.raises(EvaluationError, match="no answers"):
        totals.total("mean", [], [])


@pytest.mark.parametrize("rule", [rule for rule in scoring.RULES if rule != "judged"])
def test_every_rule_grades_nothing_said_as_wrong_and_unread(rule: str) -> None:
    facts = {"dataset": "svt", "answer_type": "text", "precision": None}
    gold: Any = ["x"] * 10 if rule in ("vqa_official", "vqa_m4c", "anls", "contained") else "B"
    question = {"gold": gold, "options": ANIMALS if rule not in parsing.YES_NO else {}, "facts": facts}
    for lenient in (False, True):
        assert scoring.grade(rule, question, "", lenient).value == 0
        assert scoring.grade(rule, question, "  ", lenient).read is None or rule == "realworld"
