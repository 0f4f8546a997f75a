"""The table of benchmarks, reading their questions, asking and scoring them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import make_fixtures
import numpy as np
import pytest
from PIL import Image as Pillow
from PIL.Image import Image

from open_pisces.batch import Turn
from open_pisces.eval.evaluation import rescore
from open_pisces.eval.intervals import EvaluationError
from open_pisces.eval.run import RunError, RunFolder
from open_pisces.eval.understanding import evaluate as understanding
from open_pisces.eval.understanding.benchmarks import Benchmark, benchmarks, choose, read_row
from open_pisces.eval.understanding.evaluate import evaluate
from open_pisces.eval.understanding.questions import QuestionsError, read_questions
from open_pisces.generate.generator import Generator, PromptError

PAPER = (
    "VQAv2, GQA, MMBench-EN, MMBench-CN, VizWiz, POPE, MM-Vet, MME-P, MME-C, SEED-Bench, HallusionBench, LLaVA-W, "
    "MMStar, TextVQA, OCRBench, DocVQA, InfoVQA, AI2D, MathVista, MMMU, ScienceQA, MMVP, RealWorldQA, CV-Bench"
).split(", ")
JUDGED = {"mm_vet", "llava_w", "hallusion", "mathvista"}

# ---------------------------------------------------------------------------------------------------------- the table


def test_the_table_holds_the_papers_columns_in_their_order_and_chartqa() -> None:
    rows = list(benchmarks().values())
    assert [row.title for row in rows] == [*PAPER, "ChartQA"]
    assert [row.column for row in rows] == [*range(1, 25), None]
    assert {row.name for row in rows if row.judge == "required"} == JUDGED
    assert [row.maximum for row in rows if row.maximum != 100] == [2000, 800]
    assert choose("paper") == rows and [row.name for row in choose(["mmvp", "gqa", "mmvp"])] == ["mmvp", "gqa"]


def test_a_changed_row_has_another_hash() -> None:
    row = benchmarks()["gqa"]
    assert row.hash == read_row(json.loads(json.dumps(row.__dict__))).hash
    assert row.hash != read_row({**row.__dict__, "prompt": "{question}"}).hash


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"rule": "vibes"}, "rule = 'vibes'"),
        ({"total": "sum"}, "total = 'sum'"),
        ({"judge": "maybe"}, "judge = 'maybe'"),
        ({"gold": {"column": "answer", "form": "poem"}}, "gold.form"),
        ({"colour": "red"}, "no field is called colour"),
    ],
)
def test_a_row_is_checked(change: dict[str, Any], says: str) -> None:
    with pytest.raises(EvaluationError, match=says):
        read_row({**benchmarks()["gqa"].__dict__, **change})


def test_an_unknown_benchmark_is_named() -> None:
    with pytest.raises(EvaluationError, match="no benchmark is called imagenet.*paper, or some of vqav2"):
        choose(["gqa", "imagenet"])


# ----------------------------------------------------------------------------------------------------------- fixtures


def test_the_fixtures_are_what_the_script_makes(tmp_path: Path) -> None:
    make_fixtures.make(tmp_path / "made")
    made = {path.relative_to(tmp_path / "made") for path in (tmp_path / "made").rglob("*") if path.is_file()}
    there = {path.relative_to(make_fixtures.FIXTURES) for path in make_fixtures.FIXTURES.rglob("*") if path.is_file()}
    assert made == there
    assert sum((make_fixtures.FIXTURES / path).stat().st_size for path in there) < 400_000
    for path in there:
        if path.suffix == ".jsonl":
            assert (tmp_path / "made" / path).read_text() == (make_fixtures.FIXTURES / path).read_text()
            continue
        with Pillow.open(make_fixtures.FIXTURES / path) as kept, Pillow.open(tmp_path / "made" / path) as new:
            assert np.array_equal(kept.convert("RGB"), new.convert("RGB"))


@pytest.mark.parametrize("name", benchmarks())
def test_every_benchmark_has_made_up_questions_in_its_schema(name: str) -> None:
    row = benchmarks()[name]
    asked = read_questions(row, "fixtures")
    assert asked.units >= 4 and len({item["key"] for item in asked.items}) == len(asked.items)
    assert [len(item["prompt"]) for item in asked.items if not item["pictures"]] == sorted(
        len(item["prompt"]) for item in asked.items if not item["pictures"]
    )
    for item in asked.items:
        assert asked.pictures(item) and item["gold"] not in ("", []) and "{" not in item["prompt"]
        if row.answer == "letter":
            assert item["gold"] in item["options"]


# ------------------------------------------------------------------------------------------------------------ prompts


def items_of(name: str, data: str | Path = "fixtures") -> list[dict[str, Any]]:
    """The items of a benchmark in the order of its rows."""
    return sorted(read_questions(benchmarks()[name], data).items, key=lambda item: item["key"])


LETTER = "Answer with the option's letter from the given choices directly."
WORD = "Answer the question using a single word or phrase."
PROMPTS = {
    "vqav2": f"What color is the circle?\n{WORD}",
    "pope": f"Is there a circle in the image?\n{WORD}",
    "mme_perception": f"Is there a circle in this image?\n{WORD}",  # without its own request for yes or no
    "textvqa": f"What does the sign say?\n{WORD}",
    "mm_vet": "What is drawn here?",
    "seed_bench": f"Which shape is red?\nA. circle\nB. square\nC. triangle\nD. star\n{LETTER}",
    "scienceqa": f"Which shape is red?\nA. circle\nB. square\nC. triangle\nD. star\n{LETTER}",
    "mmbench_en": "Look closely. Which shape is red? There are several options:\nA. circle\nB. square\nC. triangle\n"
    f"D. star\n\n{LETTER}",
    "mmbench_cn": "仔细看图。 哪个图形是红色的？ 有如下几个选项：\nA. 圆形\nB. 方形\nC. 三角形\nD. 星形\n\n"
    "请直接使用所提供的选项字母作为答案回答。",
    "mmstar": "Which shape is red?\nOptions: A: circle, B: square, C: triangle, D: star\n" + LETTER.rstrip("."),
    "mmvp": f"Is the circle on the left or on the right? Options:\nA. Left\nB. Right\n{LETTER}",
    "mmmu": f"What is drawn in <image 1>?\nA. circle and square\nB. two circles\nC. a line\n\n{LETTER}",
    "mathvista": f"Which value can x have?\nA. 1\nB. 2\nC. 3\n{LETTER}",
    "vizwiz": "What color is the circle?\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
    + WORD,
    "cv_bench": "Which shape is red? Select from the following choices.\n(A) circle\n(B) square\n(C) triangle\n"
    f"(D) star\n{LETTER}",
}


@pytest.mark.parametrize(("name", "prompt"), PROMPTS.items())
def test_prompts_are_the_harness_ones_to_the_letter(name: str, prompt: str) -> None:
    assert items_of(name)[0]["prompt"] == prompt


def test_prompts_that_depend_on_the_row() -> None:
    maths = [item["prompt"].split("\n", 1) for item in items_of("mathvista")]
    assert maths[1] == ["How many corners do all shapes have?", "Answer the question using a single integer number."]
    assert maths[2][0] == "What do tea and bread cost on average? (Unit: $)" and "two decimal places" in maths[2][1]
    assert items_of("scienceqa")[1]["prompt"].startswith("Context: Figure: simple shapes.\nWhat is to the right")
    assert items_of("mmmu")[3]["prompt"].endswith(f"(see <image 1>)?\n\n{WORD}")
    assert items_of("vizwiz")[5]["prompt"].startswith("What does the label on the back say\n")


def test_rotations_of_a_question_are_one_unit() -> None:
    items = items_of("mmbench_en")[:4]  # index, index + 1,000,000, ...
    assert {item["unit"] for item in items} == {"241"} and [item["gold"] for item in items] == ["A", "D", "C", "B"]
    assert all(item["options"][item["gold"]] == "circle" for item in items)
    assert [item["unit"] for item in items_of("mmvp")[:4]] == ["0", "0", "1", "1"]
    assert [item["unit"] for item in items_of("mme_perception")[:2]] == ["existence/existence/pair.png"] * 2


def test_a_limit_takes_whole_units_spread_over_the_set() -> None:
    asked = read_questions(benchmarks()["mmbench_en"], "fixtures", 2)
    assert {item["unit"] for item in asked.items} == {"241", "243"} and len(asked.items) == 8 and asked.units == 5
    images = read_questions(benchmarks()["mme_perception"], "fixtures", 5)
    assert len(images.items) == 10 and len({item["facts"]["category"] for item in images.items}) == 5


def test_columns_of_one_dataset_take_their_own_rows() -> None:
    assert len(items_of("mme_perception")) == 20 and len(items_of("mme_cognition")) == 8
    assert len(items_of("seed_bench")) == 6  # the seventh is about a video


def test_pictures_come_from_another_subset_by_their_id() -> None:
    asked = read_questions(benchmarks()["gqa"], "fixtures")
    item = next(item for item in asked.items if item["prompt"].startswith("How many triangles"))
    (picture,) = asked.pictures(item)
    assert picture.getpixel((20, 30)) == make_fixtures.PICTURES["triangles"].getpixel((20, 30))


# ------------------------------------------------------------------------------------------------------- other sources


def as_datasets(name: str, place: str, column: str) -> Any:
    """A fixture as a ``datasets.Dataset`` with embedded pictures."""
    datasets = pytest.importorskip("datasets")
    path = make_fixtures.FIXTURES / f"{place}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        cells = row[column] if isinstance(row[column], list) else [row[column]]
        read = [{"bytes": (path.parent / cell).read_bytes(), "path": None} for cell in cells]
        row[column] = read if isinstance(row[column], list) else read[0]
    found = datasets.Dataset.from_list(rows)
    one = datasets.Image()
    return found.cast_column(column, datasets.List(one) if isinstance(rows[0][column], list) else one)


@pytest.mark.parametrize(
    ("name", "place"),
    [("pope", "pope/test"), ("seed_bench", "seed_bench/test"), ("docvqa", "docvqa/DocVQA/validation")],
)
def test_saved_datasets_and_parquet_files_give_the_same_questions(name: str, place: str, tmp_path: Path) -> None:
    row, expected = benchmarks()[name], items_of(name)
    dataset = as_datasets(name, place, "image")
    folder = tmp_path / "saved" / row.place / row.subset
    dataset.save_to_disk(str(folder))
    splits = tmp_path / "splits" / row.place
    type(dataset).to_parquet(dataset, tmp_path / f"{row.split}-00000-of-00001.parquet")
    (tmp_path / "files" / row.place / "data").mkdir(parents=True)
    shutil.move(tmp_path / f"{row.split}-00000-of-00001.parquet", tmp_path / "files" / row.place / "data")
    import datasets

    datasets.DatasetDict({row.split: dataset, "other": dataset.select([0])}).save_to_disk(str(splits))
    for root in ("saved", "splits", "files"):
        asked = read_questions(row, tmp_path / root)
        assert sorted(asked.items, key=lambda item: item["key"]) == expected, root
        item = asked.items[-1]
        mine = read_questions(row, "fixtures")
        assert [p.tobytes() for p in asked.pictures(item)] == [p.tobytes() for p in mine.pictures(item)]


def copied(tmp_path: Path, place: str) -> Path:
    """The fixtures with one benchmark's folder to change."""
    shutil.copytree(make_fixtures.FIXTURES / "pictures", tmp_path / "pictures")
    shutil.copytree(make_fixtures.FIXTURES / place, tmp_path / place)
    return tmp_path


