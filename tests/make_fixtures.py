"""Makes the few questions that stand for each benchmark in tests: our own words and drawings, in its schema.

``python tests/make_fixtures.py`` writes them to eval/understanding/fixtures; a test compares them with what this makes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fixture_pictures import PICTURES

FIXTURES = Path(__file__).parent.parent / "open_pisces" / "eval" / "understanding" / "fixtures"
Rows = list[dict[str, Any]]
# ------------------------------------------------------------------------------------------------------ questions

SHAPES = [  # picture, question, options, index of the right one
    ("pair", "Which shape is red?", ["circle", "square", "triangle", "star"], 0),
    ("pair", "What is to the right of the circle?", ["a triangle", "a square", "a star", "nothing"], 1),
    ("triangles", "How many triangles are there?", ["1", "3", "2", "4"], 2),
    ("tower", "What colour is the circle?", ["red", "blue", "green", "yellow"], 3),
    ("tower", "Which shape is at the top?", ["circle", "square", "triangle", "star"], 0),
    ("single", "What colour is the square?", ["purple", "green", "red", "blue"], 1),
]
SAID = [  # picture, question, what ten people said
    ("pair", "What color is the circle?", {"red": 10}),
    ("pair", "What is next to the circle?", {"square": 5, "a square": 3, "blue square": 2}),
    ("triangles", "How many triangles are there?", {"2": 7, "two": 2, "three": 1}),
    ("tower", "Is the circle at the top?", {"yes": 9, "no": 1}),
    ("single", "What shape is it?", {"square": 6, "box": 4}),
    ("sign", "What does the sign say?", {"stop": 8, "STOP": 2}),
]


def said(counts: dict[str, int]) -> list[str]:
    """Ten answers."""
    return [answer for answer, count in counts.items() for _ in range(count)]


def letters(options: list[str], mark: str = "{}. {}", between: str = "\n") -> str:
    """Options as one text."""
    return between.join(mark.format("ABCDE"[n], option) for n, option in enumerate(options))


def vqav2() -> Rows:
    return [
        {"question_type": "what", "multiple_choice_answer": said(counts)[0], "image_id": n, "answer_type": "other"}
        | {
            "answers": [
                {"answer": a, "answer_confidence": "yes", "answer_id": i + 1} for i, a in enumerate(said(counts))
            ]
        }
        | {"question_id": n, "question": question, "image": name}
        for n, (name, question, counts) in enumerate(SAID)
    ]


def gqa() -> Rows:
    return [
        {"id": str(n), "imageId": f"p-{name}", "question": question, "answer": options[right], "fullAnswer": ""}
        for n, (name, question, options, right) in enumerate(SHAPES)
    ]


def gqa_images() -> Rows:
    return [{"id": f"p-{name}", "image": name} for name in ("pair", "triangles", "tower", "single")]


def mmbench(questions: list[tuple[str, str, list[str], int]], hint: str) -> Rows:
    """Every question with all rotations of its options; rotation k has k x 1,000,000 added to its index."""
    rows = []
    for n, (name, question, options, right) in enumerate(questions, 241):
        for turn in range(len(options)):
            turned = options[turn:] + options[:turn]
            row = {"index": n + turn * 1_000_000, "question": question, "hint": hint if n == 241 else "nan"}
            row |= {"answer": "ABCD"[(right - turn) % len(options)]}
            row |= {letter: turned[i] if i < len(turned) else "nan" for i, letter in enumerate("ABCD")}
            row |= {"category": "attribute", "image": name, "source": "drawn", "L2-category": "perception"}
            rows.append({**row, "comment": "nan", "split": "dev"})
    return rows


def mmbench_en() -> Rows:
    return mmbench(SHAPES[:3] + [("single", "Is the square green?", ["yes", "no"], 0)] + SHAPES[4:5], "Look closely.")


def mmbench_cn() -> Rows:
    questions = [
        ("pair", "哪个图形是红色的？", ["圆形", "方形", "三角形", "星形"], 0),
        ("triangles", "有几个三角形？", ["一个", "三个", "两个", "四个"], 2),
        ("tower", "圆形是什么颜色？", ["红色", "蓝色", "绿色", "黄色"], 3),
        ("single", "方形是绿色的吗？", ["是", "不是"], 0),
        ("pair", "圆形的右边是什么？", ["三角形", "方形"], 1),
    ]
    return mmbench(questions, "仔细看图。")


def vizwiz() -> Rows:
    rows = [*SAID[:5], ("sign", "what does the label on the back say", {"unanswerable": 8, "stop": 2})]
    return [
        {"question_id": f"VizWiz_val_{n:08d}", "image": name, "question": question, "answers": said(counts)}
        | {"category": "other"}
        for n, (name, question, counts) in enumerate(rows)
    ]


def pope() -> Rows:
    asked = [("pair", "circle", "star"), ("tower", "square", "boat"), ("single", "square", "cat")]
    kinds = ("random", "popular", "adversarial")
    return [
        {"id": str(2 * n + no), "question_id": str(2 * n + no), "question": f"Is there a {thing} in the image?"}
        | {"answer": "no" if no else "yes", "image_source": name, "image": name, "category": kinds[n]}
        for n, (name, *things) in enumerate(asked)
        for no, thing in enumerate(things)
    ]


def mm_vet() -> Rows:
    rows = [
        ("pair", "What is drawn here?", "red circle<AND>blue square", "rec"),
        ("sign", "Which word is written?", "STOP<OR>stop", "ocr"),
        ("bill", "How much do tea and bread cost together?", "6.50<OR>6.5", "ocr,math"),
        ("tower", "What stands on what?", "A yellow circle stands on two purple squares.", "rec,spat,gen"),
        ("chart", "Which month is highest?", "June", "ocr,spat"),
    ]
    return [
        {"question_id": f"v1_{n}", "image": name, "question": question, "answer": answer, "image_source": "drawn"}
        | {"capability": capability}
        for n, (name, question, answer, capability) in enumerate(rows)
    ]


def mme() -> Rows:
    asked = {
        "existence": ("pair", "Is there a circle in this image?", "Is there a dog in this image?"),
        "count": ("triangles", "Are there two triangles in this image?", "Are there four triangles in this image?"),
        "position": ("pair", "Is the circle left of the square?", "Is the circle right of the square?"),
        "color": ("tower", "Is the circle yellow?", "Is the circle red?"),
        "posters": ("sign", "Is this a sign with one word?", "Is this a poster of a film?"),
        "celebrity": ("sign", "Is a word written here?", "Is the name of an actor written here?"),
        "scene": ("single", "Does this image show a shape?", "Does this image show a kitchen?"),
        "landmark": ("tower", "Is this a pile of shapes?", "Is this a tower in Paris?"),
        "artwork": ("single", "Is this a drawing?", "Is this an oil painting?"),
        "OCR": ("sign", 'Is the word in the image "STOP"?', 'Is the word in the image "STEP"?'),
        "commonsense_reasoning": ("sign", "Should a driver halt here?", "Should a driver go faster here?"),
        "numerical_calculation": ("formula", "Can x be 2?", "Can x be 3?"),
        "text_translation": ("sign", 'Does it mean "halt"?', 'Does it mean "go"?'),
        "code_reasoning": ("formula", "Is this an equation?", "Is this a loop?"),
    }
    return [
        {"question_id": f"{category}/{name}.png", "image": name, "question": f"{question} Please answer yes or no."}
        | {"answer": "No" if no else "Yes", "category": category}
        for category, (name, *both) in asked.items()
        for no, question in enumerate(both)
    ]


def seed_bench() -> Rows:
    rows = [
        {"answer": "ABCD"[right], **{f"choice_{'abcd'[i]}": option for i, option in enumerate(options)}}
        | {"data_id": name, "data_type": "image", "question": question, "question_id": str(n), "question_type_id": 1}
        | {"image": [name], "segment": None}
        for n, (name, question, options, right) in enumerate(SHAPES)
    ]
    return [*rows, {**rows[0], "data_type": "video", "question_id": "6", "image": ["pair", "swapped"]}]


def hallusion() -> Rows:
    rows = [
        ("VD", "pair", "0", "1", "pair", "Is the circle left of the square?", "1", "The circle is on the left."),
        ("VD", "pair", "1", "1", "swapped", "Is the circle left of the square?", "0", "The circle is on the right."),
        ("VD", "pair", "0", "2", "pair", "Is the circle right of the square?", "0", "The circle is on the left."),
        ("VD", "pair", "1", "2", "swapped", "Is the circle right of the square?", "1", "It is on the right."),
        ("VS", "chart", "1", "1", "chart", "Is June higher than May?", "1", "June has 8, May has 4."),
        ("VS", "chart", "1", "2", "chart", "Is July higher than June?", "0", "July has 6, June has 8."),
    ]
    return [
        {"category": category, "subcategory": kind, "visual_input": "1", "set_id": "0", "figure_id": figure}
        | {"sample_note": "drawn", "question_id": number, "question": question, "gt_answer_details": details}
        | {"gt_answer": answer, "filename": f"{name}.png", "image": name}
        for category, kind, figure, number, name, question, answer, details in rows
    ]


def llava_w() -> Rows:
    rows = [
        ("pair", "conv", "What is to the left?", "A red circle is on the left side of the picture."),
        ("tower", "detail", "Describe the picture.", "A yellow circle stands on two purple squares on a pale ground."),
        ("sign", "complex", "Why might this be put up?", "It tells drivers to halt, perhaps at a crossing."),
        ("chart", "conv", "Which month is lowest?", "May, with a value of 4."),
        ("bill", "complex", "Was bread or tea the better deal?", "That cannot be said from prices alone."),
    ]
    return [
        {"question_id": n, "question": question, "caption": ["A simple drawing.", f"It shows: {name}."]}
        | {"gpt_answer": answer, "category": category, "image_id": name, "image": name}
        for n, (name, category, question, answer) in enumerate(rows)
    ]


def mmstar() -> Rows:
    kinds = ("object counting", "recognition", "localization", "geometry", "image emotion", "diagram reasoning")
    return [
        {"index": n, "question": f"{question}\nOptions: {letters(options, '{}: {}', ', ')}", "image": name}
        | {"answer": "ABCD"[right], "category": "fine-grained perception", "l2_category": kinds[n]}
        | {"meta_info": {"source": "drawn", "split": "val", "image_path": name}}
        for n, (name, question, options, right) in enumerate(SHAPES)
    ]


def textvqa() -> Rows:
    rows = [
        ("sign", "what does the sign say?", {"stop": 10}),
        ("bill", "how much is the total?", {"6.50": 8, "6.5": 2}),
        ("bill", "what costs 4.00?", {"bread": 9, "the bread": 1}),
        ("chart", "which month is first?", {"may": 10}),
        ("formula", "what is written after the equals sign?", {"5": 7, "five": 3}),
    ]
    return [
        {"image_id": name, "question_id": 34602 + n, "question": question, "image": name, "answers": said(counts)}
        | {"ocr_tokens": [], "image_classes": ["sign"], "set_name": "val"}
        for n, (name, question, counts) in enumerate(rows)
    ]


def ocrbench() -> Rows:
    rows = [
        ("IIIT5K", "Regular Text Recognition", "sign", "what is written in the image?", ["STOP"]),
        ("textVQA", "Scene Text-centric VQA", "chart", "which month has the highest bar?", ["june"]),
        ("docVQA", "Doc-oriented VQA", "bill", "what is the total?", ["6.50"]),
        ("SROIE", "Key Information Extraction", "bill", "what is the price of tea? Answer this question using the text "
         "in the image directly.", ["2.50"]),
        ("HME100k", "Handwritten Mathematical Expression Recognition", "formula",
         "Please write out the expression of the formula in the image using LaTeX format.", ["x ^ { 2 } + 1 = 5"]),
    ]  # fmt: skip
    return [
        {"dataset": dataset, "question": question, "question_type": kind, "answer": answer, "image": name}
        for dataset, kind, name, question, answer in rows
    ]


def docvqa() -> Rows:
    rows = [
        ("bill", "What is the total?", ["6.50", "6.5"]),
        ("bill", "Which item costs 2.50?", ["Tea"]),
        ("bill", "What does bread cost?", ["4.00"]),
        ("sign", "Which word is written?", ["STOP"]),
        ("formula", "What stands on the left?", ["x^2 + 1", "x^2+1"]),
    ]
    return [
        {"questionId": str(n), "question": question, "question_types": ["form"], "image": name, "docId": n}
        | {"answers": answers, "data_split": "val"}
        for n, (name, question, answers) in enumerate(rows)
    ]


def infovqa() -> Rows:
    rows = [
        ("chart", "Which month has the highest bar?", ["June"]),
        ("chart", "What is the value of May?", ["4", "four"]),
        ("chart", "How many bars are there?", ["3", "three"]),
        ("chart", "Which bar is yellow or green?", ["July"]),
        ("bill", "What is sold besides bread?", ["tea"]),
    ]
    return [
        {"questionId": str(n), "question": question, "answers": answers, "answer_type": ["single span"], "image": name}
        | {"image_url": "", "data_split": "val"}
        for n, (name, question, answers) in enumerate(rows)
    ]


def ai2d() -> Rows:
    return [
        {"question": question, "options": options, "answer": str(right), "image": name}
        for name, question, options, right in SHAPES
    ]


def mathvista() -> Rows:
    rows = [
        ("formula", "Which value can x have?", ["1", "2", "3"], "2", "multi_choice", "text", None, ""),
        ("triangles", "How many corners do all shapes have?", None, "6", "free_form", "integer", None, ""),
        ("bill", "What do tea and bread cost on average?", None, "3.25", "free_form", "float", 2.0, "$"),
        ("chart", "What is the mean of the bars?", None, "6.0", "free_form", "float", 1.0, ""),
        ("chart", "Which two values are lowest?", None, "[4, 6]", "free_form", "list", None, ""),
    ]
    return [
        {"pid": str(n), "question": question, "image": f"images/{n}.jpg", "decoded_image": name, "choices": choices}
        | {"unit": unit, "precision": precision, "answer": answer, "question_type": kind, "answer_type": form}
        | {"metadata": {"split": "testmini"}, "query": f"Question: {question}"}
        for n, (name, question, choices, answer, kind, form, precision, unit) in enumerate(rows)
    ]


def mmmu() -> Rows:
    rows = [
        ("Math_1", "What is drawn in <image 1>?", ["circle and square", "two circles", "a line"], "A", ["pair"]),
        ("Math_2", "<image 1> and <image 2>: what changed?", ["the colours", "the sides", "nothing", "the sizes"], "B",
         ["pair", "swapped"]),
        ("Art_1", "Which picture shows two equal shapes?", ["<image 1>", "<image 2>"], "B", ["single", "triangles"]),
        ("Economics_1", "How many cups of tea can be had for 5.00 (see <image 1>)?", [], "2", ["bill"]),
        ("Physics_1", "Solve <image 1> for a positive x.", [], "['2', '2.0']", ["formula"]),
    ]  # fmt: skip
    return [
        {"id": f"validation_{name}", "question": question, "options": str(options), "explanation": ""}
        | {f"image_{i + 1}": pictures[i] if i < len(pictures) else None for i in range(7)}
        | {"img_type": "['Diagrams']", "answer": answer, "topic_difficulty": "Easy", "subfield": "drawn"}
        | {"question_type": "multiple-choice" if options else "open"}
        for name, question, options, answer, pictures in rows
    ]


def scienceqa() -> Rows:
    return [
        {"image": name, "question": question, "choices": options, "answer": right, "task": "closed choice"}
        | {"hint": "Figure: simple shapes." if n % 2 else "", "grade": "grade2", "subject": "natural science"}
        | {"topic": "shapes", "category": "geometry", "skill": "look", "lecture": "", "solution": ""}
        for n, (name, question, options, right) in enumerate(SHAPES)
    ]


def mmvp() -> Rows:
    asked = [
        ("Is the circle on the left or on the right?", "Left", "Right", "pair", "swapped"),
        ("How many shapes are there?", "One", "Two", "single", "pair"),
        ("Are the shapes green?", "Yes", "No", "triangles", "tower"),
        ("Is there a circle?", "Yes", "No", "tower", "single"),
        ("Is a word written?", "Yes", "No", "sign", "triangles"),
    ]
    return [
        {"Index": 2 * n + second + 1, "Question": question, "Options": f"(a) {first} (b) {other}"}
        | {"Correct Answer": "(b)" if second else "(a)", "image": pictures[second]}
        for n, (question, first, other, *pictures) in enumerate(asked)
        for second in (0, 1)
    ]


def realworldqa() -> Rows:
    ask = "Please answer directly with only the letter of the correct option and nothing else."
    rows = [
        (name, f"{question}\n\n{letters(options)}\n{ask}", "ABCD"[right])
        for name, question, options, right in SHAPES[:4]
    ]
    word = "Please answer directly with a single word or number."
    rows += [("sign", f"What is written?\n{word}", "STOP"), ("tower", f"How many squares are there?\n{word}", "2")]
    return [
        {"image": name, "question": question, "answer": answer, "image_path": f"{n}.webp"}
        for n, (name, question, answer) in enumerate(rows)
    ]


def cv_bench() -> Rows:
    rows = []
    for n, (name, question, options, right) in enumerate(SHAPES):
        source = ("ADE20K", "COCO", "Omni3D")[n % 3]
        prompt = f"{question} Select from the following choices.\n{letters(options, '({}) {}')}"
        row = {"idx": n, "type": "3D" if source == "Omni3D" else "2D", "task": "Count", "image": name, "prompt": prompt}
        row |= {"question": question, "choices": options, "answer": f"({'ABCD'[right]})", "filename": f"{name}.png"}
        rows.append({**row, "source": source, "source_dataset": source})
    return rows


def chartqa() -> Rows:
    rows = [
        ("human_test", "How much higher is June than May?", "4"),
        ("human_test", "Which month has the lowest value?", "May"),
        ("human_test", "What share of all is July's?", "33.3%"),
        ("augmented_test", "What is the value of June?", "8"),
        ("augmented_test", "What was the sum of all months?", "18"),
    ]
    return [{"type": kind, "question": question, "answer": answer, "image": "chart"} for kind, question, answer in rows]


FILES: dict[str, tuple[Callable[[], Rows], str]] = {
    "vqav2/validation": (vqav2, "image"),
    "gqa/testdev_balanced_instructions/testdev": (gqa, ""),
    "gqa/testdev_balanced_images/testdev": (gqa_images, "image"),
    "mmbench/en/dev": (mmbench_en, "image"),
    "mmbench/cn/dev": (mmbench_cn, "image"),
    "vizwiz/val": (vizwiz, "image"),
    "pope/test": (pope, "image"),
    "mm_vet/test": (mm_vet, "image"),
    "mme/test": (mme, "image"),
    "seed_bench/test": (seed_bench, "image"),
    "hallusion/image": (hallusion, "image"),
    "llava_w/train": (llava_w, "image"),
    "mmstar/val": (mmstar, "image"),
    "textvqa/validation": (textvqa, "image"),
    "ocrbench/test": (ocrbench, "image"),
    "docvqa/DocVQA/validation": (docvqa, "image"),
    "infovqa/InfographicVQA/validation": (infovqa, "image"),
    "ai2d/test": (ai2d, "image"),
    "mathvista/testmini": (mathvista, "decoded_image"),
    "mmmu/validation": (mmmu, "image_1 image_2 image_3 image_4 image_5 image_6 image_7"),
    "scienceqa/ScienceQA-IMG/test": (scienceqa, "image"),
    "mmvp/train": (mmvp, "image"),
    "realworldqa/test": (realworldqa, "image"),
    "cv_bench/test": (cv_bench, "image"),
    "chartqa/test": (chartqa, "image"),
}
"""File without its ending: what makes its rows, and the columns with the names of pictures."""


def make(folder: Path = FIXTURES) -> None:
    """Write all pictures and questions."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "pictures").mkdir(parents=True)
    for name, image in PICTURES.items():
        image.quantize(32).save(folder / "pictures" / f"{name}.png", optimize=True)
    for place, (rows, columns) in FILES.items():
        path = folder / f"{place}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        up = "../" * (len(path.relative_to(folder).parts) - 1)
        lines = [
            json.dumps({k: _named(k, v, columns, up) for k, v in row.items()}, ensure_ascii=False) for row in rows()
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _named(column: str, value: Any, columns: str, up: str) -> Any:
    """A cell, with pictures' names as paths."""
    if column not in columns.split() or value is None:
        return value
    return (
        [_named(column, one, columns, up) for one in value] if isinstance(value, list) else f"{up}pictures/{value}.png"
    )


if __name__ == "__main__":
    make()
