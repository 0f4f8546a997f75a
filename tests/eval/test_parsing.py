"""How answers are read, each rule on cases worked by hand from the code that is named beside it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from open_pisces.eval.understanding import parsing

ANIMALS = {"A": "a cat", "B": "a dog", "C": "a bird", "D": "a fish"}
CITIES = {"A": "Paris", "B": "Rome", "C": "Oslo"}
SIDES = {"A": "Left", "B": "Right"}

YES_NO: dict[Callable[[str], str | None], dict[str, str | None]] = {
    parsing.pope_exact: {  # lmms-eval: equality after strip and lower
        **{"Yes": "yes", " yes \n": "yes", "no": "no", "NO": "no"},
        **{"Yes.": None, "No, there is none": None, "nope": None, "": None},
    },
    parsing.pope_official: {  # POPE evaluate.py: first sentence; No, not, no as words; all else is yes
        **{"Yes.": "yes", "No, there is no dog.": "no", "There is not a dog. Yes.": "no", "I do not know": "no"},
        **{"A dog": "yes", "nothing": "yes", "NO": "yes", "Yes. No.": "yes", "": "yes"},
    },
    parsing.mme_yes_no: {  # MME: yes, else no, in the first four characters without dots
        **{"Yes.": "yes", "yes, it is": "yes", "No": "no", "n": "no", "Y": "yes", "not here": "no"},
        **{"Nothing": "no", "eyes": "yes", "maybe yes": None, "I know": None, "q": None, "": None},
    },
    parsing.only_yes_no: {  # VLMEvalKit: one of the two words, and not the other
        **{"Yes, it is.": "yes", "No.": "no", "It is, yes": "yes", "NO!": "no"},
        **{"yes and no": None, "Yesterday": None, "not": None, "": None},
    },
    parsing.lenient_yes_no: {
        **{"Yes.": "yes", "**Yes**": "yes", "The answer is no.": "no", "No, yes is wrong": "no", "Answer: Yes": "yes"},
        **{"I would say yes": "yes", "I think so": None, "it is yes or no": None, "": None},
    },
}
LETTERS: dict[Callable[..., str | None], tuple[dict[str, str], dict[str, str | None]]] = {
    parsing.first_letter: (  # SEED-Bench: the first character, after strip
        ANIMALS,
        {
            "B": "B",
            "B. a dog": "B",
            " C": "C",
            "D) x": "D",
            "Because": "B",
            "b": None,
            "The answer is B": None,
            "(B)": None,
        },
    ),
    parsing.whole_letter: (  # AI2D: exact match without case and punctuation
        ANIMALS,
        {"B": "B", "b": "B", "B.": "B", "(B)": "B", "B. a dog": None, "A B": None, "E": None, "": None},
    ),
    parsing.scienceqa_letter: (  # ScienceQA: the letter, or letter and dot first
        ANIMALS,
        {
            "B": "B",
            "B.": "B",
            "B. a dog": "B",
            "b": None,
            "(B)": None,
            "B a dog": None,
            "Answer: B": None,
            "E. x": None,
        },
    ),
    parsing.mmstar_letter: (  # MMStar: one character at the start or behind one of three leads, in lower case
        ANIMALS,
        {
            **{"B": "B", "b) a dog": "B", "(C) x": "C", "Option D": "D", "The answer is A": "A"},
            **{"the answer is (A)": None, "because": "B", "Answer: B": "A", "so B": None, "": None},
        },
    ),
    parsing.cambrian_letter: (  # CV-Bench: behind the last lead, the first character
        ANIMALS,
        {
            **{"(B)": "B", "b": "B", "The answer is C.": "C", "Answer: (D)": "D", "B. a dog": "B"},
            **{"a fish": "A", "Because": "B", "E": None, "": None},
        },
    ),
    parsing.mmvp_letter: (  # MMVP: behind the last lead, the whole rest
        SIDES,
        {
            **{"A": "A", "(b)": "B", "Right": "B", "left.": "A", "The answer is B.": "B", "Answer: right": "B"},
            **{"B. Right": None, "A Left": None, "": None},
        },
    ),
    parsing.mmbench_letter: (  # MMBench can_infer: one letter as a word, then with marks, then an option's text
        ANIMALS,
        {
            **{"B": "B", "B.": "B", "(C)": "C", ":D": "D", "The answer is D": "D", "The answer is A.": "A"},
            **{"A cat sits there": "A", "A big thing there": None, "A or B": None, "It is a dog": "B"},
            **{"a cat and a dog": None, "b": None, "E": "E", "": None},
        },
    ),
    parsing.mmmu_letter: (  # MMMU parse_multi_choice_response; where it would guess there is nothing
        CITIES,
        {
            **{"B": "B", "B.": "B", "(A) or (C)": "C", "A B": "B", "B. Rome is it": "B", "I like BANANA pie": "A"},
            **{"The city in the picture is Rome": "B", "Rome and then Oslo were shown here": "C"},
            **{"It is Rome": None, "I do not know": None, "b": None, "": None},
        },
    ),
    parsing.lenient_letter: (
        ANIMALS,
        {
            **{"b": "B", "(b)": "B", "Answer: B": "B", "The answer is (C).": "C", "option D": "D", "**B**": "B"},
            **{"B) a dog": "B", "A cat": "A", "a dog": "B", "I think it is a bird": "C", "答案是B": "B", "选C": "C"},
            **{"A is correct": "A", "It's D": "D", "B\n\nbecause it barks": "B", "The answer is a fish": "D"},
            **{"Because it barks": None, "A or B": None, "a cat and a dog": None, "E": None, "": None},
        },
    ),
}


@pytest.mark.parametrize(
    ("reading", "answer", "expected"), [(r, a, e) for r, cases in YES_NO.items() for a, e in cases.items()]
)
def test_readings_of_yes_and_no(reading: Callable[[str], str | None], answer: str, expected: str | None) -> None:
    assert reading(answer) == expected


@pytest.mark.parametrize(
    ("reading", "options", "answer", "expected"),
    [(r, options, a, e) for r, (options, cases) in LETTERS.items() for a, e in cases.items()],
)
def test_readings_of_letters(
    reading: Callable[..., str | None], options: dict[str, str], answer: str, expected: str | None
) -> None:
    assert reading(answer, options) == expected


def test_every_reading_has_eight_cases() -> None:
    assert all(len(cases) >= 8 for cases in YES_NO.values()) and all(len(c) >= 8 for _, c in LETTERS.values())
    assert set(parsing.YES_NO.values()) <= set(YES_NO) and set(parsing.LETTER.values()) <= set(LETTERS)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("red", "red"),
        ("Red.", "Red"),
        ("The answer is: a red car.", "a red car"),
        ("Final answer: 12", "12"),
        ('"red"', "red"),
        ("**red**\n\nIt is red because ...", "red"),
        ("The answer isn't clear", "The answer isn't clear"),
        ("I thought the answer is 3, but the answer is 4", "4"),
        ("  ", ""),
        ("The answer is", "The answer is"),
    ],
)
def test_plain_sets_aside_what_stands_around_an_answer(answer: str, expected: str) -> None:
    assert parsing.plain(answer) == expected


# ------------------------------------------------------------------------------------------------------ soft VQA


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two dogs.", "2 dogs"),
        ("the Cat", "cat"),
        ("an apple", "apple"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),  # the official table has this one the wrong way round
        ("1,000 people", "1000 people"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("well-known", "well known"),
        ("3.5", "3.5"),
        ("U.S.", "us"),
        ("red\nand\tblue", "red and blue"),
        ("1,000-word text", "1000word text"),  # with a comma between digits all punctuation goes
    ],
)
def test_words_normalised_as_by_the_vqa_challenge(text: str, expected: str) -> None:
    assert parsing.vqa_words(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *[("The dog's", "dog 's"), ("yes?", "yes"), ("2,000", "2000"), ("Two", "2"), ("isnt", "isn't")],
        *[("a, b", "b"), ("no.", "no"), ("T-shirt", "t shirt")],
    ],
)
def test_words_normalised_as_for_textvqa_and_vizwiz(text: str, expected: str) -> None:
    assert parsing.m4c_words(text) == expected


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("abc", "abc", 0), ("ab", "ba", 2), ("abc", "ac", 1)],
)
def test_edit_distance(first: str, second: str, distance: int) -> None:
    assert parsing.edit_distance(first, second) == parsing.edit_distance(second, first) == distance