def test_a_missing_folder_split_column_picture_or_value_is_named(tmp_path: Path) -> None:
    root = copied(tmp_path, "pope")
    with pytest.raises(QuestionsError, match=r"has no folder gqa for GQA \(lmms-lab/GQA\)"):
        read_questions(benchmarks()["gqa"], root)
    path = root / "pope" / "test.jsonl"
    whole = path.read_text()
    for change, says in (
        ('"question": "Is', "has no column question"),
        ('"answer": "yes"', "row 0: not in the schema.*gold answer 'maybe'"),
    ):
        to = change.replace("question", "asked") if "question" in change else '"answer": "maybe"'
        path.write_text(whole.replace(change, to))
        with pytest.raises(QuestionsError, match=says):
            read_questions(benchmarks()["pope"], root)
    path.write_text(whole + "{")
    with pytest.raises(QuestionsError, match=r"test\.jsonl, line 7: not valid JSON"):
        read_questions(benchmarks()["pope"], root)
    path.write_text(whole)
    (root / "pictures" / "tower.png").unlink()
    asked = read_questions(benchmarks()["pope"], root)
    with pytest.raises(QuestionsError, match="row 2, column image.*no such file"):
        asked.pictures(next(item for item in asked.items if item["row"] == 2))
    path.rename(path.with_name("train.jsonl"))
    with pytest.raises(QuestionsError, match=r"has no split test.*it has train\.jsonl"):
        read_questions(benchmarks()["pope"], root)


def test_a_dataset_that_the_hub_does_not_give_names_the_ways_out(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def refuse(name: str, subset: str | None, split: str) -> None:
        raise ConnectionError(f"no route to {name} {subset} {split}\nat length")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(QuestionsError, match=r"lmms-lab/MMBench \(en\), split dev: no route.* en dev; copy it"):
        read_questions(benchmarks()["mmbench_en"], "hub")
    with pytest.raises(QuestionsError, match=r"someone/copy, split test: no route"):
        read_questions(benchmarks()["pope"], "someone/copy")


# ------------------------------------------------------------------------------------------------------------- asking


class Pupil:
    """Answers as a table says, and remembers what it was asked."""

    def __init__(self, answers: dict[str, str] | None = None, longest: int = 10_000, most: int = 9) -> None:
        self.answers, self.longest, self.most = answers or {}, longest, most
        self.batches: list[list[str]] = []
        self.contents: list[tuple[str | int, ...]] = []

    def text(self, images: list[list[Image]], prompts: list[str], max_new_tokens: int) -> list[str]:
        """One answer each: the one whose key stands in the prompt."""
        for shown, prompt in zip(images, prompts, strict=True):
            if len(prompt) > self.longest or len(shown) > self.most:
                raise PromptError(f"{len(prompt)} characters and {len(shown)} pictures are too many")
        self.batches.append(prompts)
        return [next((a for key, a in self.answers.items() if key in prompt), "") for prompt in prompts]

    def answer(
        self, conversations: list[tuple[Turn, ...]], images: list[tuple[Image, ...]], max_new_tokens: int
    ) -> list[str]:
        """The same for prompts with pictures inside."""
        self.contents += [turns[0].content for turns in conversations]
        texts = ["".join(p for p in turns[0].content if isinstance(p, str)) for turns in conversations]
        return self.text([list(shown) for shown in images], texts, max_new_tokens)


def run_one(pupil: Any, name: str, model: Path, folder: Path, **how: Any) -> dict[str, Any]:
    """The result of one benchmark over the fixtures."""
    found = evaluate(pupil, name, model=model, folder=folder, **how)
    row: dict[str, Any] = found["rows"][name]
    return row


POPE = {"circle": "Yes.", "square": "yes", "star": "no", "boat": "yes", "cat": "perhaps"}


def test_scores_with_strict_and_lenient_reading(nano_folder: Path, tmp_path: Path) -> None:
    found = run_one(Pupil(POPE), "pope", nano_folder, tmp_path)
    # Strict: 2 hits (the squares), "Yes." unread, 1 false alarm (boat): 4 / (4 + 1 + 1). Lenient: 3 hits: 6 / (6 + 1).
    assert (found["strict"], found["lenient"]) == (round(100 * 4 / 6, 4), round(100 * 6 / 7, 4))
    assert found["score"] == found["strict"] and found["low"] <= found["score"] <= found["high"]
    assert (found["unparsed"], found["unparsed_lenient"], found["n"]) == (2, 1, 6)
    assert [one["answer"] for one in found["unparsed_first"]] == ["perhaps", "Yes."]
    # POPE's own code reads "Yes." and "perhaps" as yes: 3 hits, 2 false alarms.
    assert found["details"]["score_official"] == 75 and found["details"]["yes_ratio"] == 50
    assert found["baseline"] == round(100 * 2 / 3, 4) and found["why"] == "made-up questions, not the benchmark"
    assert found["task"] == "understanding/pope" and found["run"] == RunFolder.load(tmp_path / "pope").hash


def test_a_run_keeps_what_was_sent_and_said_and_scores_again_from_it(nano_folder: Path, tmp_path: Path) -> None:
    pupil = Pupil(POPE)
    found = run_one(pupil, "pope", nano_folder, tmp_path)
    run = RunFolder.load(tmp_path / "pope")
    assert [item["prompt"] for item in run.items] == [prompt for batch in pupil.batches for prompt in batch]
    settings = run.manifest.settings
    assert settings["row"] == benchmarks()["pope"].hash and read_row(settings["benchmark"]) == benchmarks()["pope"]
    assert all(len(row["pictures"]) == 1 for row in run.rows("answers"))
    (tmp_path / "pope" / "scores.json").unlink()
    assert rescore(tmp_path / "pope") == {**found, "folder": str(tmp_path / "pope")}
    assert run_one(Pupil({}), "pope", nano_folder, tmp_path) == found  # answers that are there are not asked again
    with pytest.raises(RunError, match="limit"):
        run_one(Pupil(POPE), "pope", nano_folder, tmp_path, limit=2)


def test_a_benchmark_is_an_evaluation_with_a_typed_score(nano_folder: Path, tmp_path: Path) -> None:
    one = understanding.Understanding(Pupil(POPE), benchmarks()["pope"], limit=4, batch_size=3)
    assert (one.task, one.stages, one.batch_size, one.device) == ("understanding/pope", ("answers",), 3, "cpu")
    found = one.run(nano_folder, tmp_path / "pope")
    assert found["folder"] == str(tmp_path / "pope") and found["seconds"] >= 0 and "4 of 6 units asked" in found["why"]
    score = one.score(RunFolder.load(tmp_path / "pope"))
    assert isinstance(score, understanding.BenchmarkScore) and score.name == "understanding/pope" and score.n == 4
    assert all(found[key] == value for key, value in score.row().items())
    assert score.score is not None and found["score"] == round(score.score, 4)
    with pytest.raises(QuestionsError, match="has no folder pope"):
        understanding.Understanding(Pupil(), benchmarks()["pope"], tmp_path / "none")


def test_an_interrupted_run_goes_on_with_the_same_batches(nano_folder: Path, tmp_path: Path) -> None:
    whole = Pupil(POPE)
    expected = run_one(whole, "pope", nano_folder, tmp_path / "a", batch_size=2)
    assert [len(batch) for batch in whole.batches] == [2, 2, 2]

    class Stopped(Pupil):
        def text(self, images: list[list[Image]], prompts: list[str], max_new_tokens: int) -> list[str]:
            if self.batches:
                raise KeyboardInterrupt
            return super().text(images, prompts, max_new_tokens)

    with pytest.raises(KeyboardInterrupt):
        run_one(Stopped(POPE), "pope", nano_folder, tmp_path / "b", batch_size=2)
    with pytest.raises(RunError, match=r"rows of answers\.jsonl are missing"):
        rescore(tmp_path / "b" / "pope")
    rest = Pupil(POPE)
    assert run_one(rest, "pope", nano_folder, tmp_path / "b", batch_size=2) == expected
    assert rest.batches == whole.batches[1:]


def test_pictures_stand_where_the_text_names_them(nano_folder: Path, tmp_path: Path) -> None:
    pupil = Pupil(
        {"what changed": "B", "equal shapes": "(A) or (B)", "Solve": "x = 2", "cups": "two", "drawn in": "hm"}
    )
    found = run_one(pupil, "mmmu", nano_folder, tmp_path)
    both = next(content for content in pupil.contents if content.count(0) and 1 in content and content[0] == 0)
    assert both[:3] == (0, " and ", 1) and str(both[3]).startswith(": what changed?\nA. the colours")
    options = next(content for content in pupil.contents if str(content[0]).startswith("Which picture shows"))
    assert options[1:4] == (0, "\nB. ", 1)
    # 3 of 5: "two" is no 2 to this rule, and "hm" is unread: of three options, a guess would be right in a third.
    assert found["strict"] == 60 and found["unparsed"] == 1
    assert found["details"] == {"guesses": 1, "score_with_guesses": round(100 * (3 + 1 / 3) / 5, 4)}


def test_questions_that_the_model_refuses_are_said_and_counted(nano_folder: Path, tmp_path: Path) -> None:
    longest = sorted(len(item["prompt"]) for item in items_of("pope"))[2]
    long = run_one(Pupil(POPE, longest=longest), "pope", nano_folder, tmp_path)
    refused = [row for row in RunFolder.load(tmp_path / "pope").rows("answers") if row["answer"] is None]
    assert long["refused"] == len(refused) == 3 and f"{longest + 2} characters" in refused[0]["refused"]
    assert f"3 of 6 questions refused and counted as wrong, first: {longest + 2}" in long["why"]
    few = run_one(Pupil({"": "B"}, most=1), "mmmu", nano_folder, tmp_path)
    assert few["refused"] == 2 and "2 pictures are too many" in few["why"]


def test_a_set_that_is_missing_does_not_stop_the_others(nano_folder: Path, tmp_path: Path) -> None:
    root = copied(tmp_path / "data", "pope")
    found = evaluate(Pupil(POPE), ["gqa", "pope"], model=nano_folder, data=root, folder=tmp_path)
    assert found["rows"]["gqa"]["score"] is None and "has no folder gqa" in found["rows"]["gqa"]["why"]
    assert found["rows"]["pope"]["score"] is not None and found["rows"]["pope"]["why"] == "" and found["not_run"] == 1
    by_name = {"pope": root, "gqa": "fixtures"}
    found = evaluate(Pupil(), ["gqa", "pope"], model=nano_folder, data=by_name, folder=tmp_path / "b")
    assert found["not_run"] == 0 and found["data"] == {"pope": str(root), "gqa": "fixtures"}


def golden(row: Benchmark) -> Pupil:
    """Answers everything as the gold says."""
    items = read_questions(row, "fixtures").items

    class Golden(Pupil):
        def text(self, images: list[list[Image]], prompts: list[str], max_new_tokens: int) -> list[str]:
            return [self._said(prompt) for prompt in prompts]

        def answer(
            self, conversations: Sequence[tuple[Turn, ...]], images: Sequence[tuple[Image, ...]], max_new_tokens: int
        ) -> list[str]:
            marked = [
                "".join(p if isinstance(p, str) else f"<image {p + 1}>" for p in t[0].content) for t in conversations
            ]
            return self.text([], marked, max_new_tokens)

        @staticmethod
        def _said(prompt: str) -> str:
            told = next(item for item in items if item["prompt"] == prompt)
            gold = told["gold"]
            return str(
                max(gold, key=gold.count) if isinstance(gold, list) else gold.strip("[]").split(",")[0].strip("'")
            )

    return Golden()


@pytest.mark.parametrize("name", [name for name in benchmarks() if name not in JUDGED | {"mmvp", "hallusion"}])
def test_the_right_answers_get_the_best_score(name: str, nano_folder: Path, tmp_path: Path) -> None:
    found = run_one(golden(benchmarks()[name]), name, nano_folder, tmp_path)
    soft = name in ("vqav2", "textvqa", "vizwiz")  # people disagree
    assert found["strict"] == pytest.approx(found["maximum"], rel=0.12 if soft else 1e-9)
    assert found["lenient"] == pytest.approx(found["maximum"], rel=0.12 if soft else 1e-9)
    assert found["unparsed"] == found["refused"] == 0 and found["baseline"] <= found["strict"]


def test_two_pictures_with_one_prompt_are_two_questions(nano_folder: Path, tmp_path: Path) -> None:
    found = run_one(Pupil({"": "A"}), "mmvp", nano_folder, tmp_path)
    assert found["details"]["each"] == 50 and found["score"] == 0 and (found["n"], found["questions"]) == (5, 10)


def test_all_rows_run_on_a_real_model_or_say_why_not(nano_folder: Path, tmp_path: Path) -> None:
    found = evaluate(Generator.from_pretrained(nano_folder, "cpu"), model=nano_folder, limit=1, folder=tmp_path)
    assert list(found["rows"]) == list(benchmarks()) and found["not_run"] == 4 + 1  # CV-Bench needs three sources
    for name, row in found["rows"].items():
        assert (row["score"] is None) == (name in JUDGED | {"cv_bench"}) and row["why"]
        assert {"strict", "lenient", "n", "unparsed", "low", "high", "baseline"} <= set(row)
    assert "needs a language model as judge" in found["rows"]["mm_vet"]["why"]
    assert "COCO, Omni3D" in found["rows"]["cv_bench"]["why"]
    assert understanding.ANSWERS == "answers" and (tmp_path / "gqa" / "answers.jsonl").is_file()
